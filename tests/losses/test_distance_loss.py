import lpips
import numpy as np
import pytest
import torch
from basicsr.metrics.psnr_ssim import calculate_ssim_pt
from torchvision import models as tv

from tlw_basicsr import LPIPSDistance, SSIMDistance, UserError
from tlw_basicsr.losses import distance_loss


def reference_lpips(net, linear, distance):
    """The lpips package's own forward, on the same weights."""
    model = lpips.LPIPS(net=net, lpips=linear, pnet_rand=True, verbose=False)
    model.net.load_state_dict(distance.trunk.state_dict())
    return model.requires_grad_(False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("net", ["vgg", "alex", "squeeze"])
@pytest.mark.parametrize("linear", [False, True])
def test_value_and_gradient_are_those_of_the_lpips_package(pair, net, linear):
    distance = LPIPSDistance(net, linear, weights="random", seed=1)
    model = reference_lpips(net, linear, distance)
    sr, gt = pair
    ours, theirs = sr.clone().requires_grad_(), sr.clone().requires_grad_()
    value, expected = distance(ours, gt), model(2 * theirs - 1, 2 * gt - 1).flatten()
    assert value.shape == (2,)
    assert torch.allclose(value, expected, rtol=1e-5)
    value.sum().backward()
    expected.sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6 * theirs.grad.abs().max().item())


def test_vgg_without_heads_is_the_papers_distance(pair):
    """Written out from torchvision's network: relu1_2, 2_2, 3_3, 4_3, 5_3, unit length, summed over the layers."""
    distance = LPIPSDistance(weights="random", seed=0)
    sr, gt = pair

    def maps(x):
        x = (2 * x - 1 - torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)) / torch.tensor(
            [0.458, 0.448, 0.450]
        ).view(1, 3, 1, 1)
        out = []
        for number, layer in enumerate(vgg):
            x = layer(x)
            if number in (3, 8, 15, 22, 29):
                out.append(x / x.square().sum(1, keepdim=True).sqrt())
        return out

    vgg = tv.vgg16(weights=None).features
    names = {
        f"slice{s}.{i}.": f"{i}."
        for s, r in enumerate(((0, 4), (4, 9), (9, 16), (16, 23), (23, 30)), 1)
        for i in range(*r)
    }
    state = {}
    for name, value in distance.trunk.state_dict().items():
        prefix = next(p for p in names if name.startswith(p))
        state[names[prefix] + name.removeprefix(prefix)] = value
    vgg.load_state_dict(state)
    vgg = [torch.nn.ReLU() if isinstance(m, torch.nn.ReLU) else m for m in vgg]
    with torch.no_grad():
        expected = sum((a - b).square().sum(1).mean((1, 2)) for a, b in zip(maps(sr), maps(gt), strict=True))
        assert torch.allclose(distance(sr, gt), expected, rtol=1e-4)


def test_random_weights_are_seeded_and_leave_the_random_numbers_alone(pair):
    torch.manual_seed(5)
    before = torch.rand(3)
    torch.manual_seed(5)
    one = LPIPSDistance("alex", weights="random", seed=1)
    assert torch.equal(torch.rand(3), before)
    again, other = (LPIPSDistance("alex", weights="random", seed=s) for s in (1, 2))
    assert torch.equal(one(*pair), again(*pair))
    assert not torch.equal(one(*pair), other(*pair))


def test_gradient_is_finite_on_a_constant_image():
    distance = LPIPSDistance("vgg", weights="random")
    sr = torch.zeros(1, 3, 32, 32, requires_grad=True)
    distance(sr, torch.zeros(1, 3, 32, 32)).sum().backward()
    assert torch.isfinite(sr.grad).all()


