"""Weightings: the maps against plain formulations, one's own in one file, and all of them through a YAML."""

import copy
import csv

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import structural_similarity

from tests.conftest import control_options, tiny_options, write_yaml
from tests.helpers import batch, built, refused
from tlw_basicsr import (
    TLW,
    LDLWeights,
    LearnedWeights,
    PSPLWeights,
    SSIMDistance,
    TLWWeightNet,
    Weighting,
    fixed_sum,
    weighted_pixel_loss,
)
from tlw_basicsr.core.weightings import SHORT_NAMES, ErrorWeights, ssim_map
from tlw_basicsr.losses.tlw_loss import build_weighting
from tlw_basicsr.models import build_model
from tlw_basicsr.tools.evaluation import FIELD, Pair
from tlw_basicsr.tools.weight_maps import describe_map, describe_set, map_of, write_rows

PLUGIN = """
import torch
from basicsr.utils.registry import DATASET_REGISTRY, LOSS_REGISTRY
from tlw_basicsr import BicubicSRDataset, Weighting

@LOSS_REGISTRY.register()
class HalfWeights(Weighting):
    needs = ("mask",)

    def map(self, sr, gt, t, mask):
        return {floor} + mask

@DATASET_REGISTRY.register()
class MaskedDataset(BicubicSRDataset):
    def __getitem__(self, index):
        item = super().__getitem__(index)
        item["mask"] = torch.zeros_like(item["gt"][:1])
        item["mask"][:, : item["gt"].shape[1] // 2] = 1
        return item
"""


def plain_ldl(sr, gt, sr_ema):
    """LDL's map of one image, pixel by pixel."""
    r, r_ema = (np.abs(image - gt).sum(0) for image in (sr, sr_ema))
    around = np.pad(r, 3, mode="reflect")
    height, width = r.shape
    found = np.zeros_like(r)
    for y in range(height):
        for x in range(width):
            found[y, x] = np.var(around[y : y + 7, x : x + 7], ddof=1) if r[y, x] >= r_ema[y, x] else 0
    return found * np.var(r, ddof=1) ** 0.2


def test_ldl_is_the_local_variance_of_an_error_that_has_grown(pair):
    sr, gt = (image.cpu() for image in pair)
    sr_ema = (sr + torch.rand_like(sr) * 0.02).clamp(0, 1)
    w = TLW(weights=LDLWeights()).weights(sr, gt, t=40, sr_ema=sr_ema)
    maps = [plain_ldl(*(i.double().numpy() for i in images)) for images in zip(sr, gt, sr_ema, strict=True)]
    plain = torch.from_numpy(np.stack([m / m.max() for m in maps]))[:, None].expand(sr.shape)
    expected = fixed_sum(plain, TLW(weights="error").k(40))
    assert 0.2 < (plain == 0).double().mean() < 0.8
    torch.testing.assert_close(w.double(), expected, atol=2e-5, rtol=0)
    # the average of a first iteration is the network itself
    torch.testing.assert_close(LDLWeights().map(sr, gt, 0, sr)[:, 0].double(), torch.stack([
        torch.from_numpy(plain_ldl(a, b, a) / np.var(np.abs(a - b).sum(0), ddof=1) ** 0.2)
        for a, b in zip(sr.double().numpy(), gt.double().numpy(), strict=True)
    ]), rtol=0.03, atol=1e-6)  # fmt: skip
    assert LDLWeights().map(gt + 0.3, gt, 0, gt).min() >= 0  # rounding makes a variance of nothing negative


