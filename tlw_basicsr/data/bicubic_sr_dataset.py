"""A data set of pairs of images that needs HR images only."""

import random
from typing import Any

import numpy as np
from basicsr.data.transforms import augment
from basicsr.utils import img2tensor
from basicsr.utils.registry import DATASET_REGISTRY
from torch.utils import data

from tlw_basicsr.data.bicubic import KERNEL_WIDTH, imresize
from tlw_basicsr.data.images import as_floats, open_client, read_levels
from tlw_basicsr.data.listing import ImageEntry, list_images
from tlw_basicsr.util.errors import UserError


def lq_of_crop(gt: np.ndarray, top: int, left: int, height: int, width: int, scale: int, quantize: bool) -> np.ndarray:
    """Return a crop, in LR pixels, of MATLAB's bicubic LR image of ``gt`` (H, W, C), uint8: float32 in [0, 1].

    It is computed from the pixels that it depends on; H and W are multiples of ``scale``. With ``quantize`` the 8-bit
    image is resized to 8 bits, as LR images on disk are made.
    """
    margin = KERNEL_WIDTH // 2 + 1
    y0, x0 = max(top - margin, 0), max(left - margin, 0)
    region = gt[y0 * scale : (top + height + margin) * scale, x0 * scale : (left + width + margin) * scale]
    lq = imresize(region if quantize else as_floats(region), 1 / scale)[top - y0 :, left - x0 :][:height, :width]
    return as_floats(lq) if quantize else lq


@DATASET_REGISTRY.register()
class BicubicSRDataset(data.Dataset):
    """HR images and their bicubic LR images, which are made on the fly by MATLAB's antialiased bicubic.

    An item is ``{'lq', 'gt', 'lq_path', 'gt_path'}`` with RGB float32 tensors (3, H, W), ``gt`` in [0, 1]; both paths
    are the HR image's, which is cut from the top left.

    Args:
        opt: ``scale``, ``phase`` (train, val or test) and those of :class:`tlw_basicsr.engine.schema.BicubicSROptions`.

    Raises:
        UserError: See :func:`tlw_basicsr.data.listing.list_images` and :func:`check_sizes`.
    """

    def __init__(self, opt: dict[str, Any]) -> None:
        super().__init__()
        self.opt = opt
        self.scale = opt["scale"]
        self.train = opt["phase"] == "train"
        self.gt_size = opt.get("gt_size") if self.train else None
        self.mod_crop = self.scale if self.train else opt.get("mod_crop") or self.scale
        self.quantize_lq = opt.get("quantize_lq", True)
        what = f"datasets.{opt['phase']}"
        self.entries = list_images(opt, what=what)
        check_sizes(self.entries, self.gt_size, self.mod_crop, self.scale, what)
        self.file_client: Any = None

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.entries[index].path
        if self.file_client is None:  # each worker opens it for itself, since an LMDB does not survive a fork
            self.file_client = open_client(self.opt)
        levels = read_levels(self.file_client, path)
        height, width = (side // self.mod_crop * self.mod_crop for side in levels.shape[:2])
        levels = levels[:height, :width]
        top, left, h, w = 0, 0, height // self.scale, width // self.scale
        if self.gt_size:
            side = self.gt_size // self.scale
            top, left = random.randint(0, h - side), random.randint(0, w - side)
            h = w = side
        lq = lq_of_crop(levels, top, left, h, w, self.scale, self.quantize_lq)
        gt = levels[top * self.scale : (top + h) * self.scale, left * self.scale : (left + w) * self.scale]
        if self.train:
            # augment flips in place, which neither an image of a cache nor a part of an array is for
            gt, lq = augment(
                [np.array(gt), np.array(lq)], self.opt.get("use_hflip", False), self.opt.get("use_rot", False)
            )
        gt, lq = img2tensor([as_floats(np.ascontiguousarray(gt)), np.ascontiguousarray(lq)])
        return {"lq": lq, "gt": gt, "lq_path": path, "gt_path": path}

    def __len__(self) -> int:
        return len(self.entries)


def check_sizes(entries: list[ImageEntry], gt_size: int | None, mod_crop: int, scale: int, what: str) -> None:
    """Raise a :class:`UserError` if a crop does not fit the scale or an image is too small for it."""
    if gt_size and gt_size % scale:
        raise UserError(f"{what}.gt_size: {gt_size} is not a multiple of the scale {scale}")
    if mod_crop % scale:
        raise UserError(f"{what}.mod_crop: {mod_crop} is not a multiple of the scale {scale}")
    need = max(gt_size or 0, mod_crop, 4 * scale)
    for path, height, width in entries:
        if min(height, width) < need:
            raise UserError(
                f"{what}: {path} is {height}×{width} pixels (height×width), smaller than the {need}×{need} needed"
                + (" for gt_size" if gt_size == need else "")
            )
