"""A training state: everything that a resumed training needs besides its networks, collected, written and taken."""

import random
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from basicsr.utils import get_root_logger
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_map

from tlw_basicsr.models.guard import StepGuard, list_parameters
from tlw_basicsr.models.optimizer import MixedPrecision
from tlw_basicsr.util.errors import UserError
from tlw_basicsr.util.files import save_file
from tlw_basicsr.version import __version__

QUEUE = "queue_"  # Real-ESRGAN's, which are made in the first iteration
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")  # have their parameter's shape


def gather(opt: dict[str, Any], value: Any) -> list[Any]:
    """Return the values of all processes, by their ranks; called by every process."""
    values = [value]
    if opt["dist"]:
        values = [None] * opt["world_size"]
        dist.all_gather_object(values, value)
    return values


def is_from_basicsr(state: dict[str, Any]) -> bool:
    """Return whether a state was written by BasicSR alone."""
    return "random" not in state


def collect_state(model: Any) -> dict[str, Any]:
    """Collect what BasicSR's own states lack; called by every process."""
    return {
        "random": gather(model.opt, get_random_state()),
        "amp": model.amp.state_dict(),
        "guard": model.guard.state_dict(),
        "accumulated": [collect_gradients(o) for o in model.optimizers],
        "position": getattr(model, "position", None),
        "seed": model.opt.get("manual_seed"),
        "best_metric_results": to_plain(getattr(model, "best_metric_results", {})),
        "options": getattr(model, "given_options", {}),
        "version": __version__,
        **collect_others(model),
    }


def collect_others(model: Any) -> dict[str, Any]:
    """Collect what a model of others keeps between iterations: objects with a state, and what each process holds."""
    found: dict[str, Any] = {}
    for name, part in find_others(model).items():
        try:
            found.setdefault("others", {})[name] = to_plain(part.state_dict(), strict=True)
        except TypeError as error:
            get_root_logger().warning(f"{name} of the model is not saved ({error}): a resumed training will differ.")
    mine = {name: value for name, value in read_attributes(model).items() if is_kept(name, value, model.noted)}
    kept = gather(model.opt, mine)
    return {**found, "kept": kept} if any(kept) else found


def find_others(model: Any) -> dict[str, Any]:
    """Find the attributes of a model that have a state, such as a ``GradScaler``, and are not known otherwise."""
    known = (nn.Module, Optimizer, LRScheduler, MixedPrecision, StepGuard)
    return {
        name: value
        for name, value in vars(model).items()
        if hasattr(value, "state_dict") and hasattr(value, "load_state_dict") and not isinstance(value, known)
    }


def read_attributes(model: Any) -> dict[str, Any]:
    """Read a model's attributes of plain types, and the tensors of its modules that are not networks, such as losses.

    Networks, optimisers and the log have files or entries of their own.
    """
    found: dict[str, Any] = {}
    for name, value in vars(model).items():
        if isinstance(value, nn.Module) and not name.startswith("net") and name != "tlw":
            found |= {f"{name}.{key}": tensor for key, tensor in value.state_dict().items()}
        elif name not in ("opt", "batch", "log_dict", "best_metric_results", "noted"):
            with suppress(TypeError):
                found[name] = to_plain(value, strict=True)
    return found


def note_attributes(model: Any) -> dict[str, Any]:
    """Note what a model holds that was just built; what differs from it later is kept between iterations."""
    return {name: (value, mark(value)) for name, value in read_attributes(model).items()}


def mark(value: Any) -> Any:
    """Return a plain value with each tensor replaced by what changes when it is written or exchanged."""
    return tree_map(lambda v: (v.data_ptr(), v._version) if torch.is_tensor(v) else v, value)


def is_kept(name: str, value: Any, noted: dict[str, Any]) -> bool:
    """Return whether a value differs from what was noted; what came later is the batch's, but for queues."""
    return name.startswith(QUEUE) or (name in noted and mark(value) != noted[name][1])


