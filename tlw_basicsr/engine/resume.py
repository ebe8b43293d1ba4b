"""Resuming: which state to go on from, whether its options are those of now, and which states to keep."""

import math
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from basicsr.utils import get_time_str

from tlw_basicsr.models.states import get_random_state, is_from_basicsr, set_random_state, to_plain
from tlw_basicsr.networks import build_network, check_fit, take_entry
from tlw_basicsr.util.errors import UserError, first_line, reason_of, short
from tlw_basicsr.util.files import load_file
from tlw_basicsr.util.kinds import Options

WHAT = "path.resume_state"
TRIED = "; the state before it is tried"


class DamagedState(UserError):
    """A state that can't be taken, or that lacks a whole network; the state before it is tried."""


class OtherTraining(UserError):
    """A state that these options can't go on from."""


def find_state(opt: Options, damaged: DamagedState | None = None) -> tuple[dict[str, Any] | None, list[str]]:
    """Find the training state to resume from, and set ``opt["path"]`` to it and to the networks saved with it.

    With ``--auto_resume`` it is the newest one in ``experiments/{name}/training_states`` that is whole and has whole
    networks, else ``path.resume_state``. The weighting network starts anew after a state that BasicSR itself wrote.
    ``damaged`` says why the state found before can't be taken: the one before it is looked for.

    Returns:
        The state, or None to start afresh, and lines for the log.
    """
    notes: list[str] = []
    named = opt["path"].get("resume_state")
    saved = list_states(Path(opt["path"]["training_states"])) if opt["auto_resume"] else []
    candidates = saved or ([Path(named)] if named else [])
    if damaged:
        if Path(named) not in saved:
            raise damaged
        notes.append(f"{damaged}{TRIED}")
        candidates = saved[saved.index(Path(named)) + 1 :]
    for path in candidates:
        try:
            state, more, networks = read_all(path, opt)
        except DamagedState as error:
            if not saved:
                raise
            notes.append(f"{error}{TRIED}")
            continue
        notes += more
        opt["path"].update(networks, resume_state=str(path))
        seed = state.get("seed", opt["manual_seed"])  # the one drawn then, if none is given
        if seed != opt["manual_seed"]:
            notes.append(f"manual_seed is {seed}, that of {path}")
            opt["manual_seed"] = seed
        if "network_w" in opt and "pretrain_network_w" not in networks:
            notes.append(f"{path} was written by a training without TLW: the weighting network starts anew")
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
    """Refuse to start over where a training has left networks without a state.

    Networks of a single iteration beside an empty folder of states are accepted: that training was killed while it
    saved for the first time.
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
    """Return the names in a folder, which may not exist; one that can't be read must not look like an empty one."""
    try:
        return [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"--auto_resume: {folder} can't be read ({reason_of(error)})") from error


def list_states(folder: Path) -> list[Path]:
    """Return the states in a folder, the newest first."""
    states = (folder / name for name in list_folder(folder) if name.endswith(".state"))
    return sorted((s for s in states if s.stem.isdecimal()), key=lambda s: int(s.stem), reverse=True)


def read_all(path: Path, opt: Options) -> tuple[dict[str, Any], list[str], dict[str, Any]]:
    """Return a state, lines for the log, and the options of ``path`` that load the networks saved with it."""
    try:
        state = load_file(path, WHAT)
        numbers = [("iter", state["iter"]), ("epoch", state["epoch"]), *(state.get("position") or {}).items()]
        for name, value in numbers:
            if not isinstance(value, int) or value < 0:
                raise UserError(f"{WHAT}: {path}: {name}: expected a whole number of at least 0, got {short(value)}")
        notes = compare_options(state, opt, path)
        check_ends(state, opt, path)
        return state, notes, read_networks(state, opt, path)
    except OtherTraining:
        raise
    except UserError as error:
        raise DamagedState(*error.args) from error
    except Exception as error:  # whatever a wrong value leads to
        raise DamagedState(f"{WHAT}: {path} is damaged ({first_line(error)})") from error


