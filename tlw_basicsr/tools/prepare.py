"""Training data from large HR images: tiles, LR folders, LMDBs and lists of names.

Every file appears under its name only when it is complete, so a run may be stopped and started again. The record
``prepare_data.json`` says with which settings and from which images, by their content, the tiles are made; tiles of
images that have changed or are gone are deleted.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from functools import partial
from itertools import islice, product
from math import lcm
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import lmdb
import numpy as np
from basicsr.utils import FileClient
from tqdm import tqdm

from tlw_basicsr.data.bicubic import imresize, to_8_bits
from tlw_basicsr.data.cache import fill
from tlw_basicsr.data.images import COMPRESSION, find_fault, image_size, read_8bit, write_image
from tlw_basicsr.data.listing import ImageEntry, count_below, list_folder, list_lmdb, name_images, scandir
from tlw_basicsr.data.tiles import tile_starts
from tlw_basicsr.util.errors import UserError, reason_of, short
from tlw_basicsr.util.files import hold_lock, read_bytes, remove_leftovers, temporary_name, write_text
from tlw_basicsr.util.signals import end_with_parent

T = TypeVar("T")
LQ = "LRbicx"  # a folder of LR images is called this and its scale
RECORD = "prepare_data.json"


Record = dict[str, Any]  # what prepare_data.json holds: settings, gt, and images: {file name: {sha256, tiles}}


class Cut(NamedTuple):
    """How images are cut, see :func:`prepare`."""

    crop_size: int | None
    step: int
    threshold: int | None
    multiple: int

    def grid(self, height: int, width: int) -> list[tuple[int, int]]:
        """Return top and left of every tile of an image."""
        crop = self.crop_size or max(height, width)
        tops, lefts = (tile_starts(side, crop, self.step, self.threshold) for side in (height, width))
        return list(product(tops, lefts))

    def names(self, name: str, entry: ImageEntry) -> list[str]:
        """Return the file names of the tiles of the image that is called ``name``."""
        if self.crop_size is None:
            return [f"{name}.png"]
        return [f"{name}_s{n:03d}.png" for n, _ in enumerate(self.grid(entry.height, entry.width), 1)]


def make_tiles(item: tuple[str, list[str]], gt: Path, out: Path, cut: Cut) -> None:
    """Cut one image of ``gt`` into the named tiles in ``out``, with sides that are multiples of ``cut.multiple``."""
    image_name, names = item
    if all((out / name).exists() for name in names):
        return
    image = read_8bit(gt / image_name)
    for (top, left), name in zip(cut.grid(*image.shape[:2]), names, strict=True):
        tile = image[top:, left:][: cut.crop_size, : cut.crop_size]
        height, width = (side // cut.multiple * cut.multiple for side in tile.shape[:2])
        write_image(np.ascontiguousarray(tile[:height, :width]), out / name, COMPRESSION)


def make_lq(tile: Path, out: Path, scale: int, borders: str = "mirror", rounding: str = "twice") -> None:
    """Write the LR image of one tile, under the same name: MATLAB's bicubic of 8 bits."""
    if not (out / tile.name).exists():
        image = read_8bit(tile)
        height, width = (side // scale * scale for side in image.shape[:2])
        image = image[:height, :width].astype(np.uint8 if rounding == "twice" else np.float32)
        write_image(to_8_bits(imresize(image, 1 / scale, borders=borders)), out / tile.name, COMPRESSION)


def make_lmdb(folder: Path) -> None:
    """Pack the PNGs of ``folder`` into ``{folder}.lmdb`` with BasicSR's ``meta_info.txt``.

    BasicSR reads ASCII keys alone: other characters of a name become their numbers, é becomes ``_xe9``.
    """
    target = folder.with_name(f"{folder.name}.lmdb")
    if target.exists():
        return
    temporary = temporary_name(target)
    paths = sorted(folder.glob("*.png"))
    keys = name_images(paths, lambda name: name.encode("ascii", "backslashreplace").decode().replace("\\", "_"))
    total = sum(path.stat().st_size for path in paths)
    lines = []
    try:
        with closing(lmdb.open(str(temporary), map_size=2 * total + 2**24)) as env:
            rest = iter(tqdm(list(zip(keys, paths, strict=True)), desc=target.name, unit="image", disable=None))
            while batch := list(islice(rest, 1000)):
                with env.begin(write=True) as transaction:
                    for key, path in batch:
                        height, width = image_size(path, "--lmdb")
                        transaction.put(key.encode("ascii"), path.read_bytes())
                        lines.append(f"{key}.png ({height},{width},3) {COMPRESSION[1]}\n")
        write_text("".join(lines), temporary / "meta_info.txt")
        temporary.replace(target)
    except (lmdb.Error, OSError) as error:
        raise UserError(f"--lmdb: {target} can't be written ({reason_of(error)})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def in_parallel(work: Callable[[Any], T], items: Iterable[Any], workers: int, title: str) -> list[T]:
    """Return the results of ``work`` for every item, from ``workers`` processes; a single worker is this process.

    There are at most four workers for each processor: more only cost memory. A terminal shows a progress bar.
    """
    items = list(items)
    bar = partial(tqdm, total=len(items), desc=title, unit="image", disable=None)
    if workers == 1:
        return [work(item) for item in bar(items)]
    with ProcessPoolExecutor(min(workers, 4 * (os.cpu_count() or 1)), initializer=end_with_parent) as pool:
        try:
            return list(bar(pool.map(work, items)))  # an error cancels the items after it
        except BrokenProcessPool as error:
            raise UserError("--workers: a process was killed, perhaps for lack of memory; try fewer") from error


def prepare(
    gt: Path,
    out: Path,
    crop_size: int | None = None,
    step: int | None = None,
    threshold: int | None = None,
    scales: Iterable[int] = (),
    multiple: int | None = None,
    lmdb: bool = False,
    cache: Path | None = None,
    workers: int = 1,
    borders: str = "mirror",
    rounding: str = "twice",
) -> dict[str, int]:
    """Make ``out/HR``, ``out/LRbicx{scale}``, their ``.lmdb`` and ``out/meta_info.txt`` from the images in ``gt``.

    With ``cache``, also fill that folder with the decoded images, for the option ``datasets.train.cache``.

    Names are those of the images, with ``_`` for spaces and dots, which BasicSR does not read, and all different. What
    an earlier run with the same settings has made is kept, except tiles of images that are gone or have changed. The
    arguments are those of ``tlw prepare``; None for ``crop_size`` means whole images, for ``step`` no overlap, for
    ``threshold`` no tiles at the border (see :func:`tlw_basicsr.data.tiles.tile_starts`), for ``multiple`` the least
    common multiple of the scales. LR images that are not MATLAB's of 8 bits lie in folders of their own, such as
    ``LRbicx4_replicate`` and ``LRbicx8_once``.

    Returns:
        Numbers of ``images``, ``tiles`` and LR ``images_lq``, of images whose earlier tiles were ``deleted``, and of
        images in subfolders that were ``left_out``.
    """
    scales = sorted(set(scales))
    multiple = multiple or lcm(*scales)
    cut = Cut(crop_size, step or crop_size or 1, threshold, multiple)
    if crop_size and crop_size % multiple:
        raise UserError(f"--crop-size: {crop_size} is not a multiple of {multiple}, the least common one of the scales")
    images = list_folder(gt, "--gt")
    need = max([4 * scale for scale in scales] + [multiple])
    for path, height, width in images:
        side = min(height, width, crop_size or height) // multiple * multiple
        if side < need:
            raise UserError(
                f"--scales: tiles of {path}, {height}×{width} pixels, have a side of {side} as a multiple of "
                f"{multiple}; needed are {need}, 4 times the largest scale"
            )
    suffix = "".join(f"_{value}" for value in (borders, rounding) if value not in ("mirror", "twice"))
    hr, lq = out / "HR", {scale: out / f"{LQ}{scale}{suffix}" for scale in scales}
    for path in (hr, *lq.values(), out / "meta_info.txt"):
        if path.exists() and path.is_dir() == (path.name == "meta_info.txt"):
            kind = "a folder" if path.is_dir() else "not a folder"
            raise UserError(f"--out: {path} is {kind}; delete it or choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    with hold_lock(out / ".prepare.lock", f"--out: {out}", lambda line: print(line, file=sys.stderr)):
        remove_leftovers(out, *_image_folders(out))
        sources, deleted = _update_record(out, gt, images, cut, workers)
        hr.mkdir(exist_ok=True)
        in_parallel(partial(make_tiles, gt=gt, out=hr, cut=cut), sources.items(), workers, "HR")
        tiles = [hr / tile for names in sources.values() for tile in names]
        for scale, folder in lq.items():
            folder.mkdir(exist_ok=True)
            work = partial(make_lq, out=folder, scale=scale, borders=borders, rounding=rounding)
            in_parallel(work, tiles, workers, folder.name)
        sizes = [(tile.name, *image_size(tile, "--out")) for tile in sorted(tiles)]
        write_text("".join(f"{name} ({height},{width},3)\n" for name, height, width in sizes), out / "meta_info.txt")
        for folder in [hr, *lq.values()] if lmdb else []:
            make_lmdb(folder)
        if cache:  # LMDBs hold the same files
            folders = [hr, *lq.values()]
            fill(cache, [(str(f / tile.name), "gt") for f in folders for tile in tiles], FileClient("disk"), "--cache")
    made = {"images": len(sources), "tiles": len(tiles), "images_lq": len(tiles) * len(scales)}
    return {**made, "deleted": deleted, "left_out": count_below(gt)}


def _update_record(
    out: Path, gt: Path, images: list[ImageEntry], cut: Cut, workers: int
) -> tuple[dict[str, list[str]], int]:
    """Compare the images with the record, delete the tiles of those that have changed or are gone, and write it anew.

    Return the names of every image's tiles by the name of its file, and the number of images whose tiles were deleted.
    """
    record = _read_record(out)
    known = record["images"]
    if known and record["settings"] != cut._asdict():
        settings = short(record["settings"])
        raise UserError(f"--out: {out} was made with other settings, {settings}; choose another folder")
    paths = [Path(entry.path) for entry in images]
    names = name_images(paths, lambda name: re.sub(r"[^\w-]+", "_", name))
    digests = in_parallel(_digest, paths, workers, "images")
    sources = {
        path.name: {"sha256": digest, "tiles": cut.names(name, entry)}
        for path, digest, name, entry in zip(paths, digests, names, images, strict=True)
    }
    stale = [name for name, source in known.items() if sources.get(name) != source]
    if stale and record["gt"] != str(gt.resolve()):
        raise UserError(f"--out: {out} was made from other images, those of {record['gt']}; choose another folder")
    known_tiles = {tile for source in known.values() for tile in source["tiles"]}
    for folder in _image_folders(out):
        if others := set(scandir(str(folder))) - known_tiles:
            raise UserError(
                f"--out: {folder / min(others)} is not in the record of earlier runs, {out / RECORD}; delete it or "
                "choose another folder"
            )
    for folder in _image_folders(out):
        for tile in [tile for name in stale for tile in known[name]["tiles"]]:
            (folder / tile).unlink(missing_ok=True)
        if sources != known:
            shutil.rmtree(folder.with_name(f"{folder.name}.lmdb"), ignore_errors=True)
    record = {"settings": cut._asdict(), "gt": str(gt.resolve()), "images": sources}
    write_text(json.dumps(record, indent=0), out / RECORD)
    return {name: source["tiles"] for name, source in sources.items()}, len(stale)


def _read_record(out: Path) -> Record:
    """Read the record of earlier runs; it is empty where there is no file."""
    file = out / RECORD
    if not file.exists():
        return {"images": {}}
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--out: {file} can't be read ({reason_of(error)}); choose another folder") from error
    match content:
        case {"settings": dict(), "gt": str(), "images": dict(images)}:
            content["images"] = {name: _read_entry(entry) for name, entry in images.items()}
            if all(content["images"].values()):
                return content
    raise UserError(f"--out: {file} does not say from which images the tiles are made; choose another folder")


def _read_entry(entry: Any) -> Record | None:
    """Return an image of the record, also of one with size and time beside the SHA-256; None if it is malformed."""
    match entry:
        case {"sha256": str(digest), "tiles": [*tiles]} | {"mark": [_, _, str(digest)], "tiles": [*tiles]}:
            # files of these names are deleted, so none may lie elsewhere
            if all(isinstance(tile, str) and Path(tile).name == tile for tile in tiles):
                return {"sha256": digest, "tiles": tiles}
    return None


def _digest(path: Path) -> str:
    return hashlib.sha256(read_bytes(path, "--gt")).hexdigest()


def _image_folders(out: Path) -> list[Path]:
    return [path for path in (out / "HR", *out.glob(f"{LQ}*")) if path.is_dir() and path.suffix != ".lmdb"]


def check_folder(folder: Path, workers: int = 1) -> tuple[int, list[str]]:
    """Read every image of a folder, with its subfolders, or of an LMDB.

    Return the number of images, and a line for each that can't be read. A folder without images is a UserError.
    """
    backend: dict[str, Any] = {"backend": "disk"}
    if folder.suffix == ".lmdb":
        backend = {"backend": "lmdb", "db_paths": [str(folder)], "client_keys": ["gt"]}
        names = [entry.path for entry in list_lmdb(folder, "--check")]
    elif folder.is_dir():
        names = [str(folder / name) for name in sorted(scandir(str(folder), recursive=True))]
    else:
        raise UserError(f"--check: {folder} is not a folder")
    if not names:
        raise UserError(f"--check: {folder} has no image")
    faults = in_parallel(partial(_find_fault, backend), names, workers, folder.name)
    return len(names), [f"{name}: {fault}" for name, fault in zip(names, faults, strict=True) if fault]


def _find_fault(backend: dict[str, Any], name: str) -> str | None:
    try:
        content = FileClient(**backend).get(name, "gt")
    except (OSError, lmdb.Error, UnicodeEncodeError) as error:
        return reason_of(error)
    return "no image of this key in the LMDB" if content is None else find_fault(content)
