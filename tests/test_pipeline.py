"""Trainings through YAML: logs, files, resume, both entry points."""

import os
import re
import shutil
import subprocess
import sys
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from basicsr.archs import build_network

from tests.conftest import ROOT, control_options, plain_options, tiny_options, write_yaml
from tests.helpers import log_lines, same
from tlw_basicsr import UserError, k_schedule
from tlw_basicsr.util.files import load_file


def test_a_training_writes_basicsrs_files_and_logs_tlws_values(photographs, train, tmp_path):
    experiment = train(tiny_options(photographs))
    names = {p.name for p in (experiment / "models").iterdir()}
    assert names == {f"net_{n}_{i}.pth" for n in "gw" for i in ("4", "8", "latest")}
    assert {p.name for p in (experiment / "training_states").iterdir()} == {"4.state", "8.state"}
    assert (experiment / "options.yml").is_file()
    assert not list(experiment.rglob("*.tmp"))

    lines = log_lines(experiment)
    assert [int(line["iter"]) for line in lines] == list(range(1, 9))
    for line in lines:  # 3 iterations an epoch
        expected = k_schedule((int(line["iter"]) - 1) // 3, k_decay=4)
        assert float(line["k"]) == pytest.approx(expected, rel=1e-3)
        assert float(line["w_mean"]) == pytest.approx(expected, rel=1e-3)
        assert {"l_pix", "l_w", "wc", "w_std"} <= line.keys()
    text = next(experiment.glob("train_*.log")).read_text()
    assert text.count("Validation photos_val") == 2
    assert "lr:(5.000e-04,)" in text  # the scheduler's milestone

    saved = load_file(experiment / "models/net_g_8.pth", "test")
    assert saved.keys() == {"params", "params_ema"}
    assert not same(saved["params"], saved["params_ema"])
    weights = load_file(experiment / "models/net_w_8.pth", "test")["params"]
    build_network({"type": "TLWWeightNet", "num_feat": 4}).load_state_dict(weights)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [4, 6])
def test_a_resumed_training_ends_with_the_same_bits(photographs, train, tmp_path, workers, stop):
    changes = {"datasets__train__num_worker_per_gpu": workers, "logger__save_checkpoint_freq": 2}
    whole = train(tiny_options(photographs, **changes), root=tmp_path / "whole")
    train(tiny_options(photographs, train__total_iter=stop, **changes), root=tmp_path / "cut")
    resumed = train(tiny_options(photographs, **changes), "--auto_resume", root=tmp_path / "cut")
    for name in ("models/net_g_8.pth", "models/net_w_8.pth", "training_states/8.state"):
        assert same(load_file(whole / name, ""), load_file(resumed / name, "")), name
    assert [int(line["iter"]) for line in log_lines(resumed)] == list(range(stop + 1, 9))


