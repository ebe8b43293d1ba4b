"""Networks: built from their options, loaded from files, and what they take."""

import inspect
import warnings
from contextlib import suppress
from copy import deepcopy
from functools import lru_cache
from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn

from tlw_basicsr.registry import check_arguments, find_doubts, keep_arguments, lookup
from tlw_basicsr.util.errors import UserError, expanded, first_line, short
from tlw_basicsr.util.files import load_file
from tlw_basicsr.util.kinds import DICT, Options

if TYPE_CHECKING:
    from spandrel import ImageModelDescriptor

FROM_FILE = "SpandrelNetwork"  # {type: SpandrelNetwork, file: PATH}


def build_network(opt: Options, key: str, device: str = "meta") -> nn.Module:
    """Build the network of section ``key`` without changing the random numbers.

    On the device ``meta`` it takes no memory, where its class can be built so.
    """
    arch = lookup(ARCH_REGISTRY, opt[key], key)
    arguments = keep_arguments(opt[key], arch)
    try:
        with torch.random.fork_rng(devices=[]):
            if device != "meta":
                return arch(**arguments).to(device)
            with suppress(Exception), torch.device("meta"):
                return arch(**arguments)
            return arch(**arguments)  # some compute with their weights while they are built
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
    """Load the registered network of ``{type: …, …}`` with the weights of a file, in eval mode on the CPU.

    The file is one that :func:`read_network` reads; ``key`` is the options' place, for messages.
    """
    arch = lookup(ARCH_REGISTRY, options, key)
    options = options or {}
    check_arguments(options, key, arch)
    if options == of_file(path):
        return read_model(path, param_key).model.eval().requires_grad_(False)
    net = build_network({key: options}, key, "cpu")
    state = read_network(path, param_key, "checkpoint")
    check_fit(state, net, True, path, "checkpoint")
    net.load_state_dict(state)
    return net.eval().requires_grad_(False)


def read_network(path: str | Path, param_key: str | None, what: str) -> dict[str, torch.Tensor]:
    """Read the state dict of a network from a file, without the ``module.`` of DataParallel.

    The file has BasicSR's format, ``{'params': …, 'params_ema': …}``, of which ``param_key`` is taken, or ``params``
    where that is missing; or it is the state dict itself, as safetensors are. ``what`` is the option that names it.
    """
    content = read_safetensors(path, what) if is_safetensors(path) else load_file(path, what)
    return take_entry(content, param_key, path, what)


