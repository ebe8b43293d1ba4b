"""The images of a data set: those in folders, lists and LMDBs, which belong together, and what they are called.

Three rules hold for every program, and BasicSR's data sets follow them too (see :mod:`tlw_basicsr.compat`):

- In a folder that has images, hidden files and files of other kinds (``Thumbs.db``, ``desktop.ini``) are ignored.
- The LR image of ``NAME.SUFFIX`` is the one with the template's name and this suffix, else the only one with the
  template's name, whatever its suffix and case.
- An image is called by its stem; if several images share it, by as much of their paths as tells them apart.
"""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import lmdb
from basicsr.utils import scandir as basicsr_scandir

from tlw_basicsr.data.images import SUFFIXES, image_size
from tlw_basicsr.util.errors import UserError, expanded, short
from tlw_basicsr.util.files import read_bytes

IMAGE_NAME = re.compile(rf".+?(?:{'|'.join(map(re.escape, SUFFIXES))})(?=[\s,;]|$)", re.IGNORECASE)
LMDB_LINE = re.compile(r"(.+)\.\w+\s+\((\d{1,9}),\s*(\d{1,9})(?:,\s*\d+)?\)", re.ASCII)


class ImageEntry(NamedTuple):
    """One image of a dataset: its path, or its key in an LMDB, and its size in pixels."""

    path: str
    height: int
    width: int


def scandir(
    dir_path: str, suffix: str | tuple[str, ...] | None = None, recursive: bool = False, full_path: bool = False
) -> Iterator[str]:
    """Like BasicSR's ``scandir``, but a folder that has images yields these alone, unless a ``suffix`` is given.

    With ``recursive`` BasicSR's takes a hidden file, such as macOS' ``.DS_Store``, for a folder.
    """
    folders = [dir_path]
    if recursive:
        folders = [folder for folder, _, _ in os.walk(dir_path, onerror=_raise, followlinks=True)]
    paths = [path for folder in folders for path in basicsr_scandir(folder, suffix, full_path=True)]
    if not full_path:
        paths = [os.path.relpath(path, dir_path) for path in paths]
    images = [path for path in paths if path.lower().endswith(SUFFIXES)]
    yield from paths if suffix is not None or not images else images


def _raise(error: OSError) -> None:
    raise error


def count_below(folder: Path) -> int:
    """Return the number of images in the subfolders of a folder, which :func:`list_folder` leaves out."""
    found = scandir(str(folder), recursive=True)
    return sum(len(Path(name).parts) > 1 and name.lower().endswith(SUFFIXES) for name in found)


def list_folder(folder: Path, key: str, names: Sequence[str] | None = None) -> list[ImageEntry]:
    """Return the images of a folder without its subfolders, or those of the given names. Reads headers only."""
    if not folder.is_dir():
        raise UserError(f"{key}: {folder} is not a folder")
    if names is None:
        names = sorted(name for name in scandir(str(folder)) if name.lower().endswith(SUFFIXES))
    if not names:
        below = count_below(folder)
        where = f", but its subfolders have {below}, which are not read" if below else ""
        raise UserError(f"{key}: {folder} has no image{where}; read are {' '.join(SUFFIXES)}")
    return [ImageEntry(str(folder / name), *image_size(folder / name, key)) for name in names]


def list_images(opt: dict[str, Any], root_key: str = "dataroot_gt", what: str = "datasets") -> list[ImageEntry]:
    """Return the images of the folder or LMDB ``opt[root_key]``; a ``meta_info_file`` restricts them.

    ``what`` is the place of the options in the YAML, or an argument, for messages.
    """
    key = what if what.startswith("--") else f"{what}.{root_key}"  # an argument has no options
    root = expanded(opt[root_key], key)
    if opt["io_backend"]["type"] == "lmdb":
        return list_lmdb(root, key)
    names = read_names(opt["meta_info_file"], f"{what}.meta_info_file") if opt.get("meta_info_file") else None
    return list_folder(root, key, names)


