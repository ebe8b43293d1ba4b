"""``tlw``, also ``python -m tlw_basicsr``: the programs of this package as one command."""

import sys
from difflib import get_close_matches
from importlib import import_module

from tlw_basicsr.commands import COMMANDS, PARSERS
from tlw_basicsr.plugin import explain
from tlw_basicsr.util.errors import UserError, run
from tlw_basicsr.util.progress import announce
from tlw_basicsr.version import __version__

HELP = """usage: tlw COMMAND …

Trainable Loss Weights for super-resolution, version {version}.

{commands}

tlw COMMAND --help shows the arguments of a command and an example. To begin:
  tlw quickstart"""


def main(argv: list[str] | None = None) -> None:
    """Run the command that the arguments name."""
    name, *rest = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    if name in ("-h", "--help"):
        lines = "\n".join(f"  {command:10}  {text}" for command, text in COMMANDS.items())
        print(HELP.format(version=__version__, commands=lines))
    elif name == "--version":
        print(__version__)
    else:
        run_command(name, rest)


def run_command(name: str, argv: list[str] | None = None) -> None:
    """Run one command with its own arguments, ``sys.argv[1:]`` if None; see :func:`tlw_basicsr.util.errors.run`."""

    def execute() -> None:
        if name not in COMMANDS:
            near = get_close_matches(name, COMMANDS, 1)
            hint = f"did you mean {near[0]}?" if near else f"accepted are {', '.join(COMMANDS)}"
            raise UserError(f"tlw {name}: unknown command; {hint}")
        if name in PARSERS:
            PARSERS[name]().parse_args(argv)  # before the imports, which take seconds
        if name != "options" and not {"-h", "--help"} & {*(sys.argv[1:] if argv is None else argv)}:
            announce(f"tlw {name}: {COMMANDS[name]} …")
        try:
            command = import_module(f"tlw_basicsr.commands.{name}")
        except ImportError as error:
            raise UserError(explain(error)) from error
        command.main(argv)

    run(execute)
