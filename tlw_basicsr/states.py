"""What a training state is: writing it, finding the one to go on from, checking it, taking it, which ones to keep."""

import random
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.optim import Optimizer

import tlw_basicsr
from tlw_basicsr.errors import UserError, first_line, short
from tlw_basicsr.files import load_file, save_file
from tlw_basicsr.kinds import DICT, FRACTION, LIST, Kind, Options, check_section, is_number, or_none, whole
from tlw_basicsr.networks import build_network, check_fit, take_entry

WHAT = "path.resume_state"
COUNT = Kind("a whole number of at least 0", lambda v: whole(0).accepts(v) and v < 2**60)
STATE = {
    "iter": COUNT,
    "epoch": COUNT,
    "optimizers": LIST,
    "schedulers": LIST,
    "random": LIST,
    "accumulated": LIST,
    "amp": DICT,
    "guard": DICT,
    "position": or_none(DICT),
    "seed": Kind("a whole number below 2³²", lambda v: whole(0).accepts(v) and v < 2**32),
    "best_metric_results": DICT,
    "tlw": DICT,
    "options": DICT,
    "version": Kind("text", lambda v: isinstance(v, str)),
}
POSITION = {"epoch": COUNT, "iter": COUNT, "iters_per_epoch": whole(1)}
PARTS = {  # sections of a state
    "guard": {"skipped": COUNT, "in_row": COUNT},
    "tlw": {"k": FRACTION, "last_e_step": or_none(COUNT)},
    "amp": {"scaler": DICT},
}
BEST = {
    "better": Kind("higher or lower", lambda v: v in ("higher", "lower")),
    "val": Kind("a number", lambda v: isinstance(v, (int, float))),
    "iter": Kind("a whole number", lambda v: isinstance(v, int)),
}


# ------------------------------------------------------------------------------------------------- finding


def find_state(opt: Options) -> tuple[dict[str, Any] | None, list[str]]:
    """The training state to resume from, if any, and ``opt['path']`` set to it and to the networks saved with it.

    With ``--auto_resume`` it is the newest in ``experiments/{name}/training_states`` that is whole and whose networks
    are there and whole; else ``path.resume_state``. A state of BasicSR's own, which has no weighting network, begins
    one anew.

    Returns:
        The state, or None to start afresh, and what the log should say.

    Raises:
        UserError: the state named, or every one there is, can't be used; or it was written with options of other
            networks or optimisers.
    """
    notes: list[str] = []
    paths = [Path(opt["path"]["resume_state"])] if opt["path"].get("resume_state") else []
    saved = list_states(Path(opt["path"]["training_states"])) if opt["auto_resume"] else []
    for path in saved or paths:
        try:
            state = read_state(path)
            notes += compare_options(state, opt, path)
            networks = read_networks(state, opt, path)
        except DamagedState as error:
            if not saved:
                raise
            notes.append(f"{error}; the state before it is tried")
            continue
        opt["path"]["resume_state"] = str(path)
        opt["path"].update(networks)
        seed = state.get("seed", opt["manual_seed"])  # the one drawn then, if none is given
        if seed != opt["manual_seed"]:
            notes.append(f"manual_seed is {seed}, that of {path}")
            opt["manual_seed"] = seed
        if "network_w" in opt and "pretrain_network_w" not in networks:
            notes.append(f"{path} is of a training without TLW: the weighting network starts anew")
        return state, notes
    if saved:
        raise UserError(
            f"--auto_resume: no state in {saved[0].parent} can be used, the newest for this: "
            f"{notes[0].removesuffix('; the state before it is tried')}; move the folder away to start afresh"
        )
    models = Path(opt["path"]["models"])
    if opt["auto_resume"] and any(models.glob("net_*.pth")):
        notes.append(f"--auto_resume: there is no state for the networks in {models}; the training begins anew")
    return None, notes


class DamagedState(UserError):
    """A state, or a network saved with it, that is missing or not whole."""


def list_states(folder: Path) -> list[Path]:
    """The states in a folder, the newest first."""
    states = (s for s in folder.glob("*.state") if s.stem.isdecimal())
    return sorted(states, key=lambda s: int(s.stem), reverse=True)


def is_from_basicsr(state: dict[str, Any]) -> bool:
    """Whether a state was written by BasicSR alone."""
    return "random" not in state


