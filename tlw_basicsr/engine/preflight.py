"""Checks of the files that the options name, before a folder is made or an iteration run."""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from itertools import product
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from basicsr.models.base_model import BaseModel
from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import DATASET_REGISTRY, LOSS_REGISTRY
from torch import nn

from tlw_basicsr.data.bicubic_sr_dataset import check_sizes
from tlw_basicsr.data.listing import ImageEntry, list_images, pair_names
from tlw_basicsr.engine.options import find_model
from tlw_basicsr.losses.tlw_loss import TLWLoss
from tlw_basicsr.models.training import device_names
from tlw_basicsr.models.uncertainty_model import FeatureTap
from tlw_basicsr.models.validation import LQ_ALONE, calculate_metric, compares
from tlw_basicsr.networks import build_network, check_fit, read_network
from tlw_basicsr.registry import OTHER, find_doubts, find_origin, keep_arguments, lookup, overrides
from tlw_basicsr.util.errors import UserError, first_line
from tlw_basicsr.util.kinds import Options

LONGEST_EPOCH = 20_000_000  # samples, whose order is a list in memory
MOST_SIZES = 8  # of a set's images, on which the network is tried
FITTING_SIDES = [48, 64, 56, 60, 72]  # of windows of 6, 7, 8, 12 and 16 pixels


def check_files(opt: Options) -> None:
    """Check images, checkpoints, losses and the distance's weights.

    Raises:
        UserError: the first thing that is wrong, in one line that names the file.
    """
    for key, dataset_opt in opt["datasets"].items():
        place = f"datasets.{key}"
        check_folders(dataset_opt, place)
        check_images(dataset_opt, place, opt)
    for key, value in opt["path"].items():
        names_file = key.startswith(("pretrain_network_", "resume_state"))
        if names_file and value is not None and not Path(value).is_file():
            raise UserError(f"path.{key}: {value} is not a file")
    for key in [k for k in opt if k.startswith("network_")]:
        check_network(opt, key)
    check_forward(opt)
    if opt["is_train"]:
        check_losses(opt)
    if opt["is_train"] and opt["model_type"] == "UncertaintyModel":
        check_uncertainty(opt)
    check_validation(opt)
    if get_wandb_options(opt) and find_spec("wandb") is None:
        raise UserError("logger.wandb.project: wandb is not installed; pip install wandb, or delete the project")


def count_channels(dataset_opt: Options) -> int:
    """Channels of a data set's images: one with BasicSR's ``color: y``."""
    return 1 if dataset_opt.get("color") == "y" else 3


def tell_color(channels: int) -> str:
    """The reason for images of one channel, for a message."""
    return "; the images have one channel, by color: y of the data set" if channels == 1 else ""


def check_losses(opt: Options) -> None:
    """Build the losses; D and the weighting network are tried on noise of the training's size and channels."""
    for key, section in opt["train"].items():
        if not str(key).endswith("_opt") or not section:
            continue
        place, call = f"train.{key}", lookup(LOSS_REGISTRY, section, f"train.{key}")
        try:
            with torch.random.fork_rng(devices=[]), device_names(opt):
                loss = call(**keep_arguments(section, call))
        except UserError:
            raise
        except Exception as error:  # of what kind is up to the loss
            raise UserError(
                f"{place}: {section['type']} can't be built from these options ({first_line(error)})"
                f"{find_doubts(section, call)}"
            ) from error
        if isinstance(loss, TLWLoss) and isinstance(loss.distance, nn.Module):
            check_distance(loss.distance, opt)
            check_weighting(opt)


def check_distance(distance: nn.Module, opt: Options) -> None:
    """Check on noise of the training's size that the distance gives one value per sample."""
    channels, size = count_channels(opt["datasets"]["train"]), opt["datasets"]["train"].get("gt_size")
    size = size if isinstance(size, int) and size else 64
    images = torch.rand((2, 2, channels, size, size), generator=torch.Generator().manual_seed(0))
    place = "train.pixel_opt.distance"
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            value = distance(*images)
    except Exception as error:
        raise UserError(
            f"{place}: fails on images of {size}×{size} pixels ({first_line(error)}){tell_color(channels)}"
        ) from error
    if not torch.is_tensor(value) or value.shape != (2,):
        shape = tuple(getattr(value, "shape", ()))
        raise UserError(f"{place}: expected a loss with one value per sample, got shape {shape} for two samples")


