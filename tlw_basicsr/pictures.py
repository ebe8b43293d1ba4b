"""Figures of weights: orange above their mean, purple below; magma for errors. The colour-blind can read both."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tlw_basicsr.core.functional import Distance, at_least_fp32, fix_reference, fixed_sum, mix, sample_weights
from tlw_basicsr.core.tlw import NEARLY_CONSTANT
from tlw_basicsr.util.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ERROR, WEIGHT = "magma", "PuOr_r"
ALL = (slice(None), slice(None))


@cache
def pyplot() -> ModuleType:
    """matplotlib's pyplot, which draws without a screen. It takes half a second to import, and few trainings draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def shown(image: Tensor) -> np.ndarray:
    """An image (C, H, W) in [0, 1] as matplotlib takes it: (H, W, 3)."""
    return image.clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()


def levels(a: Tensor, b: Tensor) -> np.ndarray:
    """|a - b| in levels of 255, mean of the channels: (C, H, W) in [0, 1] to (H, W)."""
    return 255 * (a - b).abs().mean(0).cpu().numpy()


def draw_error(axis: "Axes", error: np.ndarray, limit: float) -> Any:
    """An error map in levels of 255, on a scale from 0 to ``limit``."""
    return axis.imshow(error, cmap=ERROR, vmin=0, vmax=max(limit, 1e-6))


def around_mean(w: Tensor) -> tuple[np.ndarray, float]:
    """Weights (C, H, W) less their mean, mean of the channels, and how far most of them are from it.

    That is the 99th percentile of their distance; at least ``NEARLY_CONSTANT``, so that noise is not enlarged.
    """
    deviation = (w.mean(0) - w.mean()).float().cpu().numpy()
    return deviation, max(float(np.percentile(np.abs(deviation), 99)), NEARLY_CONSTANT)


def draw_weights(axis: "Axes", w: Tensor, limit: float | None = None) -> Any:
    """Weights (C, H, W) around their mean, mean of the channels, on a scale from ``-limit`` to ``limit``."""
    deviation, own = around_mean(w)
    limit = limit or own
    return axis.imshow(deviation, cmap=WEIGHT, vmin=-limit, vmax=limit)


def save(figure: "Figure", path: Path, dpi: int = 80) -> None:
    """Write the figure in the format of the name's suffix, make its folder, and close it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=dpi)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: the figure can't be written ({error})") from error
    finally:
        pyplot().close(figure)


def weights_beside(gt: Tensor, sr: Tensor, w: Tensor) -> Tensor:
    """x, x̂ and w (mean of the channels, around k) beside each other, for TensorBoard: (3, H, W), uint8.

    Below them are their names and the colours' bar. ``gt``, ``sr`` and ``w`` are (C, h, w) in [0, 1], each shown
    pixel by pixel; images narrower than 160 pixels are enlarged by a whole factor.
    """
    height, width = gt.shape[-2:]
    factor, dpi, below = -(-160 // width), 100, 56
    figure = pyplot().figure(figsize=(3 * width * factor / dpi, (height * factor + below) / dpi), dpi=dpi)
    total = height * factor + below
    names = ("HR image x", "SR image x̂", f"weights w, white: their mean {w.mean():.2f}")
    for number, (name, image) in enumerate(zip(names, (shown(gt), shown(sr), w), strict=True)):
        axis = figure.add_axes((number / 3, below / total, 1 / 3, height * factor / total))
        drawn = draw_weights(axis, w) if image is w else axis.imshow(image)
        drawn.set_interpolation("nearest")
        axis.set_axis_off()
        figure.text((number + 0.5) / 3, (below - 8) / total, name, ha="center", va="top", fontsize=8)
    bar = figure.add_axes((2 / 3 + 0.04, 20 / total, 1 / 3 - 0.08, 8 / total))
    limit = drawn.norm.vmax
    ticks = figure.colorbar(drawn, cax=bar, orientation="horizontal", ticks=[-limit, 0, limit], extend="both").ax
    ticks.set_xticklabels([f"{w.mean() + value:.2f}" for value in (-limit, 0, limit)])
    bar.tick_params(labelsize=7, length=2, pad=1)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]
    pyplot().close(figure)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def find_probabilities(net_w: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The method of a weighting network that returns the weights before FixedSum of x̂ and x."""
    found = getattr(net_w, "probabilities", None)
    if found is None:
        raise UserError(f"network_w: {type(net_w).__name__} has no method probabilities, the weights before FixedSum")
    return found


