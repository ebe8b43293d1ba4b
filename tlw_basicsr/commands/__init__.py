"""The commands of ``tlw``, a module each, and the arguments that they share."""

import argparse
from argparse import ArgumentParser


def parser_of(name: str, text: str | None) -> argparse.ArgumentParser:
    """The parser of ``tlw NAME``, with a text that keeps its lines."""
    return argparse.ArgumentParser(
        prog=f"tlw {name}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )


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
        default="params_ema",
        help="entry of the checkpoint; default params_ema, or params where there is no such; of no concern for a file "
        "that is a state dict, such as safetensors",
    )
    add_plugins_argument(parser)


def add_plugins_argument(parser: ArgumentParser) -> None:
    """The argument that lets a YAML run code."""
    parser.add_argument("--allow-plugins", action="store_true", help="import the plugins, code, that the YAML names")
