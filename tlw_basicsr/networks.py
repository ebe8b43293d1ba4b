"""Networks: built from their options, loaded from files, and what they take."""

import inspect
from contextlib import suppress
from math import lcm
from pathlib import Path
from typing import Any

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn

from tlw_basicsr.registry import check_arguments, find_doubts, keep_arguments, lookup
from tlw_basicsr.util.errors import UserError, first_line, short
from tlw_basicsr.util.files import load_file
from tlw_basicsr.util.kinds import DICT, Options


def build_network(opt: Options, key: str, device: str = "meta") -> nn.Module:
    """The network of section ``key``, without memory where it can be built so; random numbers are left alone.

    Raises:
        UserError: its class refuses the options.
    """
    arch = lookup(ARCH_REGISTRY, opt[key], key)
    arguments = keep_arguments(opt[key], arch)
    try:
        with torch.random.fork_rng(devices=[]):
            if device != "meta":
                return arch(**arguments).to(device)
            try:
                with torch.device("meta"):
                    return arch(**arguments)
            except Exception:  # some compute with their weights as they are built
                return arch(**arguments)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{key}: {opt[key]['type']} can't be built from these options ({first_line(error)})"
            f"{find_doubts(opt[key], arch)}"
        ) from error


def load_network(
    options: Options | None, path: str | Path, param_key: str = "params", key: str = "network_g"
) -> nn.Module:
    """The registered network of ``{type: …, …}`` with the weights of a file, in eval mode on the CPU.

    Args:
        options: of the network.
        path: a file in BasicSR's format.
        param_key: its entry, ``params`` where it is missing.
        key: the options' place, for messages.

    Raises:
        UserError: the options or the file are wrong or don't fit each other.
    """
    arch = lookup(ARCH_REGISTRY, options, key)
    options = options or {}
    check_arguments(options, key, arch)
    net = build_network({key: options}, key, "cpu")
    state = read_network(path, param_key, "checkpoint")
    check_fit(state, net, True, path, "checkpoint")
    net.load_state_dict(state)
    return net.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------- files


def read_network(path: str | Path, param_key: str | None, what: str) -> dict[str, torch.Tensor]:
    """State dict of a network in a file, ``module.`` removed.

    The file is of BasicSR's format, ``{'params': …, 'params_ema': …}``, or holds the state dict itself, as
    safetensors do.

    Args:
        path: the file.
        param_key: the entry to take, ``'params'`` where it is missing; of no concern for a state dict.
        what: the option that names the file, for the message.

    Raises:
        UserError: as :func:`load_file`, or no such entry, or it holds something else than named tensors.
    """
    content = read_safetensors(path, what) if is_safetensors(path) else load_file(path, what)
    return take_entry(content, param_key, path, what)


def is_safetensors(path: str | Path) -> bool:
    """Whether a file begins as safetensors do: eight bytes of a length, then JSON."""
    if not Path(path).is_file():
        return False
    with open(path, "rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") < Path(path).stat().st_size


def read_safetensors(path: str | Path, what: str) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file.

    Raises:
        UserError: it is damaged, or the package is not installed.
    """
    try:
        from safetensors.torch import load_file as load_tensors
    except ImportError:
        raise UserError(f"{what}: {path} needs safetensors, not installed here: pip install safetensors") from None
    try:
        return load_tensors(path)
    except Exception as error:  # safetensors' own, which is no OSError
        raise UserError(f"{what}: {path} is no readable checkpoint: damaged ({first_line(error)})") from error


def take_entry(content: dict[str, Any], param_key: str | None, path: str | Path, what: str) -> dict[str, torch.Tensor]:
    """:func:`read_network` of the file's content."""
    if not (content and all(torch.is_tensor(value) for value in content.values())):
        keys = ", ".join(short(key) for key in list(content)[:4]) or "nothing"
        entry = content.get(param_key, content.get("params")) if param_key is not None else None
        if entry is None:
            raise UserError(f"{what}: {path} has no entry {param_key!r} (BasicSR's format), it starts with {keys}")
        content = entry
    if not isinstance(content, dict) or not all(torch.is_tensor(v) for v in content.values()):
        raise UserError(f"{what}: {path} does not hold a network's tensors under {param_key!r}")
    return {str(name).removeprefix("module."): tensor for name, tensor in content.items()}


