"""What a training state is: its schema, finding the one to go on from, taking it, writing it, which ones to keep.

A state is one's own, perhaps damaged. It is read without running code, compared with one schema, tried on copies of the
optimisers and schedulers, and only then taken. Whatever is raised on the way makes it a :class:`DamagedState`, and the
state before it is tried; no list of faults is needed for that.
"""

import math
import random
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from copy import copy, deepcopy
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from basicsr.utils import get_root_logger
from torch.optim import Optimizer

from tlw_basicsr.networks import build_network, check_fit, take_entry
from tlw_basicsr.util.errors import UserError, first_line, reason_of, short
from tlw_basicsr.util.files import load_file, save_file
from tlw_basicsr.util.kinds import ANY, FRACTION, NOT_NEGATIVE, NUMBER, POSITIVE, Kind, Options, one_of, or_none, whole
from tlw_basicsr.version import __version__

WHAT = "path.resume_state"
MOST_POINTS = 10_000  # at which a schedule is tried
MOST_OPTIONS = 20_000  # values

# ------------------------------------------------------------------------------------------------- schema


def is_real(value: Any, least: float = -math.inf) -> bool:
    """Whether it is a tensor of finite real numbers of at least ``least``."""
    if not torch.is_tensor(value) or value.is_complex() or (value.is_floating_point() and value.dtype.itemsize < 2):
        return False
    return bool(torch.isfinite(value).all() and (value >= least).all())


def is_random_state(value: Any) -> bool:
    """Whether generators take it: tried on new ones. numpy takes a position beyond its array, and reads there."""
    try:
        random.Random().setstate(value["python"])
        np.random.RandomState().set_state((value["numpy"][0], np.array(value["numpy"][1], np.uint32), 0, 0, 0.0))
        torch.Generator().set_state(value["torch"])
        return (
            len(value["numpy"]) == 5
            and 0 <= value["numpy"][2] <= len(value["numpy"][1])
            and all(isinstance(word, int) for word in value["numpy"][1])
            and value["numpy"][3] in (0, 1)
            and NUMBER.accepts(value["numpy"][4])
            and all(torch.is_tensor(each) and each.dtype == torch.uint8 for each in value["cuda"])
        )
    except Exception:  # each raises what it likes
        return False


def count_options(value: Any) -> float:
    """How many values there are in nested dicts and lists; infinitely many where one is none of YAML's."""
    if isinstance(value, (dict, list)):
        return 1 + sum(map(count_options, value.values() if isinstance(value, dict) else value))
    return 1 if isinstance(value, (str, bool, int, float, type(None))) else math.inf


COUNT = Kind("a whole number of at least 0", lambda v: whole(0, 2**60).accepts(v))
REAL = Kind("a tensor of finite real numbers", is_real)
SQUARES = Kind("a tensor of finite numbers of at least 0", lambda v: is_real(v, 0))
STEP = Kind("one number of at least 0", lambda v: NOT_NEGATIVE.accepts(v) or (is_real(v, 0) and v.numel() == 1))
BETAS = Kind("two numbers in [0, 1)", lambda v: len(v) == 2 and all(NUMBER.accepts(b) and 0 <= b < 1 for b in v))
TENSORS = Kind("nothing in it but finite real numbers", lambda v: not torch.is_tensor(v) or is_real(v))

