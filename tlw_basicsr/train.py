"""Train by a BasicSR YAML: ``python -m tlw_basicsr.train -opt FILE``.

``experiments/`` is made in the folder that it is started from.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: make the package importable, and its modules not top-level ones
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tlw_basicsr.errors import run
from tlw_basicsr.pipeline import train_pipeline


def main() -> None:
    """Entry point."""
    run(lambda: train_pipeline(str(Path.cwd())))


if __name__ == "__main__":
    main()
