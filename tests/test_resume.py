"""Resuming from what is whole, stopping by a signal, keeping N checkpoints, and disks that are full."""

import errno
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from basicsr.metrics import calculate_psnr
from basicsr.models.base_model import BaseModel
from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import METRIC_REGISTRY

from tests.conftest import PSNR, ROOT, plain_options, reset_logger, set_option, tiny_options, write_yaml
from tests.helpers import (
    check_resume,
    check_same_end,
    feed_noise,
    log_lines,
    log_text,
    quick,
    refused,
    run_python,
    same,
    start,
    wait_for,
)
from tlw_basicsr import UserError
from tlw_basicsr.engine import logs
from tlw_basicsr.engine.options import parse_options
from tlw_basicsr.engine.pipeline import train_pipeline
from tlw_basicsr.engine.resume import DamagedState, compare_options, find_state, prune, set_aside, strip_options, take
from tlw_basicsr.models import TrainingMixin, with_training
from tlw_basicsr.models.states import get_random_state
from tlw_basicsr.util import files
from tlw_basicsr.util.files import load_file


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    """Flip one bit of a tensor's data."""
    with zipfile.ZipFile(path) as archive:
        data = archive.read(max((m for m in archive.infolist() if "/data/" in m.filename), key=lambda m: m.file_size))
    content = path.read_bytes()
    start = content.index(data)
    path.write_bytes(content[:start] + bytes([content[start] ^ 1]) + content[start + 1 :])


def put(value, *places):
    """A damage that sets a value in the file's content; ``...`` deletes the entry."""

    def damage(path):
        content = load_file(path, "")
        set_option(content, places, value)
        torch.save(content, path)

    return damage


@pytest.fixture(scope="module")
def trained(photographs, tmp_path_factory):
    root = tmp_path_factory.mktemp("finished")
    train_pipeline(str(root), ["-opt", str(write_yaml(root, quick(photographs)))])
    reset_logger()
    return root / "experiments"


@pytest.fixture
def finished(trained, tmp_path):
    """A copy of the files of a finished training, to be damaged."""
    return shutil.copytree(trained, tmp_path / "experiments") / "tiny"


def parsed(photographs, root):
    """The options of a training that resumes in ``root``."""
    return parse_options(str(root), True, ["-opt", str(write_yaml(root, quick(photographs))), "--auto_resume"])[0]


STATE, NET_G, NET_W = "training_states/6.state", "models/net_g_6.pth", "models/net_w_6.pth"
# fmt: off
DAMAGES = [  # what is seen as a state is looked for
    (STATE, truncate, "6.state is not a readable checkpoint"),
    (STATE, flip, "6.state is not a readable checkpoint: .*BadZipFile"),
    (STATE, put("x", "iter"), "6.state: iter: expected a whole number of at least 0, got 'x'"),
    (STATE, put(..., "schedulers"), r"6.state is damaged \(KeyError: 'schedulers'\)"),
    (STATE, put(3, "position"), "6.state is damaged"),
    (STATE, put(torch.ones(2), "options", "train", "optim_g", "lr"), "6.state is damaged"),
    (NET_G, truncate, "net_g_6.pth is not a readable checkpoint"),
    (NET_G, put(torch.full((4,), torch.nan), "params", "conv_first.bias"), "conv_first.bias has values that are not finite"),
    (NET_G, put(torch.zeros(5), "params", "conv_first.bias"), r"net_g_6.pth is of another network .*conv_first.bias is \(5,\)"),
    (NET_G, put(torch.eye(4).to_sparse(), "params", "conv_first.bias"), "6.state "),
    (NET_G, put(torch.full((4,), torch.nan), "params_ema", "conv_first.bias"), "params_ema: .* not finite"),
    (NET_G, put({"x": torch.zeros(1)}, "params_ema"), "params_ema: .* is of another network"),
    (NET_G, put(..., "params_ema"), "net_g_6.pth has no params_ema"),
    (NET_W, flip, "net_w_6.pth is not a readable checkpoint"),
    (NET_W, Path.unlink, "net_w_6.pth is not a file"),
]
MOMENTS = ("optimizers", 0, "state", 0)
LATE = [  # what is seen as the state is taken
    (put(torch.full((4, 3, 3, 3), torch.inf), *MOMENTS, "exp_avg"), "exp_avg of parameter 0 has values that are not finite real"),
    (put(torch.zeros(4), *MOMENTS, "exp_avg_sq"), r"exp_avg_sq of parameter 0 is \(4,\), not \(4, 3, 3, 3\)"),
    (put(..., *MOMENTS, "exp_avg"), "of another optimiser: moments of parameter 0 are missing"),
    (put(..., "optimizers", 0, "param_groups", 0, "betas"), "of another optimiser: betas is missing"),
    (put([0, 1], "optimizers", 0, "param_groups", 0, "params"), "ValueError: loaded state dict contains a parameter group"),
    (put([], "optimizers"), "it holds 0 optimizers, this training has 2"),
    (put([3], "random"), "TypeError"),
]
# fmt: on


