"""What makes an iteration cheaper: it trains nearly as without, and E steps come and see what they should."""

import math
import shutil

import pytest
import torch

from tests.conftest import tiny_options
from tests.helpers import EVERY_BASE, GAN, batch, built, check_resume, feed_noise, iterate, log_lines, quick
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


# ------------------------------------------------------------------- E steps now and then, on a part of the batch

TLW = {"preset": "economy", "weight_interval": 3, "weight_batch": 1, "weight_crop": 16, "k_unit": "iter"}
ECONOMY = {"network_w": ..., "train__optim_w": ..., "train__tlw": TLW}


def train_on_noise(model, base, iterations):
    """For every iteration: the shapes of x in E steps, those in M steps, and whether φ was stepped."""
    seen, rows = [], []
    model.net_w.register_forward_pre_hook(lambda _, args: seen.append((torch.is_grad_enabled(), tuple(args[1].shape))))
    for i in range(1, iterations + 1):
        feed_noise(model, base, size=(64, 64) if "V" in base else (12, 12))
        (stepped,) = iterate(model, i, "net_w")
        rows.append(([shape for e, shape in seen if e], [shape for e, shape in seen if not e], stepped))
        seen.clear()
    return rows


@pytest.mark.parametrize("base", EVERY_BASE)
def test_every_base_model_has_its_e_steps_on_a_crop_of_one_sample(photographs, tmp_path, base):
    model = built(photographs, tmp_path, base_model=base, train__ema_decay=0, **EVERY_BASE[base] | ECONOMY)
    rows = train_on_noise(model, base, 7)
    samples = 6 if base == "VideoRecurrentModel" else 2  # frames count as samples
    side = model.gt.shape[-1]
    assert [e for e, _, _ in rows] == [[(1, 3, 16, 16)], [], []] * 2 + [[(1, 3, 16, 16)]]
    assert all(m == [(samples, 3, side, side)] for _, m, _ in rows)
    assert [stepped for _, _, stepped in rows] == [True, False, False] * 2 + [True]


def test_a_step_of_phi_takes_as_many_e_steps_as_are_accumulated(photographs, tmp_path):
    model = built(photographs, tmp_path, train__accumulation_steps=2, **ECONOMY)
    rows = train_on_noise(model, "SRModel", 10)
    assert [i for i, (e, _, _) in enumerate(rows, 1) if e] == [1, 4, 7, 10]
    assert [i for i, (_, _, stepped) in enumerate(rows, 1) if stepped] == [4, 10]


def test_phi_waits_for_the_generator(photographs, tmp_path):
    model = built(
        photographs, tmp_path, base_model="ESRGANModel", train__net_d_iters=2, train__net_d_init_iters=3, **GAN, **ECONOMY
    )  # fmt: skip
    rows = train_on_noise(model, "ESRGANModel", 12)
    assert [i for i, (_, m, _) in enumerate(rows, 1) if m] == [4, 6, 8, 10, 12]  # the generator's iterations
    assert [i for i, (e, _, _) in enumerate(rows, 1) if e] == [4, 8, 12]  # of them, three or more after the last


def test_phi_may_start_from_a_file(photographs, train, tmp_path):
    first = train(tiny_options(photographs, **ECONOMY)) / "models/net_w_8.pth"
    again = tiny_options(photographs, path__pretrain_network_w=str(first), train__total_iter=1, **ECONOMY)
    net_w = load_file(train(again, root=tmp_path / "again") / "models/net_w_1.pth", "")["params"]
    before = load_file(first, "")["params"]
    assert net_w["conv.1.num_batches_tracked"] == before["conv.1.num_batches_tracked"] + 2


@pytest.mark.parametrize("base", ["SRModel", "ESRGANModel"])
def test_a_resume_within_a_round_ends_with_the_same_bits(photographs, train, tmp_path, base):
    changes = {"base_model": base, "train__total_iter": 9, "logger__save_checkpoint_freq": 5}
    opt = quick(photographs, **changes, datasets__train__gt_size=24, **EVERY_BASE[base], **ECONOMY)
    whole, _ = check_resume(train, tmp_path, opt, 5)
    assert load_file(whole / "training_states/5.state", "")["tlw"]["last_e_step"] == 4
