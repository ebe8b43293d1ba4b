"""``python -m tlw_basicsr.test -opt FILE`` is ``tlw test FILE``, in BasicSR's habit; so is running this file."""

import sys
from pathlib import Path

if not __package__:  # run as a file: make the package importable, and its modules not top-level ones
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tlw_basicsr.cli import run_command

if __name__ == "__main__":
    run_command("test")