@pytest.mark.parametrize(("file", "damage", "message"), DAMAGES)
def test_a_damaged_newest_state_is_named_and_the_one_before_it_found(
    finished, photographs, tmp_path, file, damage, message
):
    damage(finished / file)
    state, notes = find_state(parsed(photographs, tmp_path))
    assert state["iter"] == 4
    assert re.search(message, notes[0]) and notes[0].endswith("; the state before it is tried") and "\n" not in notes[0]


@pytest.mark.parametrize(("damage", "message"), LATE)
def test_a_state_that_cant_be_taken_leads_to_the_one_before_it(finished, trained, photographs, train, damage, message):
    """The model is built anew for it: the end is that of an untouched training, to the bit."""
    (finished / "models/.net_g_8.pth.0123abcd.tmp").write_bytes(b"left by a kill")
    damage(finished / STATE)
    train(quick(photographs), "--auto_resume")
    text = log_text(finished)
    warning = next(line for line in text.splitlines() if "the state before it is tried" in line)
    assert re.search(rf"6\.state can't be taken: .*{message}", warning) and "Resuming after iteration 4." in text
    check_same_end(trained / "tiny", finished, 6)
    assert not list(finished.rglob("*.tmp"))
    (aside,) = finished.glob("after_4_*")  # nothing is lost
    assert f"5 files of later iterations are moved to {aside}" in text
    later = {f"net_{net}_{label}.pth" for net in "gw" for label in (6, "latest")}
    assert {p.name for p in aside.rglob("*.*")} == {"6.state", *later}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (put("x", "schedulers", 0, "milestones"), r"^train\.scheduler: fails in iteration 5 \(TypeError: "),
        (put(torch.ones(2), *MOMENTS, "step"), r"4\.state: the first iteration after it fails \("),
    ],
)
def test_what_an_iteration_makes_of_a_state_is_one_line(finished, photographs, train, damage, message):
    state = finished / "training_states/4.state"
    damage(state)
    refused(message, train, quick(photographs, path={"resume_state": str(state)}))


def test_a_redo_is_what_auto_resume_goes_on_from(finished, photographs, train):
    """A training goes back to iteration 2, and is killed at 4: the 6.state of before must not be taken then."""
    named = {"resume_state": str(finished / "training_states/2.state")}
    changes = {"train__pixel_opt__base": "mse"}
    train(quick(photographs, path=named, train__total_iter=4, **changes))
    (aside,) = finished.glob("after_2_*")
    assert f"8 files of later iterations are moved to {aside}" in log_text(finished)
    assert sorted(p.name for p in (aside / "training_states").iterdir()) == ["4.state", "6.state"]
    assert same(*(load_file(aside / f"models/net_g_{name}.pth", "") for name in (6, "latest")))
    train(quick(photographs, **changes), "--auto_resume")
    assert "Resuming after iteration 4." in log_text(finished)
    assert not same(load_file(finished / NET_G, ""), load_file(aside / NET_G, ""))