@torch.no_grad()
def method_figure(
    net_w: nn.Module,
    k: float,
    distance: Distance,
    sr: Tensor,
    gt: Tensor,
    path: Path,
    title: str = "",
    crop: tuple[slice, slice] = ALL,
) -> dict[str, float]:
    """Write the figure that explains the method on one image: the weights and what the criterion makes of them.

    From top to bottom: x, x̂ and the error; w, the mixture x_w and its error; 1 - w, x_{1-w} and its error; histograms
    of the weights before FixedSum, after it, and of a sample. Above x̂ and the mixtures is their distance from x. Of the
    images, (3, H, W) in [0, 1], the rows and columns ``crop`` are shown; all else sees the whole.

    Returns:
        ``d_sr`` = D(x̂, x), ``d_w`` = D(x_w, x), ``d_1w`` = D(x_{1-w}, x), ``wc`` = d_1w / d_w, ``wc_gain``, how many
        times the WC of the constant map k it is, and w's mean ``k`` and standard deviation ``w_std``.
    """
    sr, gt = sr[None].clamp(0, 1), gt[None]
    z = at_least_fp32(find_probabilities(net_w)(sr, gt))
    w = fixed_sum(z, k)
    x_w, x_1w = mix(sr, gt, w)
    distance = fix_reference(distance, gt)
    d_sr, d_w, d_1w, d_k, d_1k = map(distance, (sr, x_w, x_1w, *mix(sr, gt, torch.full_like(w, k))))
    wc = d_1w / d_w
    results = {"d_sr": d_sr, "d_w": d_w, "d_1w": d_1w, "wc": wc, "wc_gain": wc / (d_1k / d_k), "k": w.mean()}
    values = {name: result.item() for name, result in results.items()} | {"w_std": w.std().item()}

    part = (..., *crop)
    sr_title = rf"SR image $\hat{{x}}$:  $D(\hat{{x}}, x)$ = {values['d_sr']:.4f}"
    w_title = rf"$x_w = w\,x + (1 - w)\,\hat{{x}}$:  $D(x_w, x)$ = {values['d_w']:.4f}"
    rest_title = rf"$x_{{1-w}} = (1 - w)\,x + w\,\hat{{x}}$:  $D(x_{{1-w}}, x)$ = {values['d_1w']:.4f}"
    mean_title = f"weights $w$; white: their mean $k$ = {values['k']:.2f}"
    rows = (
        (gt, sr, "HR image $x$", sr_title, r"error $|\hat{x} - x|$"),
        (w, x_w, mean_title, w_title, r"error $|x_w - x| = (1 - w)\,|\hat{x} - x|$"),
        (1 - w, x_1w, "$1 - w$; white: $1 - k$", rest_title, r"error $|x_{1-w} - x| = w\,|\hat{x} - x|$"),
    )
    limit = float(np.percentile(levels(sr[part][0], gt[part][0]), 99))
    height, width = gt[part].shape[-2:]
    cell = 3.5 * min(height / width, 1.3)  # inches
    figure, axes = pyplot().subplots(
        4, 3, figsize=(14.5, 3 * (cell + 0.3) + 3.6), height_ratios=[cell] * 3 + [2.2], layout="constrained"
    )
    criterion = r"$WC = D(x_{1-w}, x)\;/\;D(x_w, x)$"
    criterion += f" = {values['wc']:.2f}, {values['wc_gain']:.2f} times that of w = k"
    if values["w_std"] < NEARLY_CONSTANT:
        criterion += "; the weights are nearly constant"
    figure.suptitle(f"{title}\n{criterion}".lstrip(), fontsize=15)
    for of_row, (left, mixture, *names) in zip(axes, rows, strict=False):
        for axis, name in zip(of_row, names, strict=True):
            axis.set_axis_off()
            axis.set_title(name, fontsize=12)
        drawn = of_row[0].imshow(shown(left[part][0])) if left is gt else draw_weights(of_row[0], left[part][0])
        of_row[1].imshow(shown(mixture[part][0]))
        errors = draw_error(of_row[2], levels(mixture[part][0], gt[part][0]), limit)
    of_weights, of_errors = "difference from the mean (mean of RGB)", "error, levels of 255 (mean of RGB)"
    figure.colorbar(drawn, ax=axes[:3, 0], label=of_weights, location="left", extend="both", shrink=0.6)
    figure.colorbar(errors, ax=axes[:3, 2], label=of_errors, location="right", extend="max", shrink=0.6)
    histograms = {
        "network's output, before FixedSum": z,
        "weights $w$, after FixedSum": w,
        "a sample of $w$ (relaxed Bernoulli)": sample_weights(w, 1),
    }
    colour = pyplot().colormaps[WEIGHT](0.1)
    for axis, (name, values_of) in zip(axes[3], histograms.items(), strict=True):
        flat = values_of.flatten().float().cpu().numpy()
        axis.hist(flat, bins=50, range=(0, 1), weights=np.full(flat.shape, 100 / flat.size), color=colour)
        axis.axvline(flat.mean(), color="black", linestyle="--", label=f"mean {flat.mean():.2f}")
        axis.set(xlim=(0, 1), title=name, xlabel="weight", ylabel="share of the values (%)")
        axis.legend()
    save(figure, path)
    return values


