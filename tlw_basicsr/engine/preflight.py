"""Checks the files that the options name by their headers, before anything is built or made."""

from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import Any

from basicsr.utils.registry import DATASET_REGISTRY

from tlw_basicsr.data.bicubic_sr_dataset import check_sizes
from tlw_basicsr.data.listing import ImageEntry, list_images, pair_names
from tlw_basicsr.engine.options import KNOWN_SETS
from tlw_basicsr.registry import OTHER, find_origin, lookup
from tlw_basicsr.util.errors import UserError
from tlw_basicsr.util.kinds import Options

LONGEST_EPOCH = 20_000_000  # samples, whose order is a list in memory


def check_files(opt: Options) -> None:
    """Check by their headers the images of all sets, and that folders and checkpoints exist."""
    for key, dataset_opt in opt["datasets"].items():
        check_folders(dataset_opt, f"datasets.{key}")
        check_images(dataset_opt, f"datasets.{key}", opt)
    for key, value in opt["path"].items():
        names_file = key.startswith(("pretrain_network_", "resume_state"))
        if names_file and value is not None and not Path(value).is_file():
            raise UserError(f"path.{key}: {value} is not a file")
    if get_wandb_options(opt) and find_spec("wandb") is None:
        raise UserError("logger.wandb.project: wandb is not installed; pip install wandb, or delete the project")


def get_wandb_options(opt: Options) -> Options:
    """Return the options of wandb, or an empty dict where it is not used."""
    options = (opt.get("logger") or {}).get("wandb") or {}
    return options if options.get("project") and "debug" not in opt["name"] else {}


def check_folders(opt: dict[str, Any], place: str) -> None:
    """Check that the folders ``dataroot_*`` of a data set exist; what a third party's reads is its own affair."""
    if find_origin(lookup(DATASET_REGISTRY, opt, place)) == OTHER:
        return
    for key in [k for k in opt if k.startswith("dataroot") and opt[k] is not None]:
        for folder in opt[key] if isinstance(opt[key], list) else [opt[key]]:
            if not Path(folder).is_dir():
                raise UserError(f"{place}.{key}: {folder} is not a folder")


def count_batch(dataset_opt: dict[str, Any], opt: Options) -> int:
    """Count the samples in a batch of one process, which without a launcher serves all GPUs."""
    return dataset_opt["batch_size_per_gpu"] * (1 if opt["dist"] else max(opt["num_gpu"], 1))


def check_batch(images: int, dataset_opt: dict[str, Any], opt: Options) -> None:
    """Check that an epoch of ``images`` images fills at least one batch of a process (BasicSR would train nothing)."""
    ratio = dataset_opt.get("dataset_enlarge_ratio", 1)
    if images * ratio > LONGEST_EPOCH:
        raise UserError(
            f"datasets.train.dataset_enlarge_ratio: {ratio} times {images} images make an epoch of more than "
            f"{LONGEST_EPOCH:,}; accepted is at most {LONGEST_EPOCH // images}"
        )
    images = ceil(images * ratio / opt["world_size"])
    batch = count_batch(dataset_opt, opt)
    if images < batch:
        raise UserError(
            f"datasets.train.batch_size_per_gpu: a batch of {batch} is more than the {images} images of a "
            "process in an epoch; lower it or raise dataset_enlarge_ratio"
        )


def check_images(opt: dict[str, Any], place: str, options: Options) -> None:
    """Check by the headers that the images of BicubicSRDataset and PairedImageDataset exist and fit the scale."""
    if not _is_known(opt, place):
        return
    scale, train = opt["scale"], opt["phase"] == "train"
    entries = list_images(opt, what=place)
    mod_crop = scale if train else opt.get("mod_crop") or scale
    check_sizes(entries, opt.get("gt_size") if train else None, mod_crop, scale, place)
    if train:
        check_batch(len(entries), opt, options)
        if not opt.get("gt_size") and count_batch(opt, options) > 1:
            check_one_size(entries, opt, place)
    if opt["type"] == "BicubicSRDataset":
        return
    lq_opt = {**opt, "meta_info_file": None}
    lmdb = opt["io_backend"]["type"] == "lmdb"
    lq_entries = {e.path if lmdb else Path(e.path).name: e for e in list_images(lq_opt, "dataroot_lq", place)}
    if len(lq_entries) != len(entries) and not opt.get("meta_info_file"):
        raise UserError(f"{place}: {len(entries)} HR images, but {len(lq_entries)} LR images")
    names = [entry.path for entry in entries]
    if lmdb:  # both have the same keys
        pairs = {name: name for name in names}
    else:
        pairs = pair_names(names, list(lq_entries), [opt.get("filename_tmpl", "{}")], f"{place}.dataroot_lq")
    for gt in entries:
        lq = lq_entries.get(pairs[gt.path])
        if lq is None:
            raise UserError(f"{place}.dataroot_lq: no LR image of the key {gt.path}")
        fits = (gt.height, gt.width) == (lq.height * scale, lq.width * scale)
        # BasicSR cuts HR to LR's size outside training
        if not fits and (train or gt.height < lq.height * scale or gt.width < lq.width * scale):
            raise UserError(
                f"{place}: {gt.path} is {gt.height}×{gt.width}, which is not {scale} times the {lq.height}×{lq.width} "
                f"of {lq.path}"
            )


def _is_known(opt: Options, place: str) -> bool:
    """Whether the images of a data set can be listed here; forks take other options."""
    kind = lookup(DATASET_REGISTRY, opt, place)
    if kind.__name__ not in KNOWN_SETS or find_origin(kind) == OTHER:
        return False
    folders = not any(isinstance(opt.get(key), list) for key in ("dataroot_gt", "dataroot_lq"))
    return folders and opt["io_backend"].get("type") in ("disk", "lmdb")


def check_one_size(entries: list[ImageEntry], opt: dict[str, Any], place: str) -> None:
    """Check that whole images can be joined to a batch."""
    sizes = {(e.height // opt["scale"], e.width // opt["scale"]): e for e in entries}
    if opt.get("use_rot"):
        sizes |= {(w, h): e for (h, w), e in sizes.items()}
    if len(sizes) > 1:
        (_, a), (_, b) = list(sizes.items())[:2]
        raise UserError(
            f"{place}.gt_size: ~ with more than one image in a batch needs images of one size (square ones with "
            f"use_rot); {a.path} is {a.height}×{a.width}, {b.path} is {b.height}×{b.width}"
        )
