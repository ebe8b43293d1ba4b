"""``python -m tlw_basicsr`` is ``tlw``."""

from tlw_basicsr.cli import main

main()
