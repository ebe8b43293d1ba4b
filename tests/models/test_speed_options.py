"""What makes an iteration cheaper: exact parts change nothing, fast parts keep the gradient's direction."""

import math
import shutil

import pytest
import torch

from tests.conftest import as_tensor, photograph, tiny_options
from tests.models.test_tlw_model import batch, built
from tests.test_pipeline import log_lines
from tlw_basicsr import LPIPSDistance, SSIMDistance, TLWLoss, UserError, fixed_sum, relaxed_bernoulli
from tlw_basicsr.losses.tlw_loss import _EagerGradient
from tlw_basicsr.models.training import MixedPrecision

PHOTOGRAPHS = [
    ("astronaut", 30, 180),
    ("astronaut", 300, 100),
    ("coffee", 100, 200),
    ("chelsea", 80, 120),
    ("rocket", 200, 250),
]


def real_pairs():
    """x̂ and x of five photographs: x̂ is the bicubic ×4."""
    gt = torch.cat([as_tensor(photograph(name, top, left, 64, 64)) for name, top, left in PHOTOGRAPHS])
    lq = torch.nn.functional.interpolate(gt, scale_factor=0.25, mode="bicubic", antialias=True)
    return torch.nn.functional.interpolate(lq, scale_factor=4, mode="bicubic").clamp(0, 1), gt


class Net(torch.nn.Module):
    """A network with a few parameters, whose output starts at x̂."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 5, padding=2)
        torch.nn.init.dirac_(self.conv.weight)

    def forward(self, x):
        return self.conv(x)


def published_iteration(net_g, net_w, distance, lq, gt, noise_w, noises):
    """The published call pattern, from its description; returns both losses with their gradients in the networks."""
    x = 2 * gt - 1

    def d(a, b):
        return distance((a + 1) / 2, (b + 1) / 2)

    sr = (2 * net_g(lq) - 1).detach()
    w = relaxed_bernoulli(net_w((sr + 1) / 2, gt), noise_w)
    d_w, d_1w = d(w * x + (1 - w) * sr, x), d((1 - w) * x + w * sr, x)
    l_w = (torch.log(d_w.abs() + 1e-3) - torch.log(d_1w.abs() + 1e-3)).mean()
    l_w.backward()
    sr = 2 * net_g(lq) - 1
    with torch.no_grad():
        w = net_w((sr + 1) / 2, gt)
    above = below = 0
    for u in noises:
        ws = relaxed_bernoulli(w, u)
        with torch.no_grad():
            r = d((1 - ws) * x + ws * sr, x) / (d(ws * x + (1 - ws) * sr, x).abs() + 1e-3)
        e = (ws * (sr - x).abs()).mean((1, 2, 3))
        above, below = above + r * torch.exp(-e), below + r
    l_sr = -torch.log(above / below).mean()
    l_sr.backward()
    return l_w.item(), l_sr.item()


@pytest.mark.parametrize("chunk", [None, 2])
def test_exact_mode_is_the_published_iteration(chunk):
    from tlw_basicsr import TLWWeightNet

    lq, gt = real_pairs()
    distance = LPIPSDistance("vgg", weights="random")
    nets = [(Net(), TLWWeightNet(num_feat=8)) for _ in range(2)]
    for theirs, ours in zip(*nets, strict=True):
        ours.load_state_dict(theirs.state_dict())
    torch.manual_seed(4)
    noise_w, noises = torch.rand(1, *gt.shape), torch.rand(3, *gt.shape)
    expected = published_iteration(*nets[0], distance, lq, gt, noise_w[0], noises)

    net_g, net_w = nets[1]
    loss = TLWLoss(distance)
    loss.chunk = chunk
    torch.manual_seed(4)
    sr = net_g(lq)
    to_gt = loss.distance_to(gt)
    l_w = loss.weight_loss(sr.detach(), gt, net_w(sr.detach(), gt), to_gt)
    l_w.backward()
    with torch.no_grad():
        w = net_w(sr, gt)
    l_sr = loss(sr, gt, w, to_gt)
    l_sr.backward()
    assert l_w.item() == pytest.approx(expected[0], rel=1e-5)
    assert l_sr.item() == pytest.approx(expected[1], rel=1e-5)
    for theirs, ours in zip(nets[0], nets[1], strict=True):
        for (name, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
            difference = (a.grad - b.grad).norm() / a.grad.norm().clamp_min(1e-12)
            no_effect = name in ("conv.0.bias", "conv.3.bias", "conv.6.bias")  # a batch norm follows: only rounding
            assert difference < 1e-4 or no_effect, (name, difference)
            if name.endswith("weight"):
                assert difference < 2e-5, (name, difference)


def test_eager_gradients_are_autograds():
    sr, gt = (x.double() for x in real_pairs())
    distance = SSIMDistance()
    upstream = torch.rand(len(gt), dtype=torch.float64)
    eager, plain = (sr.clone().requires_grad_() for _ in range(2))
    (_EagerGradient.apply(eager, lambda a: distance(a, gt)) * upstream).sum().backward()
    (distance(plain, gt) * upstream).sum().backward()
    assert torch.allclose(eager.grad, plain.grad, rtol=1e-9)


@pytest.mark.parametrize("base", ["l1", "mse"])
def test_without_importance_the_gradient_keeps_its_direction(base):
    """Cosine of at least 0.999 over photographs, for the same noise; other noise changes it far more."""
    sr, gt = real_pairs()
    loss = TLWLoss(LPIPSDistance("vgg", weights="random"), base=base)
    w = fixed_sum(torch.nn.functional.avg_pool2d((sr - gt).abs(), 5, 1, 2).clamp(0, 1), 0.5)

    def gradient(importance, seed):
        loss.importance = importance
        torch.manual_seed(seed)
        leaf = sr.clone().requires_grad_()
        loss(leaf, gt, w).backward()
        return leaf.grad.flatten()

    exact = gradient(True, 1)
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(exact, gradient(False, 1), dim=0) >= 0.999
    assert cosine(exact, gradient(True, 2), dim=0) < 0.99


def test_without_importance_the_m_step_needs_no_distance(pair):
    class Unused(torch.nn.Module):
        def forward(self, a, b):
            raise AssertionError("called")

    loss = TLWLoss(Unused())
    loss.importance = False
    assert torch.isfinite(loss(*pair, torch.rand_like(pair[0])))


def test_the_fast_preset_steps_the_weights_every_second_iteration(photographs, tmp_path, pair):
    model = built(photographs, tmp_path, train__tlw__preset="fast")
    assert not model.cri_tlw.importance
    model.feed_data(batch(pair))
    stepped = []
    for i in range(1, 6):
        before = [p.detach().clone() for p in model.net_w.parameters()]
        model.optimize_parameters(i)
        stepped.append(any(not torch.equal(p, b) for p, b in zip(model.net_w.parameters(), before, strict=True)))
    assert stepped == [True, False, True, False, True]
    assert "l_w" in model.get_current_log()


def test_a_log_before_the_first_e_step_has_what_there_is(photographs, tmp_path, pair):
    model = built(photographs, tmp_path, train__tlw__preset="fast")
    model.feed_data(batch(pair))
    model.last_e_step = 1  # as after a resume
    model.optimize_parameters(2)
    log = model.get_current_log()
    assert "w_mean" in log and "k" in log and "l_w" not in log


def test_an_option_goes_before_the_preset(photographs, tmp_path):
    model = built(photographs, tmp_path, train__tlw={"preset": "fast", "importance": True, "k_unit": "iter"})
    assert model.tlw.importance and model.tlw.weight_interval == 2
    assert built(photographs, tmp_path).tlw.weight_interval == 1


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
    from tests.models.test_base_models import GAN

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


def test_under_autocast_the_m_step_sees_the_new_weights(photographs, tmp_path, pair):
    """Autocast's cache would hand it the casts of the weights from before the E step."""
    model = built(photographs, tmp_path, train__tlw__use_amp="bf16", train__optim_w__lr=0.1)
    outputs = []
    model.net_w.register_forward_hook(lambda _, __, w: outputs.append(w.detach().clone()))
    model.feed_data(batch(pair))
    model.optimize_parameters(1)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), torch.no_grad():
        fresh = model.net_w(model.output.detach(), model.gt)
    assert not torch.equal(outputs[0], outputs[1])
    assert (outputs[1] - fresh).abs().max() < 0.02


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_a_step_that_is_not_finite_is_left_out_and_counted(photographs, tmp_path, pair, amp):
    model = built(photographs, tmp_path, train__use_amp=amp)
    model.feed_data(batch(pair))
    model.optimize_parameters(1)
    theta = [p.detach().clone() for p in model.net_g.parameters()]
    scale = model.amp.scaler.get_scale()
    handle = model.net_g.conv_last.weight.register_hook(lambda g: g * math.inf)
    model.optimize_parameters(2)
    handle.remove()
    assert all(torch.equal(p, b) for p, b in zip(model.net_g.parameters(), theta, strict=True))
    assert model.get_current_log()["skipped"] == 1
    if amp == "fp16":
        assert model.amp.scaler.get_scale() == scale / 2
    model.optimize_parameters(3)
    assert any(not torch.equal(p, b) for p, b in zip(model.net_g.parameters(), theta, strict=True))


