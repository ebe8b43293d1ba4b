import pytest
import torch
from basicsr.archs import build_network
from torch.nn import functional as F

from tlw_basicsr import TLWWeightNet, error_weights, fixed_sum


def plain_forward(state, sr, gt, k):
    """The network by its published names, in train mode."""
    x = torch.cat([gt * 2 - 1, sr * 2 - 1], dim=1)
    for conv, norm, pad in ((0, 1, 3), (3, 4, 2), (6, 7, 1)):
        x = F.conv2d(x, state[f"conv.{conv}.weight"], state[f"conv.{conv}.bias"], padding=pad)
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
        x = (x - mean) / (var + 1e-5).sqrt()
        x = torch.relu(
            x * state[f"conv.{norm}.weight"].view(1, -1, 1, 1) + state[f"conv.{norm}.bias"].view(1, -1, 1, 1)
        )
    x = F.conv2d(x, state["conv.9.weight"], state["conv.9.bias"], padding=1)
    return fixed_sum(1 / (1 + torch.exp(-x)), k)


def test_forward_is_the_published_network(pair):
    net = TLWWeightNet(num_feat=8, init="paper")
    state = {name: v.clone() for name, v in net.state_dict().items()}
    assert torch.allclose(net(*pair, 0.4), plain_forward(state, *pair, 0.4), atol=1e-5)


def test_names_and_shapes_are_the_published_ones():
    shapes = {name: tuple(v.shape) for name, v in TLWWeightNet().state_dict().items()}
    assert len(shapes) == 23
    assert shapes["conv.0.weight"] == (64, 6, 7, 7)
    assert shapes["conv.3.weight"] == (64, 64, 5, 5)
    assert shapes["conv.6.weight"] == (64, 64, 3, 3)
    assert shapes["conv.9.weight"] == (3, 64, 3, 3)
    assert shapes["conv.7.running_var"] == (64,)


def test_the_mean_is_the_k_it_is_called_with(pair):
    net = build_network({"type": "TLWWeightNet", "num_feat": 4})
    for k in (0.3, 0.7):
        assert torch.allclose(net(*pair, k).mean((2, 3)), torch.tensor(k), atol=1e-5)


def test_a_prior_of_the_error_starts_at_its_weights_and_learns_from_there(pair):
    net = TLWWeightNet(num_feat=4, prior="error")
    assert torch.allclose(net(*pair, 0.5), error_weights(*pair, 0.5), atol=4e-3)  # but for the ends that are cut
    net(*pair, 0.5)[..., :5].sum().backward()
    assert net.conv[-1].weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="none"):
        TLWWeightNet(prior="errors")


def test_paper_start_values():
    net = TLWWeightNet(num_feat=64, init="paper")
    assert net.conv[3].weight.std().item() == pytest.approx(0.02, rel=0.02)
    norms = torch.stack([net.conv[i].weight for i in (1, 4, 7)])
    biases = torch.stack([net.conv[i].bias for i in (1, 4, 7)])
    assert norms.std().item() == pytest.approx(0.02, rel=0.2)
    assert norms.mean().abs().item() < 0.01
    assert biases.std().item() == pytest.approx(1.0, rel=0.2)


def test_right_under_autocast(pair):
    net = TLWWeightNet(num_feat=8)
    full = net(*pair, 0.6)
    with torch.autocast("cpu", torch.bfloat16):
        low = net(*pair, 0.6)
    assert low.dtype == torch.float32
    assert torch.allclose(low.mean((2, 3)), torch.tensor(0.6), atol=1e-5)
    assert (low - full).abs().max() < 0.05


def test_an_unknown_init_is_refused():
    with pytest.raises(ValueError, match="paper"):
        TLWWeightNet(init="best")