@pytest.mark.parametrize("best", [2, 6])
def test_the_best_networks_stay_unless_they_are_of_a_later_iteration(finished, photographs, train, best):
    """``tlw infer`` would take them for those of the training that goes on."""
    for iteration, newest in ((4, 2), (6, best)):
        records = {"photos_val": {"psnr": {"better": "higher", "val": 30.0, "iter": newest}}}
        put(records, "best_metric_results")(finished / f"training_states/{iteration}.state")
    shutil.copy(finished / NET_G, finished / "models/net_g_best.pth")
    opt = parsed(photographs, finished.parents[1])
    set_aside(opt, load_file(finished / "training_states/4.state", ""))
    assert (finished / "models/net_g_best.pth").exists() == (best == 2)
    assert not (finished / "models/net_g_latest.pth").exists() and not (finished / STATE).exists()
    set_aside(opt, load_file(finished / "training_states/4.state", ""))  # nothing is later any more
    assert len([*finished.glob("after_4_*")]) == 1


def test_a_state_that_cant_be_taken_leaves_the_random_numbers_as_they_were():
    def resume(_):
        random.random(), np.random.rand(), torch.rand(1)
        raise KeyError("x")

    model = SimpleNamespace(opt={"path": {}}, device="cpu", agreed=bool, resume_training=resume)
    before = get_random_state()
    assert isinstance(take(model, {"iter": 1}), DamagedState)
    assert same(get_random_state(), before)


OPTIMIZERS = [
    {"type": "AdamW", "lr": 1e-3, "weight_decay": 0.01},
    {"type": "SGD", "lr": 1e-2, "momentum": 0.9},
    {"type": "RMSprop", "lr": 1e-3},
    {"type": "NAdam", "lr": 1e-3},
]
SCHEDULERS = [
    {"type": "CosineAnnealingLR", "T_max": 8},
    {"type": "StepLR", "step_size": 2},
    {"type": "OneCycleLR", "max_lr": 1e-3, "total_steps": 8},
    {"type": "CosineAnnealingWarmRestarts", "T_0": 3},
]


@pytest.mark.parametrize(("optimizer", "scheduler"), zip(OPTIMIZERS, SCHEDULERS, strict=True), ids=lambda o: o["type"])
def test_a_training_with_them_is_the_same_after_an_interruption(photographs, train, tmp_path, optimizer, scheduler):
    changes = {"train__optim_g": optimizer, "train__scheduler": scheduler, "train__total_iter": 8}
    whole, _ = check_resume(train, tmp_path, quick(photographs, **changes), 4)
    state = load_file(whole / "training_states/8.state", "")
    reference = getattr(torch.optim, optimizer["type"])([torch.nn.Parameter(torch.zeros(1))], **keywords(optimizer))
    schedule = getattr(torch.optim.lr_scheduler, scheduler["type"])(reference, **keywords(scheduler))
    for _ in range(7):
        reference.step()
        schedule.step()
    assert state["optimizers"][0]["param_groups"][0]["lr"] == pytest.approx(reference.param_groups[0]["lr"])


def keywords(section):
    return {key: value for key, value in section.items() if key != "type"}


def test_an_optimiser_of_the_installed_basicsr_comes_first(monkeypatch):
    def get_optimizer(self, optim_type, params, lr, **options):
        if optim_type != "Own":
            raise NotImplementedError
        return torch.optim.SGD(params, lr * 2, **options)

    monkeypatch.setattr(BaseModel, "get_optimizer", get_optimizer)
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    model = object.__new__(with_training(BaseModel))
    assert model.get_optimizer("Own", parameters, 1).param_groups[0]["lr"] == 2
    assert isinstance(model.get_optimizer("RAdam", parameters, 1), torch.optim.RAdam)
    with pytest.raises(NotImplementedError):
        model.get_optimizer("None", parameters, 1)


WARM_UP = [
    {"type": "MultiStepLR", "milestones": [6], "gamma": 0.5},
    {"type": "ExponentialLR", "gamma": 0.9},
    {"type": "CosineAnnealingRestartLR", "periods": [9]},
]


@pytest.mark.parametrize("scheduler", WARM_UP, ids=lambda s: s["type"])
def test_after_the_warm_up_the_rate_is_the_schedulers_own(photographs, train, tmp_path, scheduler):
    opt = quick(photographs, train__scheduler=scheduler, train__total_iter=9, logger__save_checkpoint_freq=3)
    warm = {**opt, "train": {**opt["train"], "warmup_iter": 4}}

    def rates(experiment):
        return [float(rate) for rate in re.findall(r"lr:\(([^,]+),\)", log_text(experiment))]

    without = rates(train(opt, root=tmp_path / "without"))
    whole, cut = check_resume(train, tmp_path, warm, 3)
    assert rates(whole) == rates(cut) == [*(pytest.approx(1e-3 * i / 4) for i in (1, 2, 3)), *without[3:]]


