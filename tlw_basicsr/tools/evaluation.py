"""How images are measured: pairs of LR and HR images, the metrics, and the protocols of the field and of the paper."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import piq
import torch
from basicsr.metrics import calculate_psnr, calculate_ssim
from basicsr.utils import FileClient, img2tensor, tensor2img
from torch import Tensor
from tqdm import tqdm

from tlw_basicsr.data.bicubic import imresize, to_8_bits
from tlw_basicsr.data.bicubic_sr_dataset import check_sizes, lq_of_crop
from tlw_basicsr.data.images import SUFFIXES, as_floats, is_grey, read_levels
from tlw_basicsr.data.listing import ImageEntry, list_images, name_images, pair_names
from tlw_basicsr.metrics.paper_metrics import l1, lpips, mse, psnr_y
from tlw_basicsr.tools.report import Row
from tlw_basicsr.util.errors import UserError, first_line

Upscaler = Callable[[Tensor], Tensor]  # an LR image (1, 3, h, w) to the SR image, RGB in [0, 1]
BICUBIC = "bicubic"
Source = Upscaler | Path | Literal["bicubic"]  # or a folder of SR images, or MATLAB's bicubic


@dataclass(frozen=True)
class Protocol:
    """How LR images are made of HR images, and how SR images are compared with them."""

    name: str  # 'field' is BasicSR's protocol, 'paper' that of arXiv:2301.10575
    multiple: int  # HR is cut from the top left to a multiple of this and of the scale
    quantize: bool  # LR and SR have 8 bits, and a border of the scale is removed; else SR is clamped to [0, 1]
    metrics: tuple[str, ...]  # what is always measured

    def mod_crop(self, scale: int) -> int:
        """HR is cut to a multiple of this: the scale, or lcm(28, scale), which is 84 at ×3."""
        return math.lcm(self.multiple, scale)

    def finish(self, sr: Tensor) -> Tensor:
        """The SR image in [0, 1] as it is seen and compared."""
        if not self.quantize:
            return sr.clamp(0, 1)
        return torch.from_numpy(to_8_bits(sr.cpu().numpy() * 255)).to(sr.device) / 255


FIELD = Protocol("field", 1, True, ("psnr_y", "ssim_y"))
PAPER = Protocol("paper", 28, False, ("psnr_y", "l1", "mse"))
PROTOCOLS = {protocol.name: protocol for protocol in (FIELD, PAPER)}


@dataclass(frozen=True)
class Pair:
    """An HR image and its LR image."""

    name: str  # different from those of the other images of its folder
    path: str  # of the HR image
    lq: Tensor  # (1, 3, h, w), RGB in [0, 1]
    gt: Tensor  # (1, 3, scale·h, scale·w)
    scale: int
    protocol: Protocol
    grey: bool = False  # whether the grey levels themselves are taken as Y


def pairs(
    folder: str | Path,
    scale: int,
    protocol: Protocol,
    lq_folder: str | Path | None = None,
    metrics: Collection[str] = (),
    grey_as_y: bool = False,
) -> Iterator[Pair]:
    """The pairs of a folder of HR images that are all large enough for the metrics, in the order of their names.

    LR images are made by the protocol, or are ``NAME`` or ``NAMExS`` of ``lq_folder`` for HR's ``NAME``, and HR is cut
    to their size. ``grey_as_y`` marks images that hold grey levels only.
    """
    entries = list_images({"dataroot_gt": str(folder), "io_backend": {"type": "disk"}}, what="--gt")
    multiple = protocol.mod_crop(scale)
    check_sizes(entries, None, multiple, scale, "--gt")
    lq_entries = list_lq(Path(lq_folder), [entry.path for entry in entries], scale) if lq_folder else {}
    chosen = [METRICS[name] for name in metrics]
    for entry in entries:
        lq = lq_entries.get(entry.path)
        sides = (lq.height * scale, lq.width * scale) if lq else (entry.height, entry.width)
        height, width = (side // multiple * multiple for side in sides)
        for metric in chosen:
            needed = metric.smallest + (2 * scale if protocol.quantize and metric.smallest == SSIM_WINDOW else 0)
            if min(height, width) < needed:
                raise UserError(
                    f"--gt: {entry.path} has {height}×{width} pixels to compare by the protocol {protocol.name}; "
                    f"{metric.label} needs {needed} a side"
                )
    for name, entry in zip(name_images([entry.path for entry in entries]), entries, strict=True):
        lq = lq_entries.get(entry.path)
        yield read_pair(entry.path, scale, protocol, lq and lq.path, name, grey_as_y and is_grey(entry.path))


def read_pair(
    path: str, scale: int, protocol: Protocol, lq_path: str | None = None, name: str = "", grey: bool = False
) -> Pair:
    """One pair: the LR image is read from ``lq_path`` and HR cut to its size, or it is made of HR by the protocol."""
    client = FileClient("disk")
    gt = read_levels(client, path)
    if lq_path:
        lq = as_floats(read_levels(client, lq_path))
        height, width = lq.shape[:2]
        if gt.shape[0] < height * scale or gt.shape[1] < width * scale:
            raise UserError(f"--lq: {lq_path} is larger than {path} by 1/{scale}")
    else:
        multiple = protocol.mod_crop(scale)
        height, width = (side // multiple * multiple // scale for side in gt.shape[:2])
        if min(height, width) < 4:
            raise UserError(f"{path} is too small for scale {scale}")
        lq = lq_of_crop(gt[: height * scale, : width * scale], 0, 0, height, width, scale, protocol.quantize)
    images = [np.ascontiguousarray(lq), np.ascontiguousarray(as_floats(gt[: height * scale, : width * scale]))]
    lq, gt = (image[None] for image in img2tensor(images))
    return Pair(name or Path(path).stem, path, lq, gt, scale, protocol, grey)


def list_lq(folder: Path, gt_paths: list[str], scale: int) -> dict[str, ImageEntry]:
    """The LR image of every HR image."""
    found = list_images({"dataroot_gt": str(folder), "io_backend": {"type": "disk"}}, what="--lq")
    by_name = {Path(entry.path).name: entry for entry in found}
    names = pair_names(gt_paths, list(by_name), ["{}", f"{{}}x{scale}"], f"--lq {folder}")
    return {gt: by_name[lq] for gt, lq in names.items()}


@dataclass(frozen=True)
class Metric:
    """A metric and how its values are written."""

    measure: Callable[[Tensor, Pair], float]  # of an SR image (1, 3, H, W)
    label: str  # with the unit
    digits: int  # in a table, of the value times the factor
    higher: bool  # is better
    factor: int = 1
    smallest: int = 0  # pixels a side that it needs, without a border

    @property
    def heading(self) -> str:
        """The label with an arrow to where it is better."""
        return f"{self.label} {'↑' if self.higher else '↓'}"


def levels(sr: Tensor, pair: Pair) -> list[np.ndarray]:
    """SR and HR image as BasicSR's metrics take them: levels of 8 bits, (H, W, 3), or (H, W, 1) of a grey pair."""
    images = [tensor2img(image.clone()) for image in (sr, pair.gt)]  # it clamps in place
    return [np.round(image.mean(axis=2, keepdims=True)) for image in images] if pair.grey else images


