"""Install BasicSR 1.4.2 into this environment: ``tlw-setup``.

Its source distribution asks for PyTorch once more, only to be built, and fails to build on Python 3.13 and later:
``setup.py`` executes a file within a function and expects the new names among ``locals()``. Here it is built with what
is installed already, and with an ``exec`` that does so. Nothing of BasicSR is changed.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

BASICSR = "basicsr==1.4.2"
MISSING = "BasicSR is not installed in this environment; run: tlw-setup"
OLD_EXEC = """\
import builtins
import sys

new_exec = builtins.exec


def old_exec(code, globals=None, locals=None, /, **options):
    if globals is None:
        frame = sys._getframe(1)
        globals, locals = frame.f_globals, frame.f_locals  # which takes new names, unlike what locals() gives
    new_exec(code, globals, locals, **options)


builtins.exec = old_exec
"""


def has_basicsr() -> bool:
    """Whether BasicSR, or a fork of its name, is installed."""
    return importlib.util.find_spec("basicsr") is not None


def main() -> None:
    """Install BasicSR if it is missing; exit code 2 if that fails."""
    if has_basicsr():
        print("BasicSR is installed already")
        return
    for name in ("pip", "setuptools"):
        if importlib.util.find_spec(name) is None:
            sys.exit(fail(f"{name} is missing in this environment; install it, then run tlw-setup again"))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "sitecustomize.py").write_text(OLD_EXEC, "utf-8")
        paths = [folder, *filter(None, [os.environ.get("PYTHONPATH")])]
        command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--quiet", BASICSR]
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, check=False)
    if done.returncode:
        sys.exit(fail(f"pip could not install {BASICSR}; its own message is above"))
    print(f"{BASICSR} is installed")


def fail(message: str) -> int:
    """Print the error; returns the exit code."""
    print(f"error: {message}", file=sys.stderr)
    return 2


def tlw() -> None:
    """``tlw``: the commands of the package, or one line if BasicSR is missing."""
    if not has_basicsr():
        sys.exit(fail(MISSING))
    from tlw_basicsr.cli import main as commands

    commands()


if __name__ == "__main__":
    main()
