"""Print what a shell needs to complete ``tlw``. Examples:

tlw completion bash > ~/.local/share/bash-completion/completions/tlw
tlw completion zsh > ~/.zfunc/_tlw      # ~/.zfunc in fpath, before compinit
tlw completion fish > ~/.config/fish/completions/tlw.fish
"""

from argparse import ArgumentParser
from collections.abc import Sequence
from importlib import import_module
from typing import Any
from unittest.mock import patch

import shtab

from tlw_basicsr.commands import COMMANDS, parser_of

SHELLS = ("bash", "zsh", "fish")


class _Found(Exception):
    """Carries the parser of a command."""


def find_parser(name: str) -> ArgumentParser:
    """Return the parser that a command makes when it runs; it does nothing more."""

    def hand_over(parser: ArgumentParser, *_: Any) -> None:
        raise _Found(parser)

    with patch.object(ArgumentParser, "parse_args", hand_over):
        try:
            import_module(f"tlw_basicsr.commands.{name}").main(["--help"])
        except _Found as found:
            return found.args[0]
    raise AssertionError(f"{name} has no parser")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments, print the script."""
    parser = parser_of("completion", __doc__)
    parser.add_argument("shell", choices=SHELLS)
    shell = parser.parse_args(argv).shell
    whole = ArgumentParser(prog="tlw")
    commands = whole.add_subparsers()
    for name, text in COMMANDS.items():
        each = find_parser(name)
        for action in each._actions:
            if action.nargs != 0 and not action.choices:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        commands.add_parser(name, help=text, parents=[each], add_help=False)
    print(shtab.complete(whole, shell))
