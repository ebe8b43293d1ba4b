"""The uncertainty baseline: its equations, its two stages through YAML, its resume."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.conftest import plain_options, tiny_options
from tests.helpers import check_resume, log_lines, refused, same
from tlw_basicsr.core.functional import uncertainty_driven_loss, uncertainty_loss
from tlw_basicsr.util.files import load_file

NETWORKS = {
    "EDSR": {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "num_block": 1, "upscale": 2},
    "RCAN": {"type": "TLWRCAN", "num_feat": 8, "num_group": 1, "num_block": 1, "squeeze_factor": 4, "upscale": 2},
    "HAT": {
        "type": "TLWHAT", "embed_dim": 12, "depths": [2], "num_heads": [2], "squeeze_factor": 6, "num_feat": 8, "upscale": 2,
    },
}  # fmt: skip


def options(photographs, network="EDSR", **changes):
    uncertainty = {
        "model_type": "UncertaintyModel",
        "network_g": dict(NETWORKS[network]),
        "network_u": {"type": "UncertaintyHead", "num_in_ch": 8, "num_feat": 4, "upscale": 2},
        "train__pixel_opt": {"type": "UncertaintyLoss"},
        "train__uncertainty": {"stage_one_iter": 4, "features": "upsample"},
    }
    return plain_options(photographs, **{**uncertainty, **changes})


def test_the_equations(pair):
    sr, gt = pair
    s = torch.randn(gt.shape, requires_grad=True)
    error, values = 2 * (sr - gt).abs().numpy(), s.detach().numpy()
    expected = np.mean(np.exp(-values) * error + 2 * values)
    assert uncertainty_loss(sr, gt, s).item() == pytest.approx(expected, rel=1e-5)
    expected = np.mean([
        (values[n, c] - values[n, c].min()) * error[n, c] for n in range(len(gt)) for c in range(3)
    ])  # fmt: skip
    assert uncertainty_driven_loss(sr, gt, s).item() == pytest.approx(expected, rel=1e-5)
    uncertainty_loss(sr, gt, s).backward()
    assert torch.allclose(s.grad, (2 - (-s).exp() * 2 * (sr - gt).abs()).detach() / s.numel(), atol=1e-9)


@pytest.mark.parametrize("network", NETWORKS)
def test_stage_one_starts_stage_two_and_the_head_is_frozen_then(photographs, train, network):
    opt = options(photographs, network, logger__save_checkpoint_freq=1, train__scheduler__milestones=[100])
    experiment = train(opt)
    lines = log_lines(experiment)
    assert [float(line["stage"]) for line in lines] == [1] * 4 + [2] * 4
    assert {"l_pix", "s_mean", "s_std"} <= lines[0].keys()
    heads, nets = ([load_file(experiment / f"models/net_{n}_{i}.pth", "") for i in range(1, 9)] for n in ("u", "g"))
    assert not any(same(a["params"], b["params"]) for a, b in pairwise(heads[:4]))  # the head learns in stage one
    assert all(same(heads[3]["params"], head["params"]) for head in heads[4:])
    assert heads[3].keys() == {"params"}
    for head in heads[4:]:
        assert same(head["stage_one_g"], nets[3]["params"])
        assert same(head["stage_one_u"], heads[3]["params"])
    assert not same(nets[3]["params"], nets[4]["params"])
    states = [load_file(experiment / f"training_states/{i}.state", "")["optimizers"][0]["state"] for i in (4, 5)]
    assert states[0][0]["step"] == 4  # stage two has a fresh optimiser, without the head
    assert states[1][0]["step"] == 1
    assert len(states[1]) < len(states[0])


@pytest.mark.parametrize("stop", [2, 4, 6])
def test_a_resumed_training_ends_with_the_same_bits(photographs, train, tmp_path, stop):
    check_resume(train, tmp_path, options(photographs, logger__save_checkpoint_freq=2), stop)


def test_stage_two_alone_from_saved_networks(photographs, train, tmp_path):
    models = train(options(photographs, train__total_iter=4), root=tmp_path / "one") / "models"
    paths = {f"path__pretrain_network_{n}": str(models / f"net_{n}_4.pth") for n in "gu"}
    two = train(options(photographs, train__uncertainty__stage_one_iter=0, **paths), root=tmp_path / "two")
    assert [float(line["stage"]) for line in log_lines(two)] == [2] * 8
    saved = load_file(two / "models/net_u_4.pth", "")
    assert same(saved["stage_one_g"], load_file(models / "net_g_4.pth", "")["params"])


# place, value, message
WRONG = [
    (
        "train__uncertainty__features",
        "tail",
        "train.uncertainty.features: 'tail' is not a module of EDSR; accepted are",
    ),
    ("network_u__num_in_ch", 5, r"network_u: UncertaintyHead fails in the first iteration .*input\[2, 8, 16, 16\]"),
    ("network_g__num_in_ch", 1, r"network_g: EDSR fails in the first iteration .*lq \(2, 3, 8, 8\)"),
    ("network_u__upscale", 4, "network_u.upscale: 4 does not fit scale: 2"),
    ("network_u", None, "network_u: expected a section"),
    ("train__uncertainty", {}, "train.uncertainty.stage_one_iter: missing"),
    ("train__uncertainty__stage_two", 4, "train.uncertainty.stage_two: unknown option"),
    ("train__pixel_opt", {"type": "L1Loss"}, "accepted with model_type: UncertaintyModel is UncertaintyLoss"),
    ("model_type", "SRModel", "UncertaintyLoss needs model_type: UncertaintyModel"),
]


@pytest.mark.parametrize(("place", "value", "message"), WRONG)
def test_wrong_options_are_refused_before_anything_is_made(photographs, train, tmp_path, place, value, message):
    refused(message, train, options(photographs, **{place: value}))
    assert not (tmp_path / "experiments").exists()


def test_paper_start_values_are_the_same_for_every_loss(photographs, train, tmp_path):
    """Convolutions N(0, 0.02), of the seed alone: what else a loss builds changes nothing."""
    nothing = {"train__optim_g__lr": 1e-12, "train__total_iter": 1, "logger__save_checkpoint_freq": 1}
    nothing |= {"train__ema_decay": 0, "train__init_g": "paper", "network_g": {**NETWORKS["EDSR"], "num_feat": 32}}
    trainings = {
        "l1": plain_options(photographs, **nothing),
        "tlw": tiny_options(photographs, **nothing),
        "uncertainty": options(photographs, **nothing, network_u__num_in_ch=32),
        "another seed": plain_options(photographs, **nothing, manual_seed=4),
    }
    starts = {
        name: load_file(train(opt, root=tmp_path / name) / "models/net_g_1.pth", "")["params"]
        for name, opt in trainings.items()
    }
    for other in ("tlw", "uncertainty"):
        assert all(torch.allclose(value, starts[other][name], atol=1e-9) for name, value in starts["l1"].items())
    weights = torch.cat([v.flatten() for n, v in starts["l1"].items() if n.endswith("weight")])
    assert weights.mean().item() == pytest.approx(0, abs=1e-3)
    assert weights.std().item() == pytest.approx(0.02, rel=0.02)
    assert not torch.allclose(starts["another seed"]["conv_first.weight"], starts["l1"]["conv_first.weight"])
