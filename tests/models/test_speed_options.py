"""What makes an iteration cheaper: exact parts change nothing, fast parts keep the gradient's direction."""

import math
import shutil

import pytest
import torch

from tests.conftest import tiny_options
from tests.helpers import GAN, batch, built, check_resume, iterate, log_lines, quick
from tlw_basicsr.util.files import load_file


def test_a_log_before_the_first_e_step_has_what_there_is(photographs, tmp_path, pair):
    model = built(photographs, tmp_path, train__tlw__preset="fast")
    model.feed_data(batch(pair))
    model.tlw.last_e_step = 1  # as after a resume
    model.optimize_parameters(2)
    log = model.get_current_log()
    assert "w_mean" in log and "k" in log and "l_w" not in log


@pytest.mark.parametrize("base", ["SRModel", "ESRGANModel"])
@pytest.mark.parametrize(
    "changes",
    [
        {"train__tlw__use_amp": "bf16"},
        {"train__use_amp": "bf16"},
        {"train__use_amp": "fp16"},
        {"train__use_channels_last": True, "train__tlw__use_channels_last": True, "train__use_tf32": True},
        {"train__tlw__distance_chunk": 1},
    ],
    ids=lambda c: " ".join(c),
)
def test_every_option_trains_nearly_as_without_it(photographs, tmp_path, pair, base, changes):
    more = GAN if base == "ESRGANModel" else {}
    logs = []
    for options in ({}, changes):
        torch.manual_seed(0)
        model = built(photographs, tmp_path, base_model=base, **more, **options)
        model.feed_data(batch(pair))
        for i in range(1, 4):
            torch.manual_seed(i)
            model.optimize_parameters(i)
        logs.append(model.get_current_log())
    name = "l_g_pix" if more else "l_pix"
    assert logs[1][name] == pytest.approx(logs[0][name], rel=0.05)
    assert logs[1]["w_mean"] == pytest.approx(logs[0]["w_mean"], abs=1e-5)  # FixedSum stays in fp32
    assert logs[1].get("skipped", 0) == 0
    assert all(p.dtype == torch.float32 for p in model.net_w.parameters())


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_a_step_that_is_not_finite_is_left_out_and_counted(photographs, tmp_path, pair, amp):
    model = built(photographs, tmp_path, train__use_amp=amp)
    model.feed_data(batch(pair))
    model.optimize_parameters(1)
    scale = model.amp.scaler.get_scale()
    handle = model.net_g.conv_last.weight.register_hook(lambda g: g * math.inf)
    assert iterate(model, 2, "net_g") == [False]
    handle.remove()
    assert model.get_current_log()["skipped"] == 1
    if amp == "fp16":
        assert model.amp.scaler.get_scale() == scale / 2
    assert iterate(model, 3, "net_g") == [True]


def test_a_run_with_amp_resumes_with_its_scale(photographs, train, tmp_path):
    whole, _ = check_resume(train, tmp_path, tiny_options(photographs, train__use_amp="fp16"), 4)
    assert load_file(whole / "training_states/8.state", "")["amp"]["scaler"]["scale"] > 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_networks_train_and_save_ordinary_files(photographs, train):
    from torch._dynamo.utils import counters

    counters.clear()
    k_unit = {"train__tlw__k_unit": "iter"}  # another k in every iteration
    experiment = train(quick(photographs, train__use_compile="reduce-overhead", train__total_iter=12, **k_unit))
    assert len({line["k"] for line in log_lines(experiment)}) == 12
    assert counters["stats"]["unique_graphs"] <= 6  # of θ, and of φ with and without gradient; not one for every k
    names = load_file(experiment / "models/net_g_latest.pth", "")["params"]
    assert all("_orig_mod" not in name for name in names)
