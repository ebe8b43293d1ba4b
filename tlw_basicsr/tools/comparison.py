"""A page that compares the SR images of several results: one HTML file that needs no server and no network."""

import base64
import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
import torch
from basicsr.utils import FileClient, img2tensor
from PIL import Image
from torch import Tensor

from tlw_basicsr.core.functional import Distance, fix_reference
from tlw_basicsr.data.bicubic import to_8_bits
from tlw_basicsr.data.bicubic_sr_dataset import lq_of_crop
from tlw_basicsr.data.images import SUFFIXES, read_image
from tlw_basicsr.data.listing import list_images, name_images
from tlw_basicsr.pictures import ERROR, WEIGHT
from tlw_basicsr.tools.evaluation import Upscaler, field_row
from tlw_basicsr.util.errors import UserError, first_line
from tlw_basicsr.util.files import write_text

TEMPLATE = Path(__file__).with_name("compare.html")
HR = "HR"
LARGEST = 29_000_000  # bytes of a page
PART = 48  # pixels a side of what the page shows of all results, as in the template
SMALLEST = 64  # pixels a side of a crop
METRICS = {
    "psnr_y": {"name": "PSNR (dB)", "digits": 2, "higher": True},
    "ssim_y": {"name": "SSIM", "digits": 4, "higher": True},
    "d": {"name": "D", "digits": 4, "higher": False},
}


@dataclass(frozen=True)
class Result:
    """What makes the SR images of one result.

    Attributes:
        label: its name on the page.
        upscale: LR (1, 3, H, W) to SR, RGB in [0, 1]; or None for a folder of SR images.
        folder: of the SR images.
        weigh: SR and HR image to the weights (1, 3, H, W), where a weighting network is known.
    """

    label: str
    upscale: Upscaler | None = None
    folder: Path | None = None
    weigh: Callable[[Tensor, Tensor], Tensor] | None = None


@dataclass
class Shot:
    """One HR image with all results: arrays (H, W, 3) of 8 bits, weights (H, W), and the values of the metrics."""

    name: str
    images: dict[str, np.ndarray]
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    rows: dict[str, dict[str, float | None]] = field(default_factory=dict)

    @property
    def spread(self) -> np.ndarray:
        """How much the results differ at each pixel, (H, W); with one result, how much it differs from HR."""
        results = [image for label, image in self.images.items() if label != HR]
        several = results if len(results) > 1 else list(self.images.values())
        return np.std(np.stack(several).astype(np.float32), axis=0).mean(axis=2)


def sr_file(folder: Path, stem: str, scale: int) -> Path:
    """The image of ``folder`` that belongs to an HR image: ``STEM``, ``STEMxSCALE`` or ``STEM_`` and more.

    Raises:
        UserError: there is none, or more than one.
    """
    there = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    for fits in (lambda name: name in (stem, f"{stem}x{scale}"), lambda name: name.startswith(f"{stem}_")):
        found = [path for path in there if fits(path.stem)]
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(f"{folder}: more than one image for {stem}: {found[0].name}, {found[1].name}")
    raise UserError(f"{folder}: no image for {stem}; accepted names are {stem}, {stem}x{scale} and {stem}_…")


