"""Which images a dataset's options name, their sizes, and reading one."""

from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import cv2
import lmdb
import numpy as np
from basicsr.data.data_util import paths_from_folder
from basicsr.utils import FileClient, imfrombytes
from PIL import ExifTags, Image

from tlw_basicsr.errors import UserError, expanded, short
from tlw_basicsr.files import whole_file

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


class ImageEntry(NamedTuple):
    """One image of a dataset: its path, or its key in an LMDB, and its size in pixels."""

    path: str
    height: int
    width: int


def list_images(opt: dict[str, Any], root_key: str = "dataroot_gt", what: str = "datasets") -> list[ImageEntry]:
    """The images of the folder or LMDB ``opt[root_key]``, sorted by name; a ``meta_info_file`` restricts them.

    Only headers are read.

    Args:
        opt: a dataset's options.
        root_key: the option that names the folder.
        what: the options' place in the YAML, for messages.

    Raises:
        UserError: the folder is missing or has no image, a listed image is missing, or a file is no image.
    """
    key = f"{what}.{root_key}"
    root = expanded(opt[root_key], key)
    if opt["io_backend"]["type"] == "lmdb":
        return _list_lmdb(root, key)
    if not root.is_dir():
        raise UserError(f"{key}: {root} is not a folder")
    if opt.get("meta_info_file"):
        names = [line.rsplit(" (", 1)[0] for line in read_lines(opt["meta_info_file"], f"{what}.meta_info_file")]
        paths = [root / name for name in names]
    else:
        paths = sorted(Path(p) for p in paths_from_folder(str(root)) if p.lower().endswith(SUFFIXES))
    if not paths:
        raise UserError(f"{key}: {root} has no image; read are {' '.join(SUFFIXES)}")
    return [ImageEntry(str(path), *image_size(path, key)) for path in paths]


def image_size(path: Path, key: str) -> tuple[int, int]:
    """Height and width of an image file, from its header."""
    try:
        with Image.open(path) as image:
            # decoding turns a camera's photograph upright; a PNG's EXIF would be sought behind all its pixels
            orientation = 1 if image.format == "PNG" else image.getexif().get(ExifTags.Base.Orientation, 1)
            if not isinstance(orientation, int):  # text or bytes, in which OpenCV may find a number all the same
                return _decoded_size(path)
            return (image.width, image.height) if 5 <= orientation <= 8 else (image.height, image.width)
    except FileNotFoundError:
        raise UserError(f"{key}: {path} does not exist") from None
    except Exception as error:  # Pillow's readers each raise what they like
        raise UserError(f"{key}: {path} is not an image that can be read ({type(error).__name__})") from error


def _decoded_size(path: Path) -> tuple[int, int]:
    image = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError("OpenCV can't decode it")
    return image.shape[:2]


def read_lines(path: str | Path, key: str) -> list[str]:
    """The lines of a text file that are not empty."""
    file = expanded(path, key)
    try:
        if file.exists() and not file.is_file():  # of which /dev/zero would never end
            raise UserError(f"{key}: {path} is no file")
        return [line.strip() for line in file.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {path} can't be read as text ({type(error).__name__})") from error


def _list_lmdb(root: Path, key: str) -> list[ImageEntry]:
    if root.suffix != ".lmdb" or not (root / "data.mdb").is_file():
        raise UserError(f"{key}: {root} is not an LMDB (a folder *.lmdb with data.mdb and meta_info.txt)")
    entries = []
    for line in read_lines(root / "meta_info.txt", key):
        name, _, rest = line.rpartition(".png (")
        shape = rest.split(")")[0].split(",")
        if not name or len(shape) < 2 or not all(n.isascii() and n.isdecimal() and len(n) < 10 for n in shape):
            raise UserError(
                f"{key}: {root / 'meta_info.txt'} has the line {short(line)}, not like 'name.png (120,125,3) 1'"
            )
        if name.startswith("/") or ".." in PurePosixPath(name).parts or "\0" in name:
            # the image that is saved for it would lie elsewhere
            raise UserError(f"{key}: {root / 'meta_info.txt'} has the key {short(name)}; accepted are names without ..")
        entries.append(ImageEntry(name, int(shape[0]), int(shape[1])))
    if not entries:
        raise UserError(f"{key}: {root / 'meta_info.txt'} lists no image")
    try:
        with lmdb.open(str(root), readonly=True, lock=False) as env:
            size = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    except lmdb.Error as error:
        raise UserError(f"{key}: {root} is not an LMDB that can be read ({error})") from error
    if size > (root / "data.mdb").stat().st_size:  # reading what is missing would end the process
        raise UserError(f"{key}: {root / 'data.mdb'} is cut: it should be {size:,} bytes")
    return entries


def read_image(client: FileClient, path: str, client_key: str = "gt") -> np.ndarray:
    """Decode one image as BasicSR does: BGR, float32 in [0, 1], (H, W, 3). Grey, palette, alpha and 16 bit become that.

    Raises:
        UserError: it is missing, truncated, or no image.
    """
    try:
        content = client.get(path, client_key)
        image = None if content is None else imfrombytes(content, float32=True)
    except (OSError, AttributeError, ValueError, cv2.error, lmdb.Error) as error:  # a failed decode is None in BasicSR
        raise UserError(f"{path}: not an image that can be read") from error
    if image is None:
        raise UserError(f"{path}: no image of this key in the LMDB")
    return image


def imwrite(img: np.ndarray, file_path: str, params: list[int] | None = None, auto_mkdir: bool = True) -> bool:
    """BasicSR's ``imwrite``, but whole or not at all: OpenCV tells nothing of a full disk.

    Args:
        img: as OpenCV takes it.
        file_path: of the image; its suffix is the format.
        params: of OpenCV's encoder.
        auto_mkdir: make the folder.

    Raises:
        UserError: it can't be encoded or written.
    """
    path = Path(file_path)
    if auto_mkdir:
        path.parent.mkdir(parents=True, exist_ok=True)
    done, content = cv2.imencode(path.suffix, img, params or [])
    if not done:
        raise UserError(f"{path}: the image can't be written as {path.suffix}")
    with whole_file(path) as file:
        file.write(content)
    return True
