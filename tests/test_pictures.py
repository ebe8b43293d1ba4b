"""Figures of a training, drawn by the script from the training's own files."""

import re

import cv2
import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

from tests.conftest import ROOT, as_tensor, control_options, photograph, tiny_options, write_yaml
from tests.helpers import refused
from tlw_basicsr import SSIMDistance, TLWWeightNet, k_schedule
from tlw_basicsr.networks import load_network
from tlw_basicsr.pictures import method_figure, spread_figure, weights_beside
from tlw_basicsr.util.yaml_options import load_yaml


@pytest.fixture
def hr(tmp_path):
    path = tmp_path / "hr.png"
    cv2.imwrite(str(path), photograph("astronaut", 0, 150, 65, 96)[..., ::-1])
    return path


def test_the_figures_of_a_training(photographs, train, tmp_path, hr, script):
    opt = tiny_options(photographs)
    experiment = train(opt)
    yaml = write_yaml(tmp_path, opt)
    out = script("visualize_weights.py", "--opt", yaml, "--image", hr, "--out", "a.png")
    values = {key: float(value) for key, value in re.findall(r"(\w+) ([\d.]+)(?:,|$)", out)}
    k = k_schedule(2, k_decay=4)  # of the state of iteration 8, in epoch 2
    assert values["k"] == pytest.approx(k, abs=1e-4)
    assert values["wc"] == pytest.approx(values["d_1w"] / values["d_w"], rel=1e-2)
    assert Image.open(tmp_path / "a.png").size[0] == 1160

    # the same distances, from the files and the plain equations
    net_g = load_network(opt["network_g"], experiment / "models/net_g_8.pth", "params_ema")
    net_w = load_network(opt["network_w"], experiment / "models/net_w_8.pth")
    gt = as_tensor(photograph("astronaut", 0, 150, 64, 96))
    lq = gt[:, :, ::2, ::2]
    cv2.imwrite(str(tmp_path / "lq.png"), photograph("astronaut", 0, 150, 64, 96)[::2, ::2, ::-1])
    out = script(
        "visualize_weights.py", "--image", hr, "--lq", "lq.png", "--k", k, "--out", "b.png",
        "--network_g", opt["network_g"], "--network_w", opt["network_w"], "--distance", "{type: SSIMDistance}",
        "--net_g", experiment / "models/net_g_8.pth", "--net_w", experiment / "models/net_w_8.pth",
    )  # fmt: skip
    with torch.no_grad():
        sr = net_g(lq).clamp(0, 1)
        w = net_w(sr, gt, k)
        expected = SSIMDistance()(w * gt + (1 - w) * sr, gt).item()
    assert float(re.search(r"d_w ([\d.]+)", out)[1]) == pytest.approx(expected, abs=1e-4)

    strip = ("--strip", "--crop", 0, 8, 32, 48)
    assert "iterations 4, 8" in script("visualize_weights.py", "--opt", yaml, "--image", hr, *strip)
    assert (tmp_path / "weights_strip.png").is_file()


def test_wrong_arguments_are_one_line(photographs, train, tmp_path, hr, script):
    opt = tiny_options(photographs, train__total_iter=4)
    train(opt)
    yaml = write_yaml(tmp_path, opt)
    control = write_yaml(tmp_path, control_options(photographs, "error"), "control.yml")
    number = write_yaml(tmp_path, {**opt, "train": 5}, "number.yml")
    loss = write_yaml(tmp_path, {**opt, "train": {"pixel_opt": 5}}, "loss.yml")
    for arguments, message in (
        (("--opt", yaml, "--image", "none.png"), "--image: none.png does not exist"),
        (("--opt", yaml, "--image", hr, "--lq", "none.png"), "--lq: none.png does not exist"),
        (("--opt", yaml, "--image", hr, "--strip", "--iter", 4), "--iter: not with --strip"),
        (("--opt", number, "--image", hr), "train: expected a section of 'key: value', got 5"),
        (("--opt", loss, "--image", hr), "train.pixel_opt: expected a section of 'key: value', got 5"),
        (("--opt", yaml, "--image", hr, "--iter", 3), "--iter: 3 is not in"),
        (("--opt", yaml, "--image", hr, "--k", 1), "--k: expected a number in (0, 1)"),
        (("--opt", yaml, "--image", hr, "--crop", 0, 0, 65, 10), "--crop: [0, 0, 65, 10] is not within"),
        (("--opt", yaml, "--image", hr, "--experiment", "nowhere"), "holds no pair"),
        (("--opt", control, "--image", hr), "--network_w: missing"),
    ):
        assert message in script("visualize_weights.py", *arguments, code=2)
    state = tmp_path / "experiments/tiny/training_states/4.state"
    for content in ({}, {"tlw": 5}, {"tlw": {}}, *({"tlw": {"k": k}} for k in ("0.5", float("nan"), [0.5], 1.0))):
        torch.save(content, state)
        out = script("visualize_weights.py", "--opt", yaml, "--image", hr, code=2)
        assert "4.state should hold a number in (0, 1) as tlw.k" in out
    assert not list(tmp_path.glob("weights*.png"))


