"""Optimisers and learning-rate schedules by name: what the installed BasicSR knows, and any of torch's."""

import inspect
from collections.abc import Callable, Iterable
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import torch
from basicsr.models import lr_scheduler
from basicsr.models.base_model import BaseModel
from torch import Tensor, nn
from torch.optim import Optimizer

from tlw_basicsr.registry import check_arguments
from tlw_basicsr.util.errors import UserError, first_line, short
from tlw_basicsr.util.kinds import NUMBER, POSITIVE, Options, suggestion


def build_optimizer(name: str, params: Iterable[Tensor] | list[dict[str, Any]], **options: Any) -> Optimizer:
    """The optimiser of the installed BasicSR, else torch's, of this name.

    Raises:
        NotImplementedError: neither has one.
    """
    stand_in: Any = None  # BasicSR's method reads nothing of its model
    try:
        return BaseModel.get_optimizer(stand_in, name, params, **options)
    except NotImplementedError:
        if name not in list_optimizers():
            raise
    return getattr(torch.optim, name)(params, **options)


def build_schedulers(section: Options, optimizers: list[Optimizer]) -> list[Any]:
    """A scheduler for each optimiser by ``train.scheduler``: the installed BasicSR's, else torch's of the ``type``.

    Raises:
        NotImplementedError: neither has one.
    """
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
    """The names of torch's optimisers."""
    return _list_classes(torch.optim, Optimizer)


def list_schedulers() -> list[str]:
    """The names of torch's schedulers."""
    return _list_classes(torch.optim.lr_scheduler, torch.optim.lr_scheduler.LRScheduler)


def _list_classes(module: Any, base: type) -> list[str]:
    found = {n for n, c in vars(module).items() if inspect.isclass(c) and issubclass(c, base) and c is not base}
    return sorted(name for name in found if not name.startswith("_"))


def check_optimizer(section: Options, place: str) -> None:
    """Check the options of an optimiser by a step on two small parameters.

    Raises:
        UserError: no optimiser of the name is known, or it refuses its options or the step.
    """
    name: Any = section.get("type")
    options = {key: value for key, value in section.items() if key != "type"}
    names = list_optimizers()
    if isinstance(name, str) and name in names:
        check_arguments(section, place, getattr(torch.optim, name), extra=("params",))
    if "lr" not in section:
        raise UserError(f"{place}.lr: missing; expected {POSITIVE.text}")
    if not POSITIVE.accepts(section["lr"]):
        raise UserError(f"{place}.lr: expected {POSITIVE.text}, got {short(section['lr'])}")
    _try(
        lambda: build_optimizer(name, make_parameters(), **options).step(),
        f"{place}.type: {short(name)}{suggestion(name, names)}; accepted are {', '.join(names)}",
        f"{place}: {name} fails with these options",
    )


def check_scheduler(section: Options, total_iter: float, place: str = "train.scheduler") -> None:
    """Check the options of a learning-rate schedule by its first steps, and that it lasts until ``total_iter``.

    Raises:
        UserError: no schedule of the name is known, it refuses its options or a step, or it ends before the training.
    """
    name = section.get("type")
    # MultiStepLR is BasicSR's own there, under another name
    ours = {"MultiStepLR": "MultiStepRestartLR"}.get(name, name) if isinstance(name, str) else None
    call: Callable | None = getattr(lr_scheduler, ours or "", None) or getattr(
        torch.optim.lr_scheduler, ours or "", None
    )
    names = sorted({*list_schedulers(), *_list_classes(lr_scheduler, torch.optim.lr_scheduler.LRScheduler)})
    if name in names and call is not None:
        check_arguments(section, place, call, extra=("optimizer", "last_epoch"))
    if name == "CosineAnnealingRestartLR":
        check_periods(section, total_iter, place)

    def run() -> None:
        optimizer = build_optimizer("Adam", make_parameters(), lr=1e-3)
        (scheduler,) = build_schedulers(section, [optimizer])
        for _ in range(2):
            optimizer.step()  # as BasicSR's models step: without a closure
            scheduler.step()
        end = getattr(scheduler, "total_steps", None)  # of OneCycleLR, which fails after it
        if end is not None and end < total_iter:
            raise ValueError(f"it ends after {end} iterations, before train.total_iter: {total_iter}")

    _try(
        run,
        f"{place}.type: {short(name)}{suggestion(name, names)}; accepted are {', '.join(names)}",
        f"{place}: {name} fails with these options",
    )


def _try(run: Callable[[], None], unknown: str, failed: str) -> None:
    try:
        with torch.random.fork_rng(devices=[]):
            run()
    except NotImplementedError as error:
        raise UserError(unknown) from error
    except Exception as error:  # of what kind is up to torch
        raise UserError(f"{failed} ({first_line(error)})") from error


def check_periods(section: Options, total_iter: float, place: str) -> None:
    """The periods of cosine annealing last until the end of the training; BasicSR's class fails where they do not."""
    periods, weights = section["periods"], section.get("restart_weights", [1])
    if not isinstance(periods, list) or not periods or not all(map(POSITIVE.accepts, periods)):
        raise UserError(f"{place}.periods: expected a list of numbers above 0, got {short(periods)}")
    if not isinstance(weights, list) or len(weights) != len(periods) or not all(map(NUMBER.accepts, weights)):
        raise UserError(
            f"{place}.restart_weights: expected a list of {len(periods)} numbers, one for each of the periods, "
            f"got {short(weights)}"
        )
    if sum(periods) < total_iter:
        last = periods[-1] + total_iter - sum(periods)
        raise UserError(
            f"{place}.periods: their sum, {sum(periods)}, is less than train.total_iter: {total_iter}; "
            f"make the last one {last:.16g}, or add one and its restart_weights"
        )


def make_parameters() -> list[nn.Parameter]:
    """The weight and the bias of a small convolution, with gradients."""
    parameters = [nn.Parameter(torch.ones(shape)) for shape in ((2, 1, 3, 3), (2,))]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    return parameters