def read_state(path: Path) -> dict[str, Any]:
    """Load a training state and check its structure.

    Raises:
        DamagedState: it can't be read, or lacks something.
    """
    try:
        state = load_file(path, WHAT)
        if not {"iter", "optimizers", "schedulers"} <= state.keys():
            raise UserError(f"{WHAT}: {path} is not a training state of BasicSR")
        where = f"{WHAT}: {path}"
        check_section(state, where, STATE, ["iter", "epoch"], state)
        if state.get("position"):
            check_section(state["position"], f"{where}: position", POSITION, POSITION)
            if state["position"]["iter"] > state["iter"]:
                raise UserError(f"{where}: position.iter: its epoch begins after its iteration")
        for key, schema in PARTS.items():
            if state.get(key):
                check_section(state[key], f"{where}: {key}", schema, schema if key == "tlw" else ())
        if not all(isinstance(numbers, dict) for numbers in state.get("random", [])):
            raise UserError(f"{where}: random: expected a section for each process")
        if not is_finite(state["optimizers"]):
            raise UserError(f"{where}: optimizers: values that are not finite")
        for dataset, metrics in state.get("best_metric_results", {}).items():
            for metric, best in metrics.items() if isinstance(metrics, dict) else [("", None)]:
                check_section(best, f"{where}: best_metric_results.{dataset}.{metric}", BEST, BEST)
    except DamagedState:
        raise
    except UserError as error:
        raise DamagedState(*error.args) from error
    return state


def read_networks(state: dict[str, Any], opt: Options, path: Path) -> dict[str, str]:
    """Look for the networks of a state, beside it and in this experiment, and read them.

    Returns:
        The options of ``path`` that load them.

    Raises:
        DamagedState: one is missing or not whole.
    """
    folders = [path.parent.with_name("models"), Path(opt["path"]["models"])]
    loads: dict[str, Any] = {}
    for key in [k for k in opt if k.startswith("network_")]:
        if key in (opt["path"].get("ignore_resume_networks") or []):
            continue
        label = key.removeprefix("network_")
        files = [folder / f"net_{label}_{state['iter']}.pth" for folder in folders]
        file = next((f for f in files if f.is_file()), None)
        if file is None:
            if is_from_basicsr(state) and key == "network_w":
                continue
            raise DamagedState(f"{WHAT}: {path} can't be used: {files[0]} is not a file")
        try:
            check_network_file(file, key, state, opt)
        except UserError as error:
            raise DamagedState(f"{WHAT}: {path} can't be used: {error}") from error
        loads |= {f"pretrain_network_{label}": str(file), f"param_key_{label}": "params", f"strict_load_{label}": True}
    return loads


def check_network_file(file: Path, key: str, state: dict[str, Any], opt: Options) -> None:
    """Check every network in a file of a state's: that of ``params``, its moving average, those of the first stage.

    Raises:
        UserError: one is missing, not finite, or of another network than section ``key`` of the options.
    """
    what = f"path.pretrain_{key}"
    entries = load_file(file, what)
    needed = ["params"]
    if key == "network_g" and ((state.get("options") or {}).get("train") or {}).get("ema_decay"):
        needed.append("params_ema")
    for name in needed:
        if name not in entries:
            raise UserError(f"{what}: {file} has no {name}")
    net = build_network(opt, key)
    for name in entries:
        if name in ("params", "params_ema"):
            check_fit(take_entry(entries, name, file, what), net, True, file, f"{what}, {name}")
    if not is_finite(entries):
        raise UserError(f"{what}: {file} has values that are not finite")


def is_finite(value: Any) -> bool:
    """Whether all floating point tensors in nested dicts and lists are finite."""
    if torch.is_tensor(value):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, dict):
        return all(map(is_finite, value.values()))
    return all(map(is_finite, value)) if isinstance(value, (list, tuple)) else True


# ------------------------------------------------------------------------------------------------- comparing


def strip_options(opt: Options) -> Options:
    """What a training state keeps of the options: all but paths and what depends on the machine."""
    left_out = {"path", "root_path", "auto_resume", "rank", "world_size", "dist", "num_gpu", "is_train"}
    return {key: to_plain(value) for key, value in opt.items() if key not in left_out}


