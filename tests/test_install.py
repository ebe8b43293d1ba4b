"""The set-up script and ``tlw-setup``, as far as they go without installing anything large."""

import os
import shutil
import subprocess
import sys

import pytest

import tlw_setup
from tests.conftest import ROOT


@pytest.mark.parametrize("python", ["/bin/false", "no-such-python"])
def test_a_python_that_cannot_be_used_is_an_error_and_not_another_python(tmp_path, python):
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/setup_env.sh", tmp_path / "scripts")
    done = subprocess.run(
        ["bash", "-c", "source scripts/setup_env.sh ''"], cwd=tmp_path, env=os.environ | {"PYTHON": python},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == f"error: PYTHON={python} is not a Python of 3.10 or later that can make environments\n"
    assert not (tmp_path / ".venv").exists()


def without_basicsr(program, cwd):
    """Run a program in which BasicSR can't be found."""
    hide = (
        "import importlib.util, sys; real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'basicsr' else real(name, *rest)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", hide + program], cwd=cwd, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_without_basicsr_one_line_says_what_to_run(tmp_path):
    done = without_basicsr("import tlw_setup; sys.argv = ['tlw', 'train']; tlw_setup.tlw()", tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: BasicSR is not installed in this environment; run: tlw-setup\n"
    done = without_basicsr("import tlw_basicsr", tmp_path)
    assert done.stderr.splitlines()[-1] == f"ImportError: {tlw_setup.MISSING}"


def test_exec_within_a_function_gives_names_to_locals_as_it_did():
    """What BasicSR's setup.py does to learn its version."""
    program = tlw_setup.OLD_EXEC + (
        "\ndef version():\n    exec(compile('x = 5', 'file', 'exec'))\n    return locals()['x']\n"
        "space = {}\nexec('y = 6', space)\nexec('z = 7', {}, space)\n"
        "assert version() == 5 and space['y'] == 6 and space['z'] == 7\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_basicsr_that_is_there_is_left_alone(capsys):
    tlw_setup.main()
    assert capsys.readouterr().out == "BasicSR is installed already\n"