# A dict: its entries, those with ? may be missing, "*" are all others. [A]: a list of A. (A,): A or None.
STATE = {
    "iter": COUNT,
    "epoch": COUNT,
    "optimizers": [
        {
            "state": {
                "*": {"step?": STEP, "exp_avg?": REAL, "exp_avg_sq?": SQUARES, "max_exp_avg_sq?": SQUARES, "*": TENSORS}
            },
            "param_groups": [
                {
                    "params": [COUNT],
                    **dict.fromkeys(("lr", "initial_lr?", "eps?", "weight_decay?"), NOT_NEGATIVE),
                    "betas?": BETAS,
                    "*": TENSORS,
                }
            ],
        }
    ],
    "schedulers": [
        {
            **{"last_epoch": COUNT, "_step_count?": COUNT, "base_lrs?": [NOT_NEGATIVE], "_last_lr?": [NOT_NEGATIVE]},
            **{"milestones?": {"*": whole(0, 1000)}, "gamma?": NOT_NEGATIVE, "restarts?": [COUNT]},
            **{
                "periods?": [POSITIVE],
                "cumulative_period?": [POSITIVE],
                "restart_weights?": [NUMBER],
                "eta_min?": NUMBER,
            },
            "*": TENSORS,
        }
    ],
    "random?": [Kind("the states of python's, numpy's and torch's random generators", is_random_state)],
    "accumulated?": [({"count": whole(1), "gradients": [(REAL,)]},)],
    "amp?": {
        "scaler?": {
            **dict.fromkeys(("scale?", "growth_factor?", "backoff_factor?"), POSITIVE),
            "growth_interval?": whole(1),
            "_growth_tracker?": COUNT,
        }
    },
    "guard?": {"skipped": COUNT, "in_row": COUNT},
    "position?": ({"epoch": COUNT, "iter": COUNT, "iters_per_epoch": whole(1, 2**60)},),
    "seed?": Kind("a whole number below 2³²", lambda v: COUNT.accepts(v) and v < 2**32),
    "best_metric_results?": {
        "*": {
            "*": {
                "better": one_of("higher", "lower"),
                "val": Kind("a number", lambda v: isinstance(v, (int, float))),
                "iter": whole(-1, 2**60),
            }
        }
    },
    "tlw?": {"k": FRACTION, "last_e_step": or_none(COUNT)},
    "options?": Kind(
        f"options, at most {MOST_OPTIONS:,}", lambda v: isinstance(v, dict) and count_options(v) <= MOST_OPTIONS
    ),
    "version?": Kind("text", lambda v: isinstance(v, str)),
    "*": ANY,
}
# what comes after the state's iteration, or counts more than there were
AT_MOST_ITER = [
    ("position", "iter"), ("tlw", "last_e_step"), ("guard", "skipped"), ("guard", "in_row"),
    ("schedulers", "*", "last_epoch"),
]  # fmt: skip


def check_shape(value: Any, shape: Any, place: str = "") -> None:
    """Compare nested values with a shape as :data:`STATE`.

    Raises:
        UserError: it is another; names the first place.
    """
    if isinstance(shape, Kind):
        try:
            fits = shape.accepts(value)
        except Exception:  # of a kind that it does not even compare with
            fits = False
        if not fits:
            raise UserError(f"{place}: expected {shape.text}, got {short(value)}")
    elif isinstance(shape, tuple):
        if value is not None:
            check_shape(value, shape[0], place)
    elif isinstance(shape, list):
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{place}: expected a list, got {short(value)}")
        for number, item in enumerate(value):
            check_shape(item, shape[0], f"{place} {number}")
    else:
        if not isinstance(value, dict):
            raise UserError(f"{place}: expected a section of 'key: value', got {short(value)}")
        for key in shape:
            if key != "*" and not key.endswith("?") and key not in value:
                raise UserError(f"{place}.{key}: missing".lstrip("."))
        for key, item in value.items():
            inner = shape.get(key) or shape.get(f"{key}?") or shape.get("*")
            if inner is None:
                raise UserError(f"{place}: {short(key)} is not an entry of it")
            check_shape(item, inner, f"{place}.{key}".lstrip("."))


def check_state(state: Any) -> None:
    """Check a training state as far as it can be without the model.

    Raises:
        UserError: an entry is missing, of another kind, out of its range or not finite.
    """
    check_shape(state, STATE)
    for place in AT_MOST_ITER:
        for value in find_values(state, place):
            if value is not None and value > state["iter"]:
                raise UserError(f"{'.'.join(place)}: {value} comes after its iteration {state['iter']}")


def find_values(value: Any, place: tuple[str, ...]) -> list[Any]:
    """The values at a place, of all entries where it says ``*``; nothing where there is none."""
    if not place or value is None:
        return [value]
    items = value if place[0] == "*" else [value.get(place[0])]
    return [found for item in items for found in find_values(item, place[1:])]


# ------------------------------------------------------------------------------------------------- finding


class DamagedState(UserError):
    """A state, or a network saved with it, that is missing, not whole or can't be taken."""


TRIED = "; the state before it is tried"


