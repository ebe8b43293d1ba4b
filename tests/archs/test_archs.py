"""The weighting network, and the networks of the comparison; VDSR and RCAN are compared with their published forms in test_convert."""

import pytest
import torch
from basicsr.archs import build_network
from basicsr.utils.registry import ARCH_REGISTRY
from torch.nn import functional as F

from tlw_basicsr import TLWHAT, TLWRCAN, TLWWeightNet, UncertaintyHead, error_weights, fixed_sum

SMALL_HAT = {"embed_dim": 12, "depths": [2], "num_heads": [2], "squeeze_factor": 6, "num_feat": 8}


def conv(state, name, x):
    return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding="same")


@pytest.mark.parametrize("size", [(8, 8), (14, 21), (9, 30)])
def test_hat_takes_any_size(size):
    net = TLWHAT(**SMALL_HAT).eval()
    lq = torch.rand(1, 3, *size)
    h, w = size
    padded = F.pad(lq, (0, -w % 7, 0, -h % 7), mode="reflect")
    with torch.no_grad():
        sr = net(lq)
        assert sr.shape == (1, 3, 4 * h, 4 * w)
        torch.testing.assert_close(sr, net(padded)[..., : 4 * h, : 4 * w])


def test_hat_sees_minus_one_to_one():
    """With its last convolution at 0 the network gives the mean back; a mean of its own shifts input and output."""
    net = TLWHAT(**SMALL_HAT, rgb_mean=[0.1, 0.5, 0.9]).eval()
    seen = []
    net.conv_first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    torch.nn.init.zeros_(net.conv_last.weight)
    torch.nn.init.zeros_(net.conv_last.bias)
    lq, mean = torch.rand(1, 3, 14, 14), torch.tensor([0.1, 0.5, 0.9]).view(1, 3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(net(lq), mean.expand(1, 3, 56, 56))
    torch.testing.assert_close(seen[0], 2 * (lq - mean))


@pytest.mark.parametrize("name", ["TLWVDSR", "TLWRCAN", "TLWHAT"])
def test_basicsr_builds_them_by_name_and_the_smallest_image_passes(name):
    net = build_network({"type": name, "upscale": 2, **(SMALL_HAT if name == "TLWHAT" else {"num_feat": 16})}).eval()
    with torch.no_grad():
        assert net(torch.rand(1, 3, 8, 8)).shape == (1, 3, 16, 16)
    # names leave room for BasicSR's own and for the HAT plugin's: a second registration would stop the program
    assert "HAT" not in ARCH_REGISTRY and ARCH_REGISTRY.get("RCAN") is not TLWRCAN


def test_the_head_of_the_uncertainty_baseline():
    head = UncertaintyHead(num_in_ch=8, num_feat=4, upscale=3)
    state = head.state_dict()
    features = torch.rand(2, 8, 5, 6)
    x = features.repeat_interleave(3, dim=2).repeat_interleave(3, dim=3)
    for i in (1, 3, 5):
        x = conv(state, f"body.{i}", F.elu(x) if i > 1 else x)
    torch.testing.assert_close(head(features), x)


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
