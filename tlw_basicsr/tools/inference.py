"""Super-resolution of image files of any size and kind by a trained network."""

import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise, product, takewhile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import normalize

from tlw_basicsr.data.bicubic import imresize
from tlw_basicsr.data.images import Picture, of_any_size, png_chunks, undo_normalization
from tlw_basicsr.data.tiles import even_tiles
from tlw_basicsr.networks import count_input_channels, fill_defaults, get_size_multiple
from tlw_basicsr.util.errors import UserError, first_line
from tlw_basicsr.util.files import whole_file

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
COLOUR_CHUNKS = (b"cICP", b"iCCP", b"sRGB", b"gAMA", b"cHRM")
WIDER = {torch.float16: "; try bf16 or fp32", torch.bfloat16: "; try fp32"}


class NetworkUpscaler:
    """A trained network as an upscaler of images of any size, in tiles that overlap if they are large.

    The image is padded by reflection to what the network takes (windows, pixel unshuffle), and the result cut. Tiles
    are those of :func:`tlw_basicsr.data.tiles.even_tiles`. Where they overlap, the outer 3/8 of the overlap, which have
    seen the tile's border most, are left out, and the results are blended linearly over the quarter in the middle. A
    network of one fixed size, a ``…_size`` of its options, gets tiles of that size. Of several results the first is
    taken.

    Args:
        net: SR network, in eval mode.
        options: its options, ``{type: …, …}``; ``window_size`` and the number of channels are read from them, or from
            the defaults of its class.
        tile: largest side of a tile in LR pixels, rounded up to what the network takes; None for the whole image.
        overlap: overlap of neighbouring tiles in LR pixels, at most half the tile; None for 32, or half of a smaller
            tile.
        device: device to run on; results come back to the CPU.
        dtype: float32, or float16 or bfloat16 for autocast.
        normalization: ``mean`` and ``std`` of a data set, by which the network's images are normalised; images given
            and returned here are in [0, 1].

    Attributes:
        scale: scale of the super-resolution, found by running the network.
        channels: number of channels of the images that the network takes.
        multiple: the sides of what the network is given are multiples of it.

    Raises:
        UserError: tile and overlap do not fit, the network fails on an image, or it does not upscale both sides by one
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
        normalization: Mapping[str, Any] | None = None,
    ) -> None:
        overlap = min(32, (tile or 64) // 2) if overlap is None else overlap
        if overlap < 0 or (tile is not None and not 1 <= tile >= 2 * overlap):
            raise UserError(f"--tile, --overlap: expected an overlap of 0 to half the tile, got {overlap} of {tile}")
        self.net = net.to(device)
        self.device, self.dtype, self.normalization = torch.device(device), dtype, normalization or {}
        self.channels = count_input_channels(options)
        self.multiple = get_size_multiple(options)
        self.tile = None if tile is None else -(-tile // self.multiple) * self.multiple
        options = fill_defaults(options)
        self.overlap, self.unit, self.smallest = overlap, self.multiple, options.get("smallest_side", 0)
        side = max(-(-16 // self.multiple) * self.multiple, self.smallest)
        sizes = [v for key, v in options.items() if key.endswith("_size") and type(v) is int and v > side]
        errors: list[Exception] = []
        for given in (side, *sizes):
            try:
                height, width = self._run(torch.zeros(1, self.channels, given, given)).shape[-2:]
                break
            except Exception as error:  # a network raises what it likes
                errors.append(error)
        else:
            raise UserError(
                f"{options['type']} fails on an image of {self.channels} channels and {side}×{side} pixels "
                f"({first_line(errors[0])})"
            ) from errors[0]
        if errors:  # it takes one size alone
            self.tile = self.multiple = self.smallest = given
            self.overlap, self.unit = min(overlap, given // 2), 1
        if height != width or height % given:
            raise UserError(f"{options['type']} makes {height}×{width} pixels of {given}×{given}: not one whole scale")
        self.scale = height // given

    @torch.no_grad()
    def __call__(self, lq: Tensor, progress: Callable[[Iterable], Iterable] = iter) -> Tensor:
        """SR image (N, C, s·H, s·W) of ``lq`` (N, C, H, W), RGB in [0, 1], float32 on the CPU, not clamped.

        ``progress`` wraps the list of tiles, as ``tqdm`` does.
        """
        height, width = lq.shape[-2:]
        lq = pad_to_multiple(lq, self.multiple, self.smallest)
        whole = self.tile is None or max(lq.shape[-2:]) <= self.tile
        sr = self._run(lq) if whole else self._run_tiles(lq, progress)
        return sr[..., : height * self.scale, : width * self.scale]

    def _run(self, lq: Tensor) -> Tensor:
        opt = self.normalization
        lq = normalize(lq, opt["mean"], opt["std"]) if opt else lq
        # a copy, because some networks (spandrel's RCAN) write to their input;
        # autocast, because networks build some of their tensors in float32 whatever their weights are
        with torch.no_grad(), torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            sr = self.net(lq.to(self.device, copy=True))
        return undo_normalization((sr[0] if isinstance(sr, (list, tuple)) else sr).float().cpu(), opt)

    def _run_tiles(self, lq: Tensor, progress: Callable[[Iterable], Iterable]) -> Tensor:
        (rows, height), (columns, width) = map(self._cut_side, lq.shape[-2:])
        sr = torch.zeros(*lq.shape[:-2], *(self.scale * side for side in lq.shape[-2:]))
        for (top, of_rows), (left, of_columns) in progress(list(product(rows, columns))):
            part = self._run(lq[..., top : top + height, left : left + width])
            place = sr[..., top * self.scale :, left * self.scale :][..., : part.shape[-2], : part.shape[-1]]
            place += part.mul_(of_rows[:, None]).mul_(of_columns)
        return sr

    def _cut_side(self, length: int) -> tuple[list[tuple[int, Tensor]], int]:
        """The starts of one side's tiles, each with the weights of its result, and the length of a tile."""
        assert self.tile is not None
        starts, tile = even_tiles(length, self.tile, self.overlap, self.unit, self.smallest)
        overlaps = [(before + tile - after) * self.scale for before, after in pairwise(starts)]
        pairs = zip([0, *overlaps], [*overlaps, 0], strict=True)
        weights = [blend_weights(tile * self.scale, before, after) for before, after in pairs]
        places = [slice(start * self.scale, (start + tile) * self.scale) for start in starts]
        total = torch.zeros(length * self.scale)  # not 1 where more than two overlap
        for place, weight in zip(places, weights, strict=True):
            total[place] += weight
        return [(s, w / total[p]) for s, p, w in zip(starts, places, weights, strict=True)], tile


