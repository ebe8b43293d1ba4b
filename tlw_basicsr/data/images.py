"""Image files: reading their sizes, decoding them as BasicSR and as inference do, checking and writing them."""

import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import cv2
import lmdb
import numpy as np
import torch
from basicsr.utils import FileClient
from basicsr.utils import imfrombytes as basicsr_imfrombytes
from PIL import ExifTags, Image
from torch import Tensor

from tlw_basicsr.util.errors import UserError
from tlw_basicsr.util.files import open_regular, read_bytes, whole_file

# what OpenCV reads; which of the rarer ones depends on its build
SUFFIXES = tuple(
    f".{name}"
    for name in "png jpg jpeg jpe bmp dib tif tiff webp ppm pgm pbm pnm pam avif jp2 sr ras exr hdr".split()  # noqa: SIM905
)
COMPRESSION = [cv2.IMWRITE_PNG_COMPRESSION, 3]


@contextmanager
def of_any_size() -> Iterator[None]:
    """Let Pillow open images of any size: OpenCV, which decodes them, has a limit of its own."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def image_size(path: Path, key: str) -> tuple[int, int]:
    """Return height and width of a decoded image file, from its header if possible.

    Formats, and versions of OpenCV and Pillow, differ in whether they turn an image by its orientation. So an image
    that has one is decoded, as are those that Pillow doesn't know.
    """
    # Pillow's readers raise all kinds of errors, also for files that OpenCV reads
    with open_regular(path, key) as file, suppress(Exception), of_any_size(), Image.open(file) as header:
        if not has_orientation(header, path):
            return header.height, header.width
    try:
        return _decode(read_bytes(path, key), cv2.IMREAD_COLOR).shape[:2]
    except ValueError as error:
        raise UserError(f"{key}: {path} is not an image that can be read") from error


def has_orientation(header: Image.Image, path: Path) -> bool:
    """Return whether something in the file may give the image's orientation, such as a camera's EXIF."""
    if header.format == "PNG":  # its EXIF may follow the pixels, and Pillow would decode these first
        with open(path, "rb") as file:
            return any(kind == b"eXIf" or file.read(11) == b"Raw profile" for kind, _ in png_chunks(file))
    return header.getexif().get(ExifTags.Base.Orientation, 1) != 1


def png_chunks(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Yield kind and length of every chunk of a PNG; the file is at the chunk's content then."""
    place = 8
    while file.seek(place) and len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        yield kind, length
        place += length + 12


@cache
def decoder_turns(kind: str) -> bool:
    """Try whether the installed OpenCV turns images of Pillow's format ``kind`` upright."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    file = BytesIO()
    Image.new("RGB", (16, 8)).save(file, kind, exif=exif)
    return _decode(file.getvalue(), cv2.IMREAD_COLOR).shape[:2] == (16, 8)


def _decode(content: bytes, flags: int) -> np.ndarray:
    """Decode an image by OpenCV; a failure is a ValueError."""
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), flags) if content else None
    except cv2.error as error:
        raise ValueError(str(error).strip().splitlines()[0]) from error
    if image is None:
        raise ValueError("OpenCV can't decode it")
    return image


class Pixels:
    """The levels (H, W, 3) of an image of a cache; what is cut from it is float32 in [0, 1], as BasicSR's are."""

    def __init__(self, levels: np.ndarray) -> None:
        self.levels, self.shape = levels, levels.shape

    def __getitem__(self, place: Any) -> np.ndarray:
        return as_floats(self.levels[place])


def as_floats(levels: np.ndarray) -> np.ndarray:
    """Return uint8 levels as float32 in [0, 1], as BasicSR makes them."""
    return levels.astype(np.float32) / 255.0


def imfrombytes(content: Any, flag: str = "color", float32: bool = False) -> Any:
    """BasicSR's; an image of a cache stays what it is."""
    return content if isinstance(content, Pixels) else basicsr_imfrombytes(content, flag, float32)


