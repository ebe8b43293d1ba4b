"""Train by a BasicSR YAML: ``tlw train FILE``, or ``python -m tlw_basicsr.train -opt FILE``.

``experiments/`` is made in the folder that it is started from.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: make the package importable, and its modules not top-level ones
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tlw_basicsr.engine.pipeline import train_pipeline
from tlw_basicsr.util.errors import run


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; a first argument without a hyphen is the YAML, as with ``-opt``."""
    words = list(sys.argv[1:] if argv is None else argv)
    train_pipeline(str(Path.cwd()), ["-opt", *words] if words and not words[0].startswith("-") else words)


if __name__ == "__main__":
    run(main)