def write_state(model: Any, epoch: int, current_iter: int | str) -> None:
    """Write ``{current_iter}.state`` for resuming, which the iterations -1 and ``best`` are not for."""
    if current_iter in (-1, "best"):
        return
    state = {
        "epoch": epoch,
        "iter": current_iter,
        "optimizers": [o.state_dict() for o in model.optimizers],
        "schedulers": [to_plain(s.state_dict()) for s in model.schedulers],
        **model.training_state(),
    }
    if model.opt["rank"] == 0:
        save_file(state, Path(model.opt["path"]["training_states"], f"{current_iter}.state"))


def collect_gradients(optimizer: Optimizer) -> dict[str, Any] | None:
    """Return the gradients that ``optimizer`` keeps for a later step, and their number, if there are any."""
    count = getattr(optimizer, "accumulated", 0)
    return {"count": count, "gradients": [p.grad for p in list_parameters(optimizer)]} if count else None


def to_plain(value: Any, strict: bool = False) -> Any:
    """Convert a value to types that are loaded with ``weights_only``; what has no such type to text, unless ``strict``.

    Mappings become dicts (a scheduler holds a Counter), numpy's numbers (of metrics) Python's.
    """
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        items = value.items()
        return {key if isinstance(key, (int, float)) else str(key): to_plain(item, strict) for key, item in items}
    if isinstance(value, (list, tuple)):
        return type(value)(to_plain(item, strict) for item in value)
    if value is None or isinstance(value, (bool, int, float, str, torch.Tensor)):
        return value
    if strict:
        raise TypeError(f"its state holds a {type(value).__name__}")
    return str(value)


def get_random_state() -> dict[str, Any]:
    """Return the states of python's, numpy's and torch's random generators, in plain types."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Set the random generators as :func:`get_random_state` found them; the GPUs' only where their number is equal."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def take_training(model: Any, state: dict[str, Any], take_basicsrs: Callable[[dict[str, Any]], None]) -> None:
    """Load a state's optimisers and schedulers, by ``take_basicsrs``, the base model's own ``resume_training``.

    A state of BasicSR's own model lacks those of the weighting network, which start anew at the iteration's learning
    rate. If the state doesn't fit, anything may be raised, and the model has to be built anew.
    """
    new = model.own_optimizers if is_from_basicsr(state) else 0
    saved = {name: list(state[name]) for name in ("optimizers", "schedulers")}
    for name, theirs in saved.items():
        ours = getattr(model, name)
        if len(theirs) != len(ours) - new:
            raise UserError(f"it holds {len(theirs)} {name}, this training has {len(ours) - new}")
        theirs += [each.state_dict() for each in ours[len(ours) - new :]]
    optimizers = [fit_groups(*each) for each in zip(saved["optimizers"], model.optimizers, strict=True)]
    # a scheduler takes every entry as an attribute, also one that hides a method
    schedulers = [
        {key: theirs[key] for key in ours.state_dict() if key in theirs}
        for theirs, ours in zip(saved["schedulers"], model.schedulers, strict=True)
    ]
    take_basicsrs({**state, "optimizers": optimizers, "schedulers": schedulers})
    for scheduler in model.schedulers[len(model.schedulers) - new :]:
        while scheduler.last_epoch < model.schedulers[0].last_epoch:
            scheduler.optimizer._opt_called = True  # no step is missing that torch would warn about
            scheduler.step()
    for optimizer in model.optimizers:
        check_moments(optimizer)


def fit_groups(theirs: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Return a saved optimiser state with the optimiser's own flags.

    How torch computes, such as ``fused``, is up to the options; and torch adds flags from version to version.
    """
    groups = []
    for group, mine in zip(theirs["param_groups"], optimizer.state_dict()["param_groups"], strict=True):
        flags = {key: value for key, value in mine.items() if value is None or isinstance(value, bool)}
        if missing := mine.keys() - group.keys() - flags.keys():
            raise UserError(f"it is of another optimiser: {min(missing)} is missing")
        groups.append({key: group[key] for key in mine.keys() - flags.keys()} | flags)
    return {"state": theirs["state"], "param_groups": groups}