def flatten(section: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested sections, by their place such as ``train.optim_g.lr``."""
    if not isinstance(section, dict):
        yield place, section
        return
    for key, value in section.items():
        yield from flatten(value, f"{place}.{key}" if place else str(key))


def compare_options(state: dict[str, Any], opt: Options, path: Path) -> list[str]:
    """Compare the options that a state was written with with those of now.

    Returns:
        What the log should say of differences in ``train`` that may be meant: losses, ``train.tlw``; learning rates and
        the schedulers' values, which a state sets back to its own.

    Raises:
        UserError: other networks, optimisers, schedulers or models; names the first option, its old and new value.
    """
    if "options" not in state:
        return []
    old, new = dict(flatten(state["options"])), dict(flatten(strip_options(opt)))
    for options in (old, new):
        options.setdefault("base_model", "SRModel")
    notes = []
    ignored = tuple(f"{key}." for key in opt["path"].get("ignore_resume_networks") or [])
    for key in sorted(old.keys() | new.keys()):
        was, now = (o.get(key, "not given") for o in (old, new))
        if was == now or key.startswith(ignored):
            continue
        difference = f"{key} was {was} in the training of {path}, now it is {now}"
        restored = key.startswith("train.scheduler.") or re.fullmatch(r"train\.optim_\w+\.lr", key)
        structure = key in ("model_type", "base_model", "scale", "train.scheduler.type") or key.startswith("network_")
        if structure or (key.startswith("train.optim_") and not restored):
            raise UserError(
                f"{difference}; a training is resumed with the networks and optimisers it had, another one is started "
                "from its networks by path.pretrain_network_g"
            )
        if restored:
            notes.append(f"{difference}; resuming takes the state's value")
        elif key.startswith("train.") and key != "train.total_iter":
            notes.append(f"{difference}; it holds from here on")
    return notes


# ------------------------------------------------------------------------------------------------- keeping


def remove_leftovers(opt: Options) -> None:
    """Remove the unfinished files of a run that was killed while it wrote."""
    for key in ("models", "training_states"):
        for file in Path(opt["path"][key]).glob(".*.tmp"):
            with suppress(OSError):
                file.unlink()


def find_best_iterations(results: dict[str, dict[str, Any]], metric: str | None) -> set[int]:
    """The iterations that are best by ``metric`` so far, one of every data set."""
    return {metrics[metric]["iter"] for metrics in results.values() if metric in metrics}


def prune(opt: Options, current_iter: int, best: Collection[int]) -> None:
    """Remove the networks and states before the newest ``logger.keep_checkpoints``, but those of ``best``.

    Those newer than ``current_iter`` (left by a run that went further) and ``latest`` stay.
    """
    keep = opt["logger"].get("keep_checkpoints")
    if not keep:
        return
    states = {int(s.stem): s for s in list_states(Path(opt["path"]["training_states"]))}
    networks = [
        (int(match[1]), file)
        for file in Path(opt["path"]["models"]).glob("net_*_*.pth")
        if (match := re.fullmatch(r"net_\w+_(\d+)\.pth", file.name))
    ]
    past = sorted(i for i in states if i <= current_iter)
    kept = {*past[-keep:], *best}
    # a state goes before its networks: it must not be there without them
    for iteration, file in [*states.items(), *networks]:
        if iteration <= current_iter and iteration not in kept:
            file.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------- writing


def collect_state(model: Any) -> dict[str, Any]:
    """What a resumed training needs beside the networks, optimisers and schedulers; called by every process."""
    random_states = [get_random_state()]
    if model.opt["dist"]:
        random_states = [None] * model.opt["world_size"]
        dist.all_gather_object(random_states, get_random_state())
    return {
        "random": random_states,
        "amp": model.amp.state_dict(),
        "guard": model.guard.state_dict(),
        "accumulated": [get_kept_gradients(o) for o in model.optimizers],
        "position": getattr(model, "position", None),
        "seed": model.opt.get("manual_seed"),
        "best_metric_results": to_plain(getattr(model, "best_metric_results", {})),
        "options": getattr(model, "given_options", {}),
        "version": tlw_basicsr.__version__,
        **({"tlw": model.tlw_state()} if hasattr(model, "tlw_state") else {}),
    }


def write_state(model: Any, epoch: int, current_iter: int | str) -> None:
    """Write ``{current_iter}.state``: BasicSR's entries and :meth:`training_state`; nothing at -1 or ``best``."""
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


def get_kept_gradients(optimizer: Optimizer) -> dict[str, Any] | None:
    """The gradients that ``optimizer`` keeps for a later step, and their number; None where there are none."""
    count = getattr(optimizer, "accumulated", 0)
    return {"count": count, "gradients": [p.grad for p in list_parameters(optimizer)]} if count else None


def list_parameters(optimizer: Optimizer) -> list[torch.Tensor]:
    """All parameters of an optimiser."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def to_plain(value: Any) -> Any:
    """``value`` in types that ``weights_only`` loading knows: mappings as dict (a scheduler holds a Counter), numpy's
    numbers (metrics) as python's, of a YAML's what is none of them as text.
    """
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key if isinstance(key, (int, float)) else str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(to_plain, value))
    return value if value is None or isinstance(value, (bool, int, float, str, torch.Tensor)) else str(value)


def get_random_state() -> dict[str, Any]:
    """State of the random generators of python, numpy and torch, in types that ``weights_only`` loading knows."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Undo :func:`get_random_state`. The GPUs' part is left out where their number differs."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


# ------------------------------------------------------------------------------------------------- taking


def take_state(model: Any, state: dict[str, Any], take_basicsrs: Callable[[dict[str, Any]], None]) -> None:
    """Load optimisers and schedulers, the best metrics so far and this process's random numbers.

    Everything is checked before anything is replaced. A state of BasicSR's own model has the optimisers of that
    alone: those after them, of the weighting network, start anew, at the learning rate of the iteration.

    Raises:
        UserError: the state is damaged, or of a training with other optimisers.
    """
    where = f"path.resume_state: {model.opt['path'].get('resume_state')}"
    lists = {}
    for name in ("optimizers", "schedulers"):
        ours = getattr(model, name)
        if "random" not in state:
            ours = ours[: len(ours) - model.own_optimizers]
        theirs = len(state[name])
        if theirs != len(ours):
            raise UserError(
                f"{where}: the state holds {theirs} {name}, this training has {len(ours)}: "
                "it was written by a training with other options"
            )
        lists[name] = ours
    for number, (theirs, ours) in enumerate(zip(state["optimizers"], lists["optimizers"], strict=True)):
        check_optimizer_state(theirs, ours, f"{where}: optimizers {number}")
    for number, (theirs, ours) in enumerate(zip(state["schedulers"], lists["schedulers"], strict=True)):
        check_scheduler_state(theirs, ours.state_dict(), f"{where}: schedulers {number}")
    for theirs, ours in zip(state["optimizers"], lists["optimizers"], strict=True):
        for group, own in zip(theirs["param_groups"], ours.param_groups, strict=True):
            # how torch computes, such as fused: the options', not a file's
            group.update({key: value for key, value in own.items() if value is None or isinstance(value, bool)})
    fresh = model.schedulers[len(lists["schedulers"]) :]
    try:
        with replace_lists(model, **lists):
            take_basicsrs(state)
        for scheduler in fresh:
            while scheduler.last_epoch < model.schedulers[0].last_epoch:
                scheduler.optimizer._opt_called = True  # no step is missing that torch would warn of
                scheduler.step()
        model.resume_rest(state)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"{where}: the state is damaged or of other networks ({first_line(error)})") from error
    for scheduler in model.schedulers:  # they have the state's values
        end = getattr(scheduler, "cumulative_period", [float("inf")])[-1]
        if model.opt["train"]["total_iter"] > end:
            raise UserError(
                f"train.total_iter: the periods of train.scheduler in {where} end at {end}; to train longer, begin a "
                "training of another name from its network: path.pretrain_network_g"
            )


