"""Resuming from what is whole, stopping by a signal, keeping N checkpoints, and disks that are full."""

import errno
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, plain_options, reset_logger, tiny_options, write_yaml
from tests.helpers import log_lines, log_text, quick, same, start, wait_for
from tlw_basicsr import UserError
from tlw_basicsr.engine.options import parse_options
from tlw_basicsr.engine.resume import compare_options, find_state, prune, strip_options
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
        section = content
        for place in places[:-1]:
            section = section[place]
        if value is ...:
            del section[places[-1]]
        else:
            section[places[-1]] = value
        torch.save(content, path)

    return damage


@pytest.fixture(scope="module")
def finished(photographs, tmp_path_factory):
    """The files of a finished training, to be damaged in copies."""
    from tlw_basicsr.engine.pipeline import train_pipeline

    root = tmp_path_factory.mktemp("finished")
    train_pipeline(str(root), ["-opt", str(write_yaml(root, quick(photographs)))])
    reset_logger()
    return lambda to: shutil.copytree(root / "experiments", to / "experiments") / "tiny"


def parsed(photographs, root, **changes):
    """The options of a training that resumes in ``root``."""
    return parse_options(
        str(root), True, ["-opt", str(write_yaml(root, quick(photographs, **changes))), "--auto_resume"]
    )[0]


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
    damage(finished(tmp_path) / file)
    state, notes = find_state(parsed(photographs, tmp_path))
    assert state["iter"] == 4
    assert re.search(message, notes[0]) and notes[0].endswith("; the state before it is tried") and "\n" not in notes[0]


@pytest.mark.parametrize(("damage", "message"), LATE)
def test_a_state_that_cant_be_taken_leads_to_the_one_before_it(finished, photographs, train, tmp_path, damage, message):
    """The model is built anew for it: the end is that of an untouched training, to the bit."""
    experiment = finished(tmp_path)
    whole = {name: load_file(experiment / name, "") for name in (NET_G, NET_W, STATE)}
    (experiment / "models/.net_g_8.pth.0123abcd.tmp").write_bytes(b"left by a kill")
    damage(experiment / STATE)
    train(quick(photographs), "--auto_resume")
    text = log_text(experiment)
    warning = next(line for line in text.splitlines() if "the state before it is tried" in line)
    assert re.search(rf"6\.state can't be taken: .*{message}", warning) and "Resuming after iteration 4." in text
    assert all(same(content, load_file(experiment / name, "")) for name, content in whole.items())
    assert not list(experiment.rglob("*.tmp"))
    (aside,) = experiment.glob("after_4_*")  # nothing is lost
    assert f"3 files of later iterations are moved to {aside}" in text
    assert {p.name for p in aside.rglob("*.*")} == {"6.state", "net_g_6.pth", "net_w_6.pth"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (put("x", "schedulers", 0, "milestones"), r"^train\.scheduler: fails in iteration 5 \(TypeError: "),
        (put(torch.ones(2), *MOMENTS, "step"), r"4\.state: the first iteration after it fails \("),
    ],
)
def test_what_an_iteration_makes_of_a_state_is_one_line(finished, photographs, train, tmp_path, damage, message):
    state = finished(tmp_path) / "training_states/4.state"
    damage(state)
    with pytest.raises(UserError, match=message) as error:
        train(quick(photographs, path={"resume_state": str(state)}))
    assert "\n" not in str(error.value)


def test_a_redo_is_what_auto_resume_goes_on_from(finished, photographs, train, tmp_path):
    """A training goes back to iteration 2, and is killed at 4: the 6.state of before must not be taken then."""
    experiment = finished(tmp_path)
    named = {"resume_state": str(experiment / "training_states/2.state")}
    changes = {"train__pixel_opt__base": "mse"}
    train(quick(photographs, path=named, train__total_iter=4, **changes))
    (aside,) = experiment.glob("after_2_*")
    assert f"6 files of later iterations are moved to {aside}" in log_text(experiment)
    assert sorted(p.name for p in (aside / "training_states").iterdir()) == ["4.state", "6.state"]
    train(quick(photographs, **changes), "--auto_resume")
    assert "Resuming after iteration 4." in log_text(experiment)
    assert not same(load_file(experiment / NET_G, ""), load_file(aside / NET_G, ""))