def tell_fit(state: dict[str, torch.Tensor], net: nn.Module) -> str:
    """How many tensors of ``net`` have their like in ``state``, and the names of the others."""
    own = net.state_dict()
    shapes = [name for name in own if name in state and own[name].shape != state[name].shape]
    others = {
        "not in the file": [name for name in own if name not in state],
        "of another shape": [f"{name} {tuple(state[name].shape)}, not {tuple(own[name].shape)}" for name in shapes],
        "not in the network": [name for name in state if name not in own],
    }
    fitting = len(own) - len(shapes) - len(others["not in the file"])
    rest = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in others.items() if names)
    return f"{fitting} of {len(own)} tensors of {type(net).__name__} are loaded{rest and '; ' + rest}."


def check_fit(state: dict[str, torch.Tensor], net: torch.nn.Module, strict: bool, path: str | Path, what: str) -> None:
    """Raise a :class:`UserError` that names the first difference unless ``state`` fits ``net``.

    With ``strict=False`` names may differ, and so may shapes, as in BasicSR; but one tensor must fit. What is to be
    loaded must be of the network's kind of numbers, and finite.
    """
    own = net.state_dict()
    missing = [name for name in own if name not in state]
    unknown = [name for name in state if name not in own]
    shapes = [name for name in own if name in state and own[name].shape != state[name].shape]
    name = type(net).__name__
    if not strict and len(missing) + len(shapes) == len(own):
        raise UserError(f"{what}: {path} is of another network, none of its tensors fits {name}")
    if strict and (missing or unknown):
        example = f"{missing[0]} is missing" if missing else f"{unknown[0]:.80} is not in {name}"
        raise UserError(
            f"{what}: {path} is of another network than network {name} of the options: {len(missing)} tensors missing,"
            f" {len(unknown)} unknown ({example})"
        )
    if strict and shapes:
        first = shapes[0]
        raise UserError(
            f"{what}: {path} is of another network than network {name} of the options: {first} is "
            f"{tuple(state[first].shape)}, not {tuple(own[first].shape)}"
        )
    check_values(state, {n: v for n, v in own.items() if n in state and n not in shapes}, path, what)


def check_values(state: dict[str, torch.Tensor], own: dict[str, torch.Tensor], path: str | Path, what: str) -> None:
    """Raise a :class:`UserError` unless the tensors of ``state`` that ``own`` names are of its kind, and finite.

    Floating point may be of another precision.
    """
    for name, ours in own.items():
        theirs = state[name]
        if theirs.is_floating_point() != ours.is_floating_point() or theirs.is_complex() != ours.is_complex():
            raise UserError(f"{what}: {path}: {name} is of {theirs.dtype}, expected is {ours.dtype}")
        if ours.is_floating_point() and not torch.isfinite(theirs.to(ours.dtype)).all():
            raise UserError(f"{what}: {path}: {name} has values that are not finite (NaN or infinite in {ours.dtype})")
        if name.endswith("running_var") and (theirs < 0).any():
            raise UserError(f"{what}: {path}: {name} has values below 0, which no variance is")


# ------------------------------------------------------------------------------------------------- what they take


def get_size_multiple(options: dict[str, Any]) -> int:
    """A side of an image for a network of these options must be a multiple of this number."""
    options = fill_defaults(options)
    window = options.get("window_size") or 1
    unshuffle = {1: 4, 2: 2}.get(options.get("scale", 4), 1) if options["type"] == "RRDBNet" else 1
    return lcm(unshuffle, *(window if isinstance(window, (list, tuple)) else [window]))


def fill_defaults(options: dict[str, Any]) -> dict[str, Any]:
    """A network's options with the defaults of its class, if ``options["type"]`` is registered."""
    try:
        parameters = inspect.signature(lookup(ARCH_REGISTRY, options, "network")).parameters
    except UserError:
        return options
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty} | options


def count_input_channels(options: dict[str, Any]) -> int:
    """Channels of the images that a network of these options takes."""
    options = fill_defaults(options)
    return options.get("num_in_ch") or options.get("in_chans") or 3


def get_section(opt: Options, key: str, where: str = "") -> Options:
    """Section ``key`` of the options, or of their section ``where``; empty where it is missing or ``~``.

    Raises:
        UserError: it is no section.
    """
    section = opt.get(key) or {}
    if not DICT.accepts(section):
        raise UserError(f"{where and where + '.'}{key}: expected {DICT.text}, got {short(section)}")
    return section


def find_device(name: str) -> torch.device:
    """``auto`` (a GPU if there is one), ``cpu``, ``cuda``, ``cuda:1``, …

    Raises:
        UserError: there is no such device, or it is of another kind.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with suppress(RuntimeError, AssertionError):
        if name.split(":")[0] in ("cpu", "cuda"):
            return torch.empty(0, device=name).device
    raise UserError(f"--device: {name!r} is not here; accepted are auto, cpu and the GPUs cuda, cuda:1, …")
