"""Test by a BasicSR YAML: ``tlw test FILE``, or ``python -m tlw_basicsr.test -opt FILE``.

``results/`` is made in the folder that it is started from.
"""

import sys
from pathlib import Path

from tlw_basicsr.engine.pipeline import test_pipeline


def main(argv: list[str] | None = None) -> None:
    """Run the command; a first argument without a hyphen is the YAML, as with ``-opt``."""
    words = list(sys.argv[1:] if argv is None else argv)
    test_pipeline(str(Path.cwd()), ["-opt", *words] if words and not words[0].startswith("-") else words)