def find_state(opt: Options, damaged: DamagedState | None = None) -> tuple[dict[str, Any] | None, list[str]]:
    """The training state to resume from, if any, and ``opt['path']`` set to it and to the networks saved with it.

    With ``--auto_resume`` it is the newest in ``experiments/{name}/training_states`` that is whole and whose networks
    are there and whole; else ``path.resume_state``. A state of BasicSR's own, which has no weighting network, begins
    one anew.

    Args:
        opt: the options.
        damaged: why the state that was found before can't be taken; the one before it is looked for.

    Returns:
        The state, or None to start afresh, and what the log should say.

    Raises:
        UserError: the state named, or every one there is, can't be used; or it was written with options of other
            networks or optimisers; or ``--auto_resume`` would start over where there has been a training.
    """
    notes: list[str] = []
    named = opt["path"].get("resume_state")
    saved = list_states(Path(opt["path"]["training_states"])) if opt["auto_resume"] else []
    if damaged:
        if Path(named) not in saved:
            raise damaged
        notes.append(f"{damaged}{TRIED}")
    later = saved[: saved.index(Path(named)) + 1] if damaged else []
    for path in [s for s in saved if s not in later] or ([Path(named)] if named and not saved else []):
        try:
            state = read_state(path)
            notes += compare_options(state, opt, path)
            networks = read_networks(state, opt, path)
        except DamagedState as error:
            if not saved:
                raise
            notes.append(f"{error}{TRIED}")
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
            f"{notes[0].removesuffix(TRIED)}; move the folder away to start afresh"
        )
    if opt["auto_resume"]:
        check_no_networks(opt)
    return None, notes


def check_no_networks(opt: Options) -> None:
    """Refuse to start over where networks of a training are left without a state.

    Those of one iteration alone, with an empty folder of states beside them, are of a training that was killed while
    it saved for the first time.

    Raises:
        UserError: there are others.
    """
    models = Path(opt["path"]["models"])
    saved = {name.removesuffix(".pth").rsplit("_", 1)[1] for name in list_folder(models) if name.startswith("net_")}
    iterations = {each for each in saved if each.isdecimal()}
    if "latest" in saved or len(iterations) > 1 or (iterations and not Path(opt["path"]["training_states"]).is_dir()):
        raise UserError(
            f"--auto_resume: there is no state for the networks in {models}; give the states back to "
            f"{opt['path']['training_states']}, or move the folder away to start afresh"
        )


def list_folder(folder: Path) -> list[str]:
    """The names in a folder; none where it does not exist.

    Raises:
        UserError: it can't be read, which must not look like an empty one.
    """
    try:
        return [path.name for path in Path(folder).iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"--auto_resume: {folder} can't be read ({reason_of(error)})") from error


def list_states(folder: Path) -> list[Path]:
    """The states in a folder, the newest first.

    Raises:
        UserError: it can't be read.
    """
    states = (folder / name for name in list_folder(folder) if name.endswith(".state"))
    return sorted((s for s in states if s.stem.isdecimal()), key=lambda s: int(s.stem), reverse=True)


def is_from_basicsr(state: dict[str, Any]) -> bool:
    """Whether a state was written by BasicSR alone."""
    return "random" not in state


def read_state(path: Path) -> dict[str, Any]:
    """Load a training state and check it, see :func:`check_state`.

    Raises:
        DamagedState: it can't be read, or is not right.
    """
    try:
        state = load_file(path, WHAT)
    except UserError as error:
        raise DamagedState(*error.args) from error
    try:
        check_state(state)
    except UserError as error:
        raise DamagedState(f"{WHAT}: {path}: {error}") from error
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
        return not value.is_floating_point() or bool(
            torch.isfinite(value.float() if value.dtype.itemsize < 2 else value).all()
        )
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