def read_lines(path: str | Path, key: str) -> list[str]:
    """Return the lines of a text file that are not empty, without a byte order mark."""
    try:
        text = read_bytes(expanded(path, key), key).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: {path} can't be read as text") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_names(path: str | Path, key: str) -> list[str]:
    """Return the names in a list such as BasicSR's ``meta_info``, ``NAME (H,W,C) …``; names may have spaces.

    A name ends before the size, else after the first suffix of an image, else before the first space.
    """
    names = []
    for line in read_lines(path, key):
        size = re.search(r"\s\(\d+, *\d+", line)
        found = IMAGE_NAME.match(line)
        names.append(line[: size.start()].rstrip() if size else found[0] if found else line.split()[0])
    return names


def mend_paths(paths: Any, opt: dict[str, Any]) -> Any:
    """Return the paths of a data set, with whole names if it has read its list only up to each line's first space."""
    key = next((key for key in ("meta_info_file", "meta_info") if isinstance(opt.get(key), str)), None)
    if key is None or not isinstance(paths, list):
        return paths
    lines = [line.strip() for line in expanded(opt[key], key).read_text("utf-8").splitlines()]
    for root in [value for name, value in opt.items() if name.startswith("dataroot") and isinstance(value, str)]:
        if paths == [os.path.join(root, line.split(" ")[0]) for line in lines]:  # noqa: PTH118, as BasicSR's
            return [str(Path(root, name)) for name in read_names(opt[key], key)]
    return paths


def read_keys(root: Path, key: str) -> list[ImageEntry]:
    """Return the keys of an LMDB and the sizes of its images, as its ``meta_info.txt`` gives them."""
    if root.suffix != ".lmdb" or not (root / "data.mdb").is_file():
        raise UserError(f"{key}: {root} is not an LMDB (a folder *.lmdb with data.mdb and meta_info.txt)")
    entries = []
    for line in read_lines(root / "meta_info.txt", key):
        found = LMDB_LINE.match(line)
        if not found:
            raise UserError(
                f"{key}: {root / 'meta_info.txt'} has the line {short(line)}, not like 'name.png (120,125,3) 1'"
            )
        name = found[1]
        if name.startswith("/") or ".." in PurePosixPath(name).parts or "\0" in name:
            # the image that is saved for it would lie elsewhere
            raise UserError(f"{key}: {root / 'meta_info.txt'} has the key {short(name)}; accepted are names without ..")
        entries.append(ImageEntry(name, int(found[2]), int(found[3])))
    if not entries:
        raise UserError(f"{key}: {root / 'meta_info.txt'} lists no image")
    return entries


def list_lmdb(root: Path, key: str) -> list[ImageEntry]:
    """Return :func:`read_keys` of an LMDB whose file is whole: reading beyond its end would kill the process."""
    entries = read_keys(root, key)
    try:
        with lmdb.open(str(root), readonly=True, lock=False) as env:
            size = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    except lmdb.Error as error:
        raise UserError(f"{key}: {root} is not an LMDB that can be read ({error})") from error
    if size > (root / "data.mdb").stat().st_size:
        raise UserError(f"{key}: {root / 'data.mdb'} is cut: it should be {size:,} bytes")
    return entries


def pair_names(gt: Sequence[str], lq: Sequence[str], templates: Sequence[str], where: str) -> dict[str, str]:
    """Return the LR image of every HR image, by the first template that fits; ``{}`` in it is the name of HR's stem."""
    names = set(lq)
    by_stem: dict[str, list[str]] = defaultdict(list)
    for name in lq:
        by_stem[stem_of(name).casefold()].append(name)
    pairs: dict[str, str] = {}
    owners: dict[str, str] = {}
    for path in gt:
        stem, suffix = stem_of(path), PurePosixPath(path).suffix
        wanted = [template.replace("{}", stem) for template in templates]
        found = [name + suffix for name in wanted if name + suffix in names][:1]
        for name in [] if found else wanted:
            same = by_stem.get(name.casefold(), [])
            found = found or [f for f in same if stem_of(f) == name] or same
        if len(found) > 1:
            raise UserError(f"{where}: {path} has several LR images, {found[0]} and {found[1]}")
        if not found:
            raise UserError(f"{where}: no LR image for {path}; expected is the name {' or '.join(wanted)}")
        pairs[path] = found[0]
        if owners.setdefault(found[0], path) != path:
            raise UserError(f"{where}: {found[0]} is the LR image of both {owners[found[0]]} and {path}")
    return pairs