class Frame(NamedTuple):
    """One moment of a training: iteration, k, x̂ and w (3, H, W)."""

    iteration: int
    k: float
    sr: Tensor
    w: Tensor


def strip_figure(gt: Tensor, frames: Sequence[Frame], path: Path, title: str = "") -> None:
    """Write a strip of a training: x and, over time, the errors |x̂ - x| in the upper row, the weights in the lower.

    The errors share a scale; the weights of each moment have their own, around k.
    """
    errors = [levels(frame.sr.clamp(0, 1), gt) for frame in frames]
    limit = float(np.percentile(errors[-1], 99))
    cell = 2.8 * min(gt.shape[1] / gt.shape[2], 1.5)
    figure, axes = pyplot().subplots(
        2, len(frames) + 1, figsize=(2.8 * (len(frames) + 1) + 1, 2 * (cell + 0.3) + 0.6), layout="constrained"
    )
    figure.suptitle(title, fontsize=14)
    for axis in axes.ravel():
        axis.set_axis_off()
    axes[0, 0].imshow(shown(gt))
    axes[0, 0].set_title("HR image $x$")
    furthest = 0.0
    for column, (frame, error) in enumerate(zip(frames, errors, strict=True), 1):
        error_map = draw_error(axes[0, column], error, limit)
        axes[0, column].set_title(f"iteration {frame.iteration:,}")
        weights = draw_weights(axes[1, column], frame.w)
        furthest = weights.norm.vmax
        axes[1, column].set_title(f"$k$ = {frame.k:.2f}, scale ± {furthest:.2f}")
    figure.colorbar(error_map, ax=axes[0], label=r"$|\hat{x} - x|$, levels of 255", extend="max", location="right")
    bar = {"label": "weight $w$", "extend": "both", "location": "right", "ticks": [-furthest, 0, furthest]}
    figure.colorbar(weights, ax=axes[1], **bar).set_ticklabels(["$k$ − scale", "$k$", "$k$ + scale"])
    save(figure, path)


def spread_figure(
    rows: Sequence[str],
    panels: Sequence[tuple[str, str, Sequence[Sequence[float]]]],
    path: Path,
    title: str,
    across: int,
    zero: bool = False,
) -> None:
    """Write a figure of values over seeds or images: a panel for each measured value, a line for each of ``rows``.

    A panel is its heading, the label of its axis with the unit, and the values of every row; ``across`` stand side by
    side. Every seed is a ring, their mean a dot, with a bar of one sample standard deviation to each side. ``zero``
    draws a line at 0, where the values are differences.
    """
    down = -(-len(panels) // across)
    size = (1.5 + 3.4 * across, 0.8 + down * (0.9 + 0.3 * len(rows)))
    figure, axes = pyplot().subplots(down, across, figsize=size, sharey=True, squeeze=False, layout="constrained")
    # as wide as the title at least
    needed = figure.suptitle(title).get_window_extent().width / figure.dpi + 0.4
    figure.set_figwidth(max(size[0], needed))
    positions = np.arange(len(rows))
    for axis, (heading, label, values) in zip(axes.ravel(), panels, strict=False):
        for position, seeds in zip(positions, values, strict=True):
            spread = float(np.std(seeds, ddof=1)) if len(seeds) > 1 else 0.0
            if not len(seeds):
                continue
            axis.plot(seeds, [position] * len(seeds), "o", mfc="none", mec="0.45", ms=5)
            axis.errorbar(np.mean(seeds), position, xerr=spread, fmt="o", color="#0072b2", ms=6, capsize=4, lw=1.8)
        axis.set_title(heading, fontsize=10)
        axis.set_xlabel(label)
        if zero:
            axis.axvline(0, color="0.3", lw=1)
        axis.grid(axis="x", color="0.9")
        axis.set_axisbelow(True)
        axis.margins(x=0.12)
        axis.locator_params(axis="x", nbins=5)  # more labels would touch
    for axis in axes[:, 0]:
        axis.set_yticks(positions, rows)
    axes[0, 0].set_ylim(len(rows) - 0.5, -0.5)
    for axis in axes.ravel()[len(panels) :]:
        axis.set_visible(False)
    save(figure, path)
