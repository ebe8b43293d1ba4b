"""The paper's metrics: Y-PSNR by its protocol, LPIPS, L1 and MSE; and those of piq for the validation.

``psnr_y``, ``l1``, ``mse`` and ``lpips`` take RGB tensors (N, 3, H, W), clamped to [0, 1] first, and give one value per
image, (N,). The registered ``tlw_*`` take two images as BasicSR's validation hands them to its metrics, BGR, (H, W, 3),
levels of 255, of 8 bits or any float type, and give a number.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal

import numpy as np
import piq
import torch
from basicsr.utils.registry import METRIC_REGISTRY
from torch import Tensor

from tlw_basicsr.core.distances import LPIPSDistance, MissingWeights
from tlw_basicsr.util.errors import UserError, first_line

LUMA = (0.299, 0.587, 0.114)
LOWER_IS_BETTER = ("calculate_niqe", "dists", "gmsd", "mdsi", "tlw_l1", "tlw_lpips", "tlw_mse")
HIGHER_IS_BETTER = ("calculate_psnr", "calculate_ssim", "fsim", "haarpsi", "tlw_psnr_y", "vif", "vsi")


def y_channel(image: Tensor) -> Tensor:
    """Y = 16 + 219·(0.299 R + 0.587 G + 0.114 B) of RGB in [0, 1]: (N, 3, H, W) to (N, H, W), levels of 255."""
    r, g, b = image.double().clamp(0, 1).unbind(dim=-3)
    return 16 + 219 * (LUMA[0] * r + LUMA[1] * g + LUMA[2] * b)


def psnr(error: Tensor, peak: float) -> Tensor:
    """10·log10(peak² / mean error²) of every image, dB: (N, …) to (N,); infinite where there is no error."""
    return 10 * torch.log10(peak**2 / error.double().square().flatten(1).mean(dim=1))


def psnr_y(sr: Tensor, gt: Tensor) -> Tensor:
    """Y-PSNR in dB, of float images: nothing is rounded, no border is removed (the paper's protocol)."""
    return psnr(y_channel(sr) - y_channel(gt), 255)


def l1(sr: Tensor, gt: Tensor) -> Tensor:
    """Mean absolute error of RGB in [0, 1]."""
    return (sr.double().clamp(0, 1) - gt.double().clamp(0, 1)).abs().flatten(1).mean(dim=1)


def mse(sr: Tensor, gt: Tensor) -> Tensor:
    """Mean squared error of RGB in [0, 1]."""
    return (sr.double().clamp(0, 1) - gt.double().clamp(0, 1)).square().flatten(1).mean(dim=1)


@cache
def lpips_model(net: Any, weights: str | None = None) -> LPIPSDistance:
    """LPIPS with its linear heads, built once in a process, on the GPU if there is one."""
    try:
        model = LPIPSDistance(net=net, linear=True, weights=weights)
    except MissingWeights as error:
        raise UserError(error.advise("LPIPS", "do without it")) from error
    except ValueError as error:
        raise UserError(str(error).replace("LPIPSDistance", "LPIPS", 1)) from error
    return model.cuda() if torch.cuda.is_available() else model


@torch.no_grad()
def lpips(sr: Tensor, gt: Tensor, net: str = "vgg", weights: str | None = None) -> Tensor:
    """LPIPS (Zhang et al., CVPR 2018, version 0.1) of RGB in [0, 1]; see :class:`tlw_basicsr.LPIPSDistance`."""
    model = lpips_model(net, weights)
    device = model.shift.device
    return model(sr.clamp(0, 1).float().to(device), gt.clamp(0, 1).float().to(device)).cpu()


def _rgb(image: np.ndarray) -> Tensor:
    """BGR (H, W, 3) of levels of 255 to RGB (1, 3, H, W) in [0, 1]."""
    channels_first = np.ascontiguousarray(image[..., ::-1].transpose(2, 0, 1))
    return torch.from_numpy(channels_first)[None].double() / 255


def find_direction(metric: Mapping[str, Any]) -> str | None:
    """Return whether ``lower`` or ``higher`` values of a metric of ``val.metrics`` are better; None where unknown."""
    name = metric.get("name") if metric["type"] == "tlw_piq" else metric["type"]
    return "lower" if name in LOWER_IS_BETTER else "higher" if name in HIGHER_IS_BETTER else None


@METRIC_REGISTRY.register()
def tlw_psnr_y(img: np.ndarray, img2: np.ndarray, **_: Any) -> float:
    """:func:`psnr_y`, dB."""
    return float(psnr_y(_rgb(img), _rgb(img2)))


@METRIC_REGISTRY.register()
def tlw_l1(img: np.ndarray, img2: np.ndarray, **_: Any) -> float:
    """:func:`l1`; lower is better."""
    return float(l1(_rgb(img), _rgb(img2)))


@METRIC_REGISTRY.register()
def tlw_mse(img: np.ndarray, img2: np.ndarray, **_: Any) -> float:
    """:func:`mse`; lower is better."""
    return float(mse(_rgb(img), _rgb(img2)))


@METRIC_REGISTRY.register()
def tlw_lpips(
    img: np.ndarray, img2: np.ndarray, net: Literal["vgg", "alex"] = "vgg", weights: str | None = None, **_: Any
) -> float:
    """:func:`lpips`; lower is better."""
    return float(lpips(_rgb(img), _rgb(img2), net, weights))


@cache
def piq_metric(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A full-reference metric of piq; DISTS downloads its weights when it is first asked for."""
    if name != "dists":
        return getattr(piq, {"vif": "vif_p"}.get(name, name))
    try:
        return piq.DISTS()
    except Exception as error:  # of the download
        raise UserError(f"tlw_piq: the weights of DISTS could not be loaded ({first_line(error)})") from error


@METRIC_REGISTRY.register()
@torch.no_grad()
def tlw_piq(
    img: np.ndarray,
    img2: np.ndarray,
    name: Literal["dists", "fsim", "gmsd", "haarpsi", "mdsi", "vif", "vsi"],
    **_: Any,
) -> float:
    """A full-reference metric of the package piq, of RGB; of ``dists``, ``gmsd`` and ``mdsi`` lower is better."""
    return float(piq_metric(name)(_rgb(img).float(), _rgb(img2).float()))