@pytest.mark.parametrize("workers", [0, 1])
def test_prefetching_changes_no_bit_and_hides_no_error(photographs, train, tmp_path, workers):
    """BasicSR's thread for it shares the random numbers of the training, and dies without a word."""
    changes = {"datasets__train__num_worker_per_gpu": workers, "train__total_iter": 4, "datasets__val": ..., "val": ...}
    nets = []
    for mode in (None, "cpu"):
        experiment = train(
            tiny_options(photographs, datasets__train__prefetch_mode=mode, **changes), root=tmp_path / f"{mode}"
        )
        nets.append(load_file(experiment / "models/net_g_4.pth", ""))
    assert same(*nets)
    shutil.copytree(photographs, tmp_path / "photos")
    content = (tmp_path / "photos/photo2.png").read_bytes()
    (tmp_path / "photos/photo2.png").write_bytes(content[: len(content) // 2])
    changes["datasets__train__dataroot_gt"] = str(tmp_path / "photos")
    with pytest.raises(UserError, match=r"photo2\.png: not an image that can be read"):
        train(tiny_options(photographs, datasets__train__prefetch_mode="cpu", **changes), root=tmp_path / "damaged")


@pytest.mark.parametrize("weights", ["random", "error"])
def test_a_resumed_control_ends_with_the_same_bits(photographs, train, tmp_path, weights):
    whole = train(control_options(photographs, weights), root=tmp_path / "whole")
    cut = train(control_options(photographs, weights, train__total_iter=6), root=tmp_path / "cut")
    (cut / "training_states/6.state").unlink()
    resumed = train(control_options(photographs, weights), "--auto_resume", root=tmp_path / "cut")
    assert [int(line["iter"]) for line in log_lines(resumed)] == list(range(5, 9))
    for name in ("models/net_g_8.pth", "training_states/8.state"):
        assert same(load_file(whole / name, ""), load_file(resumed / name, "")), name
    assert not list(whole.rglob("net_w*"))
    for line in log_lines(whole):  # 3 iterations an epoch
        expected = k_schedule((int(line["iter"]) - 1) // 3, k_decay=4)
        assert float(line["k"]) == pytest.approx(expected, rel=1e-3)
        assert float(line["w_mean"]) == pytest.approx(expected, rel=1e-3)


def test_a_resume_with_another_batch_size_goes_on_with_the_next_epoch(photographs, train, tmp_path):
    """k must not jump because an epoch has another length."""
    train(tiny_options(photographs, train__total_iter=4))  # 3 iterations an epoch: inside epoch 1
    experiment = train(tiny_options(photographs, datasets__train__batch_size_per_gpu=1), "--auto_resume")
    assert [float(line["k"]) for line in log_lines(experiment)] == pytest.approx(
        [k_schedule(2, k_decay=4)] * 4, rel=1e-3
    )
    logs = "".join(log.read_text() for log in experiment.glob("train_*.log"))
    assert "An epoch had 3 iterations, now 6; epoch 2 begins." in logs


def test_without_a_seed_a_resume_takes_the_one_that_was_drawn(photographs, train, tmp_path):
    train(tiny_options(photographs, manual_seed=None, train__total_iter=4), root=tmp_path)
    resumed = train(tiny_options(photographs, manual_seed=None), "--auto_resume", root=tmp_path)
    first, second = (load_file(resumed / f"training_states/{i}.state", "")["seed"] for i in (4, 8))
    assert first == second


def test_auto_resume_without_a_state_starts_afresh(photographs, train):
    experiment = train(tiny_options(photographs, train__total_iter=2), "--auto_resume")
    assert (experiment / "models/net_g_latest.pth").is_file()


def test_resuming_another_training_is_refused(photographs, train, tmp_path):
    plain = plain_options(photographs)
    train(plain)
    with pytest.raises(UserError, match=r"model_type was SRModel in the training of .*8\.state, now it is TLWModel"):
        train(tiny_options(photographs), "--auto_resume")


def test_same_seed_means_same_start_values_with_and_without_tlw(photographs, train, tmp_path):
    nothing = {
        "train__optim_g__lr": 1e-12,
        "train__total_iter": 2,
        "logger__save_checkpoint_freq": 2,
        "train__ema_decay": 0,
    }
    tlw = train(tiny_options(photographs, **nothing), root=tmp_path / "a")
    plain = plain_options(photographs, **nothing)
    l1 = train(plain, root=tmp_path / "b")
    a, b = (load_file(e / "models/net_g_2.pth", "")["params"] for e in (tlw, l1))
    assert all(torch.allclose(a[n], b[n], atol=1e-8) for n in a)


def program(*arguments, cwd, name="train", module=False):
    target = ["-m", f"tlw_basicsr.{name}"] if module else [str(ROOT / "tlw_basicsr" / f"{name}.py")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)} if module else os.environ
    return subprocess.run(
        [sys.executable, *target, *arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )


def test_both_entry_points_from_any_folder(photographs, tmp_path):
    """Train as a file, resume as a module, test as a file; no terminal, so no progress bar."""
    yaml = write_yaml(tmp_path, tiny_options(photographs, num_gpu="auto", train__total_iter=4))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = program("-opt", str(yaml), cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert "it/s" not in done.stderr
    again = program("-opt", str(yaml), "--auto_resume", "--force_yml", "train:total_iter=6", cwd=elsewhere, module=True)
    assert again.returncode == 0, again.stderr
    assert "Resuming after iteration 4" in again.stderr

    opt = tiny_options(photographs, model_type="SRModel")
    test_opt = {k: opt[k] for k in ("model_type", "scale", "num_gpu", "network_g")} | {
        "name": "tiny_test",
        "datasets": {"test_1": opt["datasets"]["val"]},
        "path": {"pretrain_network_g": "experiments/tiny/models/net_g_latest.pth", "param_key_g": "params_ema"},
        "val": {"save_img": True, "metrics": opt["val"]["metrics"]},
    }
    tested = program("-opt", str(write_yaml(tmp_path, test_opt, "test.yml")), cwd=elsewhere, name="test")
    assert tested.returncode == 0, tested.stderr
    results = elsewhere / "results/tiny_test"
    assert len(list((results / "visualization/photos_val").glob("photo*_tiny_test.png"))) == 6
    assert "psnr" in next(results.glob("test_*.log")).read_text()


def test_a_wrong_option_is_one_line_and_exit_code_2_and_leaves_nothing(photographs, tmp_path):
    yaml = write_yaml(tmp_path, tiny_options(photographs, train__tlw__k_start=0))
    done = program("-opt", str(yaml), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == ["error: train.tlw.k_start: expected a number in (0, 1), got 0"]
    assert not (tmp_path / "experiments").exists()


def test_debug_logs_every_iteration_and_ends_early(photographs, train):
    opt = tiny_options(photographs, logger__print_freq=100)
    experiment = train(opt, "--debug").with_name("debug_tiny")
    assert len(log_lines(experiment)) == 8


def test_tensorboard_gets_tlws_values(photographs, train, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny_options(photographs, logger__use_tb_logger=True))
    events = EventAccumulator(str(tmp_path / "tb_logger/tiny"), size_guidance={"histograms": 0, "images": 0})
    events.Reload()
    assert {"losses/l_pix", "losses/l_w", "wc", "k", "w_mean", "w_std"} <= set(events.Tags()["scalars"])
    assert len(events.Scalars("wc")) == 8
    assert [e.step for e in events.Images("weights/photos_val")] == [4, 8]  # val_freq
    assert [e.step for e in events.Histograms("weights_histogram/photos_val")] == [4, 8]
    image = events.Images("weights/photos_val")[0]
    assert (image.height, image.width) == (3 * 48 + 56, 3 * 3 * 64)  # enlarged, with names below
    histogram = events.Histograms("weights_histogram/photos_val")[0].histogram_value
    assert histogram.num == 3 * 48 * 64
    assert histogram.sum / histogram.num == pytest.approx(k_schedule(1, k_decay=4), abs=1e-5)


def with_wandb(photographs, **more):
    wandb = {"project": "tlw", "resume_id": None, **more}
    changes = {"train__total_iter": 2, "val__val_freq": 2, "logger__use_tb_logger": True, "logger__wandb": wandb}
    return tiny_options(photographs, **changes)


@pytest.mark.parametrize("given", [None, "abc"])
def test_wandb_is_started_before_tensorboard(photographs, train, tmp_path, monkeypatch, given):
    calls = []

    def init(**options):
        calls.append((options, any((tmp_path / "tb_logger/tiny").iterdir())))
        return SimpleNamespace(id=options["id"] or "drawn")

    module = ModuleType("wandb")
    module.init, module.__spec__ = init, ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    experiment = train(with_wandb(photographs, resume_id=given))
    [(options, too_late)] = calls
    assert not too_late and options["sync_tensorboard"] is True
    assert (options["project"], options["name"], options["id"]) == ("tlw", "tiny", given)
    assert options["resume"] == ("allow" if given else "never")
    assert f"wandb: project tlw, resume_id {given or 'drawn'}." in next(experiment.glob("train_*.log")).read_text()

    def refuse(**_):
        raise RuntimeError("no key\nmore")

    module.init = refuse
    with pytest.raises(UserError, match=r"^logger\.wandb: can't start \(RuntimeError: no key\)$"):
        train(with_wandb(photographs), root=tmp_path / "refused")


def test_wandb_that_is_not_installed_is_told_first(photographs, train, tmp_path, monkeypatch):
    monkeypatch.setattr("tlw_basicsr.engine.preflight.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^logger\.wandb\.project: wandb is not installed"):
        train(with_wandb(photographs))
    assert not (tmp_path / "experiments").exists()


def test_wandb_itself_takes_the_run_without_a_network(photographs, tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed")
    write_yaml(tmp_path, with_wandb(photographs))
    env = {**os.environ, "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tlw_basicsr.train", "-opt", "options.yml"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    [run] = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    content = run.read_bytes()
    for key in (b"losses/l_w", b"weights/photos_val", b"weights_histogram/photos_val", b"total_iter"):
        assert key in content, key


@pytest.mark.parametrize("options", [tiny_options, partial(control_options, weights="error")], ids=["tlw", "control"])
def test_tensorboards_pictures_leave_the_training_alone(photographs, train, tmp_path, options):
    states = []
    for use in (True, False):
        experiment = train(options(photographs, logger__use_tb_logger=use), root=tmp_path / str(use))
        files = sorted(p.relative_to(experiment) for p in experiment.rglob("*_8.pth"))
        files += [Path("training_states/8.state")]  # with the random state
        states.append({str(f): load_file(experiment / f, "") for f in files})
        del states[-1]["training_states/8.state"]["options"]["logger"]["use_tb_logger"]
    assert same(*states)
    assert len(states[0]) == (3 if options is tiny_options else 2)


def test_a_terminal_gets_a_progress_bar(photographs, tmp_path):
    yaml = write_yaml(tmp_path, tiny_options(photographs, train__total_iter=4))
    command = f"cd {tmp_path}; stty rows 40 cols 120; exec {sys.executable} -m tlw_basicsr.train -opt {yaml}"
    script = f"import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(['sh', '-c', {command!r}])))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=env, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"4/4 \[", done.stdout)
    assert "it/s" in done.stdout or "s/it" in done.stdout


def test_the_best_networks_by_a_metric_are_kept(photographs, train):
    """The network improves, so by the lowest PSNR the first one is the best."""
    metrics = {
        "lpips": {"type": "tlw_lpips", "net": "alex", "weights": "random", "better": "lower"},
        "worst": {"type": "tlw_psnr_y", "better": "lower"},
    }
    often = {"val__val_freq": 2, "logger__save_checkpoint_freq": 2}
    experiment = train(tiny_options(photographs, val__metrics=metrics, val__save_best="worst", **often))
    best = load_file(experiment / "training_states/8.state", "")["best_metric_results"]["photos_val"]
    assert best["worst"]["iter"] == 2
    assert 0 < best["lpips"]["val"] < 1
    for network in ("net_g", "net_w"):
        kept, then = (load_file(experiment / f"models/{network}_{i}.pth", "") for i in ("best", 2))
        assert same(kept, then)
    assert not (experiment / "training_states/best.state").exists()


def test_save_best_needs_a_metric(photographs, train):
    with pytest.raises(UserError, match=r"val.save_best: ssim is not in val.metrics; accepted are psnr"):
        train(tiny_options(photographs, val__save_best="ssim"))