def test_a_log_of_the_same_second_is_kept(photographs, train, monkeypatch):
    monkeypatch.setattr(logs, "get_time_str", lambda: "20260101_000000")
    opt = quick(photographs, train__total_iter=2)
    train(opt)
    text = log_text(train({**opt, "train": {**opt["train"], "total_iter": 4}}, "--auto_resume"))
    assert text.count("End of training.") == 2 and "Resuming after iteration 2." in text


def test_another_metric_begins_anew_on_a_resume(photographs, train, register):
    """One that is added, one that is turned round, one that stays."""

    def own_psnr(img, img2, **_):
        return calculate_psnr(img, img2, 2)

    own = {"type": register(METRIC_REGISTRY, own_psnr)}
    train(tiny_options(photographs, val__metrics={"psnr": PSNR, "turned": own, "gone": PSNR}))
    metrics = {"psnr": PSNR, "turned": {**own, "better": "lower"}, "added": PSNR}
    changes = {"train__total_iter": 12, "val__metrics": metrics, "val__save_best": "added"}
    experiment = train(tiny_options(photographs, **changes), "--auto_resume")
    best = load_file(experiment / "training_states/12.state", "")["best_metric_results"]["photos_val"]
    assert set(best) == set(metrics)
    assert best["added"]["iter"] == best["turned"]["iter"] == 12 and best["psnr"]["iter"] in (4, 8, 12)
    assert (experiment / "models/net_g_best.pth").is_file()


def test_a_finished_training_can_be_made_longer_whenever_it_has_saved(photographs, train, tmp_path):
    """The end is saved with its state, also where none is due."""
    opt = quick(photographs, logger__save_checkpoint_freq=100, train__total_iter=9)
    _, resumed = check_resume(train, tmp_path, opt, 6)
    assert "Resuming after iteration 6." in log_text(resumed)


def test_cosine_annealing_can_not_go_on_after_its_periods(photographs, train):
    def options(iterations):
        cosine = {"type": "CosineAnnealingRestartLR", "periods": [iterations]}
        return quick(photographs, train__scheduler=cosine, train__total_iter=iterations)

    train(options(6))
    message = (
        r"train\.total_iter: the periods of train\.scheduler in .*6\.state end at 6; to train longer, begin a training"
    )
    refused(message, train, options(8), "--auto_resume")


@pytest.mark.parametrize("way", ["none", "unreadable", "empty"])
def test_a_training_does_not_start_over_where_its_states_are_gone(finished, photographs, tmp_path, way):
    """A folder that can't be read, such as with an expired ticket, is not an empty one."""
    states = finished / "training_states"
    shutil.rmtree(states)
    if way == "unreadable":
        states.symlink_to(states)  # which root can't read either
    elif way == "empty":
        states.mkdir()
    opt = parsed(photographs, tmp_path)
    files = sorted(tmp_path.rglob("*"))
    message = r"can't be read \(" if way == "unreadable" else "there is no state for the networks in"
    refused(rf"^--auto_resume: .*{message}", find_state, opt)
    assert sorted(tmp_path.rglob("*")) == files


def test_a_training_killed_in_its_first_save_starts_anew(finished, photographs, tmp_path):
    for file in [*finished.glob("*/*_[46].pth"), *finished.glob("*/*_latest.pth"), *finished.glob("*/*.state")]:
        file.unlink()
    assert list((finished / "models").iterdir()) and find_state(parsed(photographs, tmp_path)) == (None, [])


def test_the_states_seed_and_learning_rate_are_taken_and_reported(finished, photographs, train):
    """Networks without a state are no checkpoint."""
    (finished / STATE).unlink()
    train(quick(photographs, manual_seed=99, train__optim_g__lr=0.5, train__total_iter=5), "--auto_resume")
    text = log_text(finished)
    assert "Resuming after iteration 4." in text and "manual_seed is 3, that of" in text
    assert "train.optim_g.lr was 0.001 in the training of" in text
    assert "lr:(5.000e-04,)" in [line for line in text.splitlines() if "[epoch:" in line][-1]
    assert load_file(finished / "training_states/5.state", "")["seed"] == 3


