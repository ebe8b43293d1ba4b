"""Figures of learned weights."""

from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor, nn

from tlw_basicsr.functional import at_least_fp32

matplotlib.use("Agg")
from matplotlib import pyplot as plt


@torch.no_grad()
def weights_figure(net_g: nn.Module, net_w: nn.Module, lq: Tensor, gt: Tensor, path: Path, title: str = "") -> None:
    """Write a figure of one image: HR, SR, the error |x̂ - x| and the weights w beside each other.

    Args:
        net_g: SR network.
        net_w: weighting network, with its ``k`` set.
        lq: LR image (3, H, W), RGB in [0, 1].
        gt: HR image (3, s·H, s·W).
        path: PNG to write.
        title: of the figure.
    """
    sr = net_g(lq[None]).clamp(0, 1)
    w = at_least_fp32(net_w(sr, gt[None]))[0].mean(0).cpu().numpy()
    error = (sr[0].cpu() - gt.cpu()).abs().mean(0).numpy() * 255
    height, width = w.shape
    figure, axes = plt.subplots(2, 2, figsize=(11, 9 * height / width + 1.2), layout="constrained")
    figure.suptitle(title)
    axes = axes.ravel()
    axes[0].imshow(gt.cpu().permute(1, 2, 0).numpy())
    axes[0].set_title("HR image x")
    axes[1].imshow(sr[0].cpu().permute(1, 2, 0).numpy())
    axes[1].set_title("SR image x̂")
    shown = axes[2].imshow(error, cmap="magma", vmin=0, vmax=np.percentile(error, 99))
    axes[2].set_title("error |x̂ − x|, mean of RGB")
    figure.colorbar(shown, ax=axes[2], label="levels of 255", extend="max", orientation="horizontal", shrink=0.7)
    shown = axes[3].imshow(w, cmap="viridis", vmin=0, vmax=1)
    axes[3].set_title(f"weights w, mean of RGB (their mean is k = {w.mean():.2f})")
    figure.colorbar(shown, ax=axes[3], label="weight", orientation="horizontal", shrink=0.7)
    for axis in axes:
        axis.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)
