"""The optimisers and learning-rate schedules of torch, which a YAML may name beside BasicSR's own."""

import inspect
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def _list_classes(module: Any, base: type) -> dict[str, Any]:
    """Return the public subclasses of ``base`` in a module by their names, sorted."""
    return {
        name: part
        for name, part in sorted(vars(module).items())
        if inspect.isclass(part) and issubclass(part, base) and part is not base and not name.startswith("_")
    }


OPTIMIZERS = _list_classes(torch.optim, Optimizer)
SCHEDULERS = _list_classes(torch.optim.lr_scheduler, LRScheduler)
