"""Print what a shell needs to complete ``tlw``. Examples:

tlw completion bash > ~/.local/share/bash-completion/completions/tlw
tlw completion zsh > ~/.zfunc/_tlw      # ~/.zfunc in fpath, before compinit
tlw completion fish > ~/.config/fish/completions/tlw.fish
"""

from argparse import ArgumentParser
from contextlib import suppress
from importlib import import_module
from unittest.mock import patch

import shtab

from tlw_basicsr.commands import COMMANDS, parser_of


def find_parser(name: str) -> ArgumentParser:
    """Return the parser that a command makes when it runs; it does nothing more."""
    command = import_module(f"tlw_basicsr.commands.{name}")
    with patch.object(ArgumentParser, "parse_args", autospec=True, side_effect=SystemExit) as parse:
        with suppress(SystemExit):
            command.main([])
        return parse.call_args.args[0]


def main(argv: list[str] | None = None) -> None:
    """Parse the arguments, print the script."""
    parser = parser_of("completion", __doc__)
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
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
