"""Decoded images in a folder, which training sets read by memory maps instead of decoding files again and again.

Every image is one ``.npy`` file, called by the SHA-256 of its source's content. So a replaced image is never read
stale, runs and data sets share the folder, and it may be deleted whenever no run uses it.
"""

import errno
import hashlib
import mmap
import os
import shutil
import sys
import time
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from basicsr.data.paired_image_dataset import PairedImageDataset
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

from tlw_basicsr.data.bicubic_sr_dataset import BicubicSRDataset
from tlw_basicsr.data.images import Pixels, count_pixels, decode_levels, open_client, read_content
from tlw_basicsr.util.errors import UserError, expanded, reason_of
from tlw_basicsr.util.files import hold_lock, remove_leftovers, whole_file

FULL = (errno.ENOSPC, errno.EDQUOT)
Source = tuple[str, str]  # path or LMDB key of an image, and the client's key: gt or lq


class Map(NamedTuple):
    """A file of the cache: where the pixels of what size begin."""

    file: Path
    shape: tuple[int, int, int]
    offset: int


class CacheClient:
    """Takes the place of BasicSR's ``FileClient`` in a data set, and gives pixels where that gives a file's content."""

    def __init__(self, maps: dict[Source, Map]) -> None:
        self.maps = maps

    def get(self, filepath: str, client_key: str) -> Pixels:
        """Return the pixels of an image, (H, W, 3), BGR; those that are used are read from the disk."""
        file, shape, offset = self.maps[filepath, client_key]
        with open(file, "rb") as opened:
            content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)  # a third of np.memmap's time
        return Pixels(np.frombuffer(content, np.uint8, offset=offset).reshape(shape))


def use_cache(dataset: Any, opt: dict[str, Any], where: str, quiet: bool = False) -> str:
    """Let a training set read its images from the folder ``opt["cache"]``, which gets what it lacks.

    A terminal shows progress bars, unless this is ``quiet``, as all processes of a group but one should be.

    Returns:
        A line for the log.

    Raises:
        UserError: The data set reads in another way, an image can't be read, or the disk has no room.
    """
    if isinstance(dataset, BicubicSRDataset):
        sources = [(entry.path, "gt") for entry in dataset.entries]
    elif isinstance(dataset, PairedImageDataset):
        sources = [(pair[f"{key}_path"], key) for pair in dataset.paths for key in ("gt", "lq")]
    else:
        known = "BicubicSRDataset and PairedImageDataset"
        raise UserError(f"{where}.cache: {opt['type']} does not read from a cache; accepted are {known}")
    folder = expanded(opt["cache"], f"{where}.cache")
    try:
        dataset.file_client, line = fill(folder, sources, open_client(opt), f"{where}.cache", quiet)
    except OSError as error:
        raise UserError(f"{where}.cache: {error.filename or folder} can't be used ({reason_of(error)})") from error
    return line


def fill(folder: Path, sources: list[Source], client: Any, where: str, quiet: bool = False) -> tuple[CacheClient, str]:
    """Decode into ``folder`` what it lacks of the sources; return what reads them, and a line for the log."""
    start = time.perf_counter()
    in_threads = partial(
        thread_map, max_workers=os.cpu_count(), unit="image", disable=True if quiet else None, leave=False
    )
    folder.mkdir(parents=True, exist_ok=True)
    found = in_threads(partial(_find, folder, client), sources, desc=f"looking into {folder}")
    maps: dict[Source, Any] = dict(zip(sources, found, strict=True))
    lacking = [source for source, each in maps.items() if each is None]
    if lacking:
        with hold_lock(folder / ".lock", str(folder), _say, wait=True) as held:
            if held:
                remove_leftovers(folder)
            need = sum(in_threads(partial(_count, folder, client), lacking, desc="measuring"))
            free = shutil.disk_usage(folder).free
            if need > free:
                raise UserError(
                    f"{where}: {folder} needs {need / 1e6:,.0f} MB more, and its disk has {free / 1e6:,.0f} MB free; "
                    "make room, name a folder elsewhere, or delete the option"
                )
            made: list[Path] = []
            try:
                added = in_threads(partial(_add, folder, client, made), lacking, desc=f"decoding into {folder}")
            except UserError as error:
                if isinstance(error.__cause__, OSError) and error.__cause__.errno in FULL:
                    for file in made:
                        file.unlink(missing_ok=True)
                raise
            maps.update(zip(lacking, added, strict=True))
    size = sum(int(np.prod(shape)) for _, shape, _ in set(maps.values()))
    line = f"Cache {folder}: {len(maps):,} images, {size / 1e6:,.0f} MB of pixels"
    return CacheClient(maps), f"{line}; {len(lacking):,} were decoded, in {time.perf_counter() - start:.1f} s in all."


def _find(folder: Path, client: Any, source: Source) -> Map | None:
    return _open(_name(folder, read_content(client, *source)))


def _name(folder: Path, content: bytes) -> Path:
    # another version of OpenCV may decode other levels
    return folder / f"{hashlib.sha256(cv2.__version__.encode() + content).hexdigest()}.npy"


def _open(file: Path) -> Map | None:
    """Return a file of the cache, or None where it is missing or damaged."""
    try:
        with open(file, "rb") as opened:
            np.lib.format.read_magic(opened)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(opened)
            offset = opened.tell()
            whole = os.fstat(opened.fileno()).st_size == offset + np.prod(shape)
    except (FileNotFoundError, ValueError):
        return None
    return Map(file, shape, offset) if whole and len(shape) == 3 and dtype == np.uint8 and not fortran else None


def _count(folder: Path, client: Any, source: Source) -> int:
    """Return the bytes that a source will take in the cache, 0 if another run has just added it."""
    content = read_content(client, *source)
    return 0 if _open(_name(folder, content)) else 3 * count_pixels(content) + 2**12


def _add(folder: Path, client: Any, made: list[Path], source: Source) -> Map:
    content = read_content(client, *source)  # once more: the name must be that of what is decoded
    file = _name(folder, content)
    if (found := _open(file)) is None:
        buffer = BytesIO()
        np.save(buffer, decode_levels(content, source[0]))
        with whole_file(file) as opened:
            opened.write(buffer.getbuffer())
        made.append(file)
        found = _open(file)
        assert found is not None  # it has just been written
    return found


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)
