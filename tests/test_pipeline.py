"""Trainings through YAML: logs, files, resume, both entry points."""

import re
import shutil
import sys
from functools import partial
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import pytest
import torch
from basicsr.archs import build_network
from basicsr.utils.registry import METRIC_REGISTRY
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import ROOT, control_options, plain_options, tiny_options, write_yaml
from tests.helpers import TRAIN, check_resume, log_lines, log_text, quick, refused, run_python, same
from tlw_basicsr import UserError, k_schedule
from tlw_basicsr.metrics.paper_metrics import tlw_psnr_y
from tlw_basicsr.util.files import load_file


def check_schedule(lines):
    """k and the mean of the weights follow the schedule, at 3 iterations an epoch."""
    for line in lines:
        expected = k_schedule((int(line["iter"]) - 1) // 3, k_decay=4)
        assert float(line["k"]) == pytest.approx(expected, rel=1e-3)
        assert float(line["w_mean"]) == pytest.approx(expected, rel=1e-3)


def test_a_training_writes_basicsrs_files_and_logs_tlws_values(photographs, train):
    experiment = train(tiny_options(photographs))
    names = {p.name for p in (experiment / "models").iterdir()}
    assert names == {f"net_{n}_{i}.pth" for n in "gw" for i in ("4", "8", "latest")}
    assert {p.name for p in (experiment / "training_states").iterdir()} == {"4.state", "8.state"}
    assert (experiment / "options.yml").is_file()
    assert not list(experiment.rglob("*.tmp"))

    lines = log_lines(experiment)
    assert [int(line["iter"]) for line in lines] == list(range(1, 9))
    check_schedule(lines)
    assert all({"l_pix", "l_w", "wc", "w_std"} <= line.keys() for line in lines)
    text = log_text(experiment)
    assert text.count("Validation photos_val") == 2
    assert "lr:(5.000e-04,)" in text  # the scheduler's milestone

    saved = load_file(experiment / "models/net_g_8.pth", "test")
    assert saved.keys() == {"params", "params_ema"}
    assert not same(saved["params"], saved["params_ema"])
    weights = load_file(experiment / "models/net_w_8.pth", "test")["params"]
    build_network({"type": "TLWWeightNet", "num_feat": 4}).load_state_dict(weights)


@pytest.mark.parametrize(("workers", "stop"), [(0, 6), (2, 4)])
def test_a_resumed_training_ends_with_the_same_bits(photographs, train, tmp_path, workers, stop):
    changes = {"datasets__train__num_worker_per_gpu": workers, "logger__save_checkpoint_freq": 2}
    _, resumed = check_resume(train, tmp_path, tiny_options(photographs, **changes), stop)
    assert [int(line["iter"]) for line in log_lines(resumed)] == list(range(stop + 1, 9))


@pytest.mark.parametrize("workers", [0, 1])
def test_prefetching_changes_no_bit_and_hides_no_error(photographs, train, tmp_path, workers):
    """BasicSR's thread for it shares the random numbers of the training, and dies without a word."""

    def options(folder, mode):
        opt = quick(folder, train__total_iter=4, datasets__train__num_worker_per_gpu=workers)
        opt["datasets"]["train"]["prefetch_mode"] = mode
        return opt

    experiments = [train(options(photographs, mode), root=tmp_path / str(mode)) for mode in (None, "cpu")]
    assert same(*(load_file(experiment / "models/net_g_4.pth", "") for experiment in experiments))
    damaged = shutil.copytree(photographs, tmp_path / "photos") / "photo2.png"
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    with pytest.raises(UserError, match=r"photo2\.png: not an image that can be read"):
        train(options(tmp_path / "photos", "cpu"), root=tmp_path / "damaged")


@pytest.mark.parametrize("weights", ["random", "error"])
def test_a_resumed_control_ends_with_the_same_bits(photographs, train, tmp_path, weights):
    whole, resumed = check_resume(train, tmp_path, control_options(photographs, weights), 4)
    assert [int(line["iter"]) for line in log_lines(resumed)] == list(range(5, 9))
    assert not list(whole.rglob("net_w*"))
    check_schedule(log_lines(whole))


def test_a_resume_with_another_batch_size_goes_on_with_the_next_epoch(photographs, train):
    """k must not jump because an epoch has another length; a seed that was drawn stays."""
    train(tiny_options(photographs, train__total_iter=4, manual_seed=None))  # 3 iterations an epoch: inside epoch 1
    experiment = train(
        tiny_options(photographs, datasets__train__batch_size_per_gpu=1, manual_seed=None), "--auto_resume"
    )
    k = [float(line["k"]) for line in log_lines(experiment)]
    assert k == pytest.approx([k_schedule(2, k_decay=4)] * 4, rel=1e-3)
    assert "An epoch had 3 iterations, now 6; epoch 2 begins." in log_text(experiment)
    first, second = (load_file(experiment / f"training_states/{i}.state", "")["seed"] for i in (4, 8))
    assert first == second


def test_resuming_another_training_is_refused(photographs, train):
    train(plain_options(photographs), "--auto_resume")  # without a state it starts afresh
    with pytest.raises(UserError, match=r"model_type was SRModel in the training of .*8\.state, now it is TLWModel"):
        train(tiny_options(photographs), "--auto_resume")


def test_same_seed_means_same_start_values_with_and_without_tlw(photographs, train, tmp_path):
    nothing = {"train__optim_g__lr": 1e-12, "train__total_iter": 1, "logger__save_checkpoint_freq": 1}
    starts = []
    for options in (tiny_options, plain_options):
        experiment = train(options(photographs, **nothing), root=tmp_path / options.__name__)
        starts.append(load_file(experiment / "models/net_g_1.pth", "")["params"])
    assert all(torch.allclose(value, starts[1][name], atol=1e-8) for name, value in starts[0].items())


def test_both_entry_points_from_any_folder(photographs, tmp_path):
    """Train as a file, resume as a module, test as a file; no terminal, so no progress bar."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    yaml = write_yaml(tmp_path, tiny_options(photographs, num_gpu="auto", train__total_iter=4))
    done = run_python(elsewhere, ROOT / "tlw_basicsr/train.py", "-opt", yaml, PYTHONPATH="")
    assert "it/s" not in done.stderr
    again = run_python(elsewhere, *TRAIN[:3], yaml, "--auto_resume", "--force_yml", "train:total_iter=6")
    assert "Resuming after iteration 4" in again.stderr

    opt = plain_options(photographs, name="tiny_test", num_gpu="auto", train=..., logger=..., val__save_img=True)
    opt["datasets"] = {"test_1": opt["datasets"]["val"]}
    opt["path"] = {"pretrain_network_g": "experiments/tiny/models/net_g_latest.pth", "param_key_g": "params_ema"}
    test = write_yaml(tmp_path, opt, "test.yml")
    run_python(elsewhere, ROOT / "tlw_basicsr/test.py", "-opt", test, PYTHONPATH="")
    results = elsewhere / "results/tiny_test"
    assert len(list((results / "visualization/photos_val").glob("photo*_tiny_test.png"))) == 6
    assert "psnr" in next(results.glob("test_*.log")).read_text()


def test_debug_logs_every_iteration_and_ends_early(photographs, train):
    opt = tiny_options(photographs, logger__print_freq=100)
    experiment = train(opt, "--debug").with_name("debug_tiny")
    assert len(log_lines(experiment)) == 8


def test_tensorboard_gets_tlws_values(photographs, train, tmp_path):
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

    def refuse(**_):
        raise RuntimeError("no key\nmore")

    module = SimpleNamespace(init=init, __spec__=ModuleSpec("wandb", None))
    monkeypatch.setitem(sys.modules, "wandb", module)
    experiment = train(with_wandb(photographs, resume_id=given))
    [(options, too_late)] = calls
    assert not too_late and options["sync_tensorboard"] is True
    assert (options["project"], options["name"], options["id"]) == ("tlw", "tiny", given)
    assert options["resume"] == ("allow" if given else "never")
    assert f"wandb: project tlw, resume_id {given or 'drawn'}." in log_text(experiment)
    module.init = refuse
    with pytest.raises(UserError, match=r"^logger\.wandb: can't start \(RuntimeError: no key\)$"):
        train(with_wandb(photographs), root=tmp_path / "refused")


def test_wandb_that_is_not_installed_is_told_first(photographs, train, tmp_path, monkeypatch):
    monkeypatch.setattr("tlw_basicsr.engine.preflight.find_spec", lambda name: None)
    refused(r"^logger\.wandb\.project: wandb is not installed", train, with_wandb(photographs))
    assert not (tmp_path / "experiments").exists()


def test_wandb_itself_takes_the_run_without_a_network(photographs, tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed")
    write_yaml(tmp_path, with_wandb(photographs))
    run_python(tmp_path, *TRAIN, WANDB_MODE="offline")
    [run] = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    content = run.read_bytes()
    for key in (b"losses/l_w", b"weights/photos_val", b"weights_histogram/photos_val", b"total_iter"):
        assert key in content, key


@pytest.mark.parametrize("options", [tiny_options, partial(control_options, weights="error")], ids=["tlw", "control"])
def test_tensorboards_pictures_leave_the_training_alone(photographs, train, tmp_path, options):
    contents = []
    for use in (True, False):
        experiment = train(options(photographs, logger__use_tb_logger=use), root=tmp_path / str(use))
        files = [*experiment.glob("models/*_8.pth"), experiment / "training_states/8.state"]  # with the random state
        contents.append({path.name: load_file(path, "") for path in files})
        del contents[-1]["8.state"]["options"]["logger"]["use_tb_logger"]
    assert same(*contents)
    assert len(contents[0]) == (3 if options is tiny_options else 2)


def test_a_terminal_gets_a_progress_bar(photographs, tmp_path):
    write_yaml(tmp_path, tiny_options(photographs, train__total_iter=4))
    command = f"stty rows 40 cols 120; exec {sys.executable} {' '.join(TRAIN)}"
    code = f"import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(['sh', '-c', {command!r}])))"
    done = run_python(tmp_path, "-c", code)
    assert re.search(r"4/4 \[", done.stdout)
    assert "it/s" in done.stdout or "s/it" in done.stdout


def test_the_best_networks_by_a_metric_are_kept(photographs, train, register):
    """The network improves, so by the lowest PSNR the first one is the best."""

    def own_psnr(img, img2, **_):
        return tlw_psnr_y(img, img2)

    metrics = {
        "lpips": {"type": "tlw_lpips", "net": "alex", "weights": "random", "better": "lower"},
        "worst": {"type": register(METRIC_REGISTRY, own_psnr), "better": "lower"},
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