def check_weighting(opt: Options) -> None:
    """Check that the weighting network gives weights of the images' channels."""
    channels = count_channels(opt["datasets"]["train"])
    shape = (2, channels, 32, 32)
    net = build_network(opt, "network_w", "cpu")
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            w = net(torch.zeros(shape), torch.ones(shape), 0.5)
    except Exception as error:
        hint = f"{tell_color(channels)}; num_in_ch: {channels} is for them"
        raise UserError(f"network_w: fails on images of shape {shape} ({first_line(error)}){hint}") from error
    if not torch.is_tensor(w) or w.shape != shape:
        got = tuple(w.shape) if torch.is_tensor(w) else type(w).__name__
        raise UserError(f"network_w: gives {got} for images of shape {shape}; expected are weights of that shape")


def check_forward(opt: Options) -> None:
    """Check that the SR network makes an image ``scale`` times as large of one, where it is known to be fed so.

    Not known are a plugin's data set, a plugin's model with methods of its own to feed or test the network, and models
    and networks of other inputs. The batch is the training's, of at most two: batch norm needs more than one value.
    """
    if not _takes_one_image(opt):
        return
    scale, train = opt["scale"], opt["datasets"]["train"] if opt["is_train"] else {}
    channels = count_channels(train or next(iter(opt["datasets"].values())))
    batch = min(count_batch(train, opt), 2) if train else 1
    # a network of windows takes multiples of these alone; of whole images and RealESRGANDataset's the size isn't known
    known = train.get("type") in ("BicubicSRDataset", "PairedImageDataset") and train.get("gt_size")
    sides = [train["gt_size"] // scale] if known else [48, 64, 56, 60, 72]
    devices = ["meta", "cuda" if opt["num_gpu"] and torch.cuda.is_available() else "cpu"]
    failure: Exception | None = None
    for device, side in product(devices, sides):
        shape, expected = (batch, channels, side, side), (batch, channels, side * scale, side * scale)
        net = build_network(opt, "network_g", device)
        if len(_required(net.forward)) != 1:
            return
        try:
            sr = _forward(net.train(opt["is_train"]), shape, device)
            break
        except Exception as error:  # on "meta" perhaps for want of values, on the last device for its own reasons
            failure = error
    else:
        reason = first_line(failure) if failure else ""
        raise UserError(f"network_g: fails on images of shape {shape} ({reason}){tell_color(channels)}") from failure
    got = tuple(sr.shape) if torch.is_tensor(sr) else type(sr).__name__
    if got != expected:
        raise UserError(
            f"network_g: gives {got} for images of shape {shape}; expected is {expected}{tell_color(channels)}"
        )


def _takes_one_image(opt: Options) -> bool:
    """Whether the model feeds ``network_g`` with images and takes one from it, as far as its class tells."""
    model, feeding = find_model(opt), ["feed_data", "optimize_parameters"]
    if not opt["is_train"]:
        feeding = ["feed_data", "test", "nondist_validation"]
    kinds = [lookup(DATASET_REGISTRY, dataset, "datasets") for dataset in opt["datasets"].values()]
    return (
        "scale" in opt
        and inspect.isclass(model)
        and issubclass(model, SRModel)
        and not {"VideoBaseModel", "HiFaceGANModel"} & {c.__name__ for c in inspect.getmro(model)}
        and not overrides(model, *feeding)
        and all(find_origin(kind) != OTHER for kind in kinds)
    )


def _required(call: Callable) -> list[str]:
    parameters = inspect.signature(call).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _forward(net: nn.Module, shape: tuple[int, ...], device: str) -> Any:
    """The output for zeros on ``device``; random numbers are left alone."""
    gpus = [torch.cuda.current_device()] if device == "cuda" else []
    makes = torch.device("meta") if device == "meta" else nullcontext()  # also what the network itself makes
    with torch.no_grad(), torch.random.fork_rng(devices=gpus), makes:
        return net(torch.zeros(shape, device=device))


def check_uncertainty(opt: Options) -> None:
    """Check that the head of the uncertainty baseline gives a map of the SR image's size from the named features."""
    net_g, net_u = build_network(opt, "network_g"), build_network(opt, "network_u")
    tap = FeatureTap(net_g, (opt["train"].get("uncertainty") or {}).get("features", "upsample"))
    lq = torch.zeros(1, 3, 16, 16, device=next(net_g.parameters()).device)
    features = None
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            sr = net_g(lq)
            features = tap.take()
            s = net_u(features)
    except UserError:
        raise
    except Exception as error:
        what = "network_g: fails on an image" if features is None else "network_u: fails on features"
        shape = tuple((lq if features is None else features).shape)
        raise UserError(f"{what} of shape {shape} ({first_line(error)})") from error
    # a network that pads the image, as HAT does, has features of the padded one
    padded = (*sr.shape[:2], *(side * opt["scale"] for side in features.shape[2:]))
    if s.shape not in (sr.shape, padded):
        raise UserError(f"network_u: gives {tuple(s.shape)} where the SR image is {tuple(sr.shape)}; set its upscale")


def get_wandb_options(opt: Options) -> Options:
    """The options of wandb; empty where it isn't used."""
    options = (opt.get("logger") or {}).get("wandb") or {}
    return options if options.get("project") and "debug" not in opt["name"] else {}


def check_folders(opt: dict[str, Any], place: str) -> None:
    """Check that the folders ``dataroot_*`` of a data set of any type exist."""
    for key in [k for k in opt if k.startswith("dataroot") and opt[k] is not None]:
        for folder in opt[key] if isinstance(opt[key], list) else [opt[key]]:
            if not Path(folder).is_dir():
                raise UserError(f"{place}.{key}: {folder} is not a folder")


def count_batch(dataset_opt: dict[str, Any], opt: Options) -> int:
    """Samples in a batch of one process, which without a launcher serves all GPUs."""
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
    kind = lookup(DATASET_REGISTRY, opt, place).__name__
    if kind not in ("BicubicSRDataset", "PairedImageDataset"):
        return
    scale, train = opt["scale"], opt["phase"] == "train"
    entries = list_images(opt, what=place)
    mod_crop = scale if train else opt.get("mod_crop") or scale
    check_sizes(entries, opt.get("gt_size") if train else None, mod_crop, scale, place)
    if train:
        check_batch(len(entries), opt, options)
        if not opt.get("gt_size") and count_batch(opt, options) > 1:
            check_one_size(entries, opt, place)
    if kind == "BicubicSRDataset":
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


def check_network(opt: Options, key: str) -> None:
    """Build network ``key``, and compare the checkpoint that ``path`` names for it."""
    net = build_network(opt, key)
    label = key.removeprefix("network_")
    path = opt["path"].get(f"pretrain_network_{label}")
    if path is not None:
        what = f"path.pretrain_network_{label}"
        state = read_network(path, opt["path"].get(f"param_key_{label}", "params"), what)
        check_fit(state, net, opt["path"].get(f"strict_load_{label}") is not False, path, what)


# ------------------------------------------------------------------------------------------------- validation


class ValidationSet(NamedTuple):
    """What is known of a validation or test set.

    Attributes:
        key: in ``datasets``.
        name: of the set.
        images: LR images' sizes; None where only the data set's class knows.
        has_gt: whether there are HR images; True where that is not known.
        channels: of the images.
    """

    key: str
    name: str
    images: list[ImageEntry] | None
    has_gt: bool
    channels: int


def validation_sets(opt: Options) -> list[ValidationSet]:
    """The sets that a training validates on, or a test is made of."""
    sets = []
    for key, dataset in opt["datasets"].items():
        if dataset.get("phase") == "train":
            continue
        kind = lookup(DATASET_REGISTRY, dataset, f"datasets.{key}").__name__
        root = {
            "BicubicSRDataset": "dataroot_gt",
            "PairedImageDataset": "dataroot_lq",
            "SingleImageDataset": "dataroot_lq",
        }
        images = None
        if kind in root:
            if "io_backend" not in dataset or root[kind] not in dataset:
                raise UserError(f"datasets.{key}: {kind} needs io_backend and {root[kind]}")
            listed = dataset if kind != "PairedImageDataset" else {**dataset, "meta_info_file": None}
            images = list_images(listed, root[kind], f"datasets.{key}")
        if images and kind == "BicubicSRDataset":
            scale, multiple = opt["scale"], dataset.get("mod_crop") or opt["scale"]
            lq = [[side // multiple * multiple // scale for side in size] for _, *size in images]
            images = [ImageEntry(image.path, *size) for image, size in zip(images, lq, strict=True)]
        channels = 1 if dataset.get("color") == "y" else 3
        sets.append(ValidationSet(key, dataset["name"], images, kind != LQ_ALONE, channels))
    return sets


def check_validation(opt: Options) -> None:
    """Check that sets have names of their own, metrics take their images, and the network takes their sizes.

    Raises:
        UserError: in one line that names the option and the image.
    """
    if not opt.get("val"):
        return
    sets, keys = validation_sets(opt), {}
    for each in sets:
        if each.name in keys:  # their images, and their best values, would replace each other's
            raise UserError(
                f"datasets.{each.key}.name: {each.name} is also that of datasets.{keys[each.name]}; name another"
            )
        keys[each.name] = each.key
    if opt["val"].get("save_best") and not hasattr(BaseModel, "_update_best_metric_result"):
        raise UserError("val.save_best: needs BasicSR 1.3.4.4 or later, which knows of best metrics; delete it")
    for name, metric in (opt["val"].get("metrics") or {}).items():
        check_metric(name, metric, sets, opt)
    for each in sets:
        check_sizes_of_network(each, opt)


def check_metric(name: str, metric: dict[str, Any], sets: list[ValidationSet], opt: Options) -> None:
    """Try a metric on noise of the size of each set's smallest image."""
    where = f"val.metrics.{name}"
    without = [each.key for each in sets if not each.has_gt]
    best = opt["val"].get("save_best") == name and sets and not sets[0].has_gt
    if compares(metric) and without and (best or len(without) == len(sets)):
        raise UserError(
            f"{where}: {metric['type']} compares with HR images, and datasets.{without[0]} has none; delete it (images "
            "are saved without metrics too), or take a data set of pairs" + (" as the first" if best else "")
        )
    for each in sets:
        if compares(metric) and not each.has_gt:
            continue
        size, of = (64, 64), ""
        if each.images:
            smallest = min(each.images, key=lambda image: min(image.height, image.width))
            scale = opt.get("scale", 1)
            size, of = (smallest.height * scale, smallest.width * scale), f", the size of {smallest.path}"
        elif metric["type"] == "calculate_niqe":
            continue  # it needs larger images than are tried where the sizes are not known
        shape = size if each.channels == 1 else (*size, 3)
        image, other = np.random.default_rng(0).integers(0, 256, (2, *shape), dtype=np.uint8)
        try:
            calculate_metric({"img": image, "img2": other}, metric)
        except Exception as error:
            reason = str(error) if isinstance(error, UserError) else first_line(error)
            raise UserError(
                f"{where}: {metric['type']} fails with these options on {size[0]}×{size[1]} pixels of {each.channels} "
                f"channels{of} ({reason})"
            ) from error


def check_sizes_of_network(each: ValidationSet, opt: Options) -> None:
    """Try the network without its values on the sizes of a set, where the model gives it images as they are."""
    model = find_model(opt)
    own = any(getattr(model, name, None) is not getattr(SRModel, name) for name in ("test", "nondist_validation"))
    if not each.images or own:  # it may pad, or go by tiles
        return
    sizes: dict[tuple[int, int], ImageEntry] = {}
    for image in sorted(each.images, key=lambda image: image.height * image.width):
        sizes.setdefault((image.height, image.width), image)
    step = max(len(sizes) // MOST_SIZES, 1)
    net = build_network(opt, "network_g").to("meta").eval()
    for size, image in list(sizes.items())[::step]:
        failure = _failure(net, each.channels, size)
        if failure and any(_failure(net, each.channels, (side, side)) is None for side in FITTING_SIDES):
            raise UserError(
                f"datasets.{each.key}: {opt['network_g']['type']} fails on {size[0]}×{size[1]} pixels, the LR size of "
                f"{image.path} ({first_line(failure)}); a model that pads to what it takes is SwinIRModel"
            ) from failure


def _failure(net: torch.nn.Module, channels: int, size: tuple[int, int]) -> Exception | None:
    """How a network without values fails on an image of this size; None if it does not."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.device("meta"):
            net(torch.zeros((1, channels, *size)))
    except Exception as error:
        return error
    return None
