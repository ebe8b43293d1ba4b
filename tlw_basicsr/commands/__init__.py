"""The commands of ``tlw``, a module each, and the arguments that they share."""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any


def parser_of(name: str, text: str | None) -> ArgumentParser:
    """The parser of ``tlw NAME``, with a text that keeps its lines."""
    return ArgumentParser(prog=f"tlw {name}", description=text, formatter_class=RawDescriptionHelpFormatter)


SHARED: dict[str, dict[str, Any]] = {
    "--gt": {"type": Path, "required": True, "help": "folder of HR images"},
    "--param_key": {"default": "params_ema", "help": "entry of a checkpoint; default params_ema, else params"},
    "--device": {"default": "auto", "help": "auto (default), cpu, cuda, cuda:1, …"},
    "--allow-plugins": {"action": "store_true", "help": "import the plugins, code, that the YAML names"},
    "--perceptual": {"action": "store_true", "help": "also GMSD, HaarPSI and VIF, which need no weights"},
    "--grey-as-y": {"action": "store_true", "help": "take the levels of a grey HR image as Y (field)"},
}


def add_arguments(parser: ArgumentParser, *names: str) -> None:
    """Add arguments that several commands have."""
    for name in names:
        parser.add_argument(name, **SHARED[name])


def add_network_arguments(parser: ArgumentParser) -> Any:
    """Add the arguments that name an SR network and its checkpoint; returns their group, of which one is given."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="FILE", help="a file of any network that spandrel knows; no options needed")
    source.add_argument("--opt", metavar="YAML", help="training or test YAML with the network's options (network_g)")
    source.add_argument("--network", metavar="OPTIONS", help="or the options, such as '{type: EDSR, num_in_ch: 3, …}'")
    newest = "default: the YAML's path.pretrain_network_g, else experiments/NAME/models/net_g_latest.pth"
    parser.add_argument("--checkpoint", metavar="PTH", help=newest)
    add_arguments(parser, "--param_key", "--allow-plugins")
    return source
