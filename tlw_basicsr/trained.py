"""Trained networks, as the scripts that use them find them: by a YAML, or by options and a checkpoint."""

import inspect
from argparse import ArgumentParser, Namespace
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn

from tlw_basicsr.errors import UserError, expanded, short
from tlw_basicsr.evaluation import load_network
from tlw_basicsr.kinds import DICT, STR
from tlw_basicsr.options import Options, check_arguments, load_yaml, lookup, read_options
from tlw_basicsr.preflight import build


def add_network_arguments(parser: ArgumentParser) -> None:
    """The arguments that name an SR network and its checkpoint."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--opt", metavar="YAML", help="training or test YAML with the network's options (network_g)")
    source.add_argument("--network", metavar="OPTIONS", help="or the options, such as '{type: EDSR, num_in_ch: 3, …}'")
    parser.add_argument(
        "--checkpoint",
        metavar="PTH",
        help="default: the YAML's path.pretrain_network_g, else experiments/NAME/models/net_g_latest.pth",
    )
    parser.add_argument(
        "--param_key",
        choices=("params_ema", "params"),
        default="params_ema",
        help="entry of the checkpoint; default params_ema, or params where there is no such",
    )


def sr_network(args: Namespace) -> tuple[nn.Module, Options]:
    """The SR network that the arguments name, in eval mode on the CPU, and its options.

    Raises:
        UserError: the YAML, the options or the checkpoint are wrong, or no checkpoint is named.
    """
    opt = {"network_g": load_yaml(args.network, "--network")} if args.network is not None else read_options(args.opt)
    path = args.checkpoint or checkpoint_of(opt, "g")
    return trained_network(opt, "network_g", path, args.param_key), opt["network_g"]


def checkpoint_of(opt: Options, label: str) -> Path:
    """The checkpoint that a YAML names for ``network_{label}``, else the newest of its training in this folder.

    Raises:
        UserError: there is none.
    """
    key = f"pretrain_network_{label}"
    named = section_of(opt, "path").get(key)
    if named is not None and not STR.accepts(named):
        raise UserError(f"path.{key}: expected the path of a checkpoint, or ~, got {short(named)}")
    path = Path("experiments", str(opt.get("name")), "models", f"net_{label}_latest.pth")
    if not named and not path.is_file():
        raise UserError(f"--checkpoint: missing; the options name no path.{key}, and {path} is none")
    return expanded(named, f"path.{key}") if named else path


def section_of(opt: Options, key: str, where: str = "") -> Options:
    """Section ``key`` of the options, or of their section ``where``; empty where it is missing or ``~``.

    Raises:
        UserError: it is no section.
    """
    section = opt.get(key) or {}
    if not DICT.accepts(section):
        raise UserError(f"{where and where + '.'}{key}: expected {DICT.text}, got {short(section)}")
    return section


def trained_network(opt: Options, key: str, path: str | Path, param_key: str = "params") -> nn.Module:
    """The network of section ``key`` of the options with the weights of a checkpoint, in eval mode on the CPU.

    Raises:
        UserError: the options or the checkpoint are wrong or don't fit each other.
    """
    arch = lookup(ARCH_REGISTRY, opt.get(key), key)
    check_arguments(opt[key], key, arch)
    build(opt, key)
    return load_network(opt[key], path, param_key)


def device_named(name: str) -> torch.device:
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


def completed(options: dict[str, Any]) -> dict[str, Any]:
    """A network's options with the defaults of its class, if ``options["type"]`` is registered."""
    try:
        parameters = inspect.signature(lookup(ARCH_REGISTRY, options, "network")).parameters
    except UserError:
        return options
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty} | options


def input_channels(options: dict[str, Any]) -> int:
    """Channels of the images that a network of these options takes."""
    options = completed(options)
    return options.get("num_in_ch") or options.get("in_chans") or 3
