"""TLW as the pixel loss of a framework with a registry."""

from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.conftest import ROOT
from tests.helpers import run_python, same
from tlw_basicsr import TLW, SSIMDistance, TLWPixelLoss, TLWWeightNet

SSIM = {"type": "SSIMDistance", "kernel_size": 5}


def loss_of(**options):
    torch.manual_seed(3)
    return TLWPixelLoss(**{"k_decay": 10, "distance": SSIM, "net_w": {"num_feat": 4}, "weight_crop": 16, **options})


def images(side=24, samples=3):
    generator = torch.Generator().manual_seed(1)
    gt = torch.rand(samples, 3, side, side, generator=generator)
    return (gt + 0.1 * torch.randn(gt.shape, generator=generator)).requires_grad_(), gt


def calls(loss, times=3):
    torch.manual_seed(5)
    return [loss(*images()) for _ in range(times)]


def test_it_is_the_object_of_these_options():
    torch.manual_seed(3)
    net_w = TLWWeightNet(num_feat=4, prior="error")
    expected = TLW.from_preset("economy", SSIMDistance(kernel_size=5), k_decay=10, net_w=net_w, weight_crop=16)
    loss = loss_of()
    assert same(calls(loss, 9), calls(expected, 9))
    assert same(loss.tlw.state_dict(), expected.state_dict()) and loss.tlw.last_e_step == 8
    options = {"preset": "exact", "optim_w": {"lr": 0.25, "betas": [0.1, 0.9]}, "base": "mse", "k_end": 0.8}
    other = loss_of(**options).tlw
    assert (other.optimizer.defaults["lr"], other.base, other.k_end, other.net_w.prior) == (0.25, "mse", 0.8, "none")
    assert loss_of(optim_w={"lr": 0.25}).tlw.optimizer.defaults["betas"] == (0.5, 0.999)
    assert loss_of(optim_w={"betas": [0.1, 0.9]}).tlw.optimizer.defaults["lr"] == 1e-3  # of economy
    assert loss_of(weights="error", distance=None, net_w=None)(*images()).isfinite()


@settings(max_examples=20, deadline=None)
@given(st.floats(0.01, 100))
def test_its_factor_counts_once_whether_a_framework_multiplies_or_not(weight):
    plain, weighted = calls(loss_of(), 1)[0], loss_of(loss_weight=weight)
    value = calls(weighted, 1)[0]
    assert torch.isclose(value, weight * plain, rtol=1e-5)
    assert torch.equal(abs(weighted.loss_weight) * value, value)  # as one that multiplies does


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_takes_half_precision_in_channels_last(dtype):
    (sr, gt), loss = images(), loss_of().to(memory_format=torch.channels_last)
    x = sr.detach().to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    torch.manual_seed(5)
    value = loss(x, gt.to(dtype).contiguous(memory_format=torch.channels_last))
    value.backward()
    expected = calls(loss_of(), 1)[0]
    assert value.dtype == torch.float32 and torch.isclose(value, expected, rtol=0.02)
    assert x.grad.dtype == dtype and x.grad.isfinite().all() and x.grad.any()


class Registry(dict):
    """Of the shape of BasicSR's and its descendants'."""

    def register(self, part=None):
        self[part.__name__.lower()] = part


def make_model():
    """A model's class as BasicSR's descendants have it; states go through a file."""

    class Model:
        def __init__(self, options, nested):
            self.net = nn.Conv2d(3, 3, 1)
            self.optimizers = [torch.optim.Adam(self.net.parameters())]
            loss = Registry.losses["tlwpixelloss"](**options)
            self.losses = {"l_g_pix": loss} if nested else {}
            self.cri_pix = None if nested else loss

        def save_training_state(self, path):
            torch.save({"optimizers": [o.state_dict() for o in self.optimizers]}, path)

        def resume_training(self, state):
            assert len(state["optimizers"]) == len(self.optimizers), "Wrong lengths of optimizers"
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)

    Registry.losses = Registry()
    TLWPixelLoss.register(Registry.losses, Model)
    return Model


@pytest.mark.parametrize("nested", [False, True])
def test_a_framework_keeps_its_state_with_its_own(tmp_path, nested):
    model = make_model()
    options = {"k_decay": 10, "distance": SSIM, "net_w": {"num_feat": 4}, "weight_interval": 2}

    def loss_in(one):
        return one.losses["l_g_pix"] if nested else one.cri_pix

    first = model(options, nested)
    calls(loss_in(first), 3)
    first.save_training_state(tmp_path / "3.state")
    assert len(first.optimizers) == 1
    ahead = calls(loss_in(first), 4)
    second = model(options, nested)
    second.resume_training(torch.load(tmp_path / "3.state", weights_only=True))
    assert len(second.optimizers) == 1
    assert same(calls(loss_in(second), 4), ahead) and loss_in(second).tlw.calls == 7
    torch.save({"optimizers": [first.optimizers[0].state_dict()]}, tmp_path / "without.state")
    with pytest.raises(AssertionError, match="Wrong lengths"):  # of a training without TLW
        second.resume_training(torch.load(tmp_path / "without.state", weights_only=True))
    assert len(second.optimizers) == 1


WRONG = [
    ({"loss_weight": 0}, "TLWPixelLoss: loss_weight: expected a number above 0, got 0"),
    ({"loss_weight": -1.0}, "loss_weight: expected a number above 0"),
    ({"loss_weight": "1e-2"}, "loss_weight: expected a number above 0, got '1e-2'"),  # as some YAML readers give it
    ({"reduction": "sum"}, "TLWPixelLoss: reduction: expected one of mean, got 'sum'"),
    ({"distance": {"kernel_size": 5}}, "distance.type must be one of LPIPSDistance, SSIMDistance, got None"),
    ({"distance": {"type": "SSIM"}}, "distance.type must be one of .*, got 'SSIM'"),
    ({"preset": "cheap"}, "preset must be one of"),
    ({"base": "l2"}, "base: expected one of l1, mse"),
    ({"k_decay": 0}, "k_decay: expected a number above 0"),
    ({"net_w": {"num_feat": 4, "prior": "x"}}, "prior: expected one of"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        loss_of(**options)


def test_missing_weights_are_told_in_the_words_of_options(tmp_path, monkeypatch):
    """Whoever configures a framework writes no ``SSIMDistance()``; also for the paper's distance, which is not given."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=OSError("no network")))
    for distance in (None, {"type": "LPIPSDistance", "net": "vgg"}):
        with pytest.raises(ValueError, match=r"^TLWPixelLoss: distance: .*take {type: SSIMDistance}.* weights: PATH$"):
            loss_of(distance=distance)


def test_it_needs_no_basicsr():
    hide = "import sys; sys.modules.update(basicsr=None, cv2=None, spandrel=None, yaml=None)\n"
    code = hide + "from tlw_basicsr import TLWPixelLoss; TLWPixelLoss(k_decay=1, distance={'type': 'SSIMDistance'})"
    run_python(ROOT.parent, "-c", code)