def blend_weights(length: int, before: int, after: int) -> Tensor:
    """Weights of a tile along one side, (length,): 0 in an overlap's outer 3/8, then linear, 1 in its inner 3/8.

    Those of two neighbours add up to 1. ``before`` and ``after`` are the overlaps with the neighbours, 0 without one.
    """

    def rise(overlap: int) -> Tensor:
        outer = overlap * 3 // 8
        inside = (torch.arange(length) + 0.5 - outer) / max(overlap - 2 * outer, 1)
        return inside.clamp(0, 1) if overlap else torch.ones(length)

    return rise(before) * rise(after).flip(0)


def pad_to_multiple(image: Tensor, multiple: int, smallest: int = 0) -> Tensor:
    """``image`` (N, C, H, W) reflected at the bottom and the right, where it is too small for that repeated.

    Its sides become multiples of ``multiple``, and at least ``smallest``, which is one.
    """
    height, width = image.shape[-2:]
    bottom, right = (max(-side % multiple, smallest - side) for side in (height, width))
    if not bottom and not right:
        return image
    return F.pad(image, (0, right, 0, bottom), "reflect" if bottom < height and right < width else "replicate")


def upscale_picture(
    upscale: NetworkUpscaler, picture: Picture, progress: Callable[[Iterable], Iterable] = iter
) -> np.ndarray:
    """The SR image of a file as OpenCV writes it: uint8 or uint16, grey (H, W), BGR or BGRA.

    A grey image is given to a colour network in three equal channels, and the mean of the results is taken; a network
    of one channel is given the channels of a colour image one by one. Alpha is resized by MATLAB's bicubic, not by the
    network: what is opaque stays exactly so. Grey with alpha becomes BGRA, since OpenCV writes no such PNG.
    """
    image = picture.image if picture.alpha is None else fill_hidden(picture.image, picture.alpha)
    grey = image.shape[1] == 1
    if upscale.channels == 1:
        sr = upscale(image.transpose(0, 1), progress).transpose(0, 1)
    else:
        sr = upscale(image.expand(-1, upscale.channels, -1, -1), progress)
        sr = sr.mean(dim=1, keepdim=True) if grey else sr
    if not torch.stack(sr.aminmax()).isfinite().all():
        name = next(name for name, dtype in DTYPES.items() if dtype == upscale.dtype)
        raise FloatingPointError(f"values are not finite in {name}{WIDER.get(upscale.dtype, '')}")
    if picture.alpha is not None:
        alpha = imresize(np.ascontiguousarray(picture.alpha), upscale.scale)
        sr = torch.cat([sr.expand(-1, 3, -1, -1), torch.from_numpy(alpha)[None, None]], dim=1)
    # in place, as a large image is gigabytes
    levels = sr[0].clamp_(0, 1).mul_(picture.levels).add_(0.5).numpy()
    levels = levels.astype(np.uint8 if picture.levels == 255 else np.uint16)
    return cv2.merge([*levels[2::-1], *levels[3:]])  # BGR