def test_pspl_weights_the_pixels_of_least_ssim_and_later_all_alike(pair):
    sr, gt = (image.cpu() for image in pair)
    maps = []
    for a, b in zip(sr.double().numpy(), gt.double().numpy(), strict=True):
        per_channel = [
            structural_similarity(
                a[c], b[c], data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
            )[1]
            for c in range(3)
        ]
        maps.append(np.stack(per_channel))
    inside = (..., slice(5, -5), slice(5, -5))  # borders are padded in other ways
    theirs = torch.from_numpy(np.stack(maps))[inside]
    torch.testing.assert_close(ssim_map(sr.double(), gt.double())[inside], theirs, atol=1e-6, rtol=0)
    ssim = ssim_map(sr, gt)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ssim_map(sr, gt), ssim)
    weighting, spreads = PSPLWeights(alpha=0.5), []
    for t in (0, 4, 400):
        plain = 2.0 * torch.exp(-(((ssim.double() + 1) / (0.5 * t + 1)) ** 2))  # the source's max is 2
        expected = fixed_sum(plain / plain.amax((2, 3), keepdim=True), 0.5)
        w = weighting(sr, gt, 0.5, t)
        torch.testing.assert_close(w.double(), expected, atol=1e-5, rtol=0)
        spreads.append(w.std().item())
    assert spreads[0] > 2 * spreads[1] > 100 * spreads[2]
    assert PSPLWeights(beta=1e-3)(sr, gt, 0.5).std() > 0.01  # a small σ leaves the worst pixel, not nothing


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(["error", "random", "LDL", "PSPL"]),
    k=st.floats(0.05, 0.95),
    t=st.floats(0, 1e4),
    scale=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_every_weighting_has_mean_k_in_each_channel_and_no_gradient(name, k, t, scale, seed):
    made = {"LDL": LDLWeights, "PSPL": PSPLWeights, **SHORT_NAMES}[name]()
    torch.manual_seed(seed)
    gt = torch.rand(2, 3, 12, 13)
    sr = (gt + scale * torch.randn_like(gt)).requires_grad_()
    images = {"sr_ema": torch.rand_like(gt)} if made.needs else {}
    w = made(sr, gt, k, t, **images)
    torch.testing.assert_close(w.mean((2, 3)), torch.full((2, 3), k))
    assert w.shape == gt.shape and w.min() >= 0 and w.max() <= 1 and not w.requires_grad
    tlw = TLW(weights=made, k_start=k, k_end=k)
    loss = tlw(sr, gt, t, **images)
    if not made.sampled:
        assert loss.item() == weighted_pixel_loss(sr, gt, w).item()
    loss.backward()
    assert sr.grad.isfinite().all()


def test_a_weighting_of_ones_own_reads_further_images(pair):
    class MaskWeights(Weighting):
        needs = ("mask",)

        def map(self, sr, gt, t, mask):
            return mask

    sr, gt = pair
    mask = torch.zeros_like(gt[:, :1])
    mask[..., 10:30, 10:30] = 5
    tlw = TLW(weights=MaskWeights(), k_start=0.1, k_end=0.1)
    w = tlw.weights(sr, gt, 0, mask=mask)
    assert (w[..., mask[0, 0] == 0] == 0).all() and w[..., 12, 12].unique().numel() == 1
    frames = [image[:, None] for image in (sr, gt, mask)]
    assert tlw(frames[0], frames[1], mask=frames[2], other=None) == tlw(sr, gt, mask=mask)
    with pytest.raises(ValueError, match="MaskWeights needs the image mask"):
        tlw(sr, gt)
    with pytest.raises(ValueError, match="no E step with MaskWeights"):
        tlw.e_step(sr, gt)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (lambda gt: gt[:, 0], r"Own: map must be \(2, 3, 48, 48\) or \(2, 1, 48, 48\), got \(2, 48, 48\)"),
        (lambda gt: gt[:1], r"got \(1, 3, 48, 48\)"),
        (lambda gt: gt - 0.5, r"Own: map must be at least 0, got -0.5"),
    ],
)
def test_a_map_that_is_none_is_refused(pair, wrong, text):
    class Own(Weighting):
        def map(self, sr, gt, t):
            return wrong(gt)

    sr, gt = (image.cpu() for image in pair)
    gt[..., 0, 0] = 0
    with pytest.raises(ValueError, match=text):
        TLW(weights=Own())(sr, gt)


def test_another_e_step_of_the_same_network(pair):
    class Likelihood(LearnedWeights):
        def e_loss(self, distance, sr, gt, w, noise):
            return -(w * (sr - gt).abs()).mean()

    sr, gt = pair
    net_w = TLWWeightNet(num_feat=4).to(gt.device)
    adam = lambda parameters: torch.optim.Adam(parameters, 1e-2)  # noqa: E731
    trained = []
    for weights in ("learned", LearnedWeights(), Likelihood()):
        torch.manual_seed(0)
        tlw = TLW(SSIMDistance(5), weights=weights, net_w=copy.deepcopy(net_w), optimizer=adam, stochastic=False)
        trained.append(tlw.to(gt.device))
        for _ in range(12):
            tlw(sr, gt, t=20)
    known, same, other = (list(tlw.state_dict()) for tlw in trained)
    assert known == same == other  # their files are alike
    ends = [tlw.weights(sr, gt, 20) for tlw in trained]
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])
    error = (sr - gt).abs()
    assert (ends[2] * error).mean() > 1.1 * ends[2].mean() * error.mean()