@torch.no_grad()
def shoot(results: Sequence[Result], gt_folder: Path, scale: int, distance: Distance | None = None) -> list[Shot]:
    """Make and measure the SR images of a folder of HR images, by the field's protocol.

    Args:
        results: the results, in the order of the page.
        gt_folder: of the HR images; they are cut to a multiple of the scale.
        scale: of the super-resolution.
        distance: D, which gets the 8-bit images in [0, 1].

    Raises:
        UserError: a folder or an image is wrong, or a network fails.
    """
    shots, client = [], FileClient("disk")
    entries = list_images({"dataroot_gt": str(gt_folder), "io_backend": {"type": "disk"}}, what="--gt")
    for name, entry in zip(name_images([entry.path for entry in entries]), entries, strict=True):
        whole = read_image(client, entry.path)
        height, width = (side // scale for side in whole.shape[:2])
        if min(height, width) < 1:
            raise UserError(f"--gt: {entry.path} is too small for scale {scale}")
        gt = np.ascontiguousarray(whole[: height * scale, : width * scale])
        lq = np.ascontiguousarray(lq_of_crop(gt, 0, 0, height, width, scale, True))
        x, y = (image[None] for image in reversed(img2tensor([lq, gt])))
        shot = Shot(name, {HR: rgb(x)})
        for result in results:
            sr = sr_image(result, shot.name, y, x, scale)
            shot.images[result.label] = rgb(sr)
            row: dict[str, float | None] = dict(field_row(sr, x, scale))
            if distance is not None:
                row["d"] = fix_reference(distance, x)(sr).item()
            shot.rows[result.label] = row
            if result.weigh:
                w = result.weigh(sr, x).float().mean(dim=1)[0]
                shot.weights[result.label] = to_8_bits(w.cpu().numpy() * 255)
        shots.append(shot)
    return shots


def sr_image(result: Result, name: str, lq: Tensor, gt: Tensor, scale: int) -> Tensor:
    """The SR image of a result, of 8 bits in [0, 1], cut as HR is."""
    if result.upscale is None:
        assert result.folder is not None
        path = sr_file(result.folder, name, scale)
        image = read_image(FileClient("disk"), str(path))
        sr = img2tensor([np.ascontiguousarray(image[: gt.shape[2], : gt.shape[3]])])[0][None]
        where = str(path)
    else:
        where = f"{result.label}: the SR image of {name}"
        try:
            sr = result.upscale(lq)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{result.label}: the network fails on {name} ({first_line(error)})") from error
    if sr.shape != gt.shape:
        raise UserError(f"{where} is {sr.shape[2]}×{sr.shape[3]}; expected {gt.shape[2]}×{gt.shape[3]}, as HR")
    return torch.from_numpy(to_8_bits(sr.clamp(0, 1).numpy() * 255)) / 255


def rgb(image: Tensor) -> np.ndarray:
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


def entry_of(shot: Shot, side: int | None) -> dict[str, Any]:
    """What the page holds of one image: the whole of it, or a crop of ``side`` pixels where the results differ most."""
    height, width = shot.images[HR].shape[:2]
    spread = shot.spread
    top, left = (0, 0) if side is None else most_different(spread, side)
    place = (slice(top, top + (side or height)), slice(left, left + (side or width)))
    part_top, part_left = most_different(spread[place], PART)
    return {
        "name": shot.name,
        "left": left,
        "top": top,
        "height": spread[place].shape[0],
        "width": spread[place].shape[1],
        "whole": spread[place].shape == spread.shape,
        "part": [part_left, part_top],
        "images": {label: data_url(image[place]) for label, image in shot.images.items()},
        "weights": {label: data_url(image[place]) for label, image in shot.weights.items()},
        "rows": shot.rows,
    }


def means_of(shots: Sequence[Shot]) -> dict[str, dict[str, float]]:
    """Means over the images, of every result and metric."""
    rows = [shot.rows for shot in shots]
    return {
        label: {metric: float(np.mean([row[label][metric] for row in rows])) for metric in rows[0][label]}  # type: ignore[arg-type]
        for label in rows[0]
    }


def write_page(path: Path, shots: Sequence[Shot], title: str, about: str = "", largest: int = LARGEST) -> None:
    """Write the page and, beside it, its numbers as CSV.

    Images are whole if all of them fit into ``largest`` bytes; else crops where the results differ most.

    Raises:
        UserError: a file can't be written.
    """
    table = matplotlib.colormaps
    metrics = {metric: METRICS[metric] for metric in next(iter(shots[0].rows.values()))}
    data: dict[str, Any] = {
        "title": title,
        "about": about,
        "hr": HR,
        "labels": [label for label in shots[0].images if label != HR] + [HR],
        "metrics": metrics,
        "means": means_of(shots),
        "magma": colours(table[ERROR]),
        "viridis": colours(table[WEIGHT]),
    }
    sides = [side for shot in shots for side in shot.images[HR].shape[:2]]
    side: int | None = None
    while True:
        data["images"] = [entry_of(shot, side) for shot in shots]
        text = json.dumps(data, ensure_ascii=False).replace("</", "<\\/")
        size = len(text.encode())
        if size <= largest or (side or max(sides)) <= SMALLEST:
            break
        side = max(SMALLEST, int(0.9 * (side or max(sides)) * (largest / size) ** 0.5))
    write_text(TEMPLATE.read_text("utf-8").replace("/*DATA*/", text), path)
    write_text(csv_of(shots), path.with_suffix(".csv"))


def colours(table: Any) -> list[int]:
    """A colour table of 256 as red, green and blue of 8 bits, one after the other."""
    return [int(v) for v in (255 * table(np.linspace(0, 1, 256))[:, :3]).round().ravel()]


def csv_of(shots: Sequence[Shot]) -> str:
    """A line for each image and result, then the means."""
    text = io.StringIO()
    metrics = list(next(iter(shots[0].rows.values())))
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "result", *metrics])
    for shot in shots:
        writer.writerows([shot.name, label, *row.values()] for label, row in shot.rows.items())
    writer.writerows(["mean", label, *row.values()] for label, row in means_of(shots).items())
    return text.getvalue()