def check_moments(optimizer: Optimizer) -> None:
    """Check that what an optimiser holds for its parameters is finite, complete for Adam, and of their shapes."""
    adam = isinstance(getattr(optimizer, "inner", optimizer), torch.optim.Adam)
    for number, p in enumerate(list_parameters(optimizer)):
        held = optimizer.state.get(p, {})
        if adam and held and not {"step", "exp_avg", "exp_avg_sq"} <= held.keys():
            raise UserError(f"it is of another optimiser: moments of parameter {number} are missing")
        for key, value in held.items():
            if torch.is_tensor(value) and (value.is_complex() or not torch.isfinite(value).all()):
                raise UserError(f"{key} of parameter {number} has values that are not finite real numbers")
            if key in MOMENTS and value is not None and value.shape != p.shape:
                raise UserError(f"{key} of parameter {number} is {tuple(value.shape)}, not {tuple(p.shape)}")


def take_rest(model: Any, state: dict[str, Any]) -> None:
    """Take what BasicSR's own states lack: see :func:`collect_state`."""
    if state.get("best_metric_results"):
        take_best_results(model, state["best_metric_results"])
    model.amp.load_state_dict(state.get("amp", {}))
    model.guard.load_state_dict(state.get("guard", {}))
    if "accumulated" in state:
        for optimizer, kept in zip(model.optimizers, state["accumulated"], strict=True):
            take_gradients(optimizer, kept, model.opt["train"].get("accumulation_steps", 1))
    for name, part in find_others(model).items():
        if name in state.get("others", {}):
            part.load_state_dict(state["others"][name])
        else:
            get_root_logger().warning(f"The state lacks {name} of the model: the resumed training will differ.")
    take_kept(model, state)
    random_states = state.get("random", [])
    if len(random_states) == model.opt["world_size"]:
        set_random_state(random_states[model.opt["rank"]])


def take_kept(model: Any, state: dict[str, Any]) -> None:
    """Give a model what :func:`collect_others` has found in its attributes."""
    kept = state.get("kept", [])
    mine = kept[model.opt["rank"]] if len(kept) == model.opt["world_size"] else {}
    modules: dict[str, dict[str, Any]] = {}
    for name, value in {**state.get("queues", {}), **mine}.items():  # queues: of earlier states
        owner, _, key = name.partition(".")
        if key and name in model.noted:
            modules.setdefault(owner, {})[key] = value
        elif name.startswith(QUEUE) or name in model.noted:
            setattr(model, name, value.to(model.device) if torch.is_tensor(value) else value)
    for owner, tensors in modules.items():
        getattr(model, owner).load_state_dict(tensors, strict=False)


def take_gradients(optimizer: Optimizer, kept: dict[str, Any] | None, every: int) -> None:
    """Give an optimiser the gradients it kept for a step of ``every`` iterations; leave out those of a longer step."""
    if not kept:
        return
    if kept["count"] >= every:
        get_root_logger().warning(
            f"train.accumulation_steps is {every} now: the gradients of {kept['count']} iterations, kept for a step of "
            "more, are left out"
        )
        return
    for p, gradient in zip(list_parameters(optimizer), kept["gradients"], strict=True):
        if gradient is not None and (gradient.shape != p.shape or not torch.isfinite(gradient).all()):
            raise UserError("a kept gradient is not finite, or of another shape than its parameter")
        p.grad = None if gradient is None else gradient.to(p)
    optimizer.accumulated = kept["count"]  # type: ignore[attr-defined]  of TrainingOptimizer


def take_best_results(model: Any, saved: dict[str, dict[str, Any]]) -> None:
    """Take the best results of the metrics in ``val.metrics``; a metric that is new, or turned round, has none yet."""
    model.best_metric_results = {}
    if not (model.opt.get("val") or {}).get("metrics"):
        return
    for dataset, records in saved.items():
        model._initialize_best_metric_results(dataset)
        fresh = model.best_metric_results[dataset]
        known = [name for name in fresh if name in records and records[name]["better"] == fresh[name]["better"]]
        fresh.update({name: records[name] for name in known})
