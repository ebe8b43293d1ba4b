"""``tlw compare``, where users of BasicSR look for it."""

from tlw_basicsr.cli import run_command

if __name__ == "__main__":
    run_command("compare")
