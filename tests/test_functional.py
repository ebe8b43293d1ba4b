"""Each equation against a plain formulation of its own, written here with loops and float64."""

import math
import re
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.conftest import DEVICE
from tlw_basicsr import (
    DistanceTo,
    error_weights,
    fixed_sum,
    k_schedule,
    marginal_pixel_loss,
    relaxed_bernoulli,
    sample_weights,
    uncertainty_driven_loss,
    uncertainty_loss,
    weight_criterion_loss,
    weighted_pixel_loss,
)

KS = st.floats(0.01, 0.99)
MAPS = arrays(np.float32, (1, 2, 5, 7), elements=st.floats(0, 1, width=32))


def squared_distance(a, b):
    return (a - b).square().flatten(1).mean(1)


def images(n=2, size=6, seed=0, dtype=torch.float64):  # drawn on the CPU, so that they are the same everywhere
    g = torch.Generator().manual_seed(seed)
    sr, gt = (torch.rand(n, 3, size, size, generator=g, dtype=dtype) for _ in range(2))
    return tuple(t.to(DEVICE) for t in (sr, gt, torch.rand(n, 3, size, size, generator=g, dtype=dtype)))


def plain_fixed_sum(z, k):
    out = np.array(z, dtype=np.float64)
    n, c, h, w = out.shape
    for i in range(n):
        for j in range(c):
            s, t = out[i, j].sum(), k * h * w
            alpha = max((t - s) / (h * w - s), 0) if s < h * w else 0
            beta = max((s - t) / s, 0) if s > 0 else 0
            out[i, j] = out[i, j] + alpha * (1 - out[i, j]) - beta * out[i, j]
    return out


@given(MAPS, KS)
def test_fixed_sum_is_the_formula_has_mean_k_and_keeps_the_order(z, k):
    out = fixed_sum(torch.from_numpy(z), k)
    np.testing.assert_allclose(out.cpu().numpy(), plain_fixed_sum(z, k), atol=2e-6)
    assert torch.allclose(out.mean((2, 3)), torch.tensor(k), atol=2e-6)
    assert out.min() >= 0 and out.max() <= 1
    for before, after in zip(z.reshape(2, -1), out.reshape(2, -1).cpu().numpy(), strict=True):
        assert (np.diff(after[np.argsort(before, kind="stable")]) >= -1e-6).all()
    assert torch.allclose(fixed_sum(out, k), out, atol=2e-6)


def test_fixed_sum_of_constants_and_of_large_images_near_one():
    for value, k in product((0.0, 1.0, 0.5, 1e-30, 1 - 2**-24), (1e-6, 0.3, 1 - 1e-6)):
        z = torch.full((1, 1, 8, 8), value, requires_grad=True)
        out = fixed_sum(z, k)
        assert torch.allclose(out, torch.full_like(out, k), atol=1e-6)
        (out * torch.rand_like(out)).sum().backward()
        assert torch.isfinite(z.grad).all()
    z = 1 - 1e-4 * torch.rand(1, 1, 512, 512)
    assert abs(fixed_sum(z, 0.99999).mean(dtype=torch.float64).item() - 0.99999) < 1e-6


@given(arrays(np.float32, (2, 2, 2, 5, 7), elements=st.floats(-1, 1, width=32)), KS)
def test_error_weights_are_the_formula(pair, k):
    sr, gt = pair.astype(np.float64)
    error = abs(sr - gt)
    largest = error.max((2, 3), keepdims=True)
    relative = np.divide(error, largest, out=np.zeros_like(error), where=largest > 0)
    w = error_weights(torch.from_numpy(sr), torch.from_numpy(gt), k)
    np.testing.assert_allclose(w.cpu().numpy(), plain_fixed_sum(relative, k), atol=1e-6)
    # the images' range does not matter; a shift may round a tiny error away, so it is only scaled here
    assert torch.allclose(error_weights(torch.from_numpy(sr) / 2, torch.from_numpy(gt) / 2, k), w, atol=1e-6)
    leaf, half = torch.from_numpy(sr).requires_grad_(), torch.from_numpy(sr).half()
    assert not error_weights(leaf, torch.from_numpy(gt), k).requires_grad
    assert torch.allclose(error_weights(half, half, k), torch.tensor(k), atol=1e-6)  # without an error


