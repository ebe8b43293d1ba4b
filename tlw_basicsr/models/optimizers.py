"""Builds optimisers and learning-rate schedules by name: those of the installed BasicSR, and any of torch's."""

import inspect
from collections.abc import Iterable
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import torch
from basicsr.models.base_model import BaseModel
from torch import Tensor
from torch.optim import Optimizer

from tlw_basicsr.util.kinds import Options


def build_optimizer(name: str, params: Iterable[Tensor] | list[dict[str, Any]], **options: Any) -> Optimizer:
    """Build the optimiser of this name that the installed BasicSR knows, or else torch's."""
    stand_in: Any = None  # BasicSR's method reads nothing of its model
    try:
        return BaseModel.get_optimizer(stand_in, name, params, **options)
    except NotImplementedError:
        if name not in list_optimizers():
            raise
    return getattr(torch.optim, name)(params, **options)


def build_schedulers(section: Options, optimizers: list[Optimizer]) -> list[Any]:
    """Build a scheduler for each optimiser by ``train.scheduler``: the installed BasicSR's, or else torch's."""
    stand_in: Any = SimpleNamespace(
        opt={"train": {"scheduler": deepcopy(section)}}, optimizers=optimizers, schedulers=[]
    )
    try:
        BaseModel.setup_schedulers(stand_in)
    except NotImplementedError:
        name = section["type"]
        if name not in list_schedulers():
            raise
        options = {key: value for key, value in section.items() if key != "type"}
        return [getattr(torch.optim.lr_scheduler, name)(optimizer, **options) for optimizer in optimizers]
    return stand_in.schedulers


def list_optimizers() -> list[str]:
    """Return the names of torch's optimisers, sorted."""
    return _list_classes(torch.optim, Optimizer)


def list_schedulers() -> list[str]:
    """Return the names of torch's schedulers, sorted."""
    return _list_classes(torch.optim.lr_scheduler, torch.optim.lr_scheduler.LRScheduler)


def _list_classes(module: Any, base: type) -> list[str]:
    found = {n for n, c in vars(module).items() if inspect.isclass(c) and issubclass(c, base) and c is not base}
    return sorted(name for name in found if not name.startswith("_"))
