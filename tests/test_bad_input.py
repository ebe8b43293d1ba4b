"""Whatever is given: a right result, or one line that names what is wrong; nothing runs, nothing is damaged."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.bad_input import base_options, cases, generator_of
from tests.conftest import ROOT, reset_logger, tiny_options, write_yaml
from tlw_basicsr import UserError
from tlw_basicsr.checkpoint import load_file
from tlw_basicsr.losses.distance_loss import LPIPSDistance
from tlw_basicsr.options import parse_options
from tlw_basicsr.pipeline import train_pipeline
from tlw_basicsr.preflight import check_files

CASES = cases()


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
    options = {"train__total_iter": 2, "logger__save_checkpoint_freq": 2, "datasets__val": ..., "val": ...}
    opt = tiny_options(photographs, **options)
    train_pipeline(str(root), ["-opt", str(write_yaml(root, opt))])
    reset_logger()
    experiment = root / "experiments/tiny"
    trunk = LPIPSDistance("squeeze", weights="random").trunk.state_dict()

    def train(folder, path):
        train_pipeline(str(folder), ["-opt", str(path), "--force_yml", "train:total_iter=1"])

    def use(folder, target, content):
        file = folder / {"network": "net_g_2.pth", "state": "2.state", "weights": "squeeze.pth"}[target]
        file.write_bytes(content)
        if target == "weights":
            return lambda: LPIPSDistance("squeeze", weights=str(file))
        if target == "network":
            path = write_yaml(folder, {**opt, "path": {"pretrain_network_g": str(file)}})
            return lambda: check_files(parse_options(str(folder), True, ["-opt", str(path)])[0])
        states = folder / "theirs/training_states"
        states.mkdir(parents=True)
        shutil.copytree(experiment / "models", folder / "theirs/models")
        shutil.move(file, states / file.name)
        path = write_yaml(folder, {**opt, "path": {"resume_state": str(states / file.name)}})
        return lambda: train_pipeline(str(folder), ["-opt", str(path), "--force_yml", "train:total_iter=3"])

    return {
        "options": base_options(photographs),
        "network": load_file(experiment / "models/net_g_2.pth", ""),
        "state": load_file(experiment / "training_states/2.state", ""),
        "weights": {"features." + name.split(".", 1)[1]: value for name, value in trunk.items()},
        "train": train,
        "use": use,
        "digest": lambda: digest(photographs, root),
    }


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
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


def test_there_are_enough_cases():
    assert len(CASES) >= 300 and len({c.name for c in CASES}) == len(CASES)
    assert {c.kind for c in CASES} == {"yaml", "image", "network", "state", "weights", "lmdb"}


@pytest.mark.parametrize("name", ["state code"])
def test_as_a_program_it_is_one_line_and_exit_code_2(name, given, tmp_path):
    case = next(c for c in CASES if c.name == name)
    case.make(tmp_path, generator_of(case), given)
    done = subprocess.run(
        [sys.executable, "-m", "tlw_basicsr.train", "-opt", "options.yml"], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
    assert not (tmp_path / "experiments").exists() and not (tmp_path / "ran").exists()
