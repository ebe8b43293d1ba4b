"""Install BasicSR 1.4.2, and what the plugin and the commands need, into this environment: ``tlw-setup``.

BasicSR's source distribution downloads PyTorch once more, only to be built, and fails to build on Python 3.13 and
later: ``setup.py`` executes a file within a function and expects the new names among ``locals()``. Here it is built
with what is installed already, and with an ``exec`` that does so. Nothing of BasicSR is changed.
"""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import distributions, requires
from pathlib import Path

BASICSR = "basicsr==1.4.2"
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


def find_missing() -> list[str]:
    """The requirements of the extra ``basicsr`` of which no version is installed."""
    entries = [entry.partition(";") for entry in requires("tlw_basicsr") or ()]
    wanted = [requirement.strip() for requirement, _, marker in entries if "basicsr" in marker]
    installed = {normalize(str(name)) for d in distributions() if (name := d.metadata["Name"])}
    return [each for each in wanted if normalize(re.split(r"[^\w.-]", each)[0]) not in installed]


def normalize(name: str) -> str:
    """A distribution's name as package indices compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def install(*arguments: str, **environment: str) -> None:
    """Run ``pip install``; exit code 2 if it fails."""
    if importlib.util.find_spec("pip") is None:
        sys.exit(fail("pip is missing in this environment; install it, then run tlw-setup again"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    if subprocess.run(command, env=os.environ | environment, check=False).returncode:
        sys.exit(fail(f"pip could not install {arguments[-1]}; its own message is above"))


def main() -> None:
    """Install what is missing of the extra ``basicsr`` and of BasicSR; exit code 2 if that fails."""
    missing = find_missing()
    if missing:
        print(f"Installing {', '.join(missing)}")
        install(*missing)
    if importlib.util.find_spec("basicsr") is not None:  # or a fork of its name
        print("BasicSR is installed already")
        return
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "sitecustomize.py").write_text(OLD_EXEC, "utf-8")
        paths = [folder, *filter(None, [os.environ.get("PYTHONPATH")])]
        install("--no-build-isolation", "--no-deps", BASICSR, PYTHONPATH=os.pathsep.join(paths))
    print(f"{BASICSR} is installed")


def fail(message: str) -> int:
    """Print the error; returns the exit code."""
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
