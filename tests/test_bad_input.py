"""Whatever is given: a right result, or one line that names what is wrong; nothing runs, nothing is damaged."""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.bad_input import cases, generator_of
from tests.conftest import ROOT, reset_logger, tiny_options, write_yaml
from tests.helpers import TRAIN, check_all, quick, run_python
from tlw_basicsr import UserError
from tlw_basicsr.core.distances import LPIPSDistance
from tlw_basicsr.engine.pipeline import train_pipeline
from tlw_basicsr.losses.distance_loss import build_distance
from tlw_basicsr.util.errors import run, short
from tlw_basicsr.util.files import load_file

CASES = cases()
EITHER = [case.name for case in CASES if case.must_fail is None and case.kind != "attack"]  # either ending is right
SAMPLE = set(random.Random(0).sample(EITHER, 60))
PARAMETERS = [
    pytest.param(c, id=c.name, marks=[pytest.mark.fuzz] if c.name in set(EITHER) - SAMPLE else []) for c in CASES
]


def digest(*folders):
    """Of all files' names and contents."""
    sums = hashlib.sha256()
    for folder in folders:
        for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
            sums.update(str(path).encode() + path.read_bytes())
    return sums.hexdigest()


@pytest.fixture(scope="module")
def given(photographs, tmp_path_factory):
    """What is whole: options, a finished training with its network and state, weights of a distance."""
    root = tmp_path_factory.mktemp("given")
    opt = quick(photographs, train__total_iter=2)
    train_pipeline(str(root), ["-opt", str(write_yaml(root, opt))])
    reset_logger()
    experiment = root / "experiments/tiny"
    trunk = LPIPSDistance("squeeze", weights="random").trunk.state_dict()

    def train(folder, path, total_iter=1):
        train_pipeline(str(folder), ["-opt", str(path), "--force_yml", f"train:total_iter={total_iter}"])

    def use(folder, target, content):
        file = folder / {"network": "net_g_2.pth", "state": "2.state", "weights": "squeeze.pth"}[target]
        file.write_bytes(content)
        if target == "weights":
            return lambda: build_distance({"type": "LPIPSDistance", "net": "squeeze", "weights": str(file)})
        if target == "network":
            return lambda: check_all(folder, {**opt, "path": {"pretrain_network_g": str(file)}})
        states = folder / "theirs/training_states"
        states.mkdir(parents=True)
        shutil.copytree(experiment / "models", folder / "theirs/models")
        shutil.move(file, states / file.name)
        path = write_yaml(folder, {**opt, "path": {"resume_state": str(states / file.name)}})
        return lambda: train(folder, path, 3)

    return {
        "options": tiny_options(photographs, train__total_iter=1, train__tlw__k_unit="iter"),
        "network": load_file(experiment / "models/net_g_2.pth", ""),
        "state": load_file(experiment / "training_states/2.state", ""),
        "weights": {f"features.{name}": value for name, value in trunk.items()},
        "train": train,
        "use": use,
        "digest": lambda: digest(photographs, root),
    }


@pytest.mark.parametrize("case", PARAMETERS)
def test_a_broken_input_ends_in_a_right_result_or_one_line(case, given, tmp_path, monkeypatch):
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    act = case.make(folder, generator_of(case), given)
    inputs = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "lock.mdb"}
    before = given["digest"]()
    try:
        act()
        message = None
    except UserError as error:
        message = str(error)
        assert message.strip() and message.isprintable() and len(message) < 6500, message
    assert case.must_fail is None or case.must_fail == (message is not None), message
    assert given["digest"]() == before
    assert all(path.read_bytes() == content for path, content in inputs.items())
    assert not (folder / "ran").exists() and {p.name for p in tmp_path.iterdir()} == {"work"}
    assert not list(folder.rglob("*.tmp"))
    for path in folder.glob("experiments/*/models/*.pth"):
        params = load_file(path, "")["params"]
        assert all(v.isfinite().all() for v in params.values() if torch.is_tensor(v))


def test_cases_have_names_of_their_own():
    assert len({case.name for case in CASES}) == len(CASES) >= 300


def test_as_a_program_it_is_one_line_and_exit_code_2(given, tmp_path):
    case = next(c for c in CASES if c.name == "state code")
    case.make(tmp_path, generator_of(case), given)
    done = run_python(tmp_path, *TRAIN, code=2)
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
    assert not (tmp_path / "experiments").exists() and not (tmp_path / "ran").exists()


class KillsItsProcess(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_errors_of_the_system_and_killed_workers_are_one_line(capfd, tmp_path):
    def killed():
        list(torch.utils.data.DataLoader(KillsItsProcess(), num_workers=1))

    def no_file():
        (tmp_path / "none").read_text()

    out_of_memory = "a process that loads data was killed, perhaps because memory ran out; lower num_worker_per_gpu"
    unreadable = f"{tmp_path / 'none'} can't be read or written (No such file or directory)"
    for main, message in ((killed, out_of_memory), (no_file, unreadable)):
        with pytest.raises(SystemExit) as end:
            run(main)
        err = capfd.readouterr().err
        assert end.value.code == 2 and err.startswith(f"error: {message}") and len(err.splitlines()) == 1, err
    with pytest.raises(RuntimeError, match="a bug"):
        run(lambda: (_ for _ in ()).throw(RuntimeError("a bug")))


@pytest.mark.parametrize("lines", [1, 100_000])
def test_output_that_nobody_reads_ends_a_program_quietly(lines):
    code = f"import runpy; run = runpy.run_path('errors.py')['run']; run(lambda: print('x\\n' * {lines}))"
    done = subprocess.run(
        ["bash", "-c", '{ sleep 0.2; "$0" -c "$1"; echo $? >&2; } | true', sys.executable, code],
        cwd=ROOT / "tlw_basicsr/util", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stderr == "141\n"


def test_a_value_in_a_message_is_short_and_made_at_once():
    for value in (5, -1.5, True, None, "text", "é'", [1, "a"], {"a": [1]}, float("inf")):
        assert short(value) == repr(value)
    bomb = ["x" * 1000]
    for _ in range(40):
        bomb = [bomb] * 9
    large = dict.fromkeys(range(1000), bomb)
    for value in (bomb, large, 1 << 10**6, "x" * 10**6, torch.zeros(2000, 2000), b"x" * 10**6):
        assert 0 < len(short(value)) <= 300
