"""The TLW object in loops of one's own, against the equations and the published call pattern, written out here."""

import copy
import io
import math
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from tests.conftest import DEVICE, ROOT, tiny_options
from tests.helpers import batch, built, load_script, real_pairs, refused, run_python, same
from tlw_basicsr import (
    TLW,
    LPIPSDistance,
    SSIMDistance,
    TLWLoss,
    TLWWeightNet,
    error_weights,
    fixed_sum,
    k_schedule,
    marginal_pixel_loss,
    sample_weights,
    weight_criterion_loss,
    weighted_pixel_loss,
)
from tlw_basicsr.core.tlw import PRESETS

WITHOUT_EFFECT = ("conv.0.bias", "conv.3.bias", "conv.6.bias")  # a batch norm follows: their gradients are rounding


class Net(nn.Conv2d):
    """A network with a few parameters, whose output starts at its input."""

    def __init__(self):
        super().__init__(3, 3, 5, padding=2)
        nn.init.dirac_(self.weight)
        nn.init.zeros_(self.bias)


class CountingDistance(LPIPSDistance):
    """Counts the images whose features it computes."""

    passes = 0

    def features(self, x):
        self.passes += len(x)
        return super().features(x)


def make_tlw(distance=None, num_feat=4, **options):
    """The object on a light distance and a small weighting network, the same every time."""
    torch.manual_seed(0)
    return TLW(distance or SSIMDistance(5), net_w=TLWWeightNet(num_feat=num_feat), **options).to(DEVICE)


# on a GPU the gradient of SSIM's reflected borders is summed in any order
same_bits = pytest.mark.skipif(DEVICE.type != "cpu", reason="bits of two trainings are compared on a CPU")


def copy_numbers(net):
    return copy.deepcopy(net.state_dict())


def are_same(net, numbers):
    return same(net.state_dict(), numbers)


def train_by_hand(tlw, steps, pair, first=0):
    """The losses of a loop of one's own."""
    sr, gt = pair
    net = Net().to(DEVICE)
    adam = torch.optim.Adam(net.parameters(), 1e-3)
    losses = []
    for step in range(first, first + steps):
        torch.manual_seed(step)
        loss = tlw(net(sr), gt, t=step)
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    return losses


def test_the_e_step_moves_phi_alone_and_the_loss_gives_theta_alone_a_gradient(pair):
    tlw, net = make_tlw(), Net().to(DEVICE)
    phi, theta = copy_numbers(tlw.net_w), copy_numbers(net)
    sr = net(pair[0])
    loss = tlw(sr, pair[1])
    assert not are_same(tlw.net_w, phi) and are_same(net, theta) and net.weight.grad is None
    tlw.net_w.zero_grad()
    loss.backward()
    assert net.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in tlw.net_w.parameters())
    assert all(not p.requires_grad for p in tlw.distance.parameters())


@pytest.mark.parametrize("base", ["l1", "mse"])
@pytest.mark.parametrize("stochastic", [True, False])
def test_both_steps_are_the_equations(pair, base, stochastic):
    sr, gt = (image.double() for image in pair)  # Adam's first step is a sign: in fp32 rounding decides some of them
    tlw = make_tlw(base=base, stochastic=stochastic, loss_weight=2.0, k_decay=4).double()
    net_w, k = copy.deepcopy(tlw.net_w), k_schedule(3, k_decay=4)
    adam = torch.optim.Adam(net_w.parameters(), 1e-4, (0.5, 0.999))

    torch.manual_seed(1)
    l_theta = tlw(sr, gt, t=3)

    torch.manual_seed(1)
    w = net_w(sr, gt, k)
    sample, eps = (sample_weights(w, 1)[0], 1e-3) if stochastic else (w, 0)
    l_phi = weight_criterion_loss(SSIMDistance(5), sr, gt, sample, eps)
    l_phi.backward()
    adam.step()
    w = net_w(sr, gt, k).detach()
    if stochastic:
        expected = marginal_pixel_loss(SSIMDistance(5), sr, gt, sample_weights(w, 3), base)
    else:
        expected = weighted_pixel_loss(sr, gt, w, base)
    assert tlw.log["l_w"].item() == pytest.approx(l_phi.item(), rel=1e-9)
    assert l_theta.item() == pytest.approx(2 * expected.item(), rel=1e-9)
    for (name, ours), theirs in zip(tlw.net_w.named_parameters(), net_w.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-9) or name in WITHOUT_EFFECT