WARM_UP = {
    "MultiStepLR": {"type": "MultiStepLR", "milestones": [6], "gamma": 0.5},
    "ExponentialLR": {"type": "ExponentialLR", "gamma": 0.9},
    "CosineAnnealingRestartLR": {"type": "CosineAnnealingRestartLR", "periods": [9]},
}


@pytest.mark.parametrize("scheduler", WARM_UP)
def test_after_the_warm_up_the_rate_is_the_schedulers_own(photographs, train, tmp_path, scheduler):
    def rates(name, root, *arguments, **changes):
        opt = quick(photographs, train__scheduler=WARM_UP[scheduler], train__total_iter=9, **changes)
        text = log_text(train(opt, *arguments, root=tmp_path / name))
        return [float(rate) for rate in re.findall(r"lr:\(([^,]+),\)", text)]

    without, with_it = rates("without", tmp_path), rates("with", tmp_path, train__warmup_iter=4)
    assert with_it[3:] == without[3:]
    assert with_it[:3] == pytest.approx([1e-3 * i / 4 for i in (1, 2, 3)])
    rates("cut", tmp_path, train__warmup_iter=4, logger__save_checkpoint_freq=3)
    for name in ("6.state", "9.state"):
        (tmp_path / "cut/experiments/tiny/training_states" / name).unlink()
    for log in (tmp_path / "cut").rglob("*.log"):
        log.unlink()
    assert rates("cut", tmp_path, "--auto_resume", train__warmup_iter=4) == with_it[3:]


def test_another_metric_begins_anew_on_a_resume(photographs, train):
    """One that is added, one that is turned round, one that stays."""
    psnr = {"type": "calculate_psnr", "crop_border": 2, "test_y_channel": True}
    train(tiny_options(photographs, val__metrics={"psnr": psnr, "turned": psnr, "gone": psnr}))
    metrics = {"psnr": psnr, "turned": {**psnr, "better": "lower"}, "added": psnr}
    changes = {"train__total_iter": 12, "val__metrics": metrics, "val__save_best": "added"}
    experiment = train(tiny_options(photographs, **changes), "--auto_resume")
    best = load_file(experiment / "training_states/12.state", "")["best_metric_results"]["photos_val"]
    assert set(best) == set(metrics)
    assert best["added"]["iter"] == best["turned"]["iter"] == 12 and best["psnr"]["iter"] in (4, 8, 12)
    assert (experiment / "models/net_g_best.pth").is_file()


def test_a_finished_training_can_be_made_longer_whenever_it_has_saved(photographs, train, tmp_path):
    """The end is saved with its state, also where none is due."""
    changes = {"logger__save_checkpoint_freq": 100}
    train(quick(photographs, **changes), root=tmp_path / "a")
    experiment = train(quick(photographs, **changes, train__total_iter=9), "--auto_resume", root=tmp_path / "a")
    assert "Resuming after iteration 6." in log_text(experiment)
    whole = train(quick(photographs, **changes, train__total_iter=9), root=tmp_path / "b")
    for name in ("models/net_g_9.pth", "models/net_w_latest.pth", "training_states/9.state"):
        assert same(load_file(experiment / name, ""), load_file(whole / name, "")), name


def test_cosine_annealing_can_not_go_on_after_its_periods(photographs, train):
    def options(iterations):
        cosine = {"type": "CosineAnnealingRestartLR", "periods": [iterations]}
        return quick(photographs, train__scheduler=cosine, train__total_iter=iterations)

    train(options(6))
    with pytest.raises(UserError, match=r"train\.total_iter: the periods of train\.scheduler in .*6\.state end at 6"):
        train(options(8), "--auto_resume")


