"""Files that ask for more than they hold, and states whose values don't fit: refused before anything is built of them."""

import io
import os
import pickle
import resource
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.test_pipeline import same
from tlw_basicsr import UserError
from tlw_basicsr.files import load_file
from tlw_basicsr.states import check_optimizer_state, check_scheduler_state, read_state


def archive_of(data):
    """A file of torch.save with ``data`` as its pickle."""
    whole, changed = io.BytesIO(), io.BytesIO()
    torch.save({}, whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(changed, "w") as new:
        for member in old.infolist():
            new.writestr(member.filename, data if member.filename.endswith("data.pkl") else old.read(member))
    return changed.getvalue()


def bombs():
    shared = "x"
    for _ in range(30):
        shared = [shared] * 2
    endless = []
    endless.append(endless)
    deep = []
    for _ in range(200):
        deep = [deep]
    long_put = b"\x80\x02}q\x00r" + (2**27).to_bytes(4, "little") + b"."
    call = b"\x80\x02c%b\n%b\n%b\x86R."
    integers = {n: b"J" + n.to_bytes(4, "little") for n in (30_000, 20_000)}
    both = integers[30_000] + integers[20_000]
    return {
        "memo": long_put,
        "tensor": b"\x80\x02}X\x01\x00\x00\x00a" + (call % (b"torch", b"Tensor", both))[2:-1] + b"s.",
        "bytes": b"\x80\x02}X\x01\x00\x00\x00ac__builtin__\nbytearray\nJ" + (2 * 10**9).to_bytes(4, "little") + b"\x85Rs.",
        "storage": b"\x80\x02}X\x01\x00\x00\x00actorch.storage\nUntypedStorage\nJ"
        + (2 * 10**9).to_bytes(4, "little") + b"\x85Rs.",
        "shared lists": pickle.dumps({"a": shared}, 2),
        "endless": pickle.dumps({"a": endless}, 2),
        "deep": pickle.dumps({"a": deep}, 2),
    }  # fmt: skip


@pytest.mark.parametrize("name", bombs())
def test_a_small_file_takes_little_memory_and_is_refused(tmp_path, name):
    """In a process whose memory is limited to a gigabyte more than it has with everything imported."""
    (tmp_path / "a.pth").write_bytes(archive_of(bombs()[name]))
    program = (
        "import resource\nfrom tlw_basicsr.files import load_file\nfrom tlw_basicsr.errors import run\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + 2**30,) * 2)\n"
        "run(lambda: load_file('a.pth', 'it'))\n"
    )
    if not Path("/proc/self/statm").exists() or not hasattr(resource, "RLIMIT_AS"):
        pytest.skip("limits the memory by Linux' means")
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    if name == "memo":  # harmless by itself: an index of the unpickler's memo
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: it: a.pth is no readable checkpoint")


@pytest.mark.parametrize("old", [False, True])
def test_what_torch_saves_of_plain_values_is_read(tmp_path, old):
    content = {
        "params": OrderedDict(a=torch.rand(3), b=torch.nn.Parameter(torch.rand(2, 2)), c=torch.tensor(3)),
        "half": [
            torch.rand(2).half(),
            torch.rand(2).bfloat16(),
            torch.rand(2).double(),
            torch.zeros(2, dtype=torch.uint8),
        ],
        "view": torch.arange(12.0).view(3, 4)[:, 1],
        "values": (1, 2.5, None, True, "text", b"bytes", {1: [2]}),
        "milestones": Counter([1, 2, 2]),
        "size": torch.Size([1, 2]),
    }
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=not old)
    got = load_file(tmp_path / "a.pth", "it")
    assert all(same(got[key], value) for key, value in content.items())


def state(**changes):
    whole = {"iter": 4, "epoch": 0, "optimizers": [], "schedulers": [], "random": [{}], "seed": 1}
    whole["position"] = {"epoch": 0, "iter": 0, "iters_per_epoch": 3}
    whole["tlw"] = {"k": 0.5, "last_e_step": 4}
    whole["guard"] = {"skipped": 0, "in_row": 0}
    return {**whole, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tlw": {"k": 0.5, "last_e_step": "x"}}, "tlw.last_e_step: expected"),
        ({"tlw": {"k": 2, "last_e_step": 1}}, "tlw.k: expected"),
        ({"tlw": {"k": 0.5}}, "tlw.last_e_step: missing"),
        ({"guard": {"skipped": "x", "in_row": 0}}, "guard.skipped: expected"),
        ({"seed": None}, "seed: expected a whole number below"),
        ({"seed": 2**70}, "seed: expected a whole number below"),
        ({"iter": 2**70}, "iter: expected"),
        ({"position": {"epoch": 2**70, "iter": 0, "iters_per_epoch": 3}}, "position.epoch: expected"),
        ({"position": {"epoch": 0, "iter": 5, "iters_per_epoch": 3}}, "position.iter: its epoch begins after"),
        ({"random": [3]}, "random: expected"),
        ({"amp": {"scaler": 3}}, "amp.scaler: expected"),
        ({"optimizers": [{"state": {0: {"exp_avg": torch.tensor([torch.nan])}}}]}, "optimizers: values that are not"),
        ({"version": [["x" * 99] * 999] * 99}, "version: expected text, got [["),
    ],
)
def test_a_state_with_a_wrong_value_is_damaged(tmp_path, changes, message):
    torch.save(state(), tmp_path / "4.state")
    assert read_state(tmp_path / "4.state")["iter"] == 4
    torch.save(state(**changes), tmp_path / "4.state")
    with pytest.raises(UserError) as error:
        read_state(tmp_path / "4.state")
    assert message in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("key", "value"),
    [("betas", (5, -3)), ("eps", -1.0), ("lr", -1e-3), ("betas", (0.9,)), ("step", torch.tensor(-1.0))],
)
def test_an_optimisers_state_must_be_in_range(key, value):
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))], 1e-3)
    optimizer.param_groups[0]["params"][0].sum().backward()
    optimizer.step()
    content = optimizer.state_dict()
    check_optimizer_state(content, optimizer, "it")
    (content["state"][0] if key == "step" else content["param_groups"][0])[key] = value
    with pytest.raises(UserError, match=f"it: {key}"):
        check_optimizer_state(content, optimizer, "it")


def test_a_schedulers_restarts_have_a_weight_each():
    ours = {"last_epoch": 0, "restarts": (0,), "restart_weights": (1,)}
    check_scheduler_state({**ours, "restarts": (0, 8), "restart_weights": (1, 1)}, ours, "it")
    with pytest.raises(UserError, match="its restarts and their weights are of different numbers"):
        check_scheduler_state({**ours, "restarts": (8,), "restart_weights": ()}, ours, "it")
