"""Training data from large HR images: tiles, LR folders, LMDBs and lists of names.

Every file appears under its name when it is complete, so that a run may be stopped and started again.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import cv2
import lmdb
import numpy as np
from basicsr.utils.lmdb_util import LmdbMaker
from tqdm import tqdm

from tlw_basicsr.data.bicubic import imresize
from tlw_basicsr.data.images import ImageEntry, image_size, list_images
from tlw_basicsr.errors import UserError, reason_of, short
from tlw_basicsr.files import write_text

COMPRESSION = [cv2.IMWRITE_PNG_COMPRESSION, 3]


def tile_starts(length: int, crop: int, step: int, threshold: int | None) -> list[int]:
    """Where the tiles of one side begin.

    Args:
        length: of the side, in pixels.
        crop: side of a tile; a shorter ``length`` is one tile.
        step: from one tile to the next; ``crop`` for tiles that do not overlap.
        threshold: add a last tile that ends at the border if more than this many pixels are left there; None for
            no such tile.
    """
    if length <= crop:
        return [0]
    starts = list(range(0, length - crop + 1, step))
    if threshold is not None and length - crop - starts[-1] > threshold:
        starts.append(length - crop)
    return starts


def write_image(image: np.ndarray, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    ok, content = cv2.imencode(".png", image, COMPRESSION)
    if not ok:
        raise UserError(f"{path}: the image can't be written as PNG")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.tobytes())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):  # the name may be too long for this too
            temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: can't be written ({error.strerror})") from error


def read_8bit(path: Path) -> np.ndarray:
    """Decode an image as 8-bit BGR (H, W, 3)."""
    image = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise UserError(f"{path}: not an image that can be read")
    return image


def downscale(image: np.ndarray, scale: int) -> np.ndarray:
    """MATLAB's bicubic of an 8-bit image cut to a multiple of ``scale``."""
    height, width = (side // scale * scale for side in image.shape[:2])
    return imresize(image[:height, :width], 1 / scale)


def make_tiles(source: Path, out: Path, crop: int | None, step: int, threshold: int | None, multiple: int) -> int:
    """Cut one image into PNG tiles ``{name}_s001.png``, … in ``out``; the whole image is one without ``crop``.

    Every tile is cut to a multiple of ``multiple``. Returns how many tiles the image has.
    """
    height, width = image_size(source, "--gt")
    crop_h, crop_w = crop or height, crop or width
    grid = list(product(tile_starts(height, crop_h, step, threshold), tile_starts(width, crop_w, step, threshold)))
    names = [f"{source.stem}_s{number:03d}.png" for number in range(1, len(grid) + 1)]
    if crop is None:
        names = [f"{source.stem}.png"]
    if all((out / name).exists() for name in names):
        return len(grid)
    image = read_8bit(source)
    for (top, left), name in zip(grid, names, strict=True):
        tile = image[top : top + crop_h, left : left + crop_w]
        tile_h, tile_w = (side // multiple * multiple for side in tile.shape[:2])
        write_image(np.ascontiguousarray(tile[:tile_h, :tile_w]), out / name)
    return len(grid)


def make_lq(source: Path, out: Path, scale: int) -> None:
    """Write the LR image of one tile, under the same name."""
    if not (out / source.name).exists():
        write_image(downscale(read_8bit(source), scale), out / source.name)


def make_lmdb(folder: Path) -> Path:
    """Pack the PNGs of ``folder`` into ``{folder}.lmdb`` with BasicSR's ``meta_info.txt``."""
    target = folder.with_name(f"{folder.name}.lmdb")
    if target.exists():
        return target
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp.lmdb")
    shutil.rmtree(temporary, ignore_errors=True)
    paths = sorted(folder.glob("*.png"))
    total = sum(path.stat().st_size for path in paths)
    try:
        maker = LmdbMaker(str(temporary), map_size=2 * total + 2**24, compress_level=COMPRESSION[1])
        for path in tqdm(paths, desc=target.name, unit="image", disable=None):
            height, width = image_size(path, "--lmdb")
            maker.put(path.read_bytes(), path.stem, (height, width, 3))
        maker.close()
        temporary.replace(target)
    except (lmdb.Error, OSError, UnicodeEncodeError) as error:  # BasicSR's keys are ASCII
        raise UserError(f"--lmdb: {target} can't be written ({reason_of(error)})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def in_parallel(work: Callable[[Path], Any], paths: Iterable[Path], workers: int, title: str) -> list[Any]:
    """``work`` of every path, in ``workers`` processes, with a progress bar on a terminal; in no order.

    They are at most four for each processor: more only cost memory.
    """
    paths = list(paths)
    with ProcessPoolExecutor(min(workers, 4 * (os.cpu_count() or 1))) as pool:
        futures = [pool.submit(work, path) for path in paths]
        try:
            bar = tqdm(as_completed(futures), total=len(futures), desc=title, unit="image", disable=None)
            return [future.result() for future in bar]
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

    Args:
        gt: folder of HR images.
        out: folder to fill. What is complete in it is kept; it must have been made with the same settings.
        crop_size: side of the tiles in pixels; None for whole images.
        step: from tile to tile; None for ``crop_size``.
        threshold: see :func:`tile_starts`.
        scales: of the LR folders.
        multiple: cut tiles to a multiple of it; None for the least common multiple of ``scales``.
        lmdb: also make LMDBs.
        workers: processes.

    Returns:
        Numbers of ``images``, ``tiles`` and LR ``images_lq``.

    Raises:
        UserError: no images, names that would overwrite each other, or other settings than ``out`` was made with.
    """
    scales = sorted(set(scales))
    multiple = multiple or int(np.lcm.reduce(scales or [1]))
    step = step or crop_size or 1
    if crop_size and crop_size % multiple:
        raise UserError(f"--crop-size: {crop_size} is not a multiple of {multiple}, the least common one of the scales")
    images = _list(gt, "--gt")
    need = max([4 * scale for scale in scales] + [multiple])
    for path, height, width in images:
        side = min(height, width, crop_size or height)
        if side // multiple * multiple < need:
            raise UserError(
                f"--scales: tiles of {path}, {height}×{width} pixels, have a side of {side // multiple * multiple} "
                f"as a multiple of {multiple}; needed are {need}, 4 times the largest scale"
            )
    sources = [Path(entry.path) for entry in images]
    stems = [path.stem for path in sources]
    if len(set(stems)) < len(stems):
        twice = next(stem for stem in stems if stems.count(stem) > 1)
        raise UserError(f"--gt: {gt} has several images named {twice}; their tiles would overwrite each other")

    _check_places(out, ["HR", *(f"LRbicx{scale}" for scale in scales)])
    _same_settings(out, {"crop_size": crop_size, "step": step, "threshold": threshold, "multiple": multiple})
    hr = out / "HR"
    hr.mkdir(parents=True, exist_ok=True)
    cut = partial(make_tiles, out=hr, crop=crop_size, step=step, threshold=threshold, multiple=multiple)
    tiles = sum(in_parallel(cut, sources, workers, "HR"))
    entries = _list(hr, "--out")
    folders = [hr]
    for scale in scales:
        folders.append(out / f"LRbicx{scale}")
        folders[-1].mkdir(exist_ok=True)
        shrink = partial(make_lq, out=folders[-1], scale=scale)
        in_parallel(shrink, [Path(entry.path) for entry in entries], workers, folders[-1].name)
    lines = [f"{Path(entry.path).name} ({entry.height},{entry.width},3)\n" for entry in entries]
    write_text("".join(lines), out / "meta_info.txt")
    if lmdb:
        for folder in folders:
            make_lmdb(folder)
    return {"images": len(sources), "tiles": tiles, "images_lq": len(entries) * len(scales)}


def _list(folder: Path, what: str) -> list[ImageEntry]:
    return list_images({"folder": str(folder), "io_backend": {"type": "disk"}}, "folder", what)


def _same_settings(out: Path, settings: dict[str, Any]) -> None:
    """Remember the settings in ``out``, or refuse others than those remembered."""
    file = out / "prepare_data.json"
    if file.exists():
        try:
            earlier = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"--out: {file} can't be read ({reason_of(error)}); choose another folder") from error
        if earlier != settings:
            raise UserError(f"--out: {out} was made with other settings, {short(earlier)}; choose another folder")
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {out} can't be written ({error.strerror})") from error
    write_text(json.dumps(settings), file)


def _check_places(out: Path, folders: list[str]) -> None:
    """Refuse what stands in the way of the folders and of the list of names, which is written last."""
    for folder in [out / name for name in folders]:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--out: {folder} is no folder; delete it or choose another folder")
    if (out / "meta_info.txt").is_dir():
        raise UserError(f"--out: {out / 'meta_info.txt'} is a folder; delete it or choose another folder")


if __name__ == "__main__":
    from tlw_basicsr.cli import run_command

    run_command("prepare")
