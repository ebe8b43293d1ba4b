"""What weightings do, in numbers over a set of images."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tlw_basicsr.core import functional
from tlw_basicsr.core.functional import Distance
from tlw_basicsr.core.weightings import Weighting
from tlw_basicsr.pictures import spread_figure
from tlw_basicsr.tools.evaluation import Pair, Upscaler
from tlw_basicsr.tools.report import Row, csv_text, markdown_table
from tlw_basicsr.util.files import write_text

STATISTICS = {
    "error": "correlation with the error",
    "edges": "correlation with the edges",
    "contrast": "contrast",
    "cut": "cut by FixedSum",
    "gain": "gain of the criterion",
}
MapOf = Callable[[Tensor, Tensor], Tensor]  # x̂ and x (N, C, H, W) to z in [0, 1], the weights before FixedSum


def map_of(weighting: Weighting, t: float = 0.0) -> MapOf:
    """The map of a weighting without learning; x̂ is taken for the SR image of the moving average too."""
    further: Callable[[Tensor], dict[str, Tensor]] = lambda sr: dict.fromkeys(weighting.needs, sr)  # noqa: E731
    return lambda sr, gt: functional.relative(weighting.map(sr, gt, t, **further(sr))).expand(gt.shape)


def correlate(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of two images (1, C, H, W), the mean of the channels that vary; NaN if none does."""
    centred = [(image - image.mean((-2, -1), keepdim=True)).flatten(-2) for image in (functional.at_least_fp32(a), b)]
    norms = [torch.linalg.vector_norm(image, dim=-1) for image in centred]
    # what rounding leaves of a constant does not vary
    norms = [
        n.where(n > 1e-5 * torch.linalg.vector_norm(i, dim=(-2, -1)), torch.nan)
        for n, i in zip(norms, (a, b), strict=True)
    ]
    return ((centred[0] * centred[1]).sum(-1) / (norms[0] * norms[1])).nanmean().item()


def describe_map(z: Tensor, sr: Tensor, gt: Tensor, k: float, distance: Distance) -> dict[str, float]:
    """Numbers of the weights w = FixedSum_k(z) of one image; see ``STATISTICS``.

    ``error`` and ``edges`` are Pearson's correlations of w with |x̂ - x| and with the gradient of x; ``contrast`` is the
    standard deviation of w, and ``cut`` the share of z's that FixedSum has taken from it; ``gain`` is how many times
    the weight criterion of the constant map k that of w is.

    Args:
        z: weights in [0, 1] (1, C, H, W), before FixedSum.
        sr: x̂ (1, C, H, W) in [0, 1].
        gt: x, likewise.
        k: mean of the weights.
        distance: D.
    """
    w = functional.fixed_sum(z, k)
    distance = functional.fix_reference(distance, gt)
    losses = [
        functional.weight_criterion_loss(distance, sr, gt, weights, 0.0) for weights in (torch.full_like(w, k), w)
    ]
    slopes = torch.gradient(gt, dim=(-2, -1))
    before, after = (image.std((-2, -1)).mean() for image in (z, w))
    return {
        "error": correlate(w, (sr - gt).abs()),
        "edges": correlate(w, torch.hypot(slopes[0], slopes[1])),
        "contrast": after.item(),
        "cut": (1 - after / before).item() if before > 0 else float("nan"),
        "gain": (losses[0] - losses[1]).exp().item(),
    }


@torch.no_grad()
def describe_set(
    pairs: Iterable[Pair], upscale: Upscaler, maps: Mapping[str, MapOf], k: float, distance: Distance
) -> list[Row]:
    """A row for each image and map: ``image``, ``weights`` and the values of :func:`describe_map`."""
    rows: list[Row] = []
    for pair in pairs:
        sr = upscale(pair.lq).clamp(0, 1)
        for label, map_of_images in maps.items():
            values = describe_map(map_of_images(sr, pair.gt), sr, pair.gt, k, distance)
            rows.append({"image": pair.name, "weights": label, **values})
    return rows


def write_rows(rows: Sequence[Row], path: Path, title: str) -> str:
    """Draw the rows of :func:`describe_set`, write them as CSV beside the figure; return the table of their means."""
    labels = list(dict.fromkeys(row["weights"] for row in rows))
    values = {
        name: [[v for row in rows if row["weights"] == label and np.isfinite(v := row[name])] for label in labels]
        for name in STATISTICS
    }
    panels = [(text, "a ring is an image", values[name]) for name, text in STATISTICS.items()]
    spread_figure(labels, panels, path, title, len(panels))
    write_text(csv_text(rows), path.with_suffix(".csv"))
    cells = [
        [label, *(f"{np.mean(values[name][i]):.3f}" if values[name][i] else "–" for name in STATISTICS)]
        for i, label in enumerate(labels)
    ]
    return "\n".join(markdown_table(["weights", *STATISTICS.values()], cells, 1))
