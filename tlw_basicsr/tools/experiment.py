"""The networks of a training: found by its YAML, loaded."""

from argparse import Namespace
from pathlib import Path

from torch import nn

from tlw_basicsr.engine.options import read_options
from tlw_basicsr.networks import get_section, load_network
from tlw_basicsr.util.errors import UserError, expanded, short
from tlw_basicsr.util.kinds import STR, Options
from tlw_basicsr.util.yaml_options import load_yaml


def load_sr_network(args: Namespace) -> tuple[nn.Module, Options]:
    """The SR network that the arguments name, in eval mode on the CPU, and its options.

    Raises:
        UserError: the YAML, the options or the checkpoint are wrong, or no checkpoint is named.
    """
    if args.network is not None:
        opt = {"network_g": load_yaml(args.network, "--network")}
    else:
        opt = read_options(args.opt, allow_plugins=args.allow_plugins)
    path = args.checkpoint or find_checkpoint(opt, "g")
    return load_network(opt.get("network_g"), path, args.param_key), opt["network_g"]


def find_checkpoint(opt: Options, label: str) -> Path:
    """The checkpoint that a YAML names for ``network_{label}``, else the newest of its training in this folder.

    Raises:
        UserError: there is none.
    """
    key = f"pretrain_network_{label}"
    named = get_section(opt, "path").get(key)
    if named is not None and not STR.accepts(named):
        raise UserError(f"path.{key}: expected the path of a checkpoint, or ~, got {short(named)}")
    path = Path("experiments", str(opt.get("name")), "models", f"net_{label}_latest.pth")
    if not named and not path.is_file():
        raise UserError(f"--checkpoint: missing; the options name no path.{key}, and {path} does not exist")
    return expanded(named, f"path.{key}") if named else path
