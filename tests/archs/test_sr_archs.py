"""The networks of the comparison; VDSR and RCAN are compared with their published forms in test_convert."""

import pytest
import torch
from basicsr.archs import build_network
from basicsr.utils.registry import ARCH_REGISTRY
from torch.nn import functional as F

from tlw_basicsr import TLWHAT, TLWRCAN, UncertaintyHead

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