def take_best_results(model: Any, saved: dict[str, dict[str, Any]]) -> None:
    """Take the best results of the metrics of ``val.metrics``; one that is new, or turned round, has none."""
    model.best_metric_results = {}
    if not (model.opt.get("val") or {}).get("metrics"):
        return
    for dataset, records in saved.items():
        model._initialize_best_metric_results(dataset)
        fresh = model.best_metric_results[dataset]
        known = [name for name in fresh if name in records and records[name]["better"] == fresh[name]["better"]]
        fresh.update({name: records[name] for name in known})


def take_rest(model: Any, state: dict[str, Any]) -> None:
    """What BasicSR's states do not hold."""
    if state.get("best_metric_results"):
        take_best_results(model, state["best_metric_results"])
    model.amp.load_state_dict(state.get("amp", {}))
    model.guard.load_state_dict(state.get("guard", {}))
    for optimizer, kept in zip(model.optimizers, state.get("accumulated", []), strict=False):
        if kept and hasattr(optimizer, "accumulated"):
            optimizer.accumulated = kept["count"]
            for p, gradient in zip(list_parameters(optimizer), kept["gradients"], strict=True):
                p.grad = None if gradient is None else gradient.to(p)
    if "tlw" in state and hasattr(model, "load_tlw_state"):
        model.load_tlw_state(state["tlw"])
    random_states = state.get("random", [])
    if len(random_states) == model.opt["world_size"]:
        set_random_state(random_states[model.opt["rank"]])