@pytest.mark.parametrize("way", ["none", "unreadable", "empty"])
def test_a_training_does_not_start_over_where_its_states_are_gone(finished, photographs, tmp_path, way):
    """A folder that can't be read, such as with an expired ticket, is not an empty one."""
    states = finished(tmp_path) / "training_states"
    shutil.rmtree(states)
    if way == "unreadable":
        states.symlink_to(states)  # which root can't read either
    elif way == "empty":
        states.mkdir()
    files = sorted(tmp_path.rglob("*"))
    opt = parsed(photographs, tmp_path)
    message = r"can't be read \(" if way == "unreadable" else "there is no state for the networks in"
    with pytest.raises(UserError, match=rf"^--auto_resume: .*{message}"):
        find_state(opt)
    assert sorted(tmp_path.rglob("*")) == sorted({*files, tmp_path / "options.yml"})


def test_a_training_killed_in_its_first_save_starts_anew(finished, photographs, tmp_path):
    experiment = finished(tmp_path)
    for file in [*experiment.glob("*/*_[46].pth"), *experiment.glob("*/*_latest.pth"), *experiment.glob("*/*.state")]:
        file.unlink()
    opt = parsed(photographs, tmp_path)
    assert list((experiment / "models").iterdir()) and find_state(opt) == (None, [])


def test_the_states_seed_is_told(finished, photographs, train, tmp_path):
    experiment = finished(tmp_path)
    train(quick(photographs, manual_seed=99, train__total_iter=7), "--auto_resume")
    assert "manual_seed is 3, that of" in log_text(experiment)
    assert load_file(experiment / "training_states/7.state", "")["seed"] == 3


def test_networks_without_a_state_are_no_checkpoint(finished, photographs, train, tmp_path):
    experiment = finished(tmp_path)
    (experiment / "training_states/6.state").unlink()
    train(quick(photographs), "--auto_resume")
    assert "Resuming after iteration 4." in log_text(experiment)


def test_with_no_whole_state_a_training_does_not_start_over(finished, photographs, train, tmp_path):
    experiment = finished(tmp_path)
    for state in experiment.glob("training_states/*"):
        truncate(state)
    with pytest.raises(UserError, match=r"--auto_resume: no state in .*training_states can be used.*6\.state is no"):
        train(quick(photographs), "--auto_resume")
    assert len(list(experiment.glob("models/*.pth"))) == 8


def test_a_state_that_is_named_must_be_whole(finished, photographs, train, tmp_path):
    state = finished(tmp_path) / "training_states/6.state"
    truncate(state)
    with pytest.raises(UserError, match=r"path\.resume_state: .*6\.state is not a readable checkpoint"):
        train(quick(photographs, path={"resume_state": str(state)}))


# fmt: off
CHANGES = [
    ("network_g__num_feat", 8, "network_g.num_feat was 4 in the training of {state}, now it is 8"),
    ("network_w__init", "paper", "network_w.init was not given in"),
    ("base_model", "SwinIRModel", "base_model was SRModel in"),
    ("train__optim_g__betas", [0.5, 0.9], "train.optim_g.betas was not given in"),
    ("train__scheduler", {"type": "CosineAnnealingRestartLR", "periods": [9]}, "train.scheduler.type was MultiStepLR in"),
]
ALLOWED = [
    ("train__optim_g__lr", 1e-4, "train.optim_g.lr was 0.001 in the training of {state}, now it is 0.0001; resuming takes"),
    ("train__pixel_opt__base", "mse", "train.pixel_opt.base was l1 in the training of {state}, now it is mse; it holds"),
    ("train__scheduler__milestones", [9], "train.scheduler.milestones was [4] in"),
    ("train__total_iter", 99, None),
    ("logger__print_freq", 7, None),
    ("datasets__train__name", "other", None),
]
# fmt: on


@pytest.mark.parametrize(("place", "value", "message"), CHANGES, ids=[c[0] for c in CHANGES])
def test_options_of_other_networks_or_optimisers_are_refused(photographs, place, value, message):
    state, path = {"options": strip_options(tiny_options(photographs))}, Path("8.state")
    with pytest.raises(UserError) as error:
        compare_options(state, tiny_options(photographs, **{place: value}), path)
    assert message.format(state=path) in str(error.value)


@pytest.mark.parametrize(("place", "value", "message"), ALLOWED, ids=[c[0] for c in ALLOWED])
def test_other_options_may_change(photographs, place, value, message):
    state, path = {"options": strip_options(tiny_options(photographs))}, Path("8.state")
    notes = compare_options(state, tiny_options(photographs, **{place: value}), path)
    assert len(notes) == (message is not None)
    assert message is None or message.format(state=path) in notes[0]