def test_with_no_whole_state_a_training_does_not_start_over(finished, photographs, train):
    for state in finished.glob("training_states/*"):
        truncate(state)
    with pytest.raises(UserError, match=r"--auto_resume: no state in .*training_states can be used.*6\.state is no"):
        train(quick(photographs), "--auto_resume")
    assert len(list(finished.glob("models/*.pth"))) == 8
    with pytest.raises(UserError, match=r"path\.resume_state: .*6\.state is not a readable checkpoint"):
        train(quick(photographs, path={"resume_state": str(finished / STATE)}))


# fmt: off
REFUSED = [
    ("network_g__num_feat", 8, "network_g.num_feat was 4 in the training of 8.state, now it is 8"),
    ("network_w__init", "paper", "network_w.init was not given in"),
    ("base_model", "SwinIRModel", "base_model was SRModel in"),
    ("train__optim_g__betas", [0.5, 0.9], "train.optim_g.betas was not given in"),
    ("train__scheduler", {"type": "CosineAnnealingRestartLR", "periods": [9]}, "train.scheduler.type was MultiStepLR in"),
]
ALLOWED = [
    ("train__optim_g__lr", 1e-4, "train.optim_g.lr was 0.001 in the training of 8.state, now it is 0.0001; resuming takes"),
    ("train__pixel_opt__base", "mse", "train.pixel_opt.base was l1 in the training of 8.state, now it is mse; it holds"),
    ("train__scheduler__milestones", [9], "train.scheduler.milestones was [4] in"),
    ("train__total_iter", 99, None),
    ("logger__print_freq", 7, None),
    ("datasets__train__name", "other", None),
]
# fmt: on


def test_options_of_other_networks_or_optimisers_are_refused_and_others_may_change(photographs):
    state = {"options": strip_options(tiny_options(photographs))}
    for place, value, message in REFUSED:
        changed = tiny_options(photographs, **{place: value})
        refused(re.escape(message), compare_options, state, changed, Path("8.state"))
    for place, value, message in ALLOWED:
        notes = compare_options(state, tiny_options(photographs, **{place: value}), Path("8.state"))
        assert len(notes) == (message is not None) and all(message in note for note in notes)


def test_a_training_of_basicsrs_own_goes_on_with_tlw(photographs, train, tmp_path, monkeypatch):
    """Networks and state are written by BasicSR's SRModel, without a line of ours."""
    models, states = (tmp_path / "experiments/theirs" / name for name in ("models", "training_states"))
    models.mkdir(parents=True)
    states.mkdir()
    opt = plain_options(photographs, train__optim_g__lr=3e-3) | {"is_train": True, "dist": False, "rank": 0}
    theirs = SRModel({**opt, "path": {"models": str(models), "training_states": str(states)}})
    for i in range(1, 7):
        theirs.update_learning_rate(i)
        feed_noise(theirs)
        theirs.optimize_parameters(i)
    theirs.save(epoch=1, current_iter=6)
    assert set(load_file(states / "6.state", "")) == {"epoch", "iter", "optimizers", "schedulers"}
    seen = []

    def look(self, current_iter):
        """Note what the first iteration after the resume begins with."""
        if current_iter == 7:
            moments = [v["exp_avg"] for v in self.optimizer_g.state_dict()["state"].values()]
            seen.append(deepcopy([self.net_g.state_dict(), self.net_g_ema.state_dict(), moments]))
            assert not self.optimizer_w.state
            # after the milestone, both
            assert [o.param_groups[0]["lr"] for o in self.optimizers] == pytest.approx([1.5e-3, 5e-4])
        step(self, current_iter)

    step = TrainingMixin.optimize_parameters
    monkeypatch.setattr(TrainingMixin, "optimize_parameters", look)
    path = {"resume_state": str(states / "6.state")}
    experiment = train(tiny_options(photographs, path=path, logger__save_checkpoint_freq=7, train__rehearse=False))
    moments = [v["exp_avg"] for v in theirs.optimizer_g.state_dict()["state"].values()]
    assert same(seen, [[theirs.net_g.state_dict(), theirs.net_g_ema.state_dict(), moments]])
    assert "the weighting network starts anew" in log_text(experiment)
    assert [line["iter"] for line in log_lines(experiment)] == ["7", "8"]
    assert (experiment / "models/net_w_7.pth").is_file()