def open_client(opt: Mapping[str, Any]) -> FileClient:
    """Open what reads the files of a data set by its options, with the keys ``gt`` and, for pairs, ``lq``."""
    options = dict(opt["io_backend"])
    kind = options.pop("type")
    if kind == "lmdb":
        keys = [key for key in ("gt", "lq") if f"dataroot_{key}" in opt]
        options.update(db_paths=[opt[f"dataroot_{key}"] for key in keys], client_keys=keys)
    return FileClient(kind, **options)


def read_content(client: FileClient, path: str, client_key: str = "gt") -> Any:
    """Return the content of an image file, or what a cache has of it."""
    try:
        content = client.get(path, client_key)
    except (OSError, ValueError, lmdb.Error) as error:
        raise UserError(f"{path}: not an image that can be read") from error
    if content is None:
        raise UserError(f"{path}: no image of this key in the LMDB")
    return content


def read_levels(client: FileClient, path: str) -> np.ndarray:
    """Decode an image of any kind as BasicSR does: BGR, uint8, (H, W, 3)."""
    content = read_content(client, path)
    return content.levels if isinstance(content, Pixels) else decode_levels(content, path)


def decode_levels(content: bytes, path: str) -> np.ndarray:
    """Decode the content of the image file ``path``, see :func:`read_levels`."""
    try:
        return _decode(content, cv2.IMREAD_COLOR)
    except ValueError as error:
        raise UserError(f"{path}: not an image that can be read") from error


def read_8bit(path: Path) -> np.ndarray:
    """Decode an image file as 8-bit BGR (H, W, 3)."""
    return decode_levels(read_bytes(path), str(path))


def count_pixels(content: bytes) -> int:
    """Return the number of pixels of an image file, from its header if possible; 0 where it can't be read."""
    with suppress(Exception), of_any_size(), Image.open(BytesIO(content)) as header:
        return header.height * header.width
    with suppress(ValueError):
        return _decode(content, cv2.IMREAD_COLOR)[..., 0].size
    return 0


def find_fault(content: bytes) -> str | None:
    """Return why an image file's content can't be decoded or is cut; None for a whole image."""
    try:
        image = _decode(content, cv2.IMREAD_COLOR)
        with of_any_size(), Image.open(BytesIO(content)) as whole:  # OpenCV fills in what is missing
            whole.load()
    except Image.UnidentifiedImageError:  # OpenCV alone knows it
        return None
    except Exception as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None if min(image.shape[:2]) else "it has no pixels"


def is_grey(path: str | Path) -> bool:
    """Return whether an image file holds grey levels only: one channel of any depth, also with alpha, or grey palette.

    A file with three equal channels is in colour; so the published values of Set14 take one of its images.
    """
    try:
        with open(path, "rb") as file, of_any_size():
            start = file.read(26)
            file.seek(0)
            with Image.open(file) as image:
                if image.mode == "P":
                    pixels = np.asarray(image.convert("RGB"))
                    return bool((pixels == pixels[..., :1]).all())
                if image.format == "PNG" and start[25] == 4:  # grey and alpha, RGBA for Pillow if it has 16 bits
                    return True
                return image.mode.startswith(("1", "L", "I", "F")) and image.mode != "LAB"
    except Image.UnidentifiedImageError:  # OpenCV alone knows it
        return False


class Picture(NamedTuple):
    """A decoded image file."""

    image: Tensor  # (1, C, H, W) in [0, 1], RGB, or one channel if the image is grey
    alpha: np.ndarray | None  # (H, W) in [0, 1]
    levels: int  # 255 or 65535


