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
        scale, shift = (state[f"conv.{norm}.{name}"].view(1, -1, 1, 1) for name in ("weight", "bias"))
        x = torch.relu((x - mean) / (var + 1e-5).sqrt() * scale + shift)
    x = F.conv2d(x, state["conv.9.weight"], state["conv.9.bias"], padding=1)
    return fixed_sum(1 / (1 + torch.exp(-x)), k)


def test_forward_is_the_published_network_of_mean_k(pair):
    net = build_network({"type": "TLWWeightNet", "num_feat": 8, "init": "paper"}).to(pair[0].device)
    state = {name: v.clone() for name, v in net.state_dict().items()}
    for k in (0.4, 0.7):
        assert torch.allclose(net(*pair, k), plain_forward(state, *pair, k), atol=1e-5)
        assert torch.allclose(net(*pair, k).mean((2, 3)), torch.tensor(k), atol=1e-5)


def test_names_and_shapes_are_the_published_ones():
    shapes = {name: tuple(v.shape) for name, v in TLWWeightNet().state_dict().items()}
    weights = [shapes[f"conv.{number}.weight"] for number in (0, 3, 6, 9)]
    assert weights == [(64, 6, 7, 7), (64, 64, 5, 5), (64, 64, 3, 3), (3, 64, 3, 3)]
    assert len(shapes) == 23 and shapes["conv.7.running_var"] == (64,)


def test_a_prior_of_the_error_starts_at_its_weights_and_learns_from_there(pair):
    net = TLWWeightNet(num_feat=4, prior="error")
    assert torch.allclose(net(*pair, 0.5), error_weights(*pair, 0.5), atol=4e-3)  # but for the ends that are cut
    net(*pair, 0.5)[..., :5].sum().backward()
    assert net.conv[-1].weight.grad.abs().sum() > 0
    for options, accepted in (({"prior": "errors"}, "none"), ({"init": "best"}, "paper")):
        with pytest.raises(ValueError, match=accepted):
            TLWWeightNet(**options)


def test_downscale_sees_means_of_squares_and_interpolates_the_logits(pair):
    sr, gt = (image[..., :47, :45] for image in pair)  # both sides leave a rest
    net = TLWWeightNet(num_feat=4, downscale=2)
    plain = TLWWeightNet(num_feat=4)
    plain.load_state_dict(net.state_dict())
    padded = [F.pad(image, (0, 1, 0, 1), mode="replicate") for image in (sr, gt)]
    means = [F.interpolate(image, (24, 23), mode="area") for image in padded]
    logits = F.interpolate(plain.probabilities(*means).logit(), (48, 46), mode="bilinear")[..., :47, :45]
    assert torch.allclose(net(sr, gt, 0.6), fixed_sum(logits.sigmoid(), 0.6), atol=1e-5)
    with pytest.raises(ValueError, match="downscale"):
        TLWWeightNet(downscale=0)


def test_paper_start_values():
    net = TLWWeightNet(num_feat=64, init="paper")
    assert net.conv[3].weight.std().item() == pytest.approx(0.02, rel=0.02)
    norms, biases = (torch.stack([getattr(net.conv[i], n) for i in (1, 4, 7)]) for n in ("weight", "bias"))
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