def fill_hidden(image: Tensor, alpha: np.ndarray) -> Tensor:
    """``image`` (1, C, H, W) with the nearest visible pixel's colour where alpha (H, W) is 0.

    The colour of a transparent pixel is arbitrary, often black, and the network would mix it into its neighbours.
    """
    hidden = alpha == 0
    if hidden.all() or not hidden.any():
        return image
    from scipy.ndimage import distance_transform_edt  # half a second, for few images

    rows, columns = distance_transform_edt(hidden, return_distances=False, return_indices=True)
    return image[..., torch.from_numpy(rows).long(), torch.from_numpy(columns).long()]


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def find_colour_space(path: Path) -> tuple[bytes, bytes]:
    """The PNG chunks that say what the colours of an image file are, and the colour space of its ICC profile, if any.

    The chunks of a PNG are copied (cICP, iCCP, sRGB, gAMA, cHRM); the ICC profile of another format becomes an iCCP.
    """
    with of_any_size(), Image.open(path) as header:
        profile = header.info.get("icc_profile") or b""
        is_png = header.format == "PNG"
    chunks = png_chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(profile)) if profile and not is_png else b""
    if is_png:
        with open(path, "rb") as file:
            for kind, length in takewhile(lambda chunk: chunk[0] != b"IDAT", png_chunks(file)):
                chunks += png_chunk(kind, file.read(length)) if kind in COLOUR_CHUNKS else b""
    return chunks, profile[16:20].strip()


def write_result(image: np.ndarray, target: Path, source: Path, compression: int | None = None) -> str:
    """Write an SR image as PNG with the colour space of its source; returns a note on the colours, if there is one.

    ``compression`` is from 0 to 9; None is 1 with a single filter, in 2/5 of the time of 3 and a fifth larger.
    """
    chunks, space = find_colour_space(source)
    expected = b"GRAY" if image.ndim == 2 else b"RGB"
    note = ""
    if space and space != expected:
        chunks, name = b"", space.decode("ascii", "replace")
        note = f"{source}: its ICC profile is for {name} images and is not kept, the result is {expected.decode()}"
    level = [] if compression is None else [cv2.IMWRITE_PNG_COMPRESSION, compression]
    content = cv2.imencode(".png", image, level)[1].data
    end_of_header = 33  # the signature and IHDR
    with whole_file(target) as file:
        file.writelines([content[:end_of_header], chunks, content[end_of_header:]])
    return note
