"""The distances against plain formulations and the lpips package, and what they refuse."""

import hashlib
import io
from unittest.mock import Mock

import lpips
import numpy as np
import pytest
import torch
from basicsr.metrics.psnr_ssim import calculate_ssim_pt
from torchvision import models as tv

from tlw_basicsr import LPIPSDistance, SSIMDistance, UserError
from tlw_basicsr.losses.distance_loss import build_distance


def saved(content):
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def features_of(distance):
    """The trunk's state by torchvision's names."""
    return {f"features.{name}": value for name, value in distance.trunk.state_dict().items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("net", ["vgg", "alex", "squeeze"])
@pytest.mark.parametrize("linear", [False, True])
def test_value_and_gradient_are_those_of_the_lpips_package(pair, net, linear):
    distance = LPIPSDistance(net, linear, weights="random", seed=1)
    model = lpips.LPIPS(net=net, lpips=linear, pnet_rand=True, verbose=False).requires_grad_(False)
    state = distance.trunk.state_dict()
    model.net.load_state_dict({name: state[name.split(".", 1)[1]] for name in model.net.state_dict()})
    sr, gt = pair
    ours, theirs = sr.clone().requires_grad_(), sr.clone().requires_grad_()
    value, expected = distance(ours, gt), model(2 * theirs - 1, 2 * gt - 1).flatten()
    assert value.shape == (2,) and not any(p.requires_grad for p in distance.parameters())
    assert torch.allclose(value, expected, rtol=1e-5)
    value.sum().backward()
    expected.sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6 * theirs.grad.abs().max().item())


def test_vgg_without_heads_is_the_papers_distance(pair):
    """Written out from torchvision's network: relu1_2, 2_2, 3_3, 4_3, 5_3, unit length, summed over the layers."""
    distance = LPIPSDistance(weights="random", seed=0)
    sr, gt = pair
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))

    def maps(x):
        x, out = (2 * x - 1 - mean) / std, []
        for number, layer in enumerate(vgg):
            x = layer(x) if not isinstance(layer, torch.nn.ReLU) else x.clamp_min(0)
            if number in (3, 8, 15, 22, 29):
                out.append(x / x.square().sum(1, keepdim=True).sqrt())
        return out

    vgg = tv.vgg16(weights=None).features[:30]
    vgg.load_state_dict(distance.trunk.state_dict())
    with torch.no_grad():
        expected = sum((a - b).square().sum(1).mean((1, 2)) for a, b in zip(maps(sr), maps(gt), strict=True))
        assert torch.allclose(distance(sr, gt), expected, rtol=1e-4)


def test_random_weights_are_seeded_and_leave_the_random_numbers_alone(pair):
    before = torch.get_rng_state()
    one, again, other = (LPIPSDistance("squeeze", weights="random", seed=s)(*pair) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_gradient_is_finite_on_a_constant_image():
    distance = LPIPSDistance("vgg", weights="random")
    sr = torch.zeros(1, 3, 32, 32, requires_grad=True)
    distance(sr, torch.zeros(1, 3, 32, 32)).sum().backward()
    assert torch.isfinite(sr.grad).all()


def test_features_of_gt_may_be_kept(pair):
    sr, gt = pair
    for distance in (SSIMDistance(), LPIPSDistance("squeeze", weights="random")):
        kept = distance.features(gt)
        assert torch.equal(distance.compare(distance.features(sr), kept), distance(sr, gt))
        assert torch.allclose(distance(gt, gt), torch.zeros(2), atol=1e-6)


def test_weights_come_from_the_hubs_cache_or_a_path(pair, tmp_path, monkeypatch):
    seeded = LPIPSDistance("squeeze", weights="random", seed=7)
    path = tmp_path / "mine.pth"
    path.write_bytes(saved({**features_of(seeded), "classifier.1.weight": torch.zeros(1)}))
    before = torch.get_rng_state()
    assert torch.equal(LPIPSDistance("squeeze", weights=str(path))(*pair), seeded(*pair))
    assert torch.equal(torch.get_rng_state(), before)

    # the cache: the same file under torchvision's name and hash
    content = path.read_bytes()
    name = f"squeezenet1_1-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    (tmp_path / "hub/checkpoints" / name).write_bytes(content)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    entry = tv.SqueezeNet1_1_Weights.IMAGENET1K_V1
    monkeypatch.setattr(type(entry), "url", f"https://example.invalid/{name}", raising=False)
    assert torch.equal(LPIPSDistance("squeeze")(*pair), seeded(*pair))


def test_weights_that_cannot_be_downloaded_are_one_line_with_file_and_place(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=OSError("no network")))
    with pytest.raises(ValueError, match="no network") as error:
        LPIPSDistance("vgg")
    with pytest.raises(UserError, match="no network") as line:
        build_distance({"type": "LPIPSDistance", "net": "vgg"})
    for message, ways in (
        (str(error.value), ("take SSIMDistance()", "vgg16-397923af.pth at", "weights=PATH")),
        (str(line.value), ("take {type: SSIMDistance}", "vgg16-397923af.pth at", "weights: PATH")),
    ):
        assert "\n" not in message and f"at {tmp_path / 'checkpoints'}" in message and "random" not in message
        places = [message.index(way) for way in ways]
        assert places == sorted(places)