def read_model(path: str | Path, param_key: str = "params_ema", what: str = "--model") -> "ImageModelDescriptor":
    """Build the network of a file without a YAML: spandrel knows its architecture by the names of its tensors.

    Arguments as :func:`read_network`.

    Returns:
        spandrel's descriptor: the network with its weights in ``model``, and its scale, channels and sizes.

    Raises:
        UserError: The file can't be read, or is of no network that spandrel knows and that is called with an image
            alone.
    """
    import spandrel

    state = read_network(path, param_key, what)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
            warnings.simplefilter("ignore")  # of architectures' own code
            model = spandrel.ModelLoader().load_from_state_dict(spandrel.canonicalize_state_dict(state))
    except Exception as error:  # spandrel's own, and what wrong shapes lead to
        raise UserError(
            f"{what}: {path} is of no network that spandrel knows, it starts with {short(next(iter(state)))} "
            f"({first_line(error)[:200]}); give its options by --opt or --network"
        ) from error
    check_fit(model.model.state_dict(), model.model, True, path, what)  # finite
    name = model.architecture.name
    if not isinstance(model, spandrel.ImageModelDescriptor):
        raise UserError(f"{what}: {path} is a {name} network, which needs a mask beside the image")
    sizes = model.size_requirements
    side = max(sizes.minimum, -(-16 // sizes.multiple_of) * sizes.multiple_of)
    image = torch.rand(1, model.input_channels, side, side, generator=torch.Generator().manual_seed(0))
    probe = deepcopy(model)  # some keep what they compute with, which spandrel's inference mode shuts off from training
    try:
        with torch.no_grad():
            own = probe.model.eval()(image.clone())
            own = own[0] if isinstance(own, (list, tuple)) else own
            alike = torch.allclose(own.clamp(0, 1), probe(image), atol=1e-4)
    except Exception:  # a network that takes more than an image raises what it likes
        alike = False
    if not alike:
        raise UserError(f"{what}: {path} is a {name} network, which takes more than an image in [0, 1]")
    return model


def of_file(path: str | Path) -> Options:
    """Return the options of the network that a file holds."""
    return {"type": FROM_FILE, "file": str(path)}


@lru_cache(maxsize=4)
def _describe_model(path: Path, modified: int) -> Options:
    model = read_model(path, what="file")
    return {
        "num_in_ch": model.input_channels,
        "num_out_ch": model.output_channels,
        "upscale": model.scale,
        "window_size": model.size_requirements.multiple_of,
        "smallest_side": model.size_requirements.minimum,
        "architecture": model.architecture.name,
        "takes_tiles": model.tiling.name == "SUPPORTED",
    }


def describe_model(path: str | Path) -> Options:
    """Return what the network of a file takes, under the names that options have for it."""
    path = expanded(path, "file")
    return dict(_describe_model(path, path.stat().st_mtime_ns if path.is_file() else 0))


def is_safetensors(path: str | Path) -> bool:
    """Whether a file begins as safetensors do: with the length of a header in eight bytes, then JSON."""
    if not Path(path).is_file():
        return False
    with open(path, "rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") < Path(path).stat().st_size


def read_safetensors(path: str | Path, what: str) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file."""
    try:
        from safetensors.torch import load_file as load_tensors
    except ImportError:
        raise UserError(f"{what}: {path} needs safetensors, not installed here: pip install safetensors") from None
    try:
        return load_tensors(path)
    except Exception as error:  # safetensors' own, which is no OSError
        raise UserError(f"{what}: {path} is no readable checkpoint: damaged ({first_line(error)})") from error


def take_entry(content: dict[str, Any], param_key: str | None, path: str | Path, what: str) -> dict[str, torch.Tensor]:
    """Take a network's state dict out of the content of a file, see :func:`read_network`."""
    if not (content and all(map(torch.is_tensor, content.values()))):
        keys = ", ".join(short(key) for key in list(content)[:4]) or "nothing"
        entry = content.get(param_key, content.get("params")) if param_key is not None else None
        if entry is None:
            raise UserError(f"{what}: {path} has no entry {param_key!r} (BasicSR's format), it starts with {keys}")
        content = entry
    if not isinstance(content, dict) or not all(map(torch.is_tensor, content.values())):
        raise UserError(f"{what}: {path} does not hold a network's tensors under {param_key!r}")
    return {str(name).removeprefix("module."): tensor for name, tensor in content.items()}


def compare_tensors(state: dict[str, torch.Tensor], net: nn.Module) -> tuple[list[str], list[str], list[str]]:
    """Return the names of tensors that only ``net`` has, that only ``state`` has, and whose shapes differ."""
    own = net.state_dict()
    shapes = [name for name in own if name in state and own[name].shape != state[name].shape]
    return [name for name in own if name not in state], [name for name in state if name not in own], shapes


def describe_fit(state: dict[str, torch.Tensor], net: nn.Module) -> str:
    """Say how many tensors of ``net`` are in ``state`` with their shape, and name the others."""
    own = net.state_dict()
    missing, unknown, shapes = compare_tensors(state, net)
    shapes = [f"{name} {tuple(state[name].shape)}, not {tuple(own[name].shape)}" for name in shapes]
    others = {"not in the file": missing, "of another shape": shapes, "not in the network": unknown}
    rest = "".join(f"; {kind}: {', '.join(names)}" for kind, names in others.items() if names)
    fitting = len(own) - len(shapes) - len(missing)
    return f"{fitting} of {len(own)} tensors of {type(net).__name__} are loaded{rest}."


def check_fit(state: dict[str, torch.Tensor], net: torch.nn.Module, strict: bool, path: str | Path, what: str) -> None:
    """Check that ``state`` fits ``net``; the error names the first difference.

    With ``strict=False`` names and shapes may differ, as in BasicSR, but one tensor must fit. What is loaded must have
    the network's kind of numbers, and be finite.
    """
    own, kind = net.state_dict(), type(net).__name__
    missing, unknown, shapes = compare_tensors(state, net)
    if not strict and len(missing) + len(shapes) == len(own):
        raise UserError(f"{what}: {path} is of another network, none of its tensors fits {kind}")
    if strict and (missing or unknown or shapes):
        if missing or unknown:
            example = f"{missing[0]} is missing" if missing else f"{unknown[0]:.80} is not in {kind}"
            difference = f"{len(missing)} tensors missing, {len(unknown)} unknown ({example})"
        else:
            theirs, ours = (tuple(tensors[shapes[0]].shape) for tensors in (state, own))
            difference = f"{shapes[0]} is {theirs}, not {ours}"
        raise UserError(f"{what}: {path} is of another network than network {kind} of the options: {difference}")
    for name in [name for name in own if name not in {*missing, *shapes}]:
        ours, theirs = own[name], state[name]
        if theirs.is_floating_point() != ours.is_floating_point() or theirs.is_complex() != ours.is_complex():
            raise UserError(f"{what}: {path}: {name} is of {theirs.dtype}, expected is {ours.dtype}")
        if ours.is_floating_point() and not torch.isfinite(theirs.to(ours.dtype)).all():
            raise UserError(f"{what}: {path}: {name} has values that are not finite (NaN or infinite in {ours.dtype})")
        if name.endswith("running_var") and (theirs < 0).any():
            raise UserError(f"{what}: {path}: {name} has values below 0, which no variance is")


def get_size_multiple(options: dict[str, Any]) -> int:
    """Return the number of which the sides of images for a network of these options must be multiples."""
    options = fill_defaults(options)
    window = options.get("window_size") or 1
    unshuffle = {1: 4, 2: 2}.get(options.get("scale", 4), 1) if options["type"] == "RRDBNet" else 1
    return lcm(unshuffle, *(window if isinstance(window, (list, tuple)) else [window]))


def fill_defaults(options: dict[str, Any]) -> dict[str, Any]:
    """Return a network's options with the defaults of its class, if ``options["type"]`` is registered.

    Of :data:`FROM_FILE` they are what its file says, see :func:`describe_model`.
    """
    if options["type"] == FROM_FILE and "file" in options:
        return describe_model(options["file"]) | options
    try:
        parameters = inspect.signature(lookup(ARCH_REGISTRY, options, "network")).parameters
    except UserError:
        return options
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty} | options


def count_input_channels(options: dict[str, Any]) -> int:
    """Return the number of channels of the images that a network of these options takes."""
    options = fill_defaults(options)
    return options.get("num_in_ch") or options.get("in_chans") or 3


def get_section(opt: Options, key: str, where: str = "") -> Options:
    """Return section ``key`` of ``opt``, whose place is ``where``; an empty one where it is missing or ``~``."""
    section = opt.get(key) or {}
    if not DICT.accepts(section):
        raise UserError(f"{where and where + '.'}{key}: expected {DICT.text}, got {short(section)}")
    return section


def find_device(name: str) -> torch.device:
    """Return the device of a name: ``auto`` (a GPU if there is one), ``cpu``, ``cuda``, ``cuda:1``, …"""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with suppress(RuntimeError, AssertionError):
        if name.split(":")[0] in ("cpu", "cuda"):
            return torch.empty(0, device=name).device
    raise UserError(f"--device: {name!r} is not here; accepted are auto, cpu and the GPUs cuda, cuda:1, …")
