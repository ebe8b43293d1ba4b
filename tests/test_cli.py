"""``tlw``: every command, from every place that it is called from."""

import re
import runpy
import sys
from functools import partial

import pytest

from tests.conftest import ROOT
from tests.helpers import run_python
from tlw_basicsr import __version__, cli

SCRIPTS = {path.name: path for path in sorted((ROOT / "scripts").glob("*.py")) if "cli import" in path.read_text()}


def call(monkeypatch, capfd, function, *arguments):
    """Exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["tlw", *arguments])
    monkeypatch.setenv("COLUMNS", "100")
    try:
        function()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    return code, *capfd.readouterr()


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_help_of_a_command_fits_a_screen_and_has_an_example(monkeypatch, capfd, name):
    code, out, _ = call(monkeypatch, capfd, cli.main, name, "--help")
    assert code == 0
    assert f"tlw {name} " in out.split("\n\n", 1)[1]  # behind the usage
    assert len(out.splitlines()) <= 50
    assert max(map(len, out.splitlines())) <= 120


def test_the_list_of_commands_and_the_version(monkeypatch, capfd):
    code, out, _ = call(monkeypatch, capfd, cli.main)
    assert code == 0
    assert re.findall(r"^  (\w+)  ", out, re.MULTILINE) == list(cli.COMMANDS)
    assert call(monkeypatch, capfd, cli.main, "--version")[1] == f"{__version__}\n"


def test_an_unknown_command_is_one_line(monkeypatch, capfd):
    for word, message in (("trian", "did you mean train?\n"), ("xyz", "accepted are quickstart, prepare, ")):
        code, _, err = call(monkeypatch, capfd, cli.main, word)
        assert code == 2 and err.startswith(f"error: tlw {word}: unknown command; {message}") and err.count("\n") == 1


LIGHT = """
import sys, time
from tlw_basicsr.cli import main
try:
    main(sys.argv[1:])
finally:
    print("seconds of CPU", time.process_time() < 0.5, *{"torch", "numpy", "basicsr"} & {*sys.modules})
"""


@pytest.mark.parametrize(
    "words", ["--help", "--version", "options", "infer --help", "prepare --chek", "infer", "inferr"]
)
def test_help_and_a_wrong_command_come_at_once(words):
    code = 0 if words in ("--version", "options") or "--help" in words else 2
    done = run_python(ROOT, "-c", LIGHT, *words.split(), code=code)
    assert done.stdout.endswith("seconds of CPU True\n"), done.stdout


def test_a_terminal_is_told_at_once_what_begins(monkeypatch, capfd):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for words, line in (["convert", "none.pth", "out.pth", "--net", "hat"], "tlw convert: "), (["options"], ""):
        err = call(monkeypatch, capfd, cli.main, *words)[2]
        assert err.startswith(line) and bool(err) == bool(line)


@pytest.mark.parametrize("name", [*SCRIPTS, "tlw_basicsr", "tlw_basicsr.train", "tlw_basicsr.test"])
def test_a_script_and_a_module_are_commands(monkeypatch, capfd, name):
    """``python -m tlw_basicsr.train`` is ``tlw train``, and does not end silently."""
    run = partial(runpy.run_module, name, alter_sys=True)
    if name in SCRIPTS:
        run = partial(runpy.run_path, str(SCRIPTS[name]))
    code, out, _ = call(monkeypatch, capfd, partial(run, run_name="__main__"), "--help")
    assert code == 0 and out.startswith("usage: tlw ")


def test_options_lists_the_yaml_files_and_prints_one(monkeypatch, capfd):
    names = call(monkeypatch, capfd, cli.main, "options")[1].split()
    assert {"EDSR_L1TLW_x4", "recipe_EDSR_x4"} <= set(names)
    code, out, _ = call(monkeypatch, capfd, cli.main, "options", "EDSR_L1TLW_x4")
    assert code == 0
    assert out == (ROOT / "options/train/EDSR/train_EDSR_L1TLW_x4.yml").read_text("utf-8")
    code, out, err = call(monkeypatch, capfd, cli.main, "options", "EDSR_L1TWL_x4")
    assert code == 2 and out == "" and "did you mean EDSR_L1TLW_x4" in err and err.count("\n") == 1
