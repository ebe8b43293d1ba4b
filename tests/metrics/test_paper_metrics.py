import lpips as lpips_package
import numpy as np
import pytest
import torch
from basicsr.metrics import calculate_metric
from basicsr.utils import tensor2img

from tests.conftest import as_tensor, photograph
from tlw_basicsr.metrics.paper_metrics import l1, lpips, mse, psnr_y


@pytest.fixture
def images():
    gt = photograph("coffee", 50, 100, 40, 56)
    noise = np.random.default_rng(1).normal(0, 12, gt.shape)
    return (gt + noise).clip(0, 255).astype(np.uint8), gt


def by_hand(sr, gt):
    """Paper's protocol with numpy, on float images in [0, 1], (H, W, 3)."""
    y = [16 + 219 * (0.299 * i[..., 0] + 0.587 * i[..., 1] + 0.114 * i[..., 2]) for i in (sr, gt)]
    return {
        "psnr": 20 * np.log10(255) - 10 * np.log10(((y[0] - y[1]) ** 2).mean()),
        "l1": np.abs(sr - gt).mean(),
        "mse": ((sr - gt) ** 2).mean(),
    }


def test_against_numpy_on_floats_that_are_not_rounded(images):
    sr, gt = (image / 255.0 for image in images)
    sr = sr + 0.003  # between two levels, and above 1 in places
    expected = by_hand(sr.clip(0, 1), gt)
    tensors = [torch.from_numpy(image).permute(2, 0, 1)[None] for image in (sr, gt)]
    assert psnr_y(*tensors).item() == pytest.approx(expected["psnr"], abs=1e-9)
    assert l1(*tensors).item() == pytest.approx(expected["l1"], abs=1e-12)
    assert mse(*tensors).item() == pytest.approx(expected["mse"], abs=1e-12)


def test_one_value_an_image(images):
    sr, gt = (torch.cat([as_tensor(i), as_tensor(np.ascontiguousarray(i[::-1]))]) for i in images)
    for metric in (psnr_y, l1, mse):
        assert metric(sr, gt).shape == (2,)
        assert metric(sr, gt)[1].item() == pytest.approx(metric(sr[1:], gt[1:]).item())
    assert psnr_y(gt, gt).isinf().all()


def test_basicsrs_validation_gets_them_by_name(images):
    """Grey levels and BGR, as ``tensor2img`` gives them."""
    sr, gt = images
    expected = by_hand(sr / 255.0, gt / 255.0)
    data = {"img": tensor2img(as_tensor(sr)), "img2": tensor2img(as_tensor(gt))}
    for name, key in (("tlw_psnr_y", "psnr"), ("tlw_l1", "l1"), ("tlw_mse", "mse")):
        assert calculate_metric(data, {"type": name}) == pytest.approx(expected[key], rel=1e-9)
        floats = {key: image.astype(np.float32) for key, image in data.items()}
        assert calculate_metric(floats, {"type": name}) == pytest.approx(expected[key], rel=1e-6)


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_lpips_is_that_of_the_package(images, net):
    """With the package's linear heads; the trunk has random weights, the package gets the same."""
    sr, gt = (as_tensor(image) for image in images)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        package = lpips_package.LPIPS(net=net, pnet_rand=True, verbose=False).eval()
    with torch.no_grad():
        expected = package(2 * sr - 1, 2 * gt - 1).item()
    assert lpips(sr, gt, net, "random").item() == pytest.approx(expected, rel=1e-4)
    data = {"img": tensor2img(sr), "img2": tensor2img(gt)}
    by_name = calculate_metric(data, {"type": "tlw_lpips", "net": net, "weights": "random"})
    assert by_name == pytest.approx(expected, rel=1e-4)
    assert lpips(gt, gt, net, "random").item() == 0