@pytest.mark.parametrize(
    "distance", [SSIMDistance(), LPIPSDistance("squeeze", weights="random")], ids=["ssim", "lpips"]
)
def test_features_of_gt_may_be_kept(pair, distance):
    sr, gt = pair
    kept = distance.features(gt)
    assert torch.equal(distance.compare(distance.features(sr), kept), distance(sr, gt))
    assert torch.allclose(distance(gt, gt), torch.zeros(2), atol=1e-6)
    assert (distance(sr, gt) > 0).all()


def test_stays_in_eval_mode_and_has_nothing_to_train():
    distance = LPIPSDistance("alex", linear=True, weights="random").train()
    assert not distance.training and not distance.heads.training
    assert not any(p.requires_grad for p in distance.parameters())


def test_weights_come_from_the_hubs_cache_or_a_path(pair, tmp_path, monkeypatch):
    seeded = LPIPSDistance("squeeze", weights="random", seed=7)
    state = {"features." + name.split(".", 1)[1]: v for name, v in seeded.trunk.state_dict().items()}
    state |= {"classifier.1.weight": torch.zeros(1)}
    path = tmp_path / "mine.pth"
    torch.save(state, path)
    assert torch.equal(LPIPSDistance("squeeze", weights=str(path))(*pair), seeded(*pair))

    # the cache: the same file under torchvision's name and hash
    import hashlib

    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    name = f"squeezenet1_1-{digest}.pth"
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    (cache / name).write_bytes(path.read_bytes())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    entry = distance_loss.TRUNK_WEIGHTS["squeeze"]
    monkeypatch.setattr(type(entry), "url", f"https://example.invalid/{name}", raising=False)
    assert torch.equal(LPIPSDistance("squeeze")(*pair), seeded(*pair))


def test_weights_that_cannot_be_had_are_one_line_with_file_and_place(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda *_, **__: (_ for _ in ()).throw(OSError("no network"))
    )
    with pytest.raises(UserError) as error:
        LPIPSDistance("vgg")
    message = str(error.value)
    assert "\n" not in message
    assert "vgg16-397923af.pth" in message and str(tmp_path / "checkpoints") in message and "no network" in message


def test_weights_of_another_network_are_refused(tmp_path):
    path = tmp_path / "alex.pth"
    torch.save(tv.alexnet(weights=None).state_dict(), path)
    with pytest.raises(UserError, match=r"alex\.pth does not hold the weights of torchvision's squeeze"):
        LPIPSDistance("squeeze", weights=str(path))
    with pytest.raises(UserError, match="vgg, alex, squeeze"):
        LPIPSDistance("resnet")


def test_ssim_distance_is_one_minus_ssim_of_the_reflected_image(pair):
    reflected = [torch.nn.functional.pad(x, [5] * 4, mode="reflect") for x in pair]
    expected = 1 - calculate_ssim_pt(*reflected, crop_border=0)
    assert torch.allclose(SSIMDistance()(*pair).double(), expected, atol=1e-5)


def test_ssim_distance_counts_the_border(pair):
    """A change of the outermost pixels must not go unseen: weights would vanish there."""
    _, gt = pair
    changed = gt.clone()
    changed[..., 0] = 1 - changed[..., 0]
    assert (SSIMDistance()(changed, gt) > 0.01).all()


def test_ssim_distance_takes_values_outside_the_range_and_half_precision(pair):
    sr, gt = pair
    assert torch.isfinite(SSIMDistance()(sr * 3 - 1, gt)).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert SSIMDistance()(sr.bfloat16(), gt).dtype == torch.float32
    with pytest.raises(UserError, match="odd"):
        SSIMDistance(kernel_size=10)


def test_distance_grows_with_the_blur(pair):
    _, gt = pair
    blurred = [torch.nn.functional.avg_pool2d(gt, s, 1, s // 2, count_include_pad=False) for s in (3, 5, 9)]
    for distance in (SSIMDistance(), LPIPSDistance("vgg", weights="random")):
        values = [distance(b, gt).mean().item() for b in blurred]
        assert np.all(np.diff(values) > 0)