def test_the_quickstart_saves_what_a_strip_shows():
    for loss in ("L1", "L1TLW"):
        path = ROOT / f"options/quickstart/quickstart_EDSR_{loss}_x4.yml"
        opt = load_yaml(path.read_text("utf-8"), path.name)
        assert opt["train"]["total_iter"] / opt["logger"]["save_checkpoint_freq"] == 6  # the default of --columns


def test_a_figure_of_a_perfect_image_of_constant_weights_and_of_another_network(pair, tmp_path):
    gt, path, net = pair[1][0], tmp_path / "figure.svg", TLWWeightNet(num_feat=4).eval()
    values = method_figure(net, 0.3, SSIMDistance(), gt, gt, path)
    assert values["d_sr"] == pytest.approx(0, abs=1e-6) and path.read_text().startswith("<?xml")
    refused("can't be written", method_figure, net, 0.3, SSIMDistance(), gt, gt, tmp_path / "figure.nothing")
    refused("no method probabilities", method_figure, torch.nn.Conv2d(3, 3, 1), 0.5, SSIMDistance(), gt, gt, path)
    torch.nn.init.zeros_(net.conv[-1].weight)  # constant weights gain nothing
    values = method_figure(net, 0.6, SSIMDistance(), pair[0][0], gt, path)
    assert values["wc_gain"] == pytest.approx(1, abs=1e-4) and values["wc"] > 1 and values["w_std"] < 1e-5


def test_tensorboards_picture_is_x_then_sr_then_w_with_names_and_a_bar_of_the_colours():
    gt, sr, w = torch.rand(3, 40, 200), torch.ones(3, 40, 200), torch.full((3, 40, 200), 0.25)
    w[:, :10] = 0.75
    beside = weights_beside(gt, sr, w)
    assert beside.dtype == torch.uint8 and beside.shape[0] == 3 and beside.shape[2] == 600
    assert (beside[:, :40, :200].float() - gt * 255).abs().max() <= 1  # pixel by pixel
    assert (beside[:, :40, 201:399] == 255).all()
    limit = 0.75 - w.mean().item()  # of the weights furthest from their mean, which is white
    levels = (1.0, (0.25 - w.mean().item()) / limit / 2 + 0.5)
    colours = torch.tensor([matplotlib.colormaps["PuOr_r"](level)[:3] for level in levels]) * 255
    assert (beside[:, 5, 500].float() - colours[0]).abs().max() <= 1
    assert (beside[:, 30, 500].float() - colours[1]).abs().max() <= 1
    white = weights_beside(gt, sr, torch.full_like(w, 0.3) + 1e-4 * torch.rand_like(w))[:, :40, 401:]
    assert white.float().mean() > 240  # nearly constant weights look so
    below = beside[:, 40:].float()
    for column in range(3):
        assert (below[:, :18, 200 * column : 200 * (column + 1)] < 128).any()  # a name
    colours = {tuple(pixel) for pixel in below[:, :, 400:].flatten(1).T.int().tolist()}
    assert len(colours) > 100  # the bar
    small = weights_beside(gt[..., :20], sr[..., :20], w[..., :20])
    assert small.shape[2] == 3 * 160
    assert torch.equal(small[:, ::8, ::8][:, :40, :20], beside[:, :40, :20])


def test_spread_figure_shows_every_seed_the_mean_and_the_spread(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Axes, "errorbar", lambda _, x, y, xerr, **__: drawn.append((x, y, xerr)))
    panels = [("Set5", "PSNR (dB)", [[1.0, 3.0], [5.0, 5.0]]), ("Set14", "PSNR (dB)", [[2.0], [7.0]])]
    spread_figure(["L1", "L1TLW"], panels, tmp_path / "a.png", "title", 2)
    assert [(x, y, round(e, 6)) for x, y, e in drawn] == [
        (2.0, 0, 1.414214), (5.0, 1, 0.0), (2.0, 0, 0.0), (7.0, 1, 0.0)
    ]  # fmt: skip
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_the_title_of_a_spread_figure_is_not_cut(tmp_path):
    title = "EDSR ×4, the paper's protocol: mean and standard deviation over the seeds"
    for number in (1, 3):
        panels = number * [("Set5", "PSNR (dB), higher is better", [[1.0, 3.0], [5.0, 5.0]])]
        spread_figure(["L1", "L1TLW"], panels, tmp_path / "a.png", title, number)
        image = np.array(Image.open(tmp_path / "a.png").convert("L"))
        dark = np.flatnonzero((image[:25] < 128).any(axis=0))  # columns of the title
        assert dark[0] > 5 and dark[-1] < image.shape[1] - 5
