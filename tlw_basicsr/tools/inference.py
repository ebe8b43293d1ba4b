"""Super-resolution of image files of any size and kind by a trained network."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from tlw_basicsr.data.bicubic import imresize
from tlw_basicsr.data.images import Picture, of_any_size
from tlw_basicsr.data.tiles import tile_starts
from tlw_basicsr.engine.options import read_options
from tlw_basicsr.networks import count_input_channels, find_device, get_size_multiple, load_network
from tlw_basicsr.util.errors import UserError, first_line
from tlw_basicsr.util.files import open_regular

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WIDER = {torch.float16: "; try bf16 or fp32", torch.bfloat16: "; try fp32"}


class NetworkUpscaler:
    """A trained network as an upscaler of images of any size, in tiles that overlap if they are large.

    The image is padded by reflection to what the network takes (windows, pixel unshuffle), and the result cut. Where
    tiles overlap, the outer 3/8 of the overlap, which have seen the tile's border most, are left out, and the results
    are blended linearly over the quarter in the middle.

    Args:
        net: SR network, in eval mode.
        options: its options, ``{type: …, …}``; ``window_size`` and the number of channels are read from them, or from
            the defaults of its class.
        tile: side of a tile in LR pixels, rounded up to what the network takes; None for the whole image at once.
        overlap: of neighbouring tiles, in LR pixels, at most half the tile; None for 32, or half of a smaller tile.
        device: to run on; results come back to the CPU.
        dtype: float32, or float16 or bfloat16 for autocast.

    Attributes:
        scale: of the super-resolution, found by running the network.
        channels: of the images that the network takes.
        multiple: a side of what the network is given is a multiple of it.

    Raises:
        UserError: tile and overlap don't fit, the network fails on an image, or it does not upscale both sides by one
            whole number.
    """

    def __init__(
        self,
        net: nn.Module,
        options: dict[str, Any],
        tile: int | None = None,
        overlap: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        overlap = min(32, (tile or 64) // 2) if overlap is None else overlap
        if overlap < 0 or (tile is not None and not 1 <= tile >= 2 * overlap):
            raise UserError(f"--tile, --overlap: expected an overlap of 0 to half the tile, got {overlap} of {tile}")
        self.net = net.to(device)
        self.device, self.dtype = torch.device(device), dtype
        self.channels = count_input_channels(options)
        self.multiple = get_size_multiple(options)
        self.tile = None if tile is None else -(-tile // self.multiple) * self.multiple
        self.step = 0 if self.tile is None else max((self.tile - overlap) // self.multiple, 1) * self.multiple
        side = -(-16 // self.multiple) * self.multiple
        try:
            height, width = self._run(torch.zeros(1, self.channels, side, side)).shape[-2:]
        except Exception as error:  # a network raises what it likes
            raise UserError(
                f"{options['type']} fails on an image of {self.channels} channels and {side}×{side} pixels "
                f"({first_line(error)})"
            ) from error
        if height != width or height % side:
            raise UserError(f"{options['type']} makes {height}×{width} pixels of {side}×{side}: not one whole scale")
        self.scale = height // side

    @torch.no_grad()
    def __call__(self, lq: Tensor, progress: Callable[[Iterable], Iterable] = iter) -> Tensor:
        """SR image (N, C, s·H, s·W) of ``lq`` (N, C, H, W), RGB in [0, 1], float32 on the CPU, not clamped.

        ``progress`` wraps the list of tiles, as ``tqdm`` does.
        """
        height, width = lq.shape[-2:]
        lq = pad_to_multiple(lq, self.multiple)
        whole = self.tile is None or max(lq.shape[-2:]) <= self.tile
        sr = self._run(lq) if whole else self._run_tiles(lq, progress)
        return sr[..., : height * self.scale, : width * self.scale]

    def _run(self, lq: Tensor) -> Tensor:
        # a copy, because some networks (spandrel's RCAN) write to their input;
        # autocast, because networks build some of their tensors in float32 whatever their weights are
        with torch.no_grad(), torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.net(lq.to(self.device, copy=True)).float().cpu()

    def _run_tiles(self, lq: Tensor, progress: Callable[[Iterable], Iterable]) -> Tensor:
        assert self.tile is not None
        s, tile_side, (height, width) = self.scale, self.tile, lq.shape[-2:]
        sides = [(length, min(tile_side, length)) for length in (height, width)]
        starts = [tile_starts(length, tile, self.step, 0) for length, tile in sides]
        blend = [
            [blend_weights(tile * s, (tile_side - self.step) * s, at > 0, at + tile < length) for at in ats]
            for (length, tile), ats in zip(sides, starts, strict=True)
        ]
        sr, total = torch.zeros(*lq.shape[:-2], height * s, width * s), torch.zeros(height * s, width * s)
        for (i, top), (j, left) in progress(list(product(*(list(enumerate(ats)) for ats in starts)))):
            (_, tile_h), (_, tile_w) = sides
            weight = blend[0][i][:, None] * blend[1][j]
            place = (..., slice(top * s, (top + tile_h) * s), slice(left * s, (left + tile_w) * s))
            sr[place] += weight * self._run(lq[..., top : top + tile_h, left : left + tile_w])
            total[place] += weight
        return sr / total


def upscaler_of(
    yaml: str | Path,
    checkpoint: str | Path,
    scale: int,
    param_key: str = "params_ema",
    device: str = "auto",
    allow_plugins: bool = True,
) -> NetworkUpscaler:
    """The network of a YAML's ``network_g`` with a checkpoint's weights, as an upscaler of whole images.

    Raises:
        UserError: the YAML or the checkpoint is wrong, or the network is of another scale.
    """
    opt = read_options(str(yaml), allow_plugins=allow_plugins)
    net = load_network(opt.get("network_g"), checkpoint, param_key)
    upscale = NetworkUpscaler(net, opt["network_g"], device=find_device(device))
    if upscale.scale != scale:
        raise UserError(f"--scale: {scale}, but the network of {yaml} is of scale {upscale.scale}")
    return upscale


def check_memory(path: Path, scale: int) -> None:
    """Tell before an image is decoded that there is not the memory for it and its result.

    For each of its pixels about 40 bytes are needed, and for each of the result's 64: what is decoded, as floats, the
    sum of the tiles and of their weights, and the result in other types.

    Raises:
        UserError: as said; the message has both numbers. What the header does not tell is left to the decoding.
    """
    free = free_memory()
    try:
        with open_regular(path, "") as file, of_any_size(), Image.open(file) as header:
            width, height = header.size
    except UserError:
        raise
    except Exception:  # Pillow's readers each raise what they like
        return
    needed = width * height * (40 + 64 * scale**2)
    if free is not None and needed > free:
        raise UserError(
            f"{path}: its {width}×{height} pixels and the result at ×{scale} need about {needed / 2**30:,.1f} GiB of "
            f"memory, {free / 2**30:,.1f} are free; cut it into parts"
        )


def free_memory() -> int | None:
    """Bytes that a process may still use, of the machine and of a container; None where the system does not tell."""
    free = []
    with suppress(OSError, ValueError, IndexError):
        free.append(1024 * int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]))
    with suppress(OSError, ValueError):
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free.append(limit - used)
    return min(free, default=None)


def blend_weights(length: int, overlap: int, before: bool, after: bool) -> Tensor:
    """Weights of a tile along one side, (length,): 0 in an overlap's outer 3/8, then linear, 1 in its inner 3/8.

    Those of two neighbours add up to 1. ``before`` and ``after`` say where there is a neighbour.
    """
    outer = overlap * 3 // 8
    inside = (torch.arange(length) + 0.5 - outer) / max(overlap - 2 * outer, 1)
    rising = inside.clamp(0, 1) if before else torch.ones(length)
    return rising * (inside.flip(0).clamp(0, 1) if after else 1)


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """``image`` (N, C, H, W) reflected at the bottom and the right, where it is too small for that repeated."""
    height, width = image.shape[-2:]
    bottom, right = -height % multiple, -width % multiple
    if not bottom and not right:
        return image
    return F.pad(image, (0, right, 0, bottom), "reflect" if bottom < height and right < width else "replicate")


# ------------------------------------------------------------------------------------------------- image files


def upscale_picture(
    upscale: NetworkUpscaler, picture: Picture, progress: Callable[[Iterable], Iterable] = iter
) -> np.ndarray:
    """The SR image of a file as OpenCV writes it: uint8 or uint16, grey (H, W), BGR or BGRA.

    A grey image is given to a colour network in three equal channels, of whose results the mean is taken; a network of
    one channel is given those of a colour image one by one. Alpha is resized by MATLAB's bicubic, not by the network:
    what is opaque stays exactly so. Grey with alpha becomes BGRA, as OpenCV writes no such PNG.

    Raises:
        FloatingPointError: the network gives values that are not finite.
    """
    image = picture.image
    grey = image.shape[1] == 1
    if upscale.channels == 1:
        sr = upscale(image.transpose(0, 1), progress).transpose(0, 1)
    else:
        sr = upscale(image.expand(-1, upscale.channels, -1, -1), progress)
        sr = sr.mean(dim=1, keepdim=True) if grey else sr
    sr = sr[0].permute(1, 2, 0).numpy()
    if not np.isfinite(sr).all():
        name = next(name for name, dtype in DTYPES.items() if dtype == upscale.dtype)
        raise FloatingPointError(f"values are not finite in {name}{WIDER.get(upscale.dtype, '')}")
    if picture.alpha is not None:
        alpha = imresize(np.ascontiguousarray(picture.alpha), upscale.scale)
        sr = np.dstack([*(sr[..., [0, 0, 0]] if grey else sr).transpose(2, 0, 1), alpha])
    dtype = np.uint8 if picture.levels == 255 else np.uint16
    sr = np.floor(sr.clip(0, 1) * picture.levels + 0.5).astype(dtype)
    if sr.shape[2] == 1:
        return sr[..., 0]
    return cv2.cvtColor(sr, cv2.COLOR_RGB2BGR if sr.shape[2] == 3 else cv2.COLOR_RGBA2BGRA)
