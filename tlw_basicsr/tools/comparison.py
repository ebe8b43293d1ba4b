"""A page that compares the SR images of several results: one HTML file that needs no server and no network."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from tlw_basicsr.core.functional import Distance, fix_reference
from tlw_basicsr.data.bicubic import to_8_bits
from tlw_basicsr.pictures import ERROR, WEIGHT, around_mean
from tlw_basicsr.tools.evaluation import FIELD, METRICS, Source, make_sr, means, measure, pairs
from tlw_basicsr.tools.experiment import Trained, build_distance, load_weighting
from tlw_basicsr.tools.report import Row, csv_text, json_text
from tlw_basicsr.util.files import write_text
from tlw_basicsr.util.kinds import Options

TEMPLATE = Path(__file__).with_name("compare.html")
HR = "HR"
LARGEST = 29_000_000  # bytes of a page
PART = 48  # pixels a side of what the page shows of all results, as in the template
SMALLEST = 64  # pixels a side of a crop
LABELS = {name: (METRICS[name].label, METRICS[name].digits, METRICS[name].higher) for name in FIELD.metrics}
LABELS["d"] = ("D", 4, False)
ABOUT = "PSNR and SSIM of Y, 8-bit images, without a border of the scale."


@dataclass(frozen=True)
class Result:
    """What makes the SR images of one result."""

    label: str  # its name on the page
    source: Source
    weigh: Callable[[Tensor, Tensor], Tensor] | None = None  # SR and HR image to the weights (1, 3, H, W)
    about: str = ""  # what the page says of it


def of_network(label: str, trained: Trained, opt: Options, device: str = "auto", scale: int | None = None) -> Result:
    """A network as a result, with its weighting network if that lies beside it."""
    upscale = trained.upscaler(device, scale, label)
    weigh = load_weighting(opt, trained.path.parent)
    return Result(trained.named(label), upscale, weigh, f" {label}: {trained}.")


def compare(results: Sequence[Result], gt_folder: Path, scale: int, path: Path, distance: Options | None) -> int:
    """Write the page of the results on a folder of HR images, with D by its options; returns the number of images."""
    built = build_distance(distance, "--distance") if distance else None
    shots = shoot(results, gt_folder, scale, built)
    about = ABOUT
    if distance:
        about += f" D: {yaml.safe_dump(distance, default_flow_style=True, width=1000).strip()}."
    write_page(path, shots, f"{gt_folder.name} ×{scale}", about + "".join(result.about for result in results))
    return len(shots)


@dataclass
class Shot:
    """One HR image with all results: arrays (H, W, 3) of 8 bits, weights around their mean, values of the metrics."""

    name: str
    images: dict[str, np.ndarray]
    weights: dict[str, tuple[np.ndarray, float]] = field(default_factory=dict)
    rows: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def spread(self) -> np.ndarray:
        """How much the results differ at each pixel, (H, W); with one result, how much it differs from HR."""
        results = [image for label, image in self.images.items() if label != HR]
        several = results if len(results) > 1 else list(self.images.values())
        return np.std(np.stack(several).astype(np.float32), axis=0).mean(axis=2)


@torch.no_grad()
def shoot(results: Sequence[Result], gt_folder: Path, scale: int, distance: Distance | None = None) -> list[Shot]:
    """Make and measure the SR images of a folder of HR images, by the field's protocol.

    Args:
        results: the results, in the order of the page.
        gt_folder: folder of the HR images; they are cut to a multiple of the scale.
        scale: scale of the super-resolution.
        distance: D, which gets the 8-bit images in [0, 1].

    Raises:
        UserError: a folder or an image is wrong, or a network fails.
    """
    shots = []
    for pair in tqdm(pairs(gt_folder, scale, FIELD, metrics=FIELD.metrics), unit="image", disable=None):
        shot = Shot(pair.name, {HR: to_rgb(pair.gt)})
        for result in results:
            sr = FIELD.finish(make_sr(result.source, pair, result.label))
            shot.images[result.label] = to_rgb(sr)
            shot.rows[result.label] = measure(sr, pair, FIELD.metrics)
            if distance is not None:
                shot.rows[result.label]["d"] = fix_reference(distance, pair.gt)(sr).item()
            if result.weigh:
                shot.weights[result.label] = around_mean(result.weigh(sr, pair.gt)[0])
        shots.append(shot)
    return shots


def to_rgb(image: Tensor) -> np.ndarray:
    """(1, 3, H, W) in [0, 1] to (H, W, 3) of 8 bits."""
    return np.ascontiguousarray(to_8_bits(image[0].permute(1, 2, 0).numpy() * 255))


def most_different(spread: np.ndarray, side: int) -> tuple[int, int]:
    """Top and left of the square of this side, or less where the image is smaller, that has most of ``spread``."""
    height, width = (min(side, length) for length in spread.shape)
    sums = cv2.boxFilter(spread, -1, (width, height), anchor=(0, 0), normalize=False, borderType=cv2.BORDER_CONSTANT)
    inside = sums[: spread.shape[0] - height + 1, : spread.shape[1] - width + 1]
    top, left = np.unravel_index(int(inside.argmax()), inside.shape)
    return int(top), int(left)


def data_url(image: np.ndarray) -> str:
    """An image of 8 bits as the URL of a lossless WebP."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", lossless=True, quality=50, method=2)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def describe_shot(shot: Shot, side: int | None) -> dict[str, Any]:
    """What the page holds of one image: the whole of it, or a crop of ``side`` pixels where the results differ most."""
    height, width = shot.images[HR].shape[:2]
    spread = shot.spread
    top, left = (0, 0) if side is None else most_different(spread, side)
    place = (slice(top, top + (side or height)), slice(left, left + (side or width)))
    part_top, part_left = most_different(spread[place], PART)
    limit = max((own for _, own in shot.weights.values()), default=1.0)
    weights = {label: to_8_bits(255 * (w[place] / limit + 1) / 2) for label, (w, _) in shot.weights.items()}
    return {
        "name": shot.name,
        "left": left,
        "top": top,
        "height": spread[place].shape[0],
        "width": spread[place].shape[1],
        "whole": spread[place].shape == spread.shape,
        "part": [part_left, part_top],
        "images": {label: data_url(image[place]) for label, image in shot.images.items()},
        "weights": {label: data_url(image) for label, image in weights.items()},
        "weight_limit": limit,
        "rows": shot.rows,
    }