def test_without_amp_nothing_is_wrapped():
    amp = MixedPrecision("cpu", False)
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)])
    amp.unscale_before(optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    with amp.step():
        assert not torch.is_autocast_enabled("cpu")


def test_a_run_with_amp_resumes_with_its_scale(photographs, train, tmp_path):
    from tests.test_pipeline import same
    from tlw_basicsr.files import load_file

    changes = {"train__use_amp": "fp16", "logger__save_checkpoint_freq": 4}
    whole = train(tiny_options(photographs, **changes), root=tmp_path / "whole")
    train(tiny_options(photographs, train__total_iter=4, **changes), root=tmp_path / "cut")
    resumed = train(tiny_options(photographs, **changes), "--auto_resume", root=tmp_path / "cut")
    a, b = (load_file(e / "training_states/8.state", "") for e in (whole, resumed))
    assert same(a, b) and a["amp"]["scaler"]["scale"] > 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_networks_train_and_save_ordinary_files(photographs, train):
    from torch._dynamo.utils import counters

    from tlw_basicsr.files import load_file

    counters.clear()
    opt = tiny_options(photographs, train__use_compile=True, train__total_iter=12, datasets__val=..., val=...)
    opt["train"]["tlw"] |= {"k_unit": "iter"}  # another k in every iteration
    experiment = train(opt)
    assert len({line["k"] for line in log_lines(experiment)}) == 12
    assert counters["stats"]["unique_graphs"] <= 6  # of θ, and of φ with and without gradient; not one for every k
    names = load_file(experiment / "models/net_g_latest.pth", "")["params"]
    assert all("_orig_mod" not in name for name in names)


def test_wrong_values_are_refused(photographs, tmp_path, train):
    for place, value in (("train__tlw__preset", "quick"), ("train__use_amp", "half"), ("train__tlw__use_amp", "fp16")):
        with pytest.raises(UserError, match=place.replace("__", ".")):
            train(tiny_options(photographs, **{place: value}))