@pytest.mark.parametrize("weights", [{"type": "LDLWeights", "window": 5}, {"type": "PSPLWeights", "alpha": 0.5}])
def test_a_training_by_a_registered_weighting(photographs, train, weights):
    experiment = train(control_options(photographs, weights, train__total_iter=4))
    assert (experiment / "models/net_g_4.pth").is_file() and not list(experiment.glob("models/net_w*"))


def test_a_training_by_a_plugins_weighting_reads_the_mask_of_the_batch(photographs, train, tmp_path, monkeypatch):
    (tmp_path / "my_weights.py").write_text(PLUGIN.format(floor=0.01))
    monkeypatch.syspath_prepend(tmp_path)
    options = control_options(photographs, {"type": "HalfWeights"}, plugins=["my_weights"], train__total_iter=2)
    refused(r"BicubicSRDataset gives no mask, which HalfWeights needs", train, copy.deepcopy(options))
    assert not (tmp_path / "experiments").exists()
    options["datasets"]["train"]["type"] = "MaskedDataset"
    seen = []
    loss = TLW.forward
    monkeypatch.setattr(
        TLW, "forward", lambda tlw, *a, **images: seen.append(images["mask"]) or loss(tlw, *a, **images)
    )
    train(options)
    assert len(seen) == 3 and all(mask.shape == (2, 1, 16, 16) and mask[:, :, 0].all() for mask in seen)


def test_ldl_compares_with_the_moving_average(photographs, train, monkeypatch):
    seen, map_of_images = [], LDLWeights.map
    monkeypatch.setattr(
        LDLWeights, "map", lambda w, sr, gt, t, sr_ema: seen.append((sr, sr_ema)) or map_of_images(w, sr, gt, t, sr_ema)
    )
    train(control_options(photographs, {"type": "LDLWeights"}, train__total_iter=2, train__ema_decay=0.9))
    distances = [(sr - sr_ema).abs().max().item() for sr, sr_ema in seen]
    assert distances[-2] == 0 and 0 < distances[-1] < 0.1  # the average begins where the network does
    options = control_options(photographs, {"type": "LDLWeights"}, train__ema_decay=0, is_train=True, dist=False)
    refused(r"train.ema_decay: LDLWeights needs the moving average", build_model, options)


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ({"type": "LDLWeight"}, r"weights.type: 'LDLWeight' is not registered \(did you mean LDLWeights\?\)"),
        ({"type": "L1Loss"}, r"weights.type: L1Loss is no Weighting"),
        ({"type": "LDLWeights", "windw": 3}, r"weights.windw: unknown option \(did you mean window\?\)"),
        ({"type": "PSPLWeights", "beta": 0}, r"weights.beta: expected a number above 0, got 0"),
        ({"kind": "LDLWeights"}, r"weights.type: missing"),
    ],
)
def test_wrong_options_are_named(weights, text):
    refused(f"train.pixel_opt.{text}", build_weighting, weights)


def test_a_learned_weighting_in_a_yaml_needs_its_network(photographs, train):
    options = tiny_options(photographs, train__pixel_opt__weights={"type": "LearnedWeights"}, train__total_iter=2)
    assert list(train(options).glob("models/net_w_2.pth"))
    del options["network_w"]
    refused("network_w: missing", train, options)