def test_a_changed_learning_rate_is_told_and_the_states_is_taken(finished, photographs, train, tmp_path):
    experiment = finished(tmp_path)
    changes = {"train__optim_g__lr": 0.5, "train__total_iter": 7, "logger__print_freq": 1}
    train(quick(photographs, **changes), "--auto_resume")
    assert "train.optim_g.lr was 0.001 in the training of" in log_text(experiment)
    assert "lr:(5.000e-04,)" in [line for line in log_text(experiment).splitlines() if "[epoch:" in line][-1]


def test_a_state_holds_its_options_and_version(finished, photographs, tmp_path):
    state = load_file(finished(tmp_path) / "training_states/6.state", "")
    opt = quick(photographs)
    assert state["options"]["network_g"] == opt["network_g"] and state["options"]["train"] == opt["train"]
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", state["version"])


def test_a_training_of_basicsrs_own_goes_on_with_tlw(photographs, train, tmp_path):
    """Networks and state are written by BasicSR's SRModel, without a line of ours."""
    from copy import deepcopy

    from basicsr.models.sr_model import SRModel

    models, states = (tmp_path / "experiments/theirs" / name for name in ("models", "training_states"))
    models.mkdir(parents=True)
    states.mkdir()
    opt = deepcopy(plain_options(photographs, train__optim_g__lr=3e-3)) | {"is_train": True, "dist": False, "rank": 0}
    opt["path"] = {"models": str(models), "training_states": str(states)}
    theirs = SRModel(opt)
    for i in range(1, 7):
        theirs.update_learning_rate(i)
        theirs.feed_data({"lq": torch.rand(2, 3, 8, 8), "gt": torch.rand(2, 3, 16, 16)})
        theirs.optimize_parameters(i)
    theirs.save(epoch=1, current_iter=6)
    assert set(load_file(states / "6.state", "")) == {"epoch", "iter", "optimizers", "schedulers"}

    tlw = tiny_options(photographs, path={"resume_state": str(states / "6.state")}, logger__save_checkpoint_freq=7)
    seen = {}
    from tlw_basicsr.models import TrainingMixin

    step = TrainingMixin.optimize_parameters

    def look(self, current_iter):
        if not seen:
            seen.update(
                g={k: v.clone() for k, v in self.net_g.state_dict().items()},
                ema={k: v.clone() for k, v in self.net_g_ema.state_dict().items()},
                optimizer=[v["exp_avg"].clone() for v in self.optimizer_g.state_dict()["state"].values()],
                lrs=[o.param_groups[0]["lr"] for o in self.optimizers],
                iter=current_iter,
                states=len(self.optimizer_w.state),
            )
        step(self, current_iter)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingMixin, "optimize_parameters", look)
        experiment = train(tlw)
    assert same(seen["g"], theirs.net_g.state_dict()) and same(seen["ema"], theirs.net_g_ema.state_dict())
    assert same(seen["optimizer"], [v["exp_avg"] for v in theirs.optimizer_g.state_dict()["state"].values()])
    assert seen["iter"] == 7 and seen["states"] == 0
    assert seen["lrs"] == pytest.approx([1.5e-3, 5e-4])  # after the milestone, both
    assert "the weighting network starts anew" in log_text(experiment)
    assert [line["iter"] for line in log_lines(experiment)] == ["7", "8"]
    assert (experiment / "models/net_w_7.pth").is_file()


# ------------------------------------------------------------------------------------------------- signals


