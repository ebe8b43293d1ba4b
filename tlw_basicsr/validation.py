"""Validation: what can be known of it is told before training, and what fails in it costs nothing that was trained.

BasicSR's own compares with the HR image of the last training batch where a set has none, and takes the mean of all
images for not a number where one is.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from basicsr.metrics import calculate_metric as basicsr_calculate_metric
from basicsr.models.base_model import BaseModel
from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import DATASET_REGISTRY, METRIC_REGISTRY
from torch.utils.data import Dataset

from tlw_basicsr.data.images import undo_normalization
from tlw_basicsr.data.listing import ImageEntry, list_images, name_images
from tlw_basicsr.errors import UserError, first_line
from tlw_basicsr.kinds import Options
from tlw_basicsr.networks import build_network
from tlw_basicsr.parts import lookup

MOST_SIZES = 8  # of a set's images, on which the network is tried
LQ_ALONE = "SingleImageDataset"  # has no HR images
FITTING_SIDES = [48, 64, 56, 60, 72]  # of windows of 6, 7, 8, 12 and 16 pixels


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


# ------------------------------------------------------------------------------------------------- before


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


def compares(metric: Mapping[str, Any]) -> bool:
    """Whether a metric of ``val.metrics`` compares with the HR image."""
    parameter = inspect.signature(lookup(METRIC_REGISTRY, metric, "val.metrics")).parameters.get("img2")
    return parameter is not None and parameter.default is parameter.empty


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
    from tlw_basicsr.options import find_model  # it knows of models, which need what is here

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


def calculate_metric(data: Mapping[str, Any], opt: Mapping[str, Any]) -> Any:
    """BasicSR's; a value that is not a number is an error. ``img`` and ``img1``, its name of before 1.3.5, are one.

    Raises:
        UserError: the metric gives NaN.
    """
    parameters = inspect.signature(METRIC_REGISTRY.get(opt["type"])).parameters
    images = {("img" if key == "img1" else key): value for key, value in data.items()}
    if "img1" in parameters:
        images["img1"] = images.pop("img")
    options = {key: value for key, value in deepcopy(dict(opt)).items() if key != "better"}
    value = basicsr_calculate_metric(images, options)
    if np.ndim(value) == 0 and np.isnan(value):
        shape = np.shape(next(iter(images.values())))
        raise UserError(f"{opt['type']} gives no number for an image of {shape[0]}×{shape[1]} pixels")
    return value


# ------------------------------------------------------------------------------------------------- names


def names_of_sets(datasets: Sequence[Dataset], apart: bool) -> list[list[str] | None]:
    """A name for every item of the sets, all different; None for a set that does not tell its paths.

    Args:
        datasets: with their options as ``opt``.
        apart: their images are saved in one folder, as in a training.
    """
    paths = [_paths(dataset) for dataset in datasets]
    together = apart and sum(each is not None for each in paths) > 1

    def key(path: str, dataset: Any) -> str:
        parts = PurePosixPath(path.replace("\\", "/"))
        return str(parts.parent / dataset.opt["name"] / parts.name) if together else str(parts)

    keys = [[key(path, dataset) for path in each or []] for each, dataset in zip(paths, datasets, strict=True)]
    if not apart:
        return [name_images(each) if known is not None else None for each, known in zip(keys, paths, strict=True)]
    names = iter(name_images([one for each in keys for one in each]))
    return [[next(names) for _ in each] if known is not None else None for each, known in zip(keys, paths, strict=True)]


def _paths(dataset: Any) -> list[str] | None:
    """The LR paths of a data set's items."""
    if hasattr(dataset, "entries"):
        return [entry.path for entry in dataset.entries]
    paths = getattr(dataset, "paths", None)
    if not isinstance(paths, list) or len(paths) != len(dataset):
        return None
    found = [path.get("lq_path") if isinstance(path, dict) else path for path in paths]
    names = [path for path in found if isinstance(path, str)]
    return names if len(names) == len(found) else None


# ------------------------------------------------------------------------------------------------- within


@contextmanager
def validate_alone(model: Any, dataset: Any) -> Iterator[None]:
    """Within it a model validates on ``dataset`` by what that has, and leaves no trace in the training.

    Images that the set has normalised by ``mean`` and ``std`` are measured and saved as they are in [0, 1], where the
    model goes through it as BasicSR's SRModel. The training batch's HR image is away; metrics that need HR images are
    left out where the set has none, and so are values of other sets. Networks come back in the modes that they were in,
    also where the validation fails.
    """
    networks = [net for net in vars(model).values() if isinstance(net, torch.nn.Module)]
    training = {part: part.training for net in networks for part in net.modules()}
    vars(model).pop("gt", None)
    vars(model).pop("metric_results", None)
    val = model.opt.get("val") or {}
    metrics = val.get("metrics")
    if metrics and type(getattr(dataset, "dataset", dataset)).__name__ == LQ_ALONE:
        val["metrics"] = {name: metric for name, metric in metrics.items() if not compares(metric)} or None
    opt = dataset.opt
    if opt.get("mean") is not None and type(model).nondist_validation is SRModel.nondist_validation:
        # BasicSR's takes the images for those in [0, 1]
        visuals = model.get_current_visuals
        model.get_current_visuals = lambda: {key: undo_normalization(image, opt) for key, image in visuals().items()}
    try:
        yield
    finally:
        vars(model).pop("get_current_visuals", None)
        if metrics:
            val["metrics"] = metrics
        for part, mode in training.items():
            part.training = mode
