"""Which training state to go on from, whether it can be trusted and fits the options, and which ones to keep."""

import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from tlw_basicsr.checkpoint import check_fit, entry_of, load_file
from tlw_basicsr.errors import UserError
from tlw_basicsr.kinds import DICT, FRACTION, LIST, Kind, check_section, or_none, whole
from tlw_basicsr.options import Options
from tlw_basicsr.preflight import build

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
    saved = saved_states(Path(opt["path"]["training_states"])) if opt["auto_resume"] else []
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


def saved_states(folder: Path) -> list[Path]:
    """The states in a folder, the newest first."""
    states = (s for s in folder.glob("*.state") if s.stem.isdecimal())
    return sorted(states, key=lambda s: int(s.stem), reverse=True)


def is_basicsrs(state: dict[str, Any]) -> bool:
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
        if not finite(state["optimizers"]):
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
            if is_basicsrs(state) and key == "network_w":
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
    net = build(opt, key)
    for name in entries:
        if name in ("params", "params_ema"):
            check_fit(entry_of(entries, name, file, what), net, True, file, f"{what}, {name}")
    if not finite(entries):
        raise UserError(f"{what}: {file} has values that are not finite")


def finite(value: Any) -> bool:
    """Whether all floating point tensors in nested dicts and lists are finite."""
    if torch.is_tensor(value):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    return all(map(finite, value)) if isinstance(value, (list, tuple)) else True


# ------------------------------------------------------------------------------------------------- comparing


def options_of(opt: Options) -> Options:
    """What a training state keeps of the options: all but paths and what depends on the machine."""
    left_out = {"path", "root_path", "auto_resume", "rank", "world_size", "dist", "num_gpu", "is_train"}
    return {key: _plain(value) for key, value in opt.items() if key not in left_out}


def _plain(value: Any) -> Any:
    """Of YAML's values, those that a state may hold."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def flat(section: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested sections, by their place such as ``train.optim_g.lr``."""
    if not isinstance(section, dict):
        yield place, section
        return
    for key, value in section.items():
        yield from flat(value, f"{place}.{key}" if place else str(key))


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
    old, new = dict(flat(state["options"])), dict(flat(options_of(opt)))
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


def best_iterations(results: dict[str, dict[str, Any]], metric: str | None) -> set[int]:
    """The iterations that are best by ``metric`` so far, one of every data set."""
    return {metrics[metric]["iter"] for metrics in results.values() if metric in metrics}


def prune(opt: Options, current_iter: int, best: Collection[int]) -> None:
    """Remove the networks and states before the newest ``logger.keep_checkpoints``, but those of ``best``.

    Those newer than ``current_iter`` (left by a run that went further) and ``latest`` stay.
    """
    keep = opt["logger"].get("keep_checkpoints")
    if not keep:
        return
    states = {int(s.stem): s for s in saved_states(Path(opt["path"]["training_states"]))}
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