def on_levels(call: Callable[..., float], sr: Tensor, pair: Pair) -> float:
    """A metric of BasicSR, of Y."""
    return call(*levels(sr, pair), pair.scale, test_y_channel=not pair.grey)


def measure_psnr(sr: Tensor, pair: Pair) -> float:
    """Y-PSNR in dB."""
    return on_levels(calculate_psnr, sr, pair) if pair.protocol.quantize else psnr_y(sr, pair.gt).item()


def measure_lpips(sr: Tensor, pair: Pair, net: str) -> float:
    """LPIPS with the features of ``net``."""
    try:
        return lpips(pair.protocol.finish(sr), pair.gt, net).item()
    except UserError as error:
        raise UserError(f"--lpips: {error}") from error


def on_images(call: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Pair], float]:
    """A function of two batches of images as a metric."""
    return lambda sr, pair: call(pair.protocol.finish(sr), pair.gt).item()


SSIM_WINDOW = 11  # pixels, of BasicSR's SSIM
METRICS = {
    "psnr_y": Metric(measure_psnr, "PSNR (dB)", 2, True),
    "ssim_y": Metric(partial(on_levels, calculate_ssim), "SSIM", 4, True, smallest=SSIM_WINDOW),
    "l1": Metric(on_images(l1), "L1 ×10²", 3, False, 100),
    "mse": Metric(on_images(mse), "MSE ×10³", 3, False, 1000),
    "gmsd": Metric(on_images(piq.gmsd), "GMSD", 4, False),
    "haarpsi": Metric(on_images(piq.haarpsi), "HaarPSI", 4, True),
    "vif": Metric(on_images(piq.vif_p), "VIF", 4, True, smallest=41),
    "lpips_vgg": Metric(partial(measure_lpips, net="vgg"), "LPIPS-vgg", 4, False, smallest=32),
    "lpips_alex": Metric(partial(measure_lpips, net="alex"), "LPIPS-alex", 4, False, smallest=32),
}
PERCEPTUAL = ("gmsd", "haarpsi", "vif")  # without weights
LPIPS = ("lpips_vgg", "lpips_alex")


def measure(sr: Tensor, pair: Pair, metrics: Iterable[str]) -> dict[str, float]:
    """The metrics of an SR image (1, 3, H, W)."""
    return {name: METRICS[name].measure(sr, pair) for name in metrics}