@pytest.mark.parametrize("chunk", [None, 2])
def test_exact_is_the_published_iteration(chunk):
    lq, gt = real_pairs()
    distance = LPIPSDistance("vgg", weights="random")
    nets = [(Net(), TLWWeightNet(num_feat=8)) for _ in range(2)]
    for theirs, ours in zip(*nets, strict=True):
        ours.load_state_dict(theirs.state_dict())
    torch.manual_seed(4)
    expected = load_script("benchmark_speed").published(*nets[0], distance, lq, gt, 0.3, lambda: None)
    expected[1].backward()

    net_g, net_w = nets[1]
    # an optimiser that keeps φ and its gradients, which are compared
    tlw = TLW(distance, net_w=net_w, optimizer=lambda p: torch.optim.SGD(p, 0.0), distance_chunk=chunk)
    torch.manual_seed(4)
    loss = tlw(net_g(lq), gt, t=0)
    loss.backward()
    assert tlw.log["l_w"].item() == pytest.approx(expected[0].item(), rel=1e-5)
    assert loss.item() == pytest.approx(expected[1].item(), rel=1e-5)
    for theirs, ours in zip(nets[0], nets[1], strict=True):
        for (name, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
            difference = (a.grad - b.grad).norm() / a.grad.norm().clamp_min(1e-12)
            assert difference < 1e-4 or name in WITHOUT_EFFECT, (name, difference)
            if name.endswith("weight"):
                assert difference < 2e-5, (name, difference)


def test_features_of_gt_are_computed_once_an_iteration(pair):
    tlw = make_tlw(CountingDistance("squeeze", weights="random"))
    tlw(*pair)
    n = len(pair[1])
    assert tlw.distance.passes == n * (1 + 2 + 2 * 3)  # x; x_w and x_{1-w} of the E step and of each of S samples
    with torch.no_grad():  # a new x in the same memory has features of its own
        pair[1].copy_(pair[1].flip(-1))
    fresh = make_tlw(CountingDistance("squeeze", weights="random"))
    fresh.load_state_dict(tlw.state_dict())
    losses = []
    for each in (tlw, fresh):
        torch.manual_seed(0)
        losses.append(each(*pair))
    assert torch.equal(*losses)


def test_the_halves_make_the_whole(pair):
    whole, halves, frames = make_tlw(), make_tlw(), make_tlw()
    torch.manual_seed(3)
    loss = whole(*pair, t=2)
    torch.manual_seed(3)
    l_w = halves.e_step(*pair, t=2)
    assert torch.equal(halves.m_loss(*pair, t=2), loss)
    assert torch.equal(l_w, whole.log["l_w"]) and are_same(halves.net_w, copy_numbers(whole.net_w))
    torch.manual_seed(3)  # frames of a video are samples
    assert torch.equal(frames(*(image[None] for image in pair), t=2), loss)
    assert torch.equal(frames.log["w"], whole.log["w"])


def test_without_t_the_calls_are_counted(pair):
    tlw = make_tlw(k_decay=2)
    for t in range(3):
        tlw(*pair)
        assert tlw.log["w"].mean().item() == pytest.approx(k_schedule(t, k_decay=2), abs=1e-5)


def test_weights_learn_to_raise_the_criterion(pair):
    """At one x̂ WC rises well above that of the constant map, whose gain is 1 for any k."""
    sr, gt = pair
    tlw = make_tlw(num_feat=8, optimizer=lambda p: torch.optim.Adam(p, 1e-2), k_start=0.5, k_end=0.5)
    gains = []
    for _ in range(80):
        tlw(sr, gt)
        summary = tlw.summarize()
        gains.append(summary["wc_gain"].item())
        assert summary["wc"].item() == pytest.approx(math.exp(-tlw.log["l_w"].item()), rel=1e-5)
    assert sum(gains[:5]) / 5 < 1.3
    assert sum(gains[-5:]) / 5 > 2


def test_the_gain_of_constant_weights_is_one_at_every_k(pair):
    for k in (0.3, 0.85):
        tlw = make_tlw(k_start=k, k_end=k, optimizer=lambda p: torch.optim.SGD(p, 0.0))
        nn.init.zeros_(tlw.net_w.conv[-1].weight)
        tlw(*pair)
        summary = tlw.summarize()
        assert summary["wc_gain"].item() == pytest.approx(1, abs=1e-4)
        assert summary["w_std"] < 1e-5 and summary["w_mean"].item() == pytest.approx(k, abs=1e-5)
        assert (summary["wc"] > 1) == (k > 0.5)  # which says nothing of what was learned


@pytest.mark.parametrize(
    ("interval", "iterations", "stepped"),
    [
        (3, [None] * 7, [0, 0, 0, 3, 3, 3, 6]),
        (4, [3, 5, 7, 9, 11], [3, 3, 7, 7, 11]),  # a loop that skips iterations, as a GAN whose generator waits
    ],
)
def test_weight_interval_counts_calls_or_the_iterations_that_are_given(pair, interval, iterations, stepped):
    tlw, found = make_tlw(weight_interval=interval), []
    for iteration, last in zip(iterations, stepped, strict=True):
        before, due = copy_numbers(tlw.net_w.conv[0]), last != tlw.last_e_step
        tlw(*pair, iteration=iteration)
        found.append(tlw.last_e_step)
        assert are_same(tlw.net_w.conv[0], before) != due
    assert found == stepped


@pytest.mark.parametrize("options", [{"weight_batch": 2}, {"weight_crop": 24}, {"weight_batch": 1, "weight_crop": 20}])
def test_an_e_step_on_a_part_sees_the_same_places_of_both_images(options):
    count, side, size = 5, options.get("weight_crop", 64), 64
    places = torch.arange(count * size * size, device=DEVICE).view(count, 1, size, size).expand(-1, 3, -1, -1)
    gt = places / places.max()
    seen = []
    tlw = make_tlw(importance=False, **options)
    tlw.net_w.register_forward_pre_hook(lambda _, args: seen.append(args))
    tlw(gt / 2, gt, t=0)
    (part_sr, part_gt, _), (whole_sr, _, _) = seen
    assert part_gt.shape == (options.get("weight_batch", count), 3, side, side) and whole_sr.shape == gt.shape
    assert torch.equal(part_sr, part_gt / 2)
    found = (part_gt * places.max()).round().long()  # each part lies at one place of one image
    assert torch.equal(found - found[..., :1, :1], places[:1, :, :side, :side].expand_as(found))


def test_parts_are_drawn_anew_and_a_whole_draws_nothing():
    sr, gt = real_pairs()
    seen, losses = set(), set()
    for seed in range(12):
        tlw = make_tlw(weight_batch=1, weight_crop=32, importance=False)
        tlw.net_w.register_forward_pre_hook(lambda _, args: seen.add(args[1].sum().item()))
        torch.manual_seed(seed)
        tlw.e_step(sr, gt, 0)
    for options in ({}, {"weight_batch": 5, "weight_crop": 64}, {"weight_batch": 99, "weight_crop": 99}):
        tlw = make_tlw(**options)
        torch.manual_seed(1)
        losses.add(tlw(sr, gt, 0).item())
    assert len(seen) > 8 and len(losses) == 1


def test_an_e_step_draws_every_sample_and_reaches_every_edge():
    count, size, side = 3, 12, 8
    gt = torch.linspace(0, 1, count * size * size).view(count, 1, size, size).expand(-1, 3, -1, -1)
    corners = set()
    tlw = make_tlw(SSIMDistance(3), weight_batch=1, weight_crop=side, importance=False)
    tlw.net_w.register_forward_pre_hook(lambda _, args: corners.add(round(args[1][0, 0, 0, 0].item() * 431)))
    for _ in range(150):
        tlw.e_step(gt / 2, gt, 0)
    samples, tops, lefts = (
        set(each) for each in zip(*((c // 144, c % 144 // 12, c % 12) for c in corners), strict=True)
    )
    assert samples == {0, 1, 2} and tops == lefts == set(range(size - side + 1))


@pytest.mark.parametrize("options", [{"importance": True}, {"importance": False, "weight_batch": 1, "weight_crop": 32}])
def test_an_overflow_costs_an_e_step_and_nothing_else(pair, options):
    sr, gt = pair
    tlw = make_tlw(**options)
    tlw(sr, gt, t=0)
    adam, phi, l_w = copy.deepcopy(tlw.optimizer.state_dict()["state"]), copy_numbers(tlw.net_w), tlw.log["l_w"]
    for value in (math.inf, math.nan):
        bad = sr.detach().clone()
        bad[:, :, ::2, ::2] = value
        assert not tlw(bad, gt, t=1).isfinite()
    assert are_same(tlw.net_w, phi) and tlw.log["l_w"] is l_w
    assert all(same(state, adam[n]) for n, state in tlw.optimizer.state_dict()["state"].items())
    assert tlw.summarize()["skipped"] == 2 and tlw.last_e_step == 0
    assert tlw(sr, gt, t=2).isfinite() and tlw.last_e_step == 3 and not are_same(tlw.net_w, phi)
    assert all(value.isfinite() for value in tlw.summarize().values())


def test_a_gradient_that_overflows_costs_an_e_step_too(pair):
    tlw = make_tlw()
    phi = copy_numbers(tlw.net_w)
    tlw.net_w.conv[0].bias.register_hook(lambda gradient: gradient + math.inf)
    assert tlw.e_step(*pair, 0).isfinite()
    assert are_same(tlw.net_w, phi) and tlw.skipped == 1 and not tlw.optimizer.state


def test_an_overflow_leaves_a_buffer_alone_that_phi_replaces_in_each_forward(pair):
    """As ``self.mean = 0.9 * self.mean + …`` does."""

    class Centred(TLWWeightNet):
        def __init__(self):
            super().__init__(num_feat=4)
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, sr, gt, k):
            self.mean = 0.9 * self.mean + 0.1 * sr.mean()
            return super().forward(sr - self.mean, gt, k)

    sr, gt = pair
    tlw = TLW(SSIMDistance(5), net_w=Centred()).to(DEVICE)
    tlw(sr, gt, t=0)
    before = tlw.net_w.mean.clone()
    tlw(sr * math.inf, gt, t=1)
    assert tlw.skipped == 1 and torch.equal(tlw.net_w.mean, before) and before > 0
    assert tlw(sr, gt, t=2).isfinite() and not torch.equal(tlw.net_w.mean, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("preset", ["exact", "economy"])
def test_images_of_any_precision_are_taken_in_that_of_phi(pair, dtype, preset):
    images = [image.detach().to(dtype) for image in pair]
    losses = []
    for sr, gt in (images, [image.float() for image in images]):
        torch.manual_seed(0)
        tlw = TLW.from_preset(preset, SSIMDistance(5), net_w=TLWWeightNet(num_feat=4)).to(DEVICE)
        sr.requires_grad_()
        losses.append(tlw(sr, gt, t=0))
        losses[-1].backward()
        assert sr.grad.dtype == sr.dtype and sr.grad.abs().sum() > 0
    assert losses[0].item() == losses[1].item()
    tlw.to(dtype)  # half precision is left to autocast
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {t.dtype for t in tlw.state_dict().values() if torch.is_tensor(t) and t.is_floating_point()} == {expected}
    assert tlw.weights(*images).dtype == expected and tlw(*images, t=9).isfinite()


def test_a_batch_of_no_image_is_named():
    with pytest.raises(ValueError, match=r"got \(0, 3, 8, 8\) and \(0, 3, 8, 8\)"):
        TLW(SSIMDistance(5))(torch.rand(0, 3, 8, 8), torch.rand(0, 3, 8, 8))


def test_without_gradients_there_is_no_e_step(pair):
    for preset in ("exact", "economy"):
        tlw = TLW.from_preset(preset, SSIMDistance(5), net_w=TLWWeightNet(num_feat=4)).to(DEVICE)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert tlw(pair[0] * 1, pair[1] * 1, t=0).isfinite()
        assert tlw.last_e_step is None and tlw(*pair, t=1).isfinite() and tlw.last_e_step is not None


def test_under_fp16_autocast_phi_stays_in_float32(pair):
    tlw, kinds = make_tlw(), set()
    tlw.net_w.conv[0].register_forward_hook(lambda _, args, out: kinds.add(out.dtype))
    with torch.autocast(DEVICE.type, torch.float16):
        tlw(*pair, t=0)
    assert kinds == {torch.float32}


@pytest.mark.parametrize("base", ["l1", "mse"])
def test_without_importance_the_gradient_keeps_its_direction(base):
    """Cosine of at least 0.999 over photographs, for the same noise; other noise changes it far more."""
    sr, gt = real_pairs()
    distance = LPIPSDistance("vgg", weights="random")
    w = fixed_sum(nn.functional.avg_pool2d((sr - gt).abs(), 5, 1, 2).clamp(0, 1), 0.5)

    class Fixed(nn.Linear):  # with parameters for the optimiser
        def forward(self, *_):
            return w

    def gradient(importance, seed):
        tlw = TLW(distance, net_w=Fixed(1, 1), importance=importance, base=base)
        torch.manual_seed(seed)
        leaf = sr.clone().requires_grad_()
        tlw.m_loss(leaf, gt).backward()
        return leaf.grad.flatten()

    exact = gradient(True, 1)
    cosine = nn.functional.cosine_similarity
    assert torch.isfinite(make_tlw(nn.Identity(), importance=False).m_loss(sr, gt))  # the M step needs no distance
    assert cosine(exact, gradient(False, 1), dim=0) >= 0.999
    assert cosine(exact, gradient(True, 2), dim=0) < 0.99


def test_presets_are_their_arguments_and_changes_go_before_them():
    distance = SSIMDistance(5)
    for name, values in PRESETS.items():
        tlw = TLW.from_preset(name, distance)
        assert all(getattr(tlw, key) == value for key, value in values.items())
    assert TLW.from_preset("fast", distance, importance=True).importance
    economy = TLW.from_preset("economy", distance)
    assert not economy.importance and not TLW.from_preset("fast", distance).importance
    assert economy.net_w.conv[0].out_channels == 16 and economy.optimizer.param_groups[0]["lr"] == 1e-3
    assert TLW.from_preset("economy", distance, net_w=TLWWeightNet(num_feat=4)).net_w.conv[0].out_channels == 4
    with pytest.raises(ValueError, match="exact, fast, economy, paper"):
        TLW.from_preset("cheap", distance)


@pytest.mark.parametrize("base", ["l1", "mse"])
def test_controls_are_the_equations_without_a_distance(pair, base, monkeypatch):
    monkeypatch.setattr(LPIPSDistance, "__init__", lambda *_: pytest.fail("a control built a distance"))
    sr, gt = pair[0].clone().requires_grad_(), pair[1]
    k = k_schedule(40)
    random = TLW(base=base, weights="random", num_samples=4, loss_weight=2.0)
    torch.manual_seed(1)
    value = random(sr, gt, t=40)
    torch.manual_seed(1)
    expected = 2 * marginal_pixel_loss(None, sr, gt, sample_weights(torch.full_like(gt, k), 4), base)
    assert value.item() == expected.item()
    error = TLW(base=base, weights="error")
    value = error(sr, gt, t=40)
    assert value.item() == weighted_pixel_loss(sr, gt, error_weights(sr, gt, k), base).item()
    value.backward()
    assert torch.isfinite(sr.grad).all() and sr.grad.abs().sum() > 0
    for tlw in (random, error):
        assert tlw.distance is None and tlw.net_w is None and not list(tlw.parameters())
        assert set(tlw.summarize()) == {"w_mean", "w_std"}
        with pytest.raises(ValueError, match="no E step"):
            tlw.e_step(sr, gt)


@same_bits
def test_a_state_a_copy_and_a_pickle_go_on_with_the_same_bits_and_apart(pair):
    tlw, loaded = make_tlw(weight_interval=2), make_tlw(weight_interval=2)
    train_by_hand(tlw, 3, pair)
    tlw.e_step(*pair)  # what it holds for the M step is no part of a copy
    file = io.BytesIO()
    torch.save(tlw.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert (loaded.calls, loaded.last_e_step) == (tlw.calls, tlw.last_e_step) and tlw.calls >= 3
    ends = []
    for each in (tlw, loaded, copy.deepcopy(tlw), pickle.loads(pickle.dumps(tlw))):
        ends.append((train_by_hand(each, 3, pair, first=3), copy_numbers(each.net_w)))
        assert {id(p) for p in each.net_w.parameters()} == {id(p) for p in each.optimizer.param_groups[0]["params"]}
    assert all(same(end, ends[0]) for end in ends)


def test_in_a_larger_module_it_saves_loads_and_moves_with_it(pair):
    class Task(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.tlw = Net(), make_tlw(LPIPSDistance("squeeze", weights="random"))

    task, other = Task(), Task()
    task.tlw(*pair)
    state = task.state_dict()
    assert not any("distance" in name for name in state)
    other.load_state_dict(state)
    assert other.tlw.calls == 1 and are_same(other.tlw.net_w, copy_numbers(task.tlw.net_w))
    assert len(list(task.tlw.parameters())) == len(list(task.tlw.net_w.parameters()))
    tlw = task.to(torch.float64).tlw
    moments = [v for state in tlw.optimizer.state.values() for name, v in state.items() if name != "step"]
    assert moments and all(t.dtype == torch.float64 for t in [*tlw.parameters(), *tlw.distance.parameters(), *moments])
    tlw(*(image.double() for image in pair))


def test_looking_at_weights_changes_nothing_and_in_eval_mode_nothing_learns(pair):
    tlw = make_tlw()
    tlw(*pair)
    before, random = copy_numbers(tlw.net_w), torch.get_rng_state()
    w = tlw.weights(*pair, t=0)
    assert w.shape == pair[0].shape and w.mean().item() == pytest.approx(0.3, abs=1e-5)
    tlw.summarize()
    assert are_same(tlw.net_w, before) and torch.equal(random, torch.get_rng_state())
    assert tlw.net_w.training and tlw.net_w.conv[1].training
    assert torch.isfinite(tlw.eval()(*pair)) and tlw.calls == 1 and are_same(tlw.net_w, before)


@pytest.mark.parametrize(("dtype", "own"), [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, False)])
def test_under_autocast_it_trains_nearly_as_without(pair, dtype, own):
    plain, low = make_tlw(), make_tlw(use_amp="bf16" if own else False)
    for t in range(4):
        losses = []
        for tlw, lower in ((plain, False), (low, not own)):
            torch.manual_seed(t)
            with torch.autocast("cpu", dtype, enabled=lower):
                losses.append(tlw(*pair, t=t).item())
        assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in low.net_w.parameters())
    assert low.log["w"].mean().item() == pytest.approx(k_schedule(3), abs=1e-5)  # FixedSum stays in float32


def test_under_a_cached_autocast_the_m_step_sees_the_new_weights(pair):
    tlw = make_tlw(optimizer=lambda p: torch.optim.Adam(p, 0.1))
    with torch.autocast("cpu", torch.bfloat16):
        tlw(*pair, t=0)
        used = tlw.log["w"]
    fresh = make_tlw()
    fresh.net_w.load_state_dict(tlw.net_w.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fresh.net_w(*pair, 0.3), used)


WRONG_ARGUMENTS = [
    ({"base": "l2"}, "base: expected one of l1, mse"),
    ({"num_samples": 0}, "num_samples: expected a whole number of at least 1"),
    ({"k_start": 1.0}, r"k_start: expected a number in \(0, 1\)"),
    ({"weight_interval": 0}, "weight_interval"),
    ({"weight_crop": 1.5}, "weight_crop"),
    ({"use_amp": "fp16"}, "use_amp"),
    ({"distance": "lpips"}, "distance: expected a module"),
    ({"weights": "errors"}, "weights: expected one of learned, random, error"),
    ({"weights": "error", "distance": SSIMDistance()}, "not used with weights='error'"),
    ({"weights": "random", "stochastic": False}, "stochastic must be True"),
]


def test_wrong_images_and_arguments_are_named(pair):
    sr, gt = pair
    tlw = make_tlw()
    for wrong, message in (
        ((2 * sr - 1, 2 * gt - 1), r"gt must be an image in \[0, 1\]"),
        ((sr, 255 * gt), r"in \[0, 1\], got values from 0 to 250"),
        ((sr[..., :-1], gt), r"\(2, 3, 48, 47\) and \(2, 3, 48, 48\)"),
        ((sr[0], gt[0]), r"must both be \(N, C, H, W\) or \(N, T, C, H, W\), got \(3, 48, 48\)"),
    ):
        for call in (tlw, tlw.e_step, tlw.m_loss):
            with pytest.raises(ValueError, match=message):
                call(*wrong)
    with pytest.raises(ValueError, match=r"floating-point images in \[0, 1\], got torch.float32 and torch.uint8"):
        tlw(sr, (255 * gt).byte())
    for number in (1, 4):
        with pytest.raises(ValueError, match=f"num_in_ch is 3, the images have {number} channels"):
            tlw(*(image[:, :1].expand(-1, number, -1, -1) for image in pair))
    with pytest.raises(ValueError, match="must have 3 channels, or 1, got 4"):
        LPIPSDistance(weights="random")(torch.rand(1, 4, 32, 32), torch.rand(1, 4, 32, 32))
    for options, message in WRONG_ARGUMENTS:
        with pytest.raises(ValueError, match=message):
            TLW(**{"distance": None if "weights" in options else SSIMDistance(), **options})


def test_a_yamls_loss_makes_the_object_and_names_what_is_wrong():
    loss = TLWLoss({"type": "SSIMDistance", "kernel_size": 5}, base="mse", num_samples=2)
    tlw = loss.make_tlw(net_w=TLWWeightNet(num_feat=4), weight_interval=2)
    assert (tlw.base, tlw.num_samples, tlw.weight_interval, tlw.distance.kernel_size) == ("mse", 2, 2, 5)
    for options, message in (
        ({"weights": "error", "distance": {"type": "SSIMDistance"}}, "distance is not used"),
        ({"distance": "lpips"}, "distance must be options such as .*, got 'lpips'"),
        ({"distance": {}}, "distance.type: missing"),
    ):
        refused(message, TLWLoss, **options)
    refused("model_type: TLWModel", loss, torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize("preset", ["exact", "economy"])
def test_a_distance_without_a_gradient_is_refused(pair, preset):
    class Measured(nn.Module):
        def forward(self, a, b):
            return (a - b).detach().square().mean((1, 2, 3))

    with pytest.raises(ValueError, match="the distance must be differentiable"):
        TLW.from_preset(preset, Measured())(*(image.cpu() for image in pair))


def test_any_module_that_gives_one_value_per_sample_is_a_distance(pair):
    class Mean(nn.Module):
        def __init__(self, joined):
            super().__init__()
            self.joined = joined

        def forward(self, a, b):
            return (a - b).abs().flatten(1).mean(1) if not self.joined else (a - b).abs().mean().view(1)

    assert torch.isfinite(make_tlw(Mean(joined=False))(*pair))
    for options in ({}, {"distance_chunk": 2}):
        with pytest.raises(ValueError, match="must give one value per sample"):
            make_tlw(Mean(joined=True), **options).m_loss(*(image.repeat(2, 1, 1, 1) for image in pair))


@same_bits
@pytest.mark.parametrize("preset", ["exact", "fast"])
def test_ten_iterations_of_the_model_are_the_objects(photographs, tmp_path, pair, preset):
    """Bit for bit: TLWModel adds nothing to the object but BasicSR."""
    model = built(photographs, tmp_path, train__tlw__preset=preset, train__tlw__k_unit="iter", train__ema_decay=0)
    data = batch(pair)
    net_g, net_w = copy.deepcopy(model.net_g), copy.deepcopy(model.net_w)
    lr = tiny_options(photographs)["train"]["optim_w"]["lr"]
    optimizer = partial(torch.optim.Adam, lr=lr)
    tlw = TLW.from_preset(preset, SSIMDistance(5), net_w=net_w, optimizer=optimizer, k_decay=4)
    adam = torch.optim.Adam(net_g.parameters(), 1e-3)
    for i in range(10):
        torch.manual_seed(i)
        model.feed_data(data)
        model.optimize_parameters(i + 1)
        torch.manual_seed(i)
        loss = tlw(net_g(data["lq"]), data["gt"])
        adam.zero_grad()
        loss.backward()
        adam.step()
        assert loss.item() == model.get_current_log()["l_pix"]
    assert are_same(model.net_g, copy_numbers(net_g)) and are_same(model.net_w, copy_numbers(net_w))


TWO_PROCESSES = """
import torch, torch.distributed as dist
from torch import nn
from tlw_basicsr import TLW, SSIMDistance, TLWWeightNet

torch.set_num_threads(1)
dist.init_process_group("gloo")
torch.manual_seed(dist.get_rank())  # other start values, other noise
class Distance(SSIMDistance):
    factor = 1.0
    def forward(self, sr, gt):
        return self.factor * super().forward(sr, gt)
tlw = TLW(Distance(5), net_w=TLWWeightNet(num_feat=4), importance=False, weight_batch=1, weight_crop=16)
net = nn.parallel.DistributedDataParallel(nn.Conv2d(3, 3, 3, padding=1))
adam = torch.optim.Adam(net.parameters(), 1e-3)
gt = torch.rand(2, 3, 24, 24)
unchanged = []
for step in range(5):
    if step == 3 and dist.get_rank() == 1:
        tlw.distance.factor = float("nan")
    before = [p.detach().clone() for p in tlw.net_w.parameters()]
    loss = tlw(net(nn.functional.avg_pool2d(gt, 3, 1, 1)), gt)
    adam.zero_grad(); loss.backward(); adam.step()
    tlw.distance.factor = 1.0
    unchanged.append(all(map(torch.equal, before, tlw.net_w.parameters())))
assert unchanged == [False, False, False, True, False]  # in both processes
state = [p.detach() for p in [*tlw.net_w.parameters(), *net.parameters()]]
torch.save([state, tlw.log["l_w"]], f"{dist.get_rank()}.pth")
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_of_a_plain_loop_have_the_same_phi(tmp_path):
    (tmp_path / "loop.py").write_text(TWO_PROCESSES)
    run_python(tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "loop.py")
    first, second = (torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in (0, 1))
    assert same(first[0], second[0]) and first[1] != second[1]  # each on its own images


EXAMPLES = {"own_loop.py": "torch", "lightning.py": "lightning", "accelerate_loop.py": "accelerate"}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_run(tmp_path, name):
    pytest.importorskip(EXAMPLES[name])
    done = run_python(tmp_path, ROOT / "examples" / name, "--steps", 6, "--distance", "ssim")
    losses = [float(line.split("loss ")[1].split()[0]) for line in done.stdout.splitlines() if "loss " in line]
    assert losses and all(map(math.isfinite, losses)), done.stdout


class ResizingNet(TLWWeightNet):
    """A weighting network whose only buffer takes the size of the images."""

    def __init__(self):
        super().__init__(num_feat=4)
        for name, part in list(self.named_modules()):
            if isinstance(part, torch.nn.BatchNorm2d):
                self.set_submodule(name, torch.nn.Identity())
        self.register_buffer("grid", torch.zeros(1))

    def forward(self, sr, gt, k):
        self.grid = torch.zeros(sr.shape[-2:])
        return super().forward(sr, gt, k)


def test_a_buffer_may_take_the_size_of_the_images():
    tlw = TLW(SSIMDistance(5), net_w=ResizingNet(), weight_interval=2)
    assert list(dict(tlw.net_w.named_buffers())) == ["grid"]
    for side in (16, 24):  # the second without an E step
        gt = torch.rand(1, 3, side, side)
        assert tlw((gt * 0.9).requires_grad_(), gt).isfinite()