@contextmanager
def replace_lists(model: Any, **lists: list[Any]) -> Iterator[None]:
    """Within it, attributes of ``model`` are these lists."""
    whole = {name: getattr(model, name) for name in lists}
    vars(model).update(lists)
    try:
        yield
    finally:
        vars(model).update(whole)


RANGES: dict[str, Callable[[Any], bool]] = {
    "lr": lambda v: v >= 0,
    "initial_lr": lambda v: v >= 0,
    "eps": lambda v: v >= 0,
    "weight_decay": lambda v: v >= 0,
    "betas": lambda v: len(v) == 2 and all(0 <= beta < 1 for beta in v),
}


def check_optimizer_state(theirs: Any, optimizer: Optimizer, where: str) -> None:
    """Check a saved optimiser state against the optimiser that is to take it.

    Raises:
        UserError: other parameters, other shapes, or values that are not finite.
    """
    own = optimizer.state_dict()["param_groups"]
    groups = theirs.get("param_groups") if isinstance(theirs, dict) else None
    if not isinstance(groups, list) or not isinstance(theirs.get("state"), dict):
        raise UserError(f"{where} is not an optimiser's state")
    counts = [len(g["params"]) if isinstance(g, dict) and isinstance(g.get("params"), list) else -1 for g in groups]
    if counts != [len(g["params"]) for g in own]:
        raise UserError(f"{where} is of other networks: of {counts} parameters, not {[len(g['params']) for g in own]}")
    adam = isinstance(optimizer, torch.optim.Adam)
    for group, ours in zip(groups, own, strict=True):
        for key in ours.keys() - {"params"}:
            # torch adds flags from version to version
            fits = _alike(group[key], ours[key]) if key in group else ours[key] is None or isinstance(ours[key], bool)
            if not fits or not RANGES.get(key, lambda _: True)(group[key]):
                raise UserError(f"{where}: {key}: expected a value like {ours[key]!r}, got {short(group.get(key))}")
    numbers = [number for group in groups for number in group["params"]]
    for number, p in zip(numbers, list_parameters(optimizer), strict=True):
        values = theirs["state"].get(number, {})
        if not isinstance(values, dict) or (adam and values and not {"step", "exp_avg", "exp_avg_sq"} <= values.keys()):
            raise UserError(f"{where}: the state of parameter {number} is not complete")
        for key, value in values.items():
            if key == "step" and is_number(value) and value >= 0:  # of older versions
                continue
            if adam and (not torch.is_tensor(value) or (key == "step" and (value.numel() != 1 or not value >= 0))):
                raise UserError(f"{where}: {key} of parameter {number} is no tensor as Adam has it")
            if not torch.is_tensor(value):
                continue
            if key.startswith(("exp_avg", "max_exp_avg")) and value.shape != p.shape:
                raise UserError(f"{where}: {key} of parameter {number} is {tuple(value.shape)}, not {tuple(p.shape)}")
            if not value.is_floating_point() or not torch.isfinite(value).all():
                raise UserError(f"{where}: {key} of parameter {number} is of {value.dtype} or has values not finite")


def check_scheduler_state(theirs: Any, ours: dict[str, Any], where: str) -> None:
    """Check a saved scheduler state against that of the scheduler that is to take it.

    Raises:
        UserError: something is missing or of another kind.
    """
    if not isinstance(theirs, dict) or "last_epoch" not in theirs:
        raise UserError(f"{where} is not a scheduler's state")
    for key, value in ours.items():
        if key in theirs and not _alike(theirs[key], value):
            raise UserError(f"{where}: {key}: expected a value like {short(value)}, got {short(theirs[key])}")
    lists = [theirs[key] for key in ("restarts", "periods", "cumulative_period", "restart_weights") if key in theirs]
    if len({len(numbers) for numbers in lists}) > 1:
        raise UserError(f"{where}: its restarts and their weights are of different numbers")


def _alike(a: Any, b: Any) -> bool:
    """Whether ``a`` may stand where ``b`` stands, by its kind."""
    if b is None or isinstance(b, bool):
        return a is None or isinstance(a, bool)
    if isinstance(b, Number):
        return is_number(a)
    if isinstance(b, str):
        return isinstance(a, str)
    if isinstance(b, dict) and any(isinstance(key, str) for key in b):
        return isinstance(a, dict) and a.keys() == b.keys() and all(_alike(a[key], b[key]) for key in b)
    if isinstance(b, dict):
        return isinstance(a, dict) and all(is_number(n) for pair in a.items() for n in pair)
    if isinstance(b, (list, tuple)):
        like = b[0] if len(b) else 0
        return isinstance(a, (list, tuple)) and all(_alike(item, like) for item in a)
    return True