def test_a_file_that_is_not_whole_and_of_the_network_is_refused(tmp_path):
    """In a line that names the file; a YAML's user gets the same."""
    whole = features_of(LPIPSDistance("squeeze", weights="random"))
    damaged = bytearray(saved(whole))
    damaged[len(damaged) // 2] ^= 1  # torch reads it all the same
    first = next(iter(whole))
    for content, message in (
        (saved(tv.alexnet(weights=None).state_dict()), "does not hold the weights of torchvision's squeeze"),
        (saved({**whole, first: whole[first].int()}), "does not hold the weights"),
        (saved([1, 2]), "does not hold the weights"),
        (saved({**whole, first: whole[first] / 0}), "has values that are not finite"),
        (bytes(damaged), "could not be loaded .*is damaged"),
        (saved(whole)[:1000], "could not be loaded"),
        (b"I am a text", "could not be loaded"),
        (None, "does not exist"),
    ):
        path = tmp_path / "weights.pth"
        path.unlink(missing_ok=True) if content is None else path.write_bytes(content)
        with pytest.raises(ValueError, match=f"LPIPSDistance: weights: {path} {message}") as error:
            LPIPSDistance("squeeze", weights=str(path))
        with pytest.raises(UserError) as line:
            build_distance({"type": "LPIPSDistance", "net": "squeeze", "weights": str(path)})
        assert str(line.value) == f"train.pixel_opt.distance: {error.value}" and "\n" not in str(line.value)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="LPIPSDistance: net: expected one of vgg, alex, squeeze, got 'resnet'"):
        LPIPSDistance("resnet")
    with pytest.raises(ValueError, match="SSIMDistance: kernel_size: expected an odd number of at least 3, got 10"):
        SSIMDistance(kernel_size=10)


def test_ssim_distance_is_one_minus_ssim_of_the_reflected_image(pair):
    reflected = [torch.nn.functional.pad(x, [5] * 4, mode="reflect") for x in pair]
    expected = 1 - calculate_ssim_pt(*reflected, crop_border=0)
    assert torch.allclose(SSIMDistance()(*pair).double(), expected, atol=1e-5)


def test_ssim_distance_takes_any_values_and_half_precision_and_counts_the_border(pair):
    sr, gt = pair
    assert torch.isfinite(SSIMDistance()(sr * 3 - 1, gt)).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert SSIMDistance()(sr.bfloat16(), gt).dtype == torch.float32
    changed = gt.clone()
    changed[..., 0] = 1 - changed[..., 0]  # if this went unseen, weights would vanish at the border
    assert (SSIMDistance()(changed, gt) > 0.01).all()


def test_distance_grows_with_the_blur(pair):
    _, gt = pair
    blurred = [torch.nn.functional.avg_pool2d(gt, s, 1, s // 2, count_include_pad=False) for s in (3, 5, 9)]
    for distance in (SSIMDistance(), LPIPSDistance("vgg", weights="random")):
        values = [distance(b, gt).mean().item() for b in blurred]
        assert np.all(np.diff(values) > 0)