def test_a_signal_stops_after_the_iteration_and_the_run_goes_on_with_the_same_bits(photographs, train, tmp_path):
    """To the whole process group, as a cluster sends it, with a data loader's worker in it."""
    changes = {"train__total_iter": 20, "logger__save_checkpoint_freq": 20, "datasets__train__num_worker_per_gpu": 1}
    cut = tmp_path / "cut"
    cut.mkdir()
    process = start(cut, quick(photographs, **changes))
    wait_for(process, "iter:       2")
    os.killpg(process.pid, signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM, error
    assert "Stopped by SIGTERM after iteration" in error and "Traceback" not in error
    (state,) = cut.glob("experiments/tiny/training_states/*.state")
    assert 2 <= int(state.stem) < 20
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # another number of threads gives other roundings
    resumed = train(quick(photographs, **changes), "--auto_resume", root=cut)
    whole = train(quick(photographs, **changes), root=tmp_path / "whole")
    torch.set_num_threads(threads)
    check_same_end(whole, resumed, 20)


def test_a_signal_in_the_last_validation_lets_it_end(photographs, tmp_path):
    process = start(tmp_path, tiny_options(photographs, val__val_freq=7))
    wait_for(process, "Save the latest model")
    os.killpg(process.pid, signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 0, error
    assert len(list(tmp_path.glob("experiments/tiny/models/net_*_latest.pth"))) == 2


WAITS = """
import time
from tlw_basicsr.util.signals import StopSignals
with StopSignals() as stop:
    print("ready", flush=True)
    while not stop.agreed(): time.sleep(0.01)
    print(stop.received, flush=True)
    time.sleep(60)
"""


def test_a_second_signal_ends_at_once():
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", WAITS], cwd=ROOT, **pipes)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == f"{signal.SIGINT.value}\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 128 + signal.SIGTERM
    assert process.stderr.read() == "\nSIGINT: stopping after this iteration; once more stops at once\n"


HOLDS = """
import multiprocessing
from tlw_basicsr.engine.pipeline import train_pipeline
try: train_pipeline(".", ["-opt", "options.yml"])
except Exception as e: held = e
print(len(multiprocessing.active_children()), held)
"""


def test_a_program_ends_while_something_still_holds_a_data_loaders_worker(photographs, tmp_path):
    """Python sends SIGTERM to the workers that are left when it ends, and waits for them."""
    damaged = shutil.copytree(photographs, tmp_path / "photos") / "photo2.png"
    damaged.write_bytes(damaged.read_bytes()[:-2000])
    opt = quick(tmp_path / "photos", datasets__train__num_worker_per_gpu=2)
    write_yaml(tmp_path, opt)
    done = run_python(tmp_path, "-c", HOLDS)
    last = done.stdout.splitlines()[-1]
    assert last.startswith("2 ") and "photo2.png" in last


def test_the_signals_mean_what_they_meant_after_a_training(photographs, train):
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    train(quick(photographs, train__total_iter=1))
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before


def test_old_checkpoints_go_but_not_the_newest_best_or_latest(photographs, train, monkeypatch):
    """The metric of ``save_best`` is best at iteration 2, another one is not."""
    validation = TrainingMixin.validation

    def validated(self, loader, current_iter, *more):
        validation(self, loader, current_iter, *more)
        if current_iter == 2:
            self.best_metric_results["photos_val"]["psnr"]["val"] = 99.0

    monkeypatch.setattr(TrainingMixin, "validation", validated)
    opt = tiny_options(photographs, logger__save_checkpoint_freq=1, logger__keep_checkpoints=2, val__val_freq=2)
    opt["val"].update(metrics={"other": {**PSNR, "crop_border": 3}, "psnr": PSNR}, save_best="psnr")
    experiment = train(opt)
    assert {p.stem for p in experiment.glob("training_states/*")} == {"2", "7", "8"}
    kept = {f"net_{n}_{i}.pth" for n in "gw" for i in (2, 7, 8, "latest", "best")}
    assert {p.name for p in experiment.glob("models/*")} == kept


def test_pruning_leaves_what_is_newer_and_removes_networks_without_a_state(tmp_path):
    opt = {"path": {"models": tmp_path, "training_states": tmp_path / "s"}, "logger": {"keep_checkpoints": 1}}
    kept = {"net_g_2.pth", "net_g_9.pth", "net_g_latest.pth", "s/2.state", "s/9.state"}
    (tmp_path / "s").mkdir()
    for name in {*kept, "net_g_1.pth"}:
        (tmp_path / name).touch()
    prune(opt, 2, {-1})
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.*")} == kept


LIMITED = """
import resource, signal
from tlw_basicsr.engine.pipeline import train_pipeline
from tlw_basicsr.models import states, training
from tlw_basicsr.models import TrainingMixin, with_training
from tlw_basicsr.util import files
from tlw_basicsr.util.errors import run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save, calls = files.save_file, []
def limited(content, path):
    calls.append(path)
    if len(calls) == 5: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    save(content, path)
training.save_file = states.save_file = limited
run(lambda: train_pipeline(".", ["-opt", "options.yml"]))
"""


def test_a_full_disk_ends_the_training_in_one_line_and_damages_nothing(photographs, tmp_path):
    """A limit of the file size, which the operating system keeps, as a full disk."""
    write_yaml(tmp_path, quick(photographs, train__total_iter=100))
    done = run_python(tmp_path, "-c", LIMITED, code=2)
    errors = [line for line in done.stderr.splitlines() if " INFO: " not in line and "error" in line.lower()]
    assert len(errors) == 1 and "Traceback" not in done.stderr
    assert re.fullmatch(r"error: .*\.(pth|log) can't be written \(File too large\)", errors[0])
    experiment = tmp_path / "experiments/tiny"
    assert not list(experiment.rglob("*.tmp"))
    for file in (*experiment.rglob("*.pth"), *experiment.rglob("*.state")):
        load_file(file, "")
    assert (experiment / "training_states/2.state").is_file()


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a folder that not even root can write to")
def test_a_folder_that_cant_be_written_to_is_one_line(photographs, tmp_path):
    with pytest.raises(UserError, match=r"/proc/.* can't be read or written \(") as error:
        train_pipeline("/proc", ["-opt", str(write_yaml(tmp_path, quick(photographs)))])
    assert "\n" not in str(error.value)


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_images_on_a_full_disk(photographs, train, monkeypatch):
    write = files.os.fsync

    def images_full(descriptor):
        full() if ".png" in str(Path(f"/proc/self/fd/{descriptor}").readlink()) else write(descriptor)

    monkeypatch.setattr(files.os, "fsync", images_full)
    text = log_text(train(tiny_options(photographs, val__save_img=True)))
    assert re.search(r"fails \(.*photo0_4\.png can't be written \(No space left on device\)\)", text)


def test_logs_on_a_full_disk(photographs, train, monkeypatch):
    flush = logging.StreamHandler.flush

    def log_full(handler):
        full() if "/train_" in getattr(handler, "baseFilename", "") else flush(handler)

    monkeypatch.setattr(logging.StreamHandler, "flush", log_full)
    refused(r"\.log can't be written \(No space left on device\)", train, quick(photographs))


def run_script(folder, name, *arguments):
    """The figures that a script prints."""
    out = run_python(folder, ROOT / "scripts" / name, *arguments).stdout
    return json.loads(out[out.index("{") :])


@pytest.mark.slow
def test_a_training_killed_within_writes_ends_with_the_same_bits(tmp_path):
    """20 kills; some within a write is what the program asks of itself."""
    size = ("--kills", 20, "--iterations", 64, "--num-feat", 32)
    figures = run_script(tmp_path, "kill_test.py", *size, "--out", "k")
    assert figures["kills"] == figures["resumed"] == 20 and figures["checkpoints_kept"] >= 3
    assert figures["different_files"] == []


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="watches the process in /proc")
def test_a_long_training_grows_nowhere(tmp_path):
    figures = run_script(tmp_path, "soak_test.py", "--iterations", 600, "--warm-up", 200, "--out", "s")
    assert figures["samples"] > 10
