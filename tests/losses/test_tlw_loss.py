import pytest
import torch
from torch import nn

from tlw_basicsr import (
    LPIPSDistance,
    TLWLoss,
    UserError,
    error_weights,
    marginal_pixel_loss,
    sample_weights,
    weight_criterion_loss,
    weighted_pixel_loss,
)


class Counting(LPIPSDistance):
    """Counts the images whose features it computes."""

    passes = 0

    def features(self, x):
        self.passes += 1
        return super().features(x)


@pytest.fixture(scope="module")
def distance():
    return Counting("squeeze", weights="random")


@pytest.fixture
def w():
    return torch.rand(2, 3, 48, 48)


def on_signed_images(distance):
    """D for the equations, which run on [-1, 1]."""
    return lambda a, b: distance((a + 1) / 2, (b + 1) / 2)


@pytest.mark.parametrize("base", ["l1", "mse"])
def test_stochastic_losses_are_the_equations_on_signed_images(pair, w, distance, base):
    sr, gt = pair
    loss = TLWLoss(distance, base=base, num_samples=3, loss_weight=2.0)
    d = loss.distance_to(gt)
    torch.manual_seed(1)
    l_w = loss.weight_loss(sr, gt, w, d)
    l_sr = loss(sr, gt, w, d)
    torch.manual_seed(1)
    one, ws = sample_weights(w, 1)[0], sample_weights(w, 3)
    plain = on_signed_images(distance)
    assert l_w.item() == pytest.approx(weight_criterion_loss(plain, 2 * sr - 1, 2 * gt - 1, one).item(), rel=1e-5)
    expected = 2 * marginal_pixel_loss(plain, 2 * sr - 1, 2 * gt - 1, ws, base)
    assert l_sr.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("base", ["l1", "mse"])
def test_deterministic_losses_are_the_equations_on_signed_images(pair, w, distance, base):
    sr, gt = pair
    loss = TLWLoss(distance, base=base, stochastic=False)
    plain = on_signed_images(distance)
    l_w = loss.weight_loss(sr, gt, w, loss.distance_to(gt))
    assert l_w.item() == pytest.approx(weight_criterion_loss(plain, 2 * sr - 1, 2 * gt - 1, w, 0).item(), rel=1e-5)
    assert loss(sr, gt, w).item() == weighted_pixel_loss(2 * sr - 1, 2 * gt - 1, w, base).item()


def test_features_of_gt_are_computed_once_an_iteration(pair, w, distance):
    sr, gt = pair
    loss = TLWLoss(distance, num_samples=3)
    distance.passes = 0
    d = loss.distance_to(gt)
    loss.weight_loss(sr, gt, w, d)
    loss(sr, gt, w, d)
    assert distance.passes == 1 + 2 + 2 * 3  # x, then x_w and x_{1-w} of the E step and of each of S samples


def test_any_module_that_gives_one_value_per_sample_is_a_distance(pair, w):
    class Mean(nn.Module):
        def forward(self, a, b):
            return (a - b).abs().flatten(1).mean(1)

    loss = TLWLoss(Mean())
    assert torch.isfinite(loss.weight_loss(*pair, w, loss.distance_to(pair[1])))
    assert torch.isfinite(loss(*pair, w))


def test_gradient_goes_to_the_image_and_not_to_the_distance(pair, w, distance):
    sr = pair[0].clone().requires_grad_()
    w.requires_grad_()
    TLWLoss(distance)(sr, pair[1], w).backward()
    assert sr.grad.abs().sum() > 0
    assert w.grad is None


@pytest.mark.parametrize("base", ["l1", "mse"])
def test_controls_are_the_equations_without_a_distance(pair, base, monkeypatch):
    monkeypatch.setattr(LPIPSDistance, "__init__", lambda *_: pytest.fail("a control built a distance"))
    sr, gt = pair[0].clone().requires_grad_(), pair[1]
    random = TLWLoss(base=base, weights="random", num_samples=4, loss_weight=2.0)
    torch.manual_seed(1)
    value = random(sr, gt, random.control_weights(sr, gt, 0.4))
    torch.manual_seed(1)
    ws = sample_weights(torch.full_like(gt, 0.4), 4)
    expected = 2 * marginal_pixel_loss(None, 2 * sr - 1, 2 * gt - 1, ws, base)
    assert value.item() == expected.item()
    error = TLWLoss(base=base, weights="error")
    w = error.control_weights(sr, gt, 0.4)
    assert torch.equal(w, error_weights(sr, gt, 0.4))
    value = error(sr, gt, w)
    assert value.item() == weighted_pixel_loss(2 * sr - 1, 2 * gt - 1, w, base).item()
    value.backward()
    assert torch.isfinite(sr.grad).all() and sr.grad.abs().sum() > 0
    assert random.distance is None and error.distance is None


def test_wrong_options_are_refused():
    for options, message in (
        ({"weights": "errors"}, "learned, random, error"),
        ({"weights": "error", "distance": {"type": "SSIMDistance"}}, "distance is not used"),
        ({"weights": "random", "stochastic": False}, "stochastic must be true"),
    ):
        with pytest.raises(UserError, match=message):
            TLWLoss(**options)
    with pytest.raises(UserError, match="l1, mse"):
        TLWLoss({"type": "SSIMDistance"}, base="l2")
    with pytest.raises(UserError, match="num_samples"):
        TLWLoss({"type": "SSIMDistance"}, num_samples=0)