def read_networks(state: dict[str, Any], opt: Options, path: Path) -> dict[str, Any]:
    """Return the options of ``path`` that load a state's networks, which lie beside it or in this experiment.

    Each must be whole, finite, and the one of its section of the options.
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
            raise UserError(f"{WHAT}: {path} can't be used: {files[0]} is not a file")
        averaged = key == "network_g" and (state.get("options") or {}).get("train", {}).get("ema_decay")
        try:
            what = f"path.pretrain_{key}"
            entries = load_file(file, what)
            net = build_network(opt, key)
            for name in ("params", "params_ema"):
                if name not in entries and (name == "params" or averaged):
                    raise UserError(f"{what}: {file} has no {name}")
                if name in entries:
                    check_fit(take_entry(entries, name, file, what), net, True, file, f"{what}, {name}")
        except UserError as error:
            raise UserError(f"{WHAT}: {path} can't be used: {error}") from error
        loads |= {f"pretrain_network_{label}": str(file), f"param_key_{label}": "params", f"strict_load_{label}": True}
    return loads


def take(model: Any, state: dict[str, Any] | None) -> DamagedState | None:
    """Let the model of every process take a state, if there is one.

    Returns why a process can't take it: the random numbers are as they were, and the model has to be built anew.
    """
    if state is None:
        return None
    where, damaged, before = f"{WHAT}: {model.opt['path'].get('resume_state')}", None, get_random_state()
    try:
        model.resume_training(state)
    except Exception as error:  # torch, BasicSR and plugins each raise what they like
        set_random_state(before)
        reason = str(error) if isinstance(error, UserError) else first_line(error)
        damaged = DamagedState(f"{where} can't be taken: it is damaged or of another training ({reason})")
    if model.agreed(torch.tensor(damaged is None, device=model.device)):
        return None
    return damaged or DamagedState(f"{where} can't be taken by another process")


def strip_options(opt: Options) -> Options:
    """Return what a training state keeps of the options: all but paths and what depends on the machine."""
    left_out = {"path", "root_path", "auto_resume", "rank", "world_size", "dist", "num_gpu", "is_train"}
    return {key: to_plain(value) for key, value in opt.items() if key not in left_out}


def flatten(section: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested sections with their places, such as ``train.optim_g.lr``."""
    if not isinstance(section, dict):
        yield place, section
        return
    for key, value in section.items():
        yield from flatten(value, f"{place}.{key}" if place else str(key))


def compare_options(state: dict[str, Any], opt: Options, path: Path) -> list[str]:
    """Compare the options that a state was written with to those of now, which may not be of another structure.

    Returns lines for the log about differences in ``train`` that may be meant: losses and ``train.tlw``, which hold
    from here on; learning rates and the schedulers' values, which the state sets back to its own.
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
        was, now = (v if isinstance(v, str) and len(v) < 100 else short(v) for v in (was, now))
        difference = f"{key} was {was} in the training of {path}, now it is {now}"
        restored = key.startswith("train.scheduler.") or re.fullmatch(r"train\.optim_\w+\.lr", key)
        structure = key in ("model_type", "base_model", "scale", "train.scheduler.type") or key.startswith("network_")
        structure &= key != "network_g.file"  # it may have moved; the state's networks are compared with it
        if structure or (key.startswith("train.optim_") and not restored):
            raise OtherTraining(
                f"{difference}; a training is resumed with the networks and optimisers it had, another one is started "
                "from its networks by path.pretrain_network_g"
            )
        if restored:
            notes.append(f"{difference}; resuming takes the state's value")
        elif key.startswith("train.") and key != "train.total_iter":
            notes.append(f"{difference}; it holds from here on")
    return notes


def check_ends(state: dict[str, Any], opt: Options, path: Path) -> None:
    """Check that the schedules, which are the state's, last until ``train.total_iter``."""
    end = min((s["cumulative_period"][-1] for s in state["schedulers"] if s.get("cumulative_period")), default=math.inf)
    if opt["train"]["total_iter"] > end:
        raise OtherTraining(
            f"train.total_iter: the periods of train.scheduler in {path} end at {end}; to train longer, begin a "
            "training of another name from its network: path.pretrain_network_g"
        )


def list_numbered(opt: Options) -> list[tuple[int, Path]]:
    """Return the iterations and files of all states, then of all networks: a state must not outlive its networks."""
    states = [(int(file.stem), file) for file in list_states(Path(opt["path"]["training_states"]))]
    networks = Path(opt["path"]["models"]).glob("net_*_*.pth")
    matches = [(re.fullmatch(r"net_\w+_(\d+)\.pth", file.name), file) for file in networks]
    return states + [(int(match[1]), file) for match, file in matches if match]


def set_aside(opt: Options, state: dict[str, Any]) -> list[str]:
    """Move what is of iterations after a state away, or a later ``--auto_resume`` or ``tlw infer`` would take it."""
    later = [file for iteration, file in list_numbered(opt) if iteration > state["iter"]]
    labels = ["latest"] * bool(later) + ["best"] * has_other_best(later, state)
    later += [file for label in labels for file in Path(opt["path"]["models"]).glob(f"net_*_{label}.pth")]
    folder = Path(opt["path"]["experiments_root"], f"after_{state['iter']}_{get_time_str()}")
    for file in later:
        target = folder / file.parent.name / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        file.rename(target)
    return [f"{len(later)} files of later iterations are moved to {folder}"] if later else []


def has_other_best(later: list[Path], state: dict[str, Any]) -> bool:
    """Return whether the newest of the later states has other best results, or might have."""
    newest = max((file for file in later if file.suffix == ".state"), key=lambda f: int(f.stem), default=None)
    try:
        found = load_file(newest, WHAT) if newest else state
    except UserError:
        return True
    return found.get("best_metric_results") != state.get("best_metric_results")


def prune(opt: Options, current_iter: int, best: Collection[int]) -> None:
    """Remove the networks and states before the newest ``logger.keep_checkpoints``, except those of ``best``."""
    keep = opt["logger"].get("keep_checkpoints")
    if not keep:
        return
    files = list_numbered(opt)
    past = sorted(i for i, file in files if file.suffix == ".state" and i <= current_iter)
    kept = {*past[-keep:], *best}
    for iteration, file in files:
        if iteration <= current_iter and iteration not in kept:
            file.unlink(missing_ok=True)