def write_page(path: Path, shots: Sequence[Shot], title: str, about: str = "", largest: int = LARGEST) -> None:
    """Write the page and, beside it, its numbers as CSV: a line for each image and result, then the means.

    Images are whole if all of them fit into ``largest`` bytes; otherwise the page holds crops where the results differ
    most.

    Raises:
        UserError: a file can't be written.
    """
    rows: list[Row] = [
        {"image": shot.name, "result": label, **values} for shot in shots for label, values in shot.rows.items()
    ]
    averages = means(rows, "result")
    metrics = {name: LABELS[name] for name in next(iter(averages.values()))}
    data: dict[str, Any] = {
        "title": title,
        "about": about,
        "hr": HR,
        "labels": [label for label in shots[0].images if label != HR] + [HR],
        "metrics": {key: dict(zip(("name", "digits", "higher"), label, strict=True)) for key, label in metrics.items()},
        "means": averages,
        "magma": list_colours(ERROR),
        "purple_orange": list_colours(WEIGHT),
    }
    sides = [side for shot in shots for side in shot.images[HR].shape[:2]]
    side: int | None = None
    while True:
        data["images"] = [describe_shot(shot, side) for shot in shots]
        text = json_text(data, indent=None).replace("<", "\\u003c")  # no name ends the script that holds it
        size = len(text.encode())
        if size <= largest or (side or max(sides)) <= SMALLEST:
            break
        side = max(SMALLEST, int(0.9 * (side or max(sides)) * (largest / size) ** 0.5))
    write_text(TEMPLATE.read_text("utf-8").replace("/*DATA*/", text), path)
    rows += [{"image": "mean", "result": label, **values} for label, values in averages.items()]
    write_text(csv_text(rows), path.with_suffix(".csv"))


def list_colours(table: str) -> list[int]:
    """A colour table of 256 as red, green and blue of 8 bits, one after the other."""
    return [int(v) for v in (255 * matplotlib.colormaps[table](np.linspace(0, 1, 256))[:, :3]).round().ravel()]
