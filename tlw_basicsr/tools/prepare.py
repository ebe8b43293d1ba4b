"""Training data from large HR images: tiles, LR folders, LMDBs and lists of names.

Every file appears under its name when it is complete, so that a run may be stopped and started again.
``prepare_data.json`` says of which images, by their content, and with which settings the tiles are made: what has
changed since is made again.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
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

from tlw_basicsr.data.bicubic import imresize
from tlw_basicsr.data.images import COMPRESSION, fault_of, image_size, read_8bit, write_image
from tlw_basicsr.data.listing import ImageEntry, list_images, name_images, scandir
from tlw_basicsr.data.tiles import tile_starts
from tlw_basicsr.util.errors import UserError, reason_of, short
from tlw_basicsr.util.files import hold_lock, remove_leftovers, temporary_name, write_text
from tlw_basicsr.util.signals import end_with_parent

T = TypeVar("T")
LQ = "LRbicx"  # and the scale: a folder of LR images


class Source(NamedTuple):
    """An HR image that tiles are cut of.

    Attributes:
        path: of the file.
        tiles: names of its tiles, in the order of :meth:`Cut.grid`.
        mark: what tells whether the file is the same: its size in bytes, time of change and SHA-256.
    """

    path: Path
    tiles: list[str]
    mark: list[Any]


class Cut(NamedTuple):
    """How images are cut, see :func:`prepare`."""

    crop_size: int | None
    step: int
    threshold: int | None
    multiple: int

    def grid(self, height: int, width: int) -> list[tuple[int, int]]:
        """Top and left of every tile of an image."""
        crop = self.crop_size or max(height, width)
        tops, lefts = (tile_starts(side, crop, self.step, self.threshold) for side in (height, width))
        return list(product(tops, lefts))

    def names(self, name: str, entry: ImageEntry) -> list[str]:
        """File names of the tiles of the image that is called ``name``."""
        if self.crop_size is None:
            return [f"{name}.png"]
        return [f"{name}_s{n:03d}.png" for n, _ in enumerate(self.grid(entry.height, entry.width), 1)]


def downscale(image: np.ndarray, scale: int) -> np.ndarray:
    """MATLAB's bicubic of an 8-bit image cut to a multiple of ``scale``."""
    height, width = (side // scale * scale for side in image.shape[:2])
    return imresize(image[:height, :width], 1 / scale)


def make_tiles(source: Source, out: Path, cut: Cut) -> None:
    """Cut one image into PNG tiles in ``out``, of sides that are multiples of ``cut.multiple``."""
    if all((out / name).exists() for name in source.tiles):
        return
    image = read_8bit(source.path)
    height, width = image.shape[:2]
    for (top, left), name in zip(cut.grid(height, width), source.tiles, strict=True):
        tile = image[top:, left:][: cut.crop_size, : cut.crop_size]
        tile_h, tile_w = (side // cut.multiple * cut.multiple for side in tile.shape[:2])
        write_image(np.ascontiguousarray(tile[:tile_h, :tile_w]), out / name, COMPRESSION)


def make_lq(source: Path, out: Path, scale: int) -> None:
    """Write the LR image of one tile, under the same name."""
    if not (out / source.name).exists():
        write_image(downscale(read_8bit(source), scale), out / source.name, COMPRESSION)


def make_lmdb(folder: Path) -> Path:
    """Pack the PNGs of ``folder`` into ``{folder}.lmdb`` with BasicSR's ``meta_info.txt``."""
    target = folder.with_name(f"{folder.name}.lmdb")
    if target.exists():
        return target
    temporary = temporary_name(target)
    paths = sorted(folder.glob("*.png"))
    total = sum(path.stat().st_size for path in paths)
    lines = []
    try:
        with closing(lmdb.open(str(temporary), map_size=2 * total + 2**24)) as env:
            rest = iter(tqdm(paths, desc=target.name, unit="image", disable=None))
            while batch := list(islice(rest, 1000)):
                with env.begin(write=True) as transaction:
                    for path in batch:
                        height, width = image_size(path, "--lmdb")
                        transaction.put(path.stem.encode("ascii"), path.read_bytes())  # as BasicSR reads keys
                        lines.append(f"{path.name} ({height},{width},3) {COMPRESSION[1]}\n")
        write_text("".join(lines), temporary / "meta_info.txt")
        temporary.replace(target)
    except (lmdb.Error, OSError, UnicodeEncodeError) as error:
        raise UserError(f"--lmdb: {target} can't be written ({reason_of(error)})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def in_parallel(work: Callable[[Any], T], items: Iterable[Any], workers: int, title: str) -> list[T]:
    """``work`` of every item, in ``workers`` processes, in their order, with a progress bar on a terminal.

    One worker is this process. They are at most four for each processor: more only cost memory.
    """
    bar = partial(tqdm, desc=title, unit="image", disable=None)
    if workers == 1:
        return [work(item) for item in bar(list(items))]
    with ProcessPoolExecutor(min(workers, 4 * (os.cpu_count() or 1)), initializer=end_with_parent) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            for done in bar(as_completed(futures), total=len(futures)):
                done.result()
            return [future.result() for future in futures]
        except BrokenProcessPool as error:
            raise UserError("--workers: a process was killed, for want of memory perhaps; try fewer") from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def prepare(
    gt: Path,
    out: Path,
    crop_size: int | None = None,
    step: int | None = None,
    threshold: int | None = None,
    scales: Iterable[int] = (),
    multiple: int | None = None,
    lmdb: bool = False,
    workers: int = 1,
) -> dict[str, int]:
    """Make ``out/HR``, ``out/LRbicx{scale}``, their ``.lmdb`` and ``out/meta_info.txt`` of the images in ``gt``.

    Names are what BasicSR reads: those of the images, with ``_`` for spaces and dots, all different.

    Args:
        gt: folder of HR images.
        out: folder to fill. What is complete in it is kept. It must have been made with the same settings, of this
            folder; tiles of images that are gone or have another content since then are deleted, and made anew.
        crop_size: side of the tiles in pixels; None for whole images.
        step: from tile to tile; None for ``crop_size``.
        threshold: see :func:`tlw_basicsr.data.tiles.tile_starts`.
        scales: of the LR folders.
        multiple: cut tiles to a multiple of it; None for the least common multiple of ``scales``.
        lmdb: also make LMDBs.
        workers: processes.

    Returns:
        Numbers of ``images``, ``tiles`` and LR ``images_lq``, and of images whose earlier tiles were ``deleted``.

    Raises:
        UserError: no images, or ``out`` was made with other settings, of another folder, or holds other images.
    """
    scales = sorted(set(scales))
    multiple = multiple or lcm(*scales)
    cut = Cut(crop_size, step or crop_size or 1, threshold, multiple)
    if crop_size and crop_size % multiple:
        raise UserError(f"--crop-size: {crop_size} is not a multiple of {multiple}, the least common one of the scales")
    images = list_images({"folder": str(gt), "io_backend": {"type": "disk"}}, "folder", "--gt")
    need = max([4 * scale for scale in scales] + [multiple])
    for path, height, width in images:
        side = min(height, width, crop_size or height)
        if side // multiple * multiple < need:
            raise UserError(
                f"--scales: tiles of {path}, {height}×{width} pixels, have a side of {side // multiple * multiple} "
                f"as a multiple of {multiple}; needed are {need}, 4 times the largest scale"
            )
    hr, lq = out / "HR", {scale: out / f"{LQ}{scale}" for scale in scales}
    _check_places(out, [hr, *lq.values()])
    _make_folder(out)
    lock = out.absolute().with_name(f".{out.absolute().name}.lock")
    with hold_lock(lock, f"--out: {out}", lambda line: print(line, file=sys.stderr)):
        remove_leftovers(out, *_image_folders(out))
        return _fill(out, gt, images, cut, scales, lmdb, workers)


def _fill(
    out: Path, gt: Path, images: list[ImageEntry], cut: Cut, scales: list[int], lmdb: bool, workers: int
) -> dict[str, int]:
    """:func:`prepare`, of what is checked and with the folder locked."""
    hr, lq = out / "HR", {scale: out / f"{LQ}{scale}" for scale in scales}
    plan = _read_plan(out)
    known = plan.get("images", {})
    if known and cut._asdict() != plan.get("settings"):
        raise UserError(f"--out: {out} was made with other settings, {short(plan['settings'])}; choose another folder")
    marks = dict(zip([e.path for e in images], _marks(images, gt, plan, workers), strict=True))
    names = name_images([entry.path for entry in images], lambda name: re.sub(r"[^\w-]+", "_", name))
    sources = {
        Path(entry.path).name: Source(Path(entry.path), cut.names(name, entry), marks[entry.path])
        for name, entry in zip(names, images, strict=True)
    }
    stale = [name for name, old in known.items() if not _is_same(old, sources.get(name))]
    if stale and plan["gt"] != str(gt.resolve()):
        raise UserError(f"--out: {out} was made of other images, those of {plan['gt']}; choose another folder")
    _check_no_others(out, {tile for s in sources.values() for tile in s.tiles}, known)
    _delete([tile for name in stale for tile in known[name]["tiles"]], out)
    if stale or sources.keys() - known.keys():
        for path in out.glob("*.lmdb"):
            shutil.rmtree(path)
    _write_plan(out, cut, gt, sources)

    hr.mkdir(exist_ok=True)
    in_parallel(partial(make_tiles, out=hr, cut=cut), sources.values(), workers, "HR")
    tiles = [hr / tile for source in sources.values() for tile in source.tiles]
    for scale, folder in lq.items():
        folder.mkdir(exist_ok=True)
        in_parallel(partial(make_lq, out=folder, scale=scale), tiles, workers, folder.name)
    entries = [(path.name, *image_size(path, "--out")) for path in sorted(tiles)]
    write_text("".join(f"{name} ({height},{width},3)\n" for name, height, width in entries), out / "meta_info.txt")
    for folder in [hr, *lq.values()] if lmdb else []:
        make_lmdb(folder)
    made = {"images": len(sources), "tiles": len(tiles), "images_lq": len(tiles) * len(scales)}
    return {**made, "deleted": len(stale)}


# ------------------------------------------------------------------------------------------------- what is there


def _read_plan(out: Path) -> dict[str, Any]:
    """What ``prepare_data.json`` says of what is in ``out``; empty where nothing is."""
    file = out / "prepare_data.json"
    if not file.exists():
        return {}
    try:
        plan = json.loads(file.read_text("utf-8"))
        if not {"settings", "gt", "images"} <= plan.keys():
            raise UserError(f"--out: {file} does not say of which images the tiles are made; choose another folder")
        return plan
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise UserError(f"--out: {file} can't be read ({reason_of(error)}); choose another folder") from error


def _write_plan(out: Path, cut: Cut, gt: Path, sources: dict[str, Source]) -> None:
    images = {name: {"mark": source.mark, "tiles": source.tiles} for name, source in sources.items()}
    plan = {"settings": cut._asdict(), "gt": str(gt.resolve()), "images": images}
    write_text(json.dumps(plan, indent=0), out / "prepare_data.json")


def _marks(images: list[ImageEntry], gt: Path, plan: dict[str, Any], workers: int) -> list[list[Any]]:
    """The marks of all images; where size and time are those of the plan, its SHA-256 is taken."""
    same_folder = plan.get("gt") == str(gt.resolve())
    known = {gt / name: old["mark"] for name, old in plan.get("images", {}).items()} if same_folder else {}
    return in_parallel(mark_of, [(Path(e.path), known.get(Path(e.path))) for e in images], workers, "images")


def mark_of(item: tuple[Path, list[Any] | None]) -> list[Any]:
    """Size in bytes, time of change and SHA-256 of a file; the last from the mark beside it if that fits."""
    path, known = item
    try:
        status = path.stat()
        if known and known[:2] == [status.st_size, status.st_mtime_ns]:
            return known
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(2**20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"--gt: {path} can't be read ({error.strerror})") from error
    return [status.st_size, status.st_mtime_ns, digest.hexdigest()]


def _is_same(old: dict[str, Any], source: Source | None) -> bool:
    """Whether the tiles of the plan are those that the image gives today."""
    return source is not None and old["mark"][2] == source.mark[2] and old["tiles"] == source.tiles


def _image_folders(out: Path) -> list[Path]:
    return [path for path in [out / "HR", *out.glob(f"{LQ}*")] if path.is_dir() and path.suffix != ".lmdb"]


def _check_no_others(out: Path, tiles: set[str], known: dict[str, Any]) -> None:
    """Refuse images in the folders that are neither to be made nor known from before."""
    known_tiles = {tile for old in known.values() for tile in old["tiles"]}
    for folder in _image_folders(out):
        others = set(scandir(str(folder))) - known_tiles
        if not known and others:
            raise UserError(
                f"--out: {folder} has images, such as {min(others)}, and {out / 'prepare_data.json'}, which would say "
                "of what they were made, does not exist; choose another folder"
            )
        if others - tiles:
            raise UserError(f"--out: {folder / min(others - tiles)} is not of --gt; delete it or choose another folder")


def _delete(tiles: list[str], out: Path) -> None:
    """Delete tiles and their LR images, of all scales."""
    for folder in _image_folders(out):
        for name in tiles:
            (folder / name).unlink(missing_ok=True)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {out} can't be written ({error.strerror})") from error


def _check_places(out: Path, folders: list[Path]) -> None:
    """Refuse what stands in the way of the folders and of the list of names, which is written last."""
    for folder in folders:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--out: {folder} is not a folder; delete it or choose another folder")
    if (out / "meta_info.txt").is_dir():
        raise UserError(f"--out: {out / 'meta_info.txt'} is a folder; delete it or choose another folder")


# ------------------------------------------------------------------------------------------------- checking


def check_folder(folder: Path, workers: int = 1) -> tuple[int, list[str]]:
    """Read every image of a folder or LMDB; returns how many there are, and a line for each that can't be read.

    Raises:
        UserError: the folder is missing or has no image.
    """
    if folder.suffix == ".lmdb":
        names = [e.path for e in list_images({"d": str(folder), "io_backend": {"type": "lmdb"}}, "d", "--check")]
        work: Callable[[str], str | None] = partial(_fault_in_lmdb, str(folder))
    else:
        if not folder.is_dir():
            raise UserError(f"--check: {folder} is not a folder")
        names = sorted(scandir(str(folder), recursive=True))
        names, work = [str(folder / name) for name in names], _fault_of_file
    if not names:
        raise UserError(f"--check: {folder} has no image")
    faults = in_parallel(work, names, workers, folder.name)
    return len(names), [f"{name}: {fault}" for name, fault in zip(names, faults, strict=True) if fault]


def _fault_of_file(path: str) -> str | None:
    try:
        return fault_of(Path(path).read_bytes())
    except OSError as error:
        return reason_of(error)


def _fault_in_lmdb(folder: str, key: str) -> str | None:
    try:
        content = FileClient("lmdb", db_paths=[folder], client_keys=["gt"]).get(key, "gt")
    except (lmdb.Error, UnicodeEncodeError) as error:
        return reason_of(error)
    return "no image of this key in the LMDB" if content is None else fault_of(content)
