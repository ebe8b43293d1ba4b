"""Measuring a network on a test set, by the protocol of the field's tables or by the paper's."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import piq
import torch
from basicsr.metrics import calculate_psnr, calculate_ssim
from basicsr.utils import FileClient, img2tensor, tensor2img
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from tlw_basicsr.data.bicubic import imresize, to_8_bits
from tlw_basicsr.data.bicubic_sr_dataset import check_sizes, lq_of_crop
from tlw_basicsr.data.images import of_any_size, read_image
from tlw_basicsr.data.listing import ImageEntry, list_images, name_images, pair_names
from tlw_basicsr.metrics.paper_metrics import l1, lpips, mse, psnr_y
from tlw_basicsr.util.errors import UserError, first_line

Upscaler = Callable[[Tensor], Tensor]
Row = dict[str, Any]

LPIPS_NETS = ("vgg", "alex")
PERCEPTUAL = {"gmsd": piq.gmsd, "haarpsi": piq.haarpsi, "vif": piq.vif_p}  # full-reference, without weights
SSIM_WINDOW = 11  # pixels, of BasicSR's SSIM
VIF_SMALLEST, LPIPS_SMALLEST = 41, 32  # pixels a side; AlexNet needs more of them than VGG


@dataclass(frozen=True)
class Protocol:
    """How LR images are made of HR images, and SR images compared with them.

    Attributes:
        name: ``'field'`` is BasicSR's, ``'paper'`` that of arXiv:2301.10575.
        multiple: HR is cut from the top left to a multiple of this and of the scale.
        quantize: LR and SR have 8 bits; else they are floats, SR clamped to [0, 1].
    """

    name: str
    multiple: int
    quantize: bool

    def mod_crop(self, scale: int) -> int:
        """HR is cut to a multiple of it: 1·scale, or lcm(28, scale), which is 84 at ×3."""
        return math.lcm(self.multiple, scale)


PROTOCOLS = {"field": Protocol("field", 1, True), "paper": Protocol("paper", 28, False)}


def bicubic(scale: int, quantize: bool = True) -> Upscaler:
    """MATLAB's bicubic as an upscaler of RGB images (1, 3, H, W) in [0, 1]; of 8-bit images with ``quantize``."""

    def upscale(lq: Tensor) -> Tensor:
        image = np.ascontiguousarray(lq[0].permute(1, 2, 0).cpu().numpy())
        sr = imresize(to_8_bits(image * 255), scale).astype(np.float32) / 255 if quantize else imresize(image, scale)
        return torch.from_numpy(sr).permute(2, 0, 1)[None]

    return upscale


def field_row(sr: Tensor, gt: Tensor, crop_border: int, grey: bool = False) -> Row:
    """Y-PSNR (dB) and Y-SSIM of two images (1, 3, H, W), rounded to 8 bits, with a border removed.

    Args:
        sr: SR image, RGB in [0, 1].
        gt: HR image.
        crop_border: pixels to remove at every border, usually the scale.
        grey: take the grey levels themselves as Y.
    """
    images = [tensor2img(image.clone()) for image in (sr, gt)]  # it clamps in place
    if grey:
        images = [np.round(image.mean(axis=2, keepdims=True)) for image in images]
    return {
        "psnr_y": calculate_psnr(*images, crop_border, test_y_channel=not grey),
        "ssim_y": calculate_ssim(*images, crop_border, test_y_channel=not grey),
    }


def paper_row(sr: Tensor, gt: Tensor) -> Row:
    """Y-PSNR (dB), L1 and MSE of two float images (1, 3, H, W), RGB in [0, 1], by the paper's protocol."""
    return {"psnr_y": psnr_y(sr, gt).item(), "l1": l1(sr, gt).item(), "mse": mse(sr, gt).item()}


@torch.no_grad()
def field_metrics(upscale: Upscaler, items: Iterable[dict[str, Any]], crop_border: int) -> dict[str, float]:
    """Means of :func:`field_row` over a data set's items, with ``lq`` and ``gt`` (3, H, W)."""
    rows = [field_row(upscale(item["lq"][None]), item["gt"], crop_border) for item in items]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