def stem_of(path: str) -> str:
    """Return the last part of a path without the suffix of an image; the key of an LMDB keeps what follows its dots."""
    name = PurePosixPath(path.replace("\\", "/")).name
    return name[: -len(suffix)] if (suffix := PurePosixPath(name).suffix).lower() in SUFFIXES else name


# what takes the place of BasicSR's functions of these names; LR comes before HR


def paired_paths_from_folder(folders: Sequence[str], keys: Sequence[str], filename_tmpl: str) -> list[dict[str, str]]:
    """Return ``[{'lq_path': …, 'gt_path': …}, …]`` for the folders of LR and HR."""
    lq, gt = (sorted(scandir(folder)) for folder in folders)
    if len(lq) != len(gt):
        raise UserError(f"{len(gt)} HR images in {folders[1]}, but {len(lq)} LR images in {folders[0]}")
    return _paths(folders, keys, pair_names(gt, lq, [filename_tmpl], folders[0]))


def paired_paths_from_meta_info_file(
    folders: Sequence[str], keys: Sequence[str], meta_info_file: str, filename_tmpl: str
) -> list[dict[str, str]]:
    """Return the pairs of the HR images that the file lists."""
    gt = read_names(meta_info_file, "meta_info_file")
    return _paths(folders, keys, pair_names(gt, list(scandir(folders[0])), [filename_tmpl], folders[0]))


def _paths(folders: Sequence[str], keys: Sequence[str], pairs: dict[str, str]) -> list[dict[str, str]]:
    lq_root, gt_root = map(Path, folders)
    return [{f"{keys[0]}_path": str(lq_root / lq), f"{keys[1]}_path": str(gt_root / gt)} for gt, lq in pairs.items()]


def paths_from_lmdb(folder: str) -> list[str]:
    """Return the keys of an LMDB; BasicSR's own function cuts them at their first dot."""
    return [entry.path for entry in read_keys(Path(folder), "dataroot")]


def paired_paths_from_lmdb(folders: Sequence[str], keys: Sequence[str]) -> list[dict[str, str]]:
    """Return the keys of the LMDBs of LR and HR, which must be the same."""
    lq, gt = (set(paths_from_lmdb(folder)) for folder in folders)
    if lq != gt:
        raise UserError(f"{folders[0]} and {folders[1]} have different keys, such as {short(min(lq ^ gt))}")
    return [{f"{keys[0]}_path": key, f"{keys[1]}_path": key} for key in sorted(gt)]


def name_images(paths: Sequence[str | Path], clean: Callable[[str], str] = str) -> list[str]:
    """Return one name for every path; names of different paths differ, even if case is ignored.

    A name is the stem. Images that would share it are called by as much of their paths as tells them apart: ``a.png``
    and ``a.jpg`` become ``a_png`` and ``a_jpg``, ``x/a.png`` and ``y/a.png`` become ``x_a`` and ``y_a``.
    """
    keys = [str(path).replace("\\", "/") for path in paths]
    longer = {key: _names_of_path(key, number, clean) for number, key in enumerate(dict.fromkeys(keys), 1)}
    names = {key: next(names) for key, names in longer.items()}
    while True:
        bearers: dict[str, list[str]] = defaultdict(list)
        for key, name in names.items():
            bearers[name.casefold()].append(key)
        twins = [key for group in bearers.values() if len(group) > 1 for key in group]
        if not twins:
            return [names[key] for key in keys]
        names.update({key: next(longer[key]) for key in twins})


def _names_of_path(path: str, number: int, clean: Callable[[str], str]) -> Iterator[str]:
    """Yield longer and longer names for one path; the last ones have its number."""
    *folders, last = (part for part in PurePosixPath(path).parts if part != "/")
    stem = stem_of(last)
    for start in range(len(folders), -1, -1):
        for end in dict.fromkeys([stem, last.replace(".", "_") if stem != last else stem]):
            yield clean("_".join([*folders[start:], end]))
    while True:
        stem = f"{stem}_{number}"
        yield clean(stem)