def test_the_numbers_of_a_map_are_those_of_plain_formulas(pair):
    sr, gt = (image[:1].cpu() for image in pair)
    z, k = torch.rand_like(gt) * (sr - gt).abs(), 0.6
    found = describe_map(z, sr, gt, k, SSIMDistance(5))
    w, error = fixed_sum(z, k), (sr - gt).abs()
    slopes = np.stack(np.gradient(gt[0].double().numpy(), axis=(1, 2)))
    edges = torch.from_numpy(np.sqrt((slopes**2).sum(0)))
    for name, other in (("error", error[0]), ("edges", edges)):
        plain = [np.corrcoef(w[0, c].flatten(), other[c].flatten())[0, 1] for c in range(3)]
        assert found[name] == pytest.approx(np.mean(plain), abs=1e-4)
    mean = z.mean((2, 3), keepdim=True)
    assert found["contrast"] == pytest.approx(w.std((2, 3)).mean().item())
    assert 1 - found["cut"] == pytest.approx(((1 - (k - mean) / (1 - mean)).mean()).item(), abs=2e-3)  # 1 - α

    def criterion(weights):
        mixed = [a * gt + (1 - a) * sr for a in (weights, 1 - weights)]
        return SSIMDistance(5)(mixed[1], gt) / SSIMDistance(5)(mixed[0], gt)

    assert found["gain"] == pytest.approx((criterion(w) / criterion(torch.full_like(w, k))).item(), rel=1e-3)
    z[:, 0], gt[:, 1] = 0.5, 0.5  # correlations are those of the channels that vary
    partly = describe_map(z, sr, gt, k, SSIMDistance(5))
    slopes = np.stack(np.gradient(gt[0, 2].double().numpy()))
    plain = np.corrcoef(fixed_sum(z, k)[0, 2].flatten(), np.hypot(*slopes).flatten())[0, 1]
    assert partly["edges"] == pytest.approx(plain, abs=1e-4) and np.isfinite(partly["error"])
    constant = describe_map(torch.ones_like(gt), sr, gt, k, SSIMDistance(5))
    assert constant["gain"] == pytest.approx(1) and constant["contrast"] == pytest.approx(0, abs=1e-6)
    assert np.isnan(constant["cut"])


def test_the_numbers_of_a_set_are_of_images_in_0_1_and_their_means_of_numbers(pair, tmp_path):
    sr, gt = (image[:1].cpu() for image in pair)
    shot = Pair("a", "a.png", sr, gt, 1, FIELD)
    maps = {"error": map_of(ErrorWeights()), "constant": lambda _, gt: torch.ones_like(gt)}
    far, near = (
        describe_set([shot], lambda _, image=image: image, maps, 0.5, SSIMDistance(5))
        for image in (3 * sr - 1, (3 * sr - 1).clamp(0, 1))
    )
    assert far[0] == near[0] and np.isnan(far[1]["cut"])
    table = write_rows([*far, {**far[1], "cut": 0.25}], tmp_path / "a.png", "title")
    assert "nan" not in table and "| 0.250 |" in table.splitlines()[-1]


def test_ldl_takes_a_normalised_image_of_the_average_back_to_0_1(photographs, tmp_path, pair):
    normal = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    opt = control_options(photographs, {"type": "LDLWeights"}, train__ema_decay=0.9)
    model = built(photographs, tmp_path, lambda _: opt)
    model.opt["datasets"]["train"] |= normal
    model.feed_data(batch(pair))
    mean, std = (torch.tensor(value, device=model.device).view(3, 1, 1) for value in normal.values())
    expected = model.net_g_ema(model.lq) * std + mean
    torch.testing.assert_close(model.list_further()["sr_ema"], expected)


def test_weights_of_a_folder_beside_each_other_and_over_a_training(photographs, train, tmp_path, script):
    opt = tiny_options(photographs)
    train(opt)
    command = ["visualize_weights.py", "--opt", write_yaml(tmp_path, opt), "--data", photographs]
    out = script(*command)
    rows = list(csv.DictReader((tmp_path / "weights_data.csv").open()))
    labels = ["learned", "error", "LDL", "PSPL, σ = 1"]
    assert len(rows) == 6 * len(labels) and (tmp_path / "weights_data.png").stat().st_size > 10_000
    for label in labels:
        gains = [float(row["gain"]) for row in rows if row["weights"] == label]
        assert f"| {np.mean(gains):.3f} |" in next(line for line in out.splitlines() if line.startswith(f"| {label} |"))
    assert "net_g_8.pth" in out and rows[1]["weights"] == "error" and float(rows[1]["error"]) == pytest.approx(1)
    out = script(*command, "--strip", "--out", "over.png")
    assert [line.split(" | ")[0] for line in out.splitlines()[2:4]] == ["| iteration 4", "| iteration 8"]
    for wrong, text in (
        (["--crop", 0, 0, 8, 8], "--crop: with --image alone"),
        (["--lq", "a.png"], "--lq: with --image"),
    ):
        assert text in script(*command, *wrong, code=2)
    assert "none" in script(*command[:-1], tmp_path / "none", code=2)


def test_the_preset_gives_another_learned_weighting_its_small_network():
    class Other(LearnedWeights):
        """Another E step, of the same network."""

    tlws = [TLW.from_preset("economy", SSIMDistance(5), weights=weights) for weights in ("learned", Other())]
    sizes = [sum(p.numel() for p in tlw.net_w.parameters()) for tlw in tlws]
    assert sizes[0] == sizes[1]