def show(value: Any) -> str:
    """An option's value for a message: short text as it is."""
    return value if isinstance(value, str) and len(value) < 100 else short(value)


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
        difference = f"{key} was {show(was)} in the training of {path}, now it is {show(now)}"
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
        "version": __version__,
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
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
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

    Everything is tried on copies before anything is replaced. A state of BasicSR's own model has the optimisers of that
    alone: those after them, of the weighting network, start anew, at the learning rate of the iteration.

    Args:
        model: a model under ``TrainingMixin``.
        state: as :func:`read_state` gives it.
        take_basicsrs: the base model's own ``resume_training``.

    Raises:
        DamagedState: it can't be taken; the random numbers are as they were, the model is to be built anew.
        UserError: the schedule that it was written with ends before this training.
    """
    where = f"{WHAT}: {model.opt['path'].get('resume_state')}"
    check_ends(state["schedulers"], model.opt["train"]["total_iter"], where)
    before = get_random_state()
    try:
        lists = {name: getattr(model, name) for name in ("optimizers", "schedulers")}
        if is_from_basicsr(state):
            lists = {name: ours[: len(ours) - model.own_optimizers] for name, ours in lists.items()}
        for name, ours in lists.items():
            if len(state[name]) != len(ours):
                raise DamagedState(
                    f"{where}: the state holds {len(state[name])} {name}, this training has {len(ours)}: "
                    "it was written by a training with other options"
                )
        fitted = {
            **state,
            "optimizers": [
                fit_optimizer_state(theirs, ours, f"{where}: optimizers {number}")
                for number, (theirs, ours) in enumerate(zip(state["optimizers"], lists["optimizers"], strict=True))
            ],
            "schedulers": [
                fit_entries(theirs, ours.state_dict(), f"{where}: schedulers {number}")
                for number, (theirs, ours) in enumerate(zip(state["schedulers"], lists["schedulers"], strict=True))
            ],
        }
        try_state(fitted, **lists, iterations=int(model.opt["train"]["total_iter"]))
        with replace_lists(model, **lists):
            take_basicsrs(fitted)
        for scheduler in model.schedulers[len(lists["schedulers"]) :]:
            while scheduler.last_epoch < model.schedulers[0].last_epoch:
                scheduler.optimizer._opt_called = True  # no step is missing that torch would warn of
                scheduler.step()
        model.resume_rest(state)
    except Exception as error:  # torch, BasicSR and plugins each raise what they like
        set_random_state(before)
        if isinstance(error, DamagedState):
            raise
        reason = str(error) if isinstance(error, UserError) else first_line(error)
        raise DamagedState(f"{where}: the state is damaged or of other networks ({reason})") from error


def fit_optimizer_state(theirs: dict[str, Any], optimizer: Optimizer, where: str) -> dict[str, Any]:
    """A saved optimiser state as the optimiser takes it.

    Raises:
        DamagedState: it is of other parameters.
    """
    own = optimizer.state_dict()["param_groups"]
    counts, ours = ([len(group["params"]) for group in groups] for groups in (theirs["param_groups"], own))
    numbers = [number for group in theirs["param_groups"] for number in group["params"]]
    if counts != ours or len(set(numbers)) != len(numbers):
        raise DamagedState(f"{where} is of other networks: of {counts} parameters, not {ours}")
    groups = []
    for group, mine in zip(theirs["param_groups"], own, strict=True):
        # how torch computes, such as fused, is the options', not a file's; and torch adds flags from version to version
        flags = {key: value for key, value in mine.items() if value is None or isinstance(value, bool)}
        fitted = {**fit_entries(group, mine, where), **flags}
        if missing := mine.keys() - fitted.keys():
            raise DamagedState(f"{where}: {min(missing)} is missing")
        groups.append(fitted)
    adam = isinstance(getattr(optimizer, "inner", optimizer), torch.optim.Adam)
    for number, p in zip(numbers, list_parameters(optimizer), strict=True):
        for key, value in theirs["state"].get(number, {}).items():
            if torch.is_tensor(value) and value.shape != p.shape and adam and key != "step":
                raise DamagedState(
                    f"{where}: {key} of parameter {number} is {tuple(value.shape)}, not {tuple(p.shape)}"
                )
    return {"state": theirs["state"], "param_groups": groups}


def fit_entries(theirs: dict[str, Any], own: dict[str, Any], where: str) -> dict[str, Any]:
    """The entries of a saved section that the own one has, too: others would hide methods, or are of no use.

    Raises:
        DamagedState: one is of another kind.
    """
    fitted = {key: value for key, value in theirs.items() if key in own}
    for key, value in fitted.items():
        if name_kind(value) != name_kind(own[key]):
            raise DamagedState(f"{where}: {key}: expected a value like {short(own[key])}, got {short(value)}")
    return fitted


def name_kind(value: Any) -> str:
    """The kind of a value, of those that may stand for each other."""
    kinds = {"flag": (bool, type(None)), "number": Number, "list": (list, tuple), "section": Mapping}
    return next((name for name, types in kinds.items() if isinstance(value, types)), type(value).__name__)


def check_ends(schedulers: list[dict[str, Any]], iterations: float, where: str) -> None:
    """Check that schedules, which are the state's, last as long as the training.

    Raises:
        UserError: the periods of one end before.
    """
    for scheduler in schedulers:
        end = ([*scheduler.get("cumulative_period", ())] or [math.inf])[-1]
        if iterations > end:
            raise UserError(
                f"train.total_iter: the periods of train.scheduler in {where} end at {end}; to train longer, begin a "
                "training of another name from its network: path.pretrain_network_g"
            )


def try_state(state: dict[str, Any], optimizers: list[Optimizer], schedulers: list[Any], iterations: int) -> None:
    """Try a state on copies: a step of every optimiser, and the learning rates until the end of the training.

    Raises:
        Exception: whatever comes of it; ValueError for values that are not finite.
    """
    copies = {}
    for theirs, optimizer in zip(state["optimizers"], optimizers, strict=True):
        trial = copies[optimizer] = copy_optimizer(optimizer)
        trial.load_state_dict(deepcopy(theirs))  # which takes the tensors themselves
        for p in list_parameters(trial):
            p.grad = torch.ones_like(p)
        trial.step()
        if not all(torch.isfinite(p).all() for p in list_parameters(trial)):
            raise ValueError("a step with it is not finite")
        trial.load_state_dict(theirs)
    for theirs, scheduler in zip(state["schedulers"], schedulers, strict=True):
        trial = copy(scheduler)
        trial.load_state_dict(theirs)
        trial.optimizer = copies.get(scheduler.optimizer, scheduler.optimizer)
        bends = [v for value in theirs.values() if isinstance(value, (dict, list, tuple)) for v in value]
        bends = [int(v) + more for v in bends if NUMBER.accepts(v) for more in (-1, 0, 1)][:MOST_POINTS]
        for iteration in sorted({*bends, theirs["last_epoch"] + 1, iterations}):
            if not theirs["last_epoch"] < iteration <= iterations:
                continue
            trial.last_epoch = iteration
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it is not called by step()
                rates = trial.get_lr()
            if len(rates) != len(trial.optimizer.param_groups) or not all(map(NOT_NEGATIVE.accepts, rates)):
                raise ValueError(f"the learning rate of iteration {iteration} is {short(rates)}")


@torch.no_grad()
def copy_optimizer(optimizer: Optimizer) -> Optimizer:
    """An optimiser of the same class and options on copies of the parameters, without hooks."""
    optimizer = getattr(optimizer, "inner", optimizer)
    bare = deepcopy({key: value for key, value in optimizer.__getstate__().items() if key != "state"})
    trial = type(optimizer).__new__(type(optimizer))
    trial.__setstate__({**bare, "state": {}})
    return trial


@contextmanager
def replace_lists(model: Any, **lists: list[Any]) -> Iterator[None]:
    """Within it, attributes of ``model`` are these lists."""
    whole_lists = {name: getattr(model, name) for name in lists}
    vars(model).update(lists)
    try:
        yield
    finally:
        vars(model).update(whole_lists)


def take_rest(model: Any, state: dict[str, Any]) -> None:
    """Take what BasicSR's states do not hold."""
    if state.get("best_metric_results"):
        take_best_results(model, state["best_metric_results"])
    model.amp.load_state_dict(state.get("amp", {}))
    model.guard.load_state_dict(state.get("guard", {}))
    if "accumulated" in state:
        for optimizer, kept in zip(model.optimizers, state["accumulated"], strict=True):
            take_gradients(optimizer, kept, model.opt["train"].get("accumulation_steps", 1))
    if "tlw" in state and hasattr(model, "load_tlw_state"):
        model.load_tlw_state(state["tlw"])
    random_states = state.get("random", [])
    if len(random_states) == model.opt["world_size"]:
        set_random_state(random_states[model.opt["rank"]])


def take_gradients(optimizer: Optimizer, kept: dict[str, Any] | None, every: int) -> None:
    """Give an optimiser the gradients that it kept for a step; each is one of ``every`` in its mean.

    Those that were kept for a step of more iterations than it now has are left out.
    """
    if not kept:
        return
    if kept["count"] >= every:
        get_root_logger().warning(
            f"train.accumulation_steps is {every} now: the gradients of {kept['count']} iterations, kept for a step of "
            "more, are left out"
        )
        return
    for p, gradient in zip(list_parameters(optimizer), kept["gradients"], strict=True):
        if gradient is not None and gradient.shape != p.shape:
            raise ValueError("a gradient is of another shape than its parameter")
        p.grad = None if gradient is None else gradient.to(p)
    optimizer.accumulated = kept["count"]  # type: ignore[attr-defined]  of TrainingOptimizer


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
