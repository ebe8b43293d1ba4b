"""Files that ask for more than they hold, and states whose values don't fit: refused before anything is built of them."""

import io
import os
import pickle
import resource
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from basicsr.models.lr_scheduler import CosineAnnealingRestartLR, MultiStepRestartLR

from tests.conftest import ROOT
from tests.helpers import same
from tlw_basicsr import UserError
from tlw_basicsr.models.states import (
    DamagedState,
    check_state,
    fit_entries,
    fit_optimizer_state,
    get_random_state,
    read_state,
    to_plain,
    try_state,
)
from tlw_basicsr.util.files import load_file


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
        "import resource\nfrom tlw_basicsr.util.files import load_file\nfrom tlw_basicsr.util.errors import run\n"
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
    optimizer = make_optimizer()
    whole = {
        "iter": 4,
        "epoch": 0,
        "optimizers": [optimizer.state_dict()],
        "schedulers": [],
        "random": [get_random_state()],
    }
    whole |= {"seed": 1, "position": {"epoch": 0, "iter": 0, "iters_per_epoch": 3}, "tlw": {"k": 0.5, "last_e_step": 4}}
    return {**whole, "guard": {"skipped": 0, "in_row": 0}, "accumulated": [None], **changes}


def make_optimizer():
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))], 1e-3)
    optimizer.param_groups[0]["params"][0].sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tlw": {"k": 0.5, "last_e_step": "x"}}, "tlw.last_e_step: expected"),
        ({"tlw": {"k": 2, "last_e_step": 1}}, "tlw.k: expected"),
        ({"tlw": {"k": 0.5}}, "tlw.last_e_step: missing"),
        ({"tlw": {"k": 0.5, "last_e_step": 10**9}}, "tlw.last_e_step: 1000000000 comes after its iteration 4"),
        ({"guard": {"skipped": "x", "in_row": 0}}, "guard.skipped: expected"),
        ({"seed": None}, "seed: expected a whole number below"),
        ({"seed": 2**70}, "seed: expected a whole number below"),
        ({"iter": 2**70}, "iter: expected"),
        ({"position": {"epoch": 2**70, "iter": 0, "iters_per_epoch": 3}}, "position.epoch: expected"),
        ({"position": {"epoch": 0, "iter": 5, "iters_per_epoch": 3}}, "position.iter: 5 comes after its iteration 4"),
        ({"random": [3]}, "random 0: expected"),
        ({"random": [{**get_random_state(), "numpy": ("MT19937", [1] * 624, 10**8, 0, 0.0)}]}, "random 0: expected"),
        ({"amp": {"scaler": 3}}, "amp.scaler: expected"),
        (
            {"accumulated": [{"count": 0.5, "gradients": []}]},
            "accumulated 0.count: expected a whole number of at least 1",
        ),
        (
            {"accumulated": [{"count": 1, "gradients": [torch.tensor(torch.nan)]}]},
            "accumulated 0.gradients 0: expected",
        ),
        ({"schedulers": [{"last_epoch": 3, "periods": [0, 45]}]}, "schedulers 0.periods 0: expected a number above 0"),
        ({"schedulers": [{"last_epoch": 5}]}, "schedulers.*.last_epoch: 5 comes after its iteration 4"),
        ({"options": {"train": torch.ones(3)}}, "options: expected"),
        ({"version": [["x" * 99] * 9] * 9}, "version: expected text, got [["),
    ],
)
def test_a_state_with_a_wrong_value_is_damaged(tmp_path, changes, message):
    torch.save(state(), tmp_path / "4.state")
    assert read_state(tmp_path / "4.state")["iter"] == 4
    torch.save(state(**changes), tmp_path / "4.state")
    with pytest.raises(DamagedState) as error:
        read_state(tmp_path / "4.state")
    assert message in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        *(("group", "betas", value) for value in ((5, -3), (0.9,), torch.ones(2))),
        *(("group", key, -1e-3) for key in ("lr", "eps", "weight_decay")),
        *(("group", "params", value) for value in ([[]], [0.5], "x")),
        *(("moments", "step", value) for value in (torch.tensor(-1.0), torch.tensor(1j), torch.ones(2), "x")),
        *(("moments", "exp_avg", value) for value in (torch.ones(2).to(torch.float8_e4m3fn), torch.tensor(torch.inf))),
        ("moments", "exp_avg_sq", -torch.ones(2)),
    ],
)
def test_an_optimisers_state_must_be_in_range(place, key, value):
    content = state()
    check_state(content)
    optimizer = content["optimizers"][0]
    (optimizer["state"][0] if place == "moments" else optimizer["param_groups"][0])[key] = value
    with pytest.raises(UserError, match=rf"^optimizers 0\..*{key}.*: expected"):
        check_state(content)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["state"][0].pop("exp_avg_sq"),
        lambda s: s["state"][0].update(exp_avg=torch.ones(3)),
        lambda s: s["param_groups"][0].update(lr=1e300),
        lambda s: s["param_groups"][0].update(params=[1, 2]),
        lambda s: s["param_groups"][0].update(eps=True),
        lambda s: s["param_groups"][0].pop("eps"),
    ],
)
def test_an_optimisers_state_is_tried_on_a_copy(change):
    optimizer, theirs = make_optimizer(), make_optimizer().state_dict()
    before = deepcopy(optimizer.state_dict()), deepcopy(optimizer.param_groups[0]["params"])
    whole = deepcopy(theirs)
    try_state({"optimizers": [theirs], "schedulers": []}, [optimizer], [], 9)
    assert same(theirs, whole)
    change(theirs)
    with pytest.raises((DamagedState, KeyError, RuntimeError, ValueError)):
        theirs = fit_optimizer_state(theirs, optimizer, "it")
        try_state({"optimizers": [theirs], "schedulers": []}, [optimizer], [], 9)
    assert same(before[0], optimizer.state_dict()) and same(before[1], optimizer.param_groups[0]["params"])


@pytest.mark.parametrize(
    "change",
    [
        {"restarts": (0, 8), "restart_weights": (1,)}, {"milestones": {7: 1000}, "gamma": 1e300}, {"base_lrs": []},
        {"periods": [9], "restart_weights": ()},
    ],
)  # fmt: skip
def test_a_schedule_is_tried_to_its_end(change):
    optimizer = make_optimizer()
    kind = CosineAnnealingRestartLR(optimizer, [9]) if "periods" in change or "base_lrs" in change else None
    scheduler = kind or MultiStepRestartLR(optimizer, [7])
    theirs = to_plain(scheduler.state_dict())
    whole = {"optimizers": [optimizer.state_dict()], "schedulers": [theirs]}
    try_state(whole, [optimizer], [scheduler], 9)
    theirs.update(change)
    with pytest.raises((ValueError, IndexError, TypeError, OverflowError)):
        try_state(whole, [optimizer], [scheduler], 9)


def test_entries_that_hide_methods_are_left_out():
    """BUILD gives an OrderedDict attributes; a scheduler takes every entry as an attribute."""
    scheduler = MultiStepRestartLR(make_optimizer(), [7])
    own = to_plain(scheduler.state_dict())
    assert fit_entries({**own, "get_lr": 3, "step": 3}, own, "it") == own
