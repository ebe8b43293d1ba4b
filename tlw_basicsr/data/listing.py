"""Which images a data set has: those of folders, lists and LMDBs, their pairs, and one name for each.

Three rules hold for every program, and BasicSR's data sets follow them too (see :mod:`tlw_basicsr.compat`):

- In a folder that has images, files of other kinds (``Thumbs.db``, ``desktop.ini``) and hidden ones count for nothing.
- The LR image of ``NAME.SUFFIX`` is the one with the template's name and this suffix, else the only one with the
  template's name, whatever its suffix and case.
- An image is called by its stem; where several have it, by as much of its path as tells them apart.
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

# a name of a list ends before the size that follows it, else at the first suffix of an image, else at the first space
NAME = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(.+?)\s+\(\d+, *\d+",
        rf"(.+?(?:{'|'.join(map(re.escape, SUFFIXES))}))(?=[\s,;]|$)",
        r"(\S+)",
    )
]
LMDB_LINE = re.compile(r"(.+)\.\w+\s+\((\d{1,9}),\s*(\d{1,9})(?:,\s*\d+)?\)", re.ASCII)


class ImageEntry(NamedTuple):
    """One image of a dataset: its path, or its key in an LMDB, and its size in pixels."""

    path: str
    height: int
    width: int


# ------------------------------------------------------------------------------------------------- listing


def scandir(
    dir_path: str, suffix: str | tuple[str, ...] | None = None, recursive: bool = False, full_path: bool = False
) -> Iterator[str]:
    """BasicSR's ``scandir`` for data sets: where there are images and no ``suffix`` is asked for, the images alone."""
    paths = list(basicsr_scandir(dir_path, suffix, recursive, full_path))
    images = [path for path in paths if path.lower().endswith(SUFFIXES)]
    yield from paths if suffix is not None or not images else images


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
    key = what if what.startswith("--") else f"{what}.{root_key}"  # an argument has no options
    root = expanded(opt[root_key], key)
    if opt["io_backend"]["type"] == "lmdb":
        entries = read_keys(root, key)
        _check_whole(root, key)
        return entries
    if not root.is_dir():
        raise UserError(f"{key}: {root} is not a folder")
    if opt.get("meta_info_file"):
        names = read_names(opt["meta_info_file"], f"{what}.meta_info_file")
    else:
        names = sorted(name for name in scandir(str(root)) if name.lower().endswith(SUFFIXES))
    if not names:
        raise UserError(f"{key}: {root} has no image; read are {' '.join(SUFFIXES)}")
    return [ImageEntry(str(root / name), *image_size(root / name, key)) for name in names]