def read_picture(path: Path) -> Picture:
    """Decode a file as BasicSR does (turned upright, palettes and CMYK to RGB), but keep alpha, 16 bits and grey."""
    try:
        content = read_bytes(path)
        colour = _decode(content, cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH)
        with of_any_size(), Image.open(BytesIO(content)) as header:
            kind, mode, frames = header.format or "", header.mode, getattr(header, "n_frames", 1)
            orientation = header.getexif().get(ExifTags.Base.Orientation, 1)
            clear = header.info.get("transparency")
        opaque = kind in ("PNG", "JPEG", "MPO", "WEBP") and mode in ("1", "L", "P", "RGB", "I;16") and clear is None
        raw = colour if opaque else _decode(content, cv2.IMREAD_UNCHANGED)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path}: not an image that can be read ({type(error).__name__})") from error
    if colour.dtype not in (np.uint8, np.uint16):
        raise UserError(f"{path}: its values are {colour.dtype}; accepted are 8 and 16 bits")
    if frames > 1 and kind != "MPO":  # a camera's photograph with its preview
        raise UserError(f"{path}: holds {frames} images; accepted are files of one")
    has_alpha = raw.ndim == 3 and raw.shape[2] == 4 and mode != "CMYK"
    if kind == "TIFF" and (has_alpha or mode == "LA"):
        raise UserError(f"{path}: a TIFF with alpha, which OpenCV decodes wrongly; accepted are PNG and WebP")
    levels = int(np.iinfo(colour.dtype).max)
    alpha = None
    if has_alpha:  # OpenCV does not turn images with alpha upright
        turns = orientation in range(2, 9) and decoder_turns(kind)
        alpha = turn(raw[..., 3], orientation if turns else 1).astype(np.float32) / levels
    if kind == "PNG" and colour.ndim == 2 and isinstance(clear, int):  # OpenCV ignores a transparent grey level
        top = 2 ** content[24] - 1  # the highest level in the file's bits
        alpha = (colour != (clear & top) * (levels // top)).astype(np.float32)
    grey = colour.ndim == 2 or is_grey(path)
    image = np.atleast_3d(colour)[..., :1] if grey else cv2.cvtColor(colour, cv2.COLOR_BGR2RGB)
    image = torch.from_numpy(image.astype(np.float32)).div_(levels)
    return Picture(image.permute(2, 0, 1)[None], alpha, levels)


def turn(image: np.ndarray, orientation: int) -> np.ndarray:
    """Turn an image (H, W) or (H, W, C) upright, by its EXIF orientation from 1 to 8."""
    if orientation in (5, 6, 7, 8):
        image = image.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return image[:, ::-1] if orientation in (2, 3, 6, 7) else image


def undo_normalization(image: Tensor, opt: Mapping[str, Any]) -> Tensor:
    """Return images (…, C, H, W) in [0, 1] for those that a data set has normalised by its options: x·std + mean."""
    mean, std = opt.get("mean"), opt.get("std")
    if mean is None and std is None:
        return image
    mean, std = (image.new_tensor(value).view(-1, 1, 1) for value in (mean, std))
    return image * std + mean


def write_image(image: np.ndarray, path: str | Path, params: list[int] | None = None) -> None:
    """Write an image (H, W), BGR or BGRA, whole or not at all; OpenCV's own function ignores a full disk."""
    path = Path(path)
    try:
        done, content = cv2.imencode(path.suffix, image, params or [])
    except cv2.error:
        done, content = False, np.empty(0)
    if not done:
        raise UserError(f"{path}: the image can't be written as {path.suffix or 'a file without suffix'}")
    with whole_file(path) as file:
        file.write(content.tobytes())


def imwrite(img: np.ndarray, file_path: str, params: list[int] | None = None, auto_mkdir: bool = True) -> bool:
    """Like BasicSR's ``imwrite``, by :func:`write_image`."""
    if auto_mkdir:
        Path(file_path).parent.mkdir(parents=True, exist_ok=True)
    write_image(img, file_path, params)
    return True


def add_jpg_compression(img: np.ndarray, quality: float = 90) -> np.ndarray:
    """BasicSR's: what a JPEG of ``quality``, cut to a whole number, makes of an image (H, W, 3) in [0, 1]: float32."""
    levels = np.rint(np.clip(img, 0, 1) * 255).astype(np.uint8)  # of floats OpenCV 5 warns
    encoded = cv2.imencode(".jpg", levels, [cv2.IMWRITE_JPEG_QUALITY, int(quality)])[1]
    return np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR), np.float32) / np.float32(255)