def test_what_is_outside_its_range_is_refused():
    sr, gt, w = images()
    for k in (0, 1, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="k must be in"):
            fixed_sum(w, k)
    with pytest.raises(ValueError, match="temperature"):
        relaxed_bernoulli(w, temperature=0)
    with pytest.raises(ValueError, match="l1, mse"):
        weighted_pixel_loss(sr, gt, w, "l2")


def test_equations_are_float32_under_autocast():
    sr, gt, w = images(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        low = marginal_pixel_loss(squared_distance, sr.bfloat16(), gt, w[None])
        full = marginal_pixel_loss(squared_distance, sr.bfloat16().float(), gt, w[None])
        out = fixed_sum(w.bfloat16(), 0.7)
    assert low.dtype == out.dtype == torch.float32
    assert torch.equal(low, full)
    assert abs(out.mean().item() - 0.7) < 1e-6


@given(
    arrays(np.float64, 8, elements=st.floats(0, 1)), arrays(np.float64, 8, elements=st.floats(0, 1, exclude_max=True))
)
def test_relaxed_bernoulli_is_the_formula(p, u):
    ours = relaxed_bernoulli(torch.from_numpy(p), torch.from_numpy(u)).cpu().numpy()
    p, u = 0.999 * p + 0.0005, 0.999 * u + 0.0005
    z = 10 * (np.log(p / (1 - p)) + np.log(u / (1 - u)))
    np.testing.assert_allclose(ours, 1 / (1 + np.exp(-z)), rtol=1e-9, atol=1e-12)


def test_relaxed_bernoulli_is_one_as_often_as_p_says():
    for p in (0.1, 0.5, 0.9):
        b = relaxed_bernoulli(torch.full((200_000,), p))
        assert abs((b > 0.5).float().mean().item() - p) < 0.005
        assert ((b < 0.01) | (b > 0.99)).float().mean() > 0.75  # a temperature of 0.1 is nearly binary


def test_relaxed_bernoulli_is_finite_at_the_ends():
    p = torch.tensor([0.0, 0.0, 1.0, 1.0], requires_grad=True)
    b = relaxed_bernoulli(p, torch.tensor([0.0, 1 - 2**-24, 0.0, 1 - 2**-24]))
    b.sum().backward()
    assert torch.isfinite(b).all() and torch.isfinite(p.grad).all()


def test_sample_weights_draws_independent_samples_of_the_same_map():
    w = torch.rand(2, 3, 8, 8)
    ws, noise = sample_weights(w, 4), torch.full_like(w, 0.3)
    assert ws.shape == (4, 2, 3, 8, 8) and not torch.equal(ws[0], ws[1])
    assert torch.equal(sample_weights(w, 1, noise=noise[None])[0], relaxed_bernoulli(w, noise))


@pytest.mark.parametrize("eps", [1e-3, 0.0])
def test_weight_criterion_loss_is_the_formula(eps):
    sr, gt, w = images()
    total = 0.0
    for n in range(2):
        x, y, v = gt[n].cpu().numpy(), sr[n].cpu().numpy(), w[n].cpu().numpy()  # D is of images in [0, 1]
        d_w = np.mean((v * x + (1 - v) * y - x) ** 2)
        d_1w = np.mean(((1 - v) * x + v * y - x) ** 2)
        total += (math.log(d_w + eps) - math.log(d_1w + eps)) / 2
    assert weight_criterion_loss(squared_distance, sr, gt, w, eps).item() == pytest.approx(total, rel=1e-9)


def test_the_e_step_gives_the_image_no_gradient_and_the_m_step_the_weights_none():
    sr, gt, w = images()
    sr.requires_grad_()
    w.requires_grad_()
    weight_criterion_loss(squared_distance, sr, gt, w).backward()
    assert sr.grad is None and w.grad.abs().sum() > 0
    w.grad = None
    weighted_pixel_loss(sr, gt, w).backward()
    marginal_pixel_loss(squared_distance, sr, gt, w[None]).backward()
    assert w.grad is None


@pytest.mark.parametrize("base", ["l1", "mse"])
def test_weighted_pixel_loss_is_the_formula(base):
    sr, gt, w = images()
    error = 2 * (sr - gt).abs().cpu().numpy()
    pixel = error if base == "l1" else error**2 / (error + 0.1)
    expected = np.mean(w.cpu().numpy() * pixel)
    assert weighted_pixel_loss(sr, gt, w, base).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("base", ["l1", "mse"])
@pytest.mark.parametrize("importance", [True, False])
def test_marginal_pixel_loss_is_the_formula(base, importance):
    sr, gt, _ = images()
    ws = torch.rand(3, 2, 3, 6, 6, dtype=torch.float64, device=DEVICE)
    total = 0.0
    for n in range(2):
        x, y = gt[n].cpu().numpy(), sr[n].cpu().numpy()
        above = below = 0.0
        for s in range(3):
            v = ws[s, n].cpu().numpy()
            r = np.mean(((1 - v) * x + v * y - x) ** 2) / (np.mean((v * x + (1 - v) * y - x) ** 2) + 1e-3)
            r = r if importance else 1.0
            error = np.abs((2 * y - 1) - (2 * x - 1))
            e = np.mean(v * (error if base == "l1" else error**2 / (error + 0.2)))
            above += r * math.exp(-e)
            below += r
        total -= math.log(above / below) / 2
    ours = marginal_pixel_loss(squared_distance if importance else None, sr, gt, ws, base)
    assert ours.item() == pytest.approx(total, rel=1e-9)


def test_marginal_pixel_loss_holds_for_errors_of_any_size():
    sr, gt, _ = images()
    ws = torch.rand(3, 2, 3, 6, 6, dtype=torch.float64, device=DEVICE)
    loss = marginal_pixel_loss(None, sr * 1e4, gt, ws)
    e = torch.stack([(w * 2 * (sr * 1e4 - gt).abs()).mean((1, 2, 3)) for w in ws])
    assert loss.item() == pytest.approx((e.min(0).values + math.log(3)).mean().item(), rel=1e-3)


def test_gradients_in_double():
    sr, gt, w = images(n=2, size=3)
    ws = torch.rand(3, 2, 3, 3, 3, dtype=torch.float64, device=DEVICE)
    leaf = w.clone().requires_grad_()
    noise = torch.rand_like(w)
    assert torch.autograd.gradcheck(lambda z: fixed_sum(z, 0.3), leaf)
    assert torch.autograd.gradcheck(lambda z: fixed_sum(z, 0.8), leaf)
    assert torch.autograd.gradcheck(lambda z: relaxed_bernoulli(z, noise), leaf)
    assert torch.autograd.gradcheck(lambda z: weight_criterion_loss(squared_distance, sr, gt, z), leaf)
    y = sr.clone().requires_grad_()  # not of the mse, which holds a stop-gradient that finite differences do not see
    assert torch.autograd.gradcheck(lambda z: weighted_pixel_loss(z, gt, w), y)
    assert torch.autograd.gradcheck(lambda z: marginal_pixel_loss(None, z, gt, ws), y)


def test_gradient_of_the_mse_takes_its_divisor_as_constant():
    sr, gt, w = images()
    sr.requires_grad_()
    weighted_pixel_loss(sr, gt, w, "mse").backward()
    error = 2 * (sr - gt).detach()
    expected = 2 * w * 2 * error / (error.abs() + 0.1) / error.numel()
    assert torch.allclose(sr.grad, expected)


@pytest.mark.parametrize("base", ["l1", "mse"])
def test_losses_and_gradients_are_finite_at_the_ends(base):
    gt = torch.full((2, 3, 8, 8), 0.25)
    for stochastic, w_value, error in product((True, False), (0.0, 0.5, 1.0), (0.0, 0.5)):
        sr, w = (gt - error).requires_grad_(), torch.full_like(gt, w_value).requires_grad_()
        l_w = weight_criterion_loss(squared_distance, sr, gt, w, 1e-3 if stochastic else 0.0)
        loss = weighted_pixel_loss(sr, gt, w, base)
        if stochastic:
            loss = marginal_pixel_loss(squared_distance, sr, gt, w.detach().expand(3, *w.shape), base)
        (l_w + loss).backward()
        assert torch.isfinite(l_w + loss)
        assert torch.isfinite(sr.grad).all() and torch.isfinite(w.grad).all()


@pytest.mark.parametrize(
    "equation",
    [
        lambda sr, gt, w: weight_criterion_loss(squared_distance, sr, gt, w),
        lambda sr, gt, w: weighted_pixel_loss(sr, gt, w),
        lambda sr, gt, w: marginal_pixel_loss(None, sr, gt, w[None]),
        lambda sr, gt, w: marginal_pixel_loss(squared_distance, sr, gt, w[None], "mse"),
        lambda sr, gt, w: uncertainty_loss(sr, gt, w),
        lambda sr, gt, w: uncertainty_driven_loss(sr, gt, w),
    ],
)
def test_images_in_another_range_or_of_other_shapes_are_refused(equation):
    sr, gt, w = images()
    assert torch.isfinite(equation(3 * sr - 1, gt, w))  # an SR image may be anything
    assert torch.isfinite(equation(sr, gt + 0.009, w)) and gt.max() > 0.97 > 0.03 > gt.min()
    for wrong in (2 * gt - 1, 255 * gt, gt + 0.05, gt - 0.05):
        with pytest.raises(ValueError, match=r"gt must be an image in \[0, 1\], got values from"):
            equation(wrong, wrong, w)
    for shapes in ((sr[:1], gt), (sr[0], gt[0])):
        with pytest.raises(ValueError, match="must both be"):
            equation(*shapes, w)
    for value in (math.nan, math.inf):  # is not reported as a range
        gt[0, 0, 0, 0] = value
        assert not torch.isfinite(weighted_pixel_loss(sr, gt, w))


def test_a_distance_must_give_one_value_per_sample():
    sr, gt, w = images()
    for distance, got in (
        (lambda a, b: (a - b).abs().mean(), "()"),
        (lambda a, b: squared_distance(a, b).mean(0, keepdim=True), "(1,)"),
        (lambda a, b: squared_distance(a, b).view(-1, 1, 1, 1), "(2, 1, 1, 1)"),
        (lambda a, b: squared_distance(a, b).tolist(), "list"),
    ):
        message = f"one value per sample, shape \\(2,\\), got {re.escape(got)}$"
        with pytest.raises(ValueError, match=message):
            weight_criterion_loss(distance, sr, gt, w)
        with pytest.raises(ValueError, match=message):
            marginal_pixel_loss(DistanceTo(distance, gt), sr, gt, w[None])


def test_a_distance_with_its_reference_gets_one_argument():
    sr, gt, w = images()
    fixed = DistanceTo(squared_distance, gt)
    assert torch.equal(weight_criterion_loss(fixed, sr, gt, w), weight_criterion_loss(squared_distance, sr, gt, w))
    ours, expected = (marginal_pixel_loss(d, sr, gt, w[None]) for d in (fixed, squared_distance))
    assert torch.equal(ours, expected)


@settings(max_examples=30)
@given(st.floats(0, 500), st.floats(0.05, 0.95), st.floats(0.05, 0.95), st.floats(1, 1000))
def test_k_schedule_goes_from_start_to_end(t, start, end, decay):
    k = k_schedule(t, start, end, decay)
    assert min(start, end) - 1e-12 <= k <= max(start, end) + 1e-12  # but for rounding
    assert k_schedule(0, start, end, decay) == start
    assert k_schedule(1e9, start, end, decay) == pytest.approx(end)
    assert k_schedule(50) == pytest.approx(0.3 + 0.6 * (1 - math.exp(-0.5)))  # the published one
