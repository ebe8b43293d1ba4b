"""Validation that measures what a set has, and leaves no trace in the training.

BasicSR's own compares with the HR image of the last training batch where a set has none, and reports NaN for a whole
set if the metric of one image is NaN.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
from basicsr.metrics import calculate_metric as basicsr_calculate_metric
from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import METRIC_REGISTRY

from tlw_basicsr.data.images import undo_normalization
from tlw_basicsr.data.listing import name_images
from tlw_basicsr.registry import lookup
from tlw_basicsr.util.errors import UserError

LQ_ALONE = "SingleImageDataset"  # has no HR images
OLD_ENOUGH = 0.01  # share of a training's first network in a moving average


def compares(metric: Mapping[str, Any]) -> bool:
    """Whether a metric of ``val.metrics`` compares with the HR image."""
    parameter = inspect.signature(lookup(METRIC_REGISTRY, metric, "val.metrics")).parameters.get("img2")
    return parameter is not None and parameter.default is parameter.empty


def calculate_metric(data: Mapping[str, Any], opt: Mapping[str, Any]) -> Any:
    """Compute a metric by BasicSR's ``calculate_metric``, and refuse NaN.

    The images are uint8 (H, W, C), under ``img`` (``img1`` before BasicSR 1.3.5) and ``img2``.
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


def describe_average(decay: float, iterations: int) -> str:
    """Say of a moving average whose share of the training's first network, decay^iterations, is large that it is."""
    share = decay**iterations if 0 < decay < 1 and iterations > 0 else 0
    return f", a young average: {share:.0%} of it is the training's first network" if share > OLD_ENOUGH else ""


def names_of_sets(datasets: Sequence[Any]) -> list[list[str] | None]:
    """Name every item of the sets, whose images are saved in one folder, differently; a set without paths gets None."""
    paths = [list_paths(dataset) for dataset in datasets]
    together = sum(each is not None for each in paths) > 1
    keys: list[str] = []
    for dataset, each in zip(datasets, paths, strict=True):
        for path in map(PurePosixPath, (path.replace("\\", "/") for path in each or [])):
            keys.append(str(path.parent / dataset.opt["name"] / path.name if together else path))
    names = iter(name_images(keys))
    return [each and [next(names) for _ in each] for each in paths]


def list_paths(dataset: Any) -> list[str] | None:
    """Return the LR paths of a data set's items, or None where it does not list them."""
    if hasattr(dataset, "entries"):
        return [entry.path for entry in dataset.entries]
    paths = getattr(dataset, "paths", None)
    if not isinstance(paths, list) or len(paths) != len(dataset):
        return None
    found: list[Any] = [path.get("lq_path") if isinstance(path, dict) else path for path in paths]
    return found if all(isinstance(path, str) for path in found) else None


@contextmanager
def validate_alone(model: Any, dataset: Any) -> Iterator[None]:
    """Let a model validate on ``dataset`` by what that has, without a trace in the training.

    Images that the set has normalised by ``mean`` and ``std`` are measured and saved in [0, 1] where the model goes
    through them as BasicSR's SRModel does. The HR image of the training batch and values of other sets are removed, and
    metrics that need HR images are left out where the set has none. Networks return to their modes, also after an
    error.
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