def test_a_signal_stops_after_the_iteration_and_the_run_goes_on_with_the_same_bits(photographs, train, tmp_path):
    """To the whole process group, as a cluster sends it, with a data loader's worker in it."""
    changes = {"train__total_iter": 20, "logger__save_checkpoint_freq": 20, "datasets__train__num_worker_per_gpu": 1}
    cut = tmp_path / "cut"
    cut.mkdir()
    process = start(cut, quick(photographs, **changes), OMP_NUM_THREADS="1")
    wait_for(process, "iter:       2")
    os.killpg(process.pid, signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM, error
    assert "Stopped by SIGTERM after iteration" in error and "Traceback" not in error
    states = list(cut.glob("experiments/tiny/training_states/*.state"))
    assert len(states) == 1 and 2 <= int(states[0].stem) < 20
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # another number of threads gives other roundings
    resumed = train(quick(photographs, **changes), "--auto_resume", root=cut)
    whole = train(quick(photographs, **changes), root=tmp_path / "whole")
    torch.set_num_threads(threads)
    for name in ("models/net_g_20.pth", "models/net_w_20.pth", "training_states/20.state"):
        assert same(load_file(whole / name, ""), load_file(resumed / name, "")), name


def test_a_signal_in_the_last_validation_lets_it_end(photographs, tmp_path):
    process = start(tmp_path, tiny_options(photographs, val__val_freq=7), OMP_NUM_THREADS="1")
    wait_for(process, "Save the latest model")
    os.killpg(process.pid, signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 0, error
    assert len(list(tmp_path.glob("experiments/tiny/models/net_*_latest.pth"))) == 2


def test_a_second_signal_ends_at_once():
    script = (
        "import signal, sys, time\nfrom tlw_basicsr.util.signals import StopSignals\n"
        "with StopSignals() as stop:\n    print('ready', flush=True)\n    time.sleep(0)\n"
        "    while not stop.agreed(): time.sleep(0.01)\n    print(stop.received, flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == f"{signal.SIGINT.value}\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 128 + signal.SIGTERM


def test_a_program_ends_while_something_still_holds_a_data_loaders_worker(photographs, tmp_path):
    """Python sends SIGTERM to the workers that are left when it ends, and waits for them."""
    shutil.copytree(photographs, tmp_path / "photos")
    damaged = tmp_path / "photos/photo2.png"
    damaged.write_bytes(damaged.read_bytes()[:-2000])
    changes = {"dataroot_gt": str(tmp_path / "photos"), "num_worker_per_gpu": 2}
    write_yaml(tmp_path, tiny_options(photographs, **{f"datasets__train__{k}": v for k, v in changes.items()}))
    script = (
        "import multiprocessing\nfrom tlw_basicsr.engine.pipeline import train_pipeline\n"
        f"try: train_pipeline({str(tmp_path)!r}, ['-opt', 'options.yml'])\n"
        "except Exception as e: held = e\n"
        "print(len(multiprocessing.active_children()), held)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    last = done.stdout.splitlines()[-1]
    assert done.returncode == 0 and last.startswith("2 ") and "photo2.png" in last, done.stdout + done.stderr


def test_the_signals_mean_what_they_meant_after_a_training(photographs, train):
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    train(quick(photographs, train__total_iter=1))
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before


# ------------------------------------------------------------------------------------------------- keeping


def test_old_checkpoints_go_but_not_the_newest_best_or_latest(photographs, train, monkeypatch):
    """The metric of ``save_best`` is best at iteration 2, another one is not."""
    from tlw_basicsr.models import TrainingMixin

    validation = TrainingMixin.validation

    def validated(self, loader, current_iter, *more):
        validation(self, loader, current_iter, *more)
        if current_iter == 2:
            self.best_metric_results["photos_val"]["psnr"]["val"] = 99.0

    monkeypatch.setattr(TrainingMixin, "validation", validated)
    psnr = {"type": "calculate_psnr", "crop_border": 2, "test_y_channel": True}
    opt = tiny_options(photographs, logger__save_checkpoint_freq=1, logger__keep_checkpoints=2, val__val_freq=2)
    opt["val"].update(metrics={"other": {**psnr, "crop_border": 3}, "psnr": psnr}, save_best="psnr")
    experiment = train(opt)
    assert {p.stem for p in experiment.glob("training_states/*")} == {"2", "7", "8"}
    assert {p.name for p in experiment.glob("models/*")} == {
        f"net_{n}_{i}.pth" for n in "gw" for i in (2, 7, 8, "latest", "best")
    }


def test_pruning_leaves_what_is_newer_and_removes_networks_without_a_state(tmp_path):
    opt = {"path": {"models": tmp_path / "m", "training_states": tmp_path / "s"}, "logger": {"keep_checkpoints": 1}}
    for folder, names in (
        ("m", ["net_g_1.pth", "net_g_2.pth", "net_g_9.pth", "net_g_latest.pth"]),
        ("s", ["2.state", "9.state"]),
    ):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).touch()
    prune(opt, 2, {-1})
    assert {p.name for p in tmp_path.rglob("*.*")} == {
        "net_g_2.pth",
        "net_g_9.pth",
        "net_g_latest.pth",
        "2.state",
        "9.state",
    }


# ------------------------------------------------------------------------------------------------- writing


def test_a_full_disk_ends_the_training_in_one_line_and_damages_nothing(photographs, tmp_path):
    """A limit of the file size, which the operating system keeps, as a full disk."""
    opt = quick(photographs, train__total_iter=100)
    write_yaml(tmp_path, opt)
    script = (
        "import resource, signal, sys\nfrom tlw_basicsr.util.errors import run\nfrom tlw_basicsr.util import files\nfrom tlw_basicsr.engine import pipeline\nfrom tlw_basicsr.models import states\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nsave, calls = files.save_file, []\n"
        "import tlw_basicsr.models.training as training\n"
        "def limited(content, path):\n    calls.append(path)\n"
        "    if len(calls) == 5: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n    save(content, path)\n"
        "training.save_file = states.save_file = limited\n"
        f"run(lambda: pipeline.train_pipeline({str(tmp_path)!r}, ['-opt', 'options.yml']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
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
    from tlw_basicsr.engine.pipeline import train_pipeline

    with pytest.raises(UserError, match=r"/proc/.* can't be read or written \(") as error:
        train_pipeline("/proc", ["-opt", str(write_yaml(tmp_path, quick(photographs)))])
    assert "\n" not in str(error.value)


def test_images_logs_and_tensorboard_on_a_full_disk(photographs, train, tmp_path, monkeypatch):
    from basicsr.models import sr_model

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        write = files.os.fsync

        def images_full(descriptor):
            full() if ".png" in str(Path(f"/proc/self/fd/{descriptor}").readlink()) else write(descriptor)

        patch.setattr(files.os, "fsync", images_full)
        experiment = train(tiny_options(photographs, val__save_img=True), root=tmp_path / "images")
        assert re.search(
            r"fails \(.*photo0_4\.png can't be written \(No space left on device\)\)", log_text(experiment)
        )
        assert sr_model.imwrite.__module__ == "tlw_basicsr.data.images"
    with monkeypatch.context() as patch:
        patch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
        with pytest.raises(UserError, match="No space left on device"):
            train(quick(photographs, logger__use_tb_logger=True), root=tmp_path / "tensorboard")
    reset_logger()
    with monkeypatch.context() as patch:
        flush = logging.StreamHandler.flush
        patch.setattr(
            logging.StreamHandler,
            "flush",
            lambda h: full() if "/train_" in getattr(h, "baseFilename", "") else flush(h),
        )
        with pytest.raises(UserError, match=r"\.log can't be written \(No space left on device\)"):
            train(quick(photographs), root=tmp_path / "logs")


# ------------------------------------------------------------------------------------------------- kills
@pytest.mark.slow
def test_a_training_killed_within_writes_ends_with_the_same_bits(tmp_path):
    """20 kills; some within a write is what the program asks of itself."""
    command = [sys.executable, str(ROOT / "scripts/kill_test.py"), "--kills", "20", "--iterations", "64"]
    done = subprocess.run(
        [*command, "--num-feat", "32", "--out", str(tmp_path / "k")], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout[done.stdout.index("{") :])
    assert figures["kills"] == figures["resumed"] == 20 and figures["checkpoints_kept"] >= 3
    assert figures["different_files"] == []


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="watches the process in /proc")
def test_a_long_training_grows_nowhere(tmp_path):
    command = [sys.executable, str(ROOT / "scripts/soak_test.py"), "--iterations", "600", "--warm-up", "200"]
    done = subprocess.run([*command, "--out", str(tmp_path / "s")], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout[done.stdout.index("{") :])["samples"] > 10