def means(rows: list[Row], by: str = "protocol") -> dict[str, dict[str, float]]:
    """Means over the images for each value of the column ``by``: ``{'field': {'psnr_y': …, 'ssim_y': …}, …}``."""
    result: dict[str, dict[str, float]] = {}
    for value in dict.fromkeys(row[by] for row in rows):
        chosen = [row for row in rows if row[by] == value]
        metrics = [key for key in chosen[0] if key not in ("image", by)]
        result[value] = {metric: float(np.mean([row[metric] for row in chosen])) for metric in metrics}
    return result


def bicubic(scale: int, quantize: bool = True) -> Upscaler:
    """MATLAB's bicubic as an upscaler, of 8-bit images with ``quantize``."""

    def upscale(lq: Tensor) -> Tensor:
        image = np.ascontiguousarray(lq[0].permute(1, 2, 0).cpu().numpy())
        sr = imresize(to_8_bits(image * 255), scale).astype(np.float32) / 255 if quantize else imresize(image, scale)
        return torch.from_numpy(sr).permute(2, 0, 1)[None]

    return upscale


def make_sr(source: Source, pair: Pair, label: str = "") -> Tensor:
    """The SR image (1, 3, H, W) of a pair; the images of a folder are cut as HR is."""
    height, width = pair.gt.shape[2:]
    if source == BICUBIC:
        return bicubic(pair.scale, pair.protocol.quantize)(pair.lq)
    if isinstance(source, Path):
        path = find_sr_file(source, pair.name, pair.scale)
        image = as_floats(read_levels(FileClient("disk"), str(path))[:height, :width])
        if image.shape[:2] != (height, width):
            raise UserError(f"{path} is {image.shape[0]}×{image.shape[1]}; expected {height}×{width}, as HR")
        return img2tensor([np.ascontiguousarray(image)])[0][None]
    network = f"{label}: the network" if label else "the network"
    try:
        sr = source(pair.lq)
    except Exception as error:  # a network raises what it likes
        raise UserError(f"{network} fails on {pair.path} ({first_line(error)})") from error
    if sr.shape != pair.gt.shape:
        shapes = f"{tuple(sr.shape)} of {tuple(pair.lq.shape)}"
        raise UserError(f"{network} makes {shapes}; --scale {pair.scale} does not fit")
    if not sr.isfinite().all():
        raise UserError(f"{network} gives values that are not finite on {pair.path}")
    return sr


def find_sr_file(folder: Path, stem: str, scale: int) -> Path:
    """The image of ``folder`` that is called ``STEM`` or ``STEMxSCALE``, else one whose name begins with ``STEM_``."""
    available = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    for fits in (lambda name: name in (stem, f"{stem}x{scale}"), lambda name: name.startswith(f"{stem}_")):
        found = [path for path in available if fits(path.stem)]
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(f"{folder}: more than one image for {stem}: {found[0].name}, {found[1].name}")
    raise UserError(f"{folder}: no image for {stem}; accepted names are {stem}, {stem}x{scale} and {stem}_…")


@torch.no_grad()
def evaluate(
    sources: Mapping[str, Source],
    gt_folder: str | Path,
    scale: int,
    *,
    lq_folder: str | Path | None = None,
    with_lpips: bool = False,
    with_perceptual: bool = False,
    grey_as_y: bool = False,
) -> list[Row]:
    """Measure every image of a folder.

    Args:
        sources: what makes the SR images, by the protocol's name.
        gt_folder: folder of the HR images.
        scale: 1 to 8.
        lq_folder: see :func:`pairs`; for the protocol ``'field'`` only.
        with_lpips: also LPIPS of VGG and AlexNet.
        with_perceptual: also GMSD (lower is better), HaarPSI and VIF (higher is better) of RGB.
        grey_as_y: take the levels of HR images that hold grey levels only as Y (``'field'``), as the published values
            of Set14 do; otherwise they are expanded to RGB first, as BasicSR does.

    Returns:
        A row for each image and protocol: ``image``, ``protocol`` and the metrics.

    Raises:
        UserError: a folder, an image or the network's result is wrong.
    """
    extra = (*(PERCEPTUAL if with_perceptual else ()), *(LPIPS if with_lpips else ()))
    metrics = {name: (*PROTOCOLS[name].metrics, *extra) for name in sources}
    several = [pairs(gt_folder, scale, PROTOCOLS[name], lq_folder, metrics[name], grey_as_y) for name in sources]
    rows: list[Row] = []
    for of_image in tqdm(zip(*several, strict=True), unit="image", disable=None, leave=False):
        for pair in of_image:
            name = pair.protocol.name
            values = measure(make_sr(sources[name], pair), pair, metrics[name])
            rows.append({"image": pair.name, "protocol": name, **values})
    return rows