@torch.no_grad()
def evaluate(
    upscalers: dict[str, Upscaler],
    gt_folder: str | Path,
    scale: int,
    *,
    lq_folder: str | Path | None = None,
    with_lpips: bool = False,
    with_perceptual: bool = False,
    grey_as_y: bool = False,
    progress: bool = False,
) -> list[Row]:
    """Measure every image of a folder.

    Args:
        upscalers: by the protocol's name, see :data:`PROTOCOLS`: LR (1, 3, H, W) to SR, RGB in [0, 1].
        gt_folder: of the HR images.
        scale: of the super-resolution.
        lq_folder: of LR images, instead of those made by the protocol: ``NAME`` or ``NAMExS`` for HR's ``NAME``. HR is
            cut to their size; with ``'field'`` only.
        with_lpips: also LPIPS of VGG and AlexNet.
        with_perceptual: also GMSD (lower is better), HaarPSI and VIF (higher is better) of the ``piq`` package, of RGB.
        grey_as_y: of HR images with one channel take the levels as Y (``'field'``), as the published values of Set14
            do; else they are expanded to RGB first, as BasicSR does.
        progress: show a bar.

    Returns:
        A row for each image and protocol: ``image``, ``protocol`` and the metrics.

    Raises:
        UserError: a folder, an image or the network's result is wrong.
    """
    entries = list_images({"dataroot_gt": str(gt_folder), "io_backend": {"type": "disk"}}, what="--gt")
    lq_entries = _lq_entries(Path(lq_folder), [entry.path for entry in entries], scale) if lq_folder else {}
    for name in upscalers:
        multiple = PROTOCOLS[name].mod_crop(scale)
        check_sizes(entries, None, multiple, scale, "--gt")
        needs = {"SSIM": 2 * scale + SSIM_WINDOW} if PROTOCOLS[name].quantize else {}
        needs |= {"LPIPS (--lpips)": LPIPS_SMALLEST} if with_lpips else {}
        needs |= {"VIF (--perceptual)": VIF_SMALLEST} if with_perceptual else {}
        for entry in entries:
            lq_entry = lq_entries.get(entry.path)
            sides = [lq_entry.height * scale, lq_entry.width * scale] if lq_entry else [entry.height, entry.width]
            height, width = (side // multiple * multiple for side in sides)
            for what, pixels in needs.items():
                if min(height, width) < pixels:
                    raise UserError(
                        f"--gt: {entry.path} has {height}×{width} pixels to compare by the protocol {name}; {what} "
                        f"needs {pixels} a side"
                    )
    client = FileClient("disk")
    rows, names = [], name_images([entry.path for entry in entries])
    for image_name, entry in zip(names, tqdm(entries, unit="image", disable=not progress, leave=False), strict=True):
        whole = read_image(client, entry.path)
        for name, upscale in upscalers.items():
            protocol = PROTOCOLS[name]
            if lq_folder:
                lq = read_image(client, lq_entries[entry.path].path)
                gt = whole[: lq.shape[0] * scale, : lq.shape[1] * scale]
                if gt.shape[:2] != (lq.shape[0] * scale, lq.shape[1] * scale):
                    raise UserError(f"--lq: {lq_entries[entry.path].path} is larger than {entry.path} by 1/{scale}")
            else:
                multiple = protocol.mod_crop(scale)
                height, width = (side // multiple * multiple for side in whole.shape[:2])
                gt = whole[:height, :width]
                lq = lq_of_crop(gt, 0, 0, height // scale, width // scale, scale, protocol.quantize)
            lq, gt = (image[None] for image in img2tensor([np.ascontiguousarray(lq), np.ascontiguousarray(gt)]))
            try:
                sr = upscale(lq)
            except Exception as error:
                raise UserError(f"the network fails on {entry.path} ({first_line(error)})") from error
            if sr.shape != gt.shape:
                raise UserError(
                    f"the network makes {tuple(sr.shape)} of {tuple(lq.shape)}; --scale {scale} does not fit"
                )
            if not sr.isfinite().all():
                raise UserError(f"the network gives values that are not finite on {entry.path}")
            grey = grey_as_y and is_grey(entry.path)
            row = field_row(sr, gt, scale, grey) if protocol.quantize else paper_row(sr, gt)
            sr = torch.from_numpy(to_8_bits(sr.numpy() * 255)) / 255 if protocol.quantize else sr.clamp(0, 1)
            if with_perceptual:
                row |= {metric: call(sr, gt).item() for metric, call in PERCEPTUAL.items()}
            if with_lpips:
                row |= _lpips_row(sr, gt)
            rows.append({"image": image_name, "protocol": name, **row})
    return rows


def is_grey(path: str) -> bool:
    """Whether an image file has one channel."""
    with of_any_size(), Image.open(path) as header:
        return header.mode.startswith(("L", "I"))


def _lpips_row(sr: Tensor, gt: Tensor) -> Row:
    """LPIPS of both networks. If their weights can't be had, what only a training's options can set is not advised."""
    try:
        return {f"lpips_{net}": lpips(sr, gt, net).item() for net in LPIPS_NETS}
    except UserError as error:
        text = str(error).partition(", or set distance.weights")[0]
        raise UserError(text.replace("LPIPSDistance", "LPIPS", 1)) from error


def _lq_entries(folder: Path, gt_paths: Sequence[str], scale: int) -> dict[str, ImageEntry]:
    """The LR image of every HR image."""
    found = list_images({"dataroot_gt": str(folder), "io_backend": {"type": "disk"}}, what="--lq")
    by_name = {Path(entry.path).name: entry for entry in found}
    pairs = pair_names(gt_paths, list(by_name), ["{}", f"{{}}x{scale}"], f"--lq {folder}")
    return {gt: by_name[lq] for gt, lq in pairs.items()}


def means(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Means over the images: ``{'field': {'psnr_y': …, 'ssim_y': …}, 'paper': {…}}``."""
    result: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(row["protocol"] for row in rows):
        chosen = [row for row in rows if row["protocol"] == name]
        metrics = [key for key in chosen[0] if key not in ("image", "protocol")]
        result[name] = {metric: float(np.mean([row[metric] for row in chosen])) for metric in metrics}
    return result


def json_text(content: Any, indent: int = 2) -> str:
    """Numbers as JSON, which knows of no infinity: the PSNR of equal images is ``null``."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(content), indent=indent, allow_nan=False)


def csv_text(rows: list[Row]) -> str:
    """The rows as CSV, with a column for every metric of any of them."""
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