def read_lines(path: str | Path, key: str) -> list[str]:
    """The lines of a text file that are not empty, without a byte order mark."""
    file = expanded(path, key)
    try:
        if file.exists() and not file.is_file():  # of which /dev/zero would never end
            raise UserError(f"{key}: {path} is not a file")
        return [line.strip() for line in file.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {path} can't be read as text ({type(error).__name__})") from error


def read_names(path: str | Path, key: str) -> list[str]:
    """The names in a list such as BasicSR's ``meta_info``, ``NAME (H,W,C) …``; they may have spaces.

    What follows a name, such as its size and further columns, is left out.
    """
    return [next(m[1] for pattern in NAME if (m := pattern.match(line))) for line in read_lines(path, key)]


def mend_paths(paths: Any, opt: dict[str, Any]) -> Any:
    """The paths of a data set that has read its list of names itself, up to each line's first space, by the rule here.

    Args:
        paths: of BasicSR's data sets; others are given back as they are.
        opt: its options, of which ``meta_info_file`` or ``meta_info`` is the list.
    """
    key = next((key for key in ("meta_info_file", "meta_info") if isinstance(opt.get(key), str)), None)
    if key is None or not isinstance(paths, list):
        return paths
    lines = [line.strip() for line in expanded(opt[key], key).read_text("utf-8").splitlines()]
    for root in [value for name, value in opt.items() if name.startswith("dataroot") and isinstance(value, str)]:
        if paths == [os.path.join(root, line.split(" ")[0]) for line in lines]:  # noqa: PTH118, as BasicSR's
            return [str(Path(root, name)) for name in read_names(opt[key], key)]
    return paths


def read_keys(root: Path, key: str) -> list[ImageEntry]:
    """The keys of an LMDB and its images' sizes, by its ``meta_info.txt``.

    Raises:
        UserError: it is not an LMDB as BasicSR has them.
    """
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


def _check_whole(root: Path, key: str) -> None:
    """Check that an LMDB's file is as long as it says: reading what is missing would end the process."""
    try:
        with lmdb.open(str(root), readonly=True, lock=False) as env:
            size = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    except lmdb.Error as error:
        raise UserError(f"{key}: {root} is not an LMDB that can be read ({error})") from error
    if size > (root / "data.mdb").stat().st_size:
        raise UserError(f"{key}: {root / 'data.mdb'} is cut: it should be {size:,} bytes")


# ------------------------------------------------------------------------------------------------- pairs


def pair_names(gt: Sequence[str], lq: Sequence[str], templates: Sequence[str], where: str) -> dict[str, str]:
    """The LR image of every HR image, by their names.

    Args:
        gt: names of HR images, with suffixes; of a name with folders the last part counts.
        lq: names of LR images.
        templates: of LR names without suffix, ``{}`` for HR's; the first that fits counts.
        where: the option, for the message.

    Raises:
        UserError: an HR image has no LR image or several, or two HR images have the same.
    """
    same_suffix = {name: name for name in lq}
    same_stem: dict[str, list[str]] = defaultdict(list)
    for name in lq:
        same_stem[stem_of(name).casefold()].append(name)
    pairs: dict[str, str] = {}
    owners: dict[str, str] = {}

    def find(path: str) -> str:
        stem, suffix = stem_of(path), PurePosixPath(path).suffix
        wanted = [template.replace("{}", stem) for template in templates]
        for name in wanted:
            if name + suffix in same_suffix:
                return name + suffix
        for name in wanted:
            found = same_stem.get(name.casefold(), [])
            found = [f for f in found if stem_of(f) == name] or found
            if len(found) > 1:
                raise UserError(f"{where}: {path} has several LR images, {found[0]} and {found[1]}")
            if found:
                return found[0]
        raise UserError(f"{where}: no LR image for {path}; expected is the name {' or '.join(wanted)}")

    for path in gt:
        pairs[path] = find(path)
        if owners.setdefault(pairs[path], path) != path:
            raise UserError(f"{where}: {pairs[path]} is the LR image of both {owners[pairs[path]]} and {path}")
    return pairs


def stem_of(path: str) -> str:
    """The last part of a path without its suffix; of an LMDB's key, which has none, all after the last dot stays."""
    name = PurePosixPath(path.replace("\\", "/")).name
    return name[: -len(suffix)] if (suffix := PurePosixPath(name).suffix).lower() in SUFFIXES else name


def paired_paths_from_folder(folders: Sequence[str], keys: Sequence[str], filename_tmpl: str) -> list[dict[str, str]]:
    """BasicSR's, by the rules above: ``[{'lq_path': …, 'gt_path': …}, …]`` of the folders of LR and HR."""
    lq, gt = (sorted(scandir(folder)) for folder in folders)
    if len(lq) != len(gt):
        raise UserError(f"{len(gt)} HR images in {folders[1]}, but {len(lq)} LR images in {folders[0]}")
    return _paths(folders, keys, pair_names(gt, lq, [filename_tmpl], folders[0]))


def paired_paths_from_meta_info_file(
    folders: Sequence[str], keys: Sequence[str], meta_info_file: str, filename_tmpl: str
) -> list[dict[str, str]]:
    """BasicSR's, by the rules above: of the HR images that the file lists."""
    gt = read_names(meta_info_file, "meta_info_file")
    return _paths(folders, keys, pair_names(gt, list(scandir(folders[0])), [filename_tmpl], folders[0]))


def _paths(folders: Sequence[str], keys: Sequence[str], pairs: dict[str, str]) -> list[dict[str, str]]:
    lq_root, gt_root = map(Path, folders)
    return [{f"{keys[0]}_path": str(lq_root / lq), f"{keys[1]}_path": str(gt_root / gt)} for gt, lq in pairs.items()]


def paths_from_lmdb(folder: str) -> list[str]:
    """BasicSR's, whose keys end at their first dot: the keys of an LMDB."""
    return [entry.path for entry in read_keys(Path(folder), "dataroot")]


def paired_paths_from_lmdb(folders: Sequence[str], keys: Sequence[str]) -> list[dict[str, str]]:
    """BasicSR's, whose keys end at their first dot: the keys that the LMDBs of LR and HR both have."""
    lq, gt = (set(paths_from_lmdb(folder)) for folder in folders)
    if lq != gt:
        raise UserError(f"{folders[0]} and {folders[1]} have different keys, such as {short(min(lq ^ gt))}")
    return [{f"{keys[0]}_path": key, f"{keys[1]}_path": key} for key in sorted(gt)]


# ------------------------------------------------------------------------------------------------- names


def name_images(paths: Sequence[str | Path], clean: Callable[[str], str] = str) -> list[str]:
    """One name for every path, all different, also where case does not count.

    It is the stem; of images that would have one name, as much of the path as tells them apart: ``a.png`` and ``a.jpg``
    are ``a_png`` and ``a_jpg``, ``x/a.png`` and ``y/a.png`` are ``x_a`` and ``y_a``.

    Args:
        paths: of files, or keys of an LMDB; one that comes twice has one name.
        clean: what a name becomes, such as without spaces.
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
    """Longer and longer names of one path; the last ones have its number."""
    *folders, last = (part for part in PurePosixPath(path).parts if part != "/")
    stem = stem_of(last)
    ends = [stem, last.replace(".", "_")] if stem != last else [stem]
    for count in range(len(folders) + 1):
        for end in ends:
            yield clean("_".join([*folders[len(folders) - count :], end]))
    while True:
        stem = f"{stem}_{number}"
        yield clean(stem)
