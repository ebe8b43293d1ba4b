"""Measuring a network on a data set, by the protocol of BasicSR's tables."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from basicsr.metrics import calculate_psnr, calculate_ssim
from basicsr.utils import tensor2img
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from tlw_basicsr.checkpoint import check_fit, network_state
from tlw_basicsr.data.bicubic import imresize, to_8_bits

Upscaler = Callable[[Tensor], Tensor]


def bicubic(scale: int, quantize: bool = True) -> Upscaler:
    """MATLAB's bicubic as an upscaler of RGB images (1, 3, H, W) in [0, 1]; of 8-bit images with ``quantize``."""

    def upscale(lq: Tensor) -> Tensor:
        image = np.ascontiguousarray(lq[0].permute(1, 2, 0).cpu().numpy())
        sr = imresize(to_8_bits(image * 255), scale).astype(np.float32) / 255 if quantize else imresize(image, scale)
        return torch.from_numpy(sr).permute(2, 0, 1)[None]

    return upscale


def load_network(options: dict[str, Any], path: str | Path, param_key: str = "params") -> nn.Module:
    """Build the registered network of ``{type: …, …}`` and load a checkpoint in BasicSR's format, in eval mode.

    Raises:
        UserError: the file is missing, damaged, or of another network.
    """
    arguments = {key: value for key, value in options.items() if key != "type"}
    net = ARCH_REGISTRY.get(options["type"])(**arguments)
    state = network_state(path, param_key, "checkpoint")
    check_fit(state, net, True, path, "checkpoint")
    net.load_state_dict(state)
    return net.eval().requires_grad_(False)


@torch.no_grad()
def field_metrics(upscale: Upscaler, items: Iterable[dict[str, Any]], crop_border: int) -> dict[str, float]:
    """Means over a data set of Y-PSNR (dB) and Y-SSIM of 8-bit images, with a border removed.

    Args:
        upscale: LR (1, 3, H, W) to SR, RGB in [0, 1].
        items: a data set's items, with ``lq`` and ``gt``.
        crop_border: pixels to remove at every border, usually the scale.
    """
    psnr, ssim = [], []
    for item in items:
        sr, gt = tensor2img(upscale(item["lq"][None])), tensor2img(item["gt"])
        psnr.append(calculate_psnr(sr, gt, crop_border, test_y_channel=True))
        ssim.append(calculate_ssim(sr, gt, crop_border, test_y_channel=True))
    return {"psnr_y": float(np.mean(psnr)), "ssim_y": float(np.mean(ssim))}
