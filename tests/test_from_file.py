"""A network that is known by its file alone: used by every command, and fine-tuned."""

import json

import cv2
import pytest
import torch
from safetensors import safe_open
from spandrel import ModelLoader
from spandrel.architectures.DRUNet import DRUNet
from spandrel.architectures.ESRGAN import ESRGAN
from spandrel.architectures.PLKSR import PLKSR
from spandrel.architectures.SAFMN import SAFMN
from spandrel.architectures.SPAN import SPAN

from tests.conftest import as_tensor, photograph, tiny_options
from tests.helpers import EDSR, check_resume, refused, same
from tlw_basicsr import UserError
from tlw_basicsr.commands import add, compare, evaluate, export, infer
from tlw_basicsr.networks import build_network, count_input_channels, get_size_multiple, of_file, read_model
from tlw_basicsr.tools import fine_tuning
from tlw_basicsr.tools.inference import NetworkUpscaler
from tlw_basicsr.util.files import load_file
from tlw_basicsr.util.yaml_options import load_yaml


class Compact(torch.nn.Module):
    """SRVGGNetCompact as published: convolutions and PReLUs under one list, then a shuffle; no upsampled input here."""

    def __init__(self, channels=3, features=8):
        super().__init__()
        layers = [torch.nn.Conv2d(channels, features, 3, 1, 1), torch.nn.PReLU(features)]
        layers += [torch.nn.Conv2d(features, features, 3, 1, 1), torch.nn.PReLU(features)]
        self.body = torch.nn.ModuleList([*layers, torch.nn.Conv2d(features, 4 * channels, 3, 1, 1)])


MAKE = {
    "Compact": Compact,
    "ESRGAN": lambda: ESRGAN(num_filters=16, num_blocks=1, scale=2),
    "SAFMN": lambda: SAFMN(dim=8, n_blocks=1, upscaling_factor=2),
    "PLKSR": lambda: PLKSR(dim=16, n_blocks=1, upscaling_factor=2),
    "SPAN": lambda: SPAN(num_in_ch=3, num_out_ch=3, feature_channels=8, upscale=2),
}


@pytest.fixture
def model(tmp_path):
    """Write the file of a seeded network of an architecture; its weights are the average, ``params`` are others."""

    def make(name="Compact", **arguments):
        torch.manual_seed(0)
        state = MAKE[name](**arguments).state_dict()
        path = tmp_path / f"2x_{name}.pth"
        torch.save({"params": {k: 0.5 * v for k, v in state.items()}, "params_ema": state}, path)
        return path

    return make


def run(command, *arguments):
    command.main([str(argument) for argument in arguments])


def test_every_command_takes_a_file_without_options(model, photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path, image = model(), photograph(height=20, width=24)
    assert cv2.imwrite("in.png", image[..., ::-1])
    with pytest.raises(SystemExit) as end:
        run(infer, "in.png", "--model", path, "--out", ".", "--suffix", "_x2")
    assert end.value.code == 0
    expected = ModelLoader().load_from_file(str(path)).eval()(as_tensor(image))[0].permute(1, 2, 0).numpy() * 255
    assert abs(cv2.imread("in_x2.png")[..., ::-1] - expected).max() <= 0.51

    run(evaluate, "--model", path, "--gt", photographs, "--protocol", "field", "--json", "of_file.json")
    assert "×2" in capsys.readouterr().out
    run(compare, "bicubic", "--model", path, f"half={path}", "--param_key", "params", "--gt", photographs)
    rows = [line.split(",") for line in (tmp_path / "compare.csv").read_text().splitlines()]
    assert {row[1] for row in rows[1:]} == {"bicubic", "2x_Compact (params)", "half (params)"}

    run(export, "net.safetensors", "--model", path)
    with safe_open("net.safetensors", "pt") as file:
        assert (file.metadata()["architecture"], file.metadata()["scale"]) == ("RealESRGAN Compact", "2")
        assert json.loads(file.metadata()["options"]) == {}
    run(evaluate, "--model", "net.safetensors", "--gt", photographs, "--protocol", "field", "--json", "exported.json")
    assert json.loads((tmp_path / "exported.json").read_text()) == json.loads((tmp_path / "of_file.json").read_text())


@pytest.mark.parametrize("architecture", MAKE)
def test_a_file_is_fine_tuned_and_known_by_spandrel_again(
    model, photographs, train, tmp_path, architecture, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    path = model(architecture)
    run(add, "--model", path, "--name", "tuned")
    opt = load_yaml(capsys.readouterr().out, "printed")
    assert (opt["scale"], opt["network_g"]) == (2, of_file(path))
    assert opt["datasets"]["train"]["gt_size"] == 2 * 48 and opt["val"]["metrics"]["psnr"]["crop_border"] == 2
    small = tiny_options(photographs)
    opt |= {"datasets": small["datasets"], "logger": small["logger"], "num_gpu": small["num_gpu"], "val": None}
    opt["datasets"]["train"]["gt_size"] = 32
    opt["train"] |= {
        "total_iter": 2,
        "scheduler": small["train"]["scheduler"],
        "pixel_opt": small["train"]["pixel_opt"],
    }
    trained = train(opt) / "models/net_g_latest.pth"

    before, after = ModelLoader().load_from_file(str(path)), ModelLoader().load_from_file(str(trained))
    assert (after.architecture.id, after.scale, after.input_channels) == (before.architecture.id, 2, 3)
    first, last = before.model.state_dict(), after.model.state_dict()
    distance = max((first[name] - last[name]).abs().max().item() for name in first)
    assert 0 < distance < 1e-3  # from the file's weights, in two small steps
    assert not same(load_file(trained, "")["params"], load_file(trained, "")["params_ema"])


@pytest.mark.parametrize(
    ("facts", "gt_size"),
    [
        ({"upscale": 2, "window_size": 16}, 96),
        ({"upscale": 4, "window_size": 20}, 240),
        ({"upscale": 3, "window_size": 8, "smallest_side": 64}, 192),
        ({"upscale": 1, "window_size": 1}, 48),
    ],
)
def test_a_fine_tuning_has_crops_that_the_network_takes(facts, gt_size, monkeypatch, tmp_path):
    known = {"num_in_ch": 3, "num_out_ch": 3, "smallest_side": 0, "architecture": "Any", **facts}
    monkeypatch.setattr(fine_tuning, "describe_model", lambda _: known)
    opt = load_yaml(fine_tuning.fine_tuning(tmp_path / "net.pth"), "x")
    assert opt["datasets"]["train"]["gt_size"] == gt_size and opt["name"] == "net_TLW"
    # what a network of ×1 restores is not made by bicubic
    kind = "PairedImageDataset" if facts["upscale"] == 1 else "BicubicSRDataset"
    assert {data["type"] for data in opt["datasets"].values()} == {kind}
    assert all(("dataroot_lq" in data) == (facts["upscale"] == 1) for data in opt["datasets"].values())
    with pytest.raises(UserError, match=r"^--name: expected a plain folder name"):
        fine_tuning.fine_tuning(tmp_path / "net.pth", "a/b")


def test_a_fine_tuning_is_resumed_exactly_also_where_its_file_has_moved(model, photographs, train, tmp_path):
    path = model()
    opt = tiny_options(photographs, network_g=of_file(path), val=..., train__total_iter=4, train__rehearse=False)
    opt["logger"]["save_checkpoint_freq"] = 2
    _, resumed = check_resume(train, tmp_path, opt, 2)
    moved = path.rename(tmp_path / "moved.pth")
    opt |= {"network_g": of_file(moved)}
    opt["train"]["total_iter"] = 5
    assert (train(opt, "--auto_resume", root=tmp_path / "cut") / "models/net_g_5.pth").is_file()
    assert resumed.is_dir()


def test_what_a_file_takes_is_what_spandrel_says(model):
    path = model("SAFMN")
    net = build_network({"network_g": of_file(path)}, "network_g", "cpu")
    assert net.training and all(p.requires_grad for p in net.parameters())
    assert (get_size_multiple(of_file(path)), count_input_channels(of_file(path))) == (8, 3)
    net = net.eval().requires_grad_(False)
    upscale = NetworkUpscaler(net, of_file(path))
    image = as_tensor(photograph(height=9, width=17))
    expected = read_model(path)(image)
    assert upscale.scale == 2 and torch.allclose(upscale(image).clamp(0, 1), expected, atol=1e-6)


def test_an_image_smaller_than_a_network_takes_is_padded():
    double = torch.nn.Upsample(scale_factor=2)
    upscale = NetworkUpscaler(double, {"type": "D", "window_size": 4, "smallest_side": 16})
    seen = []
    double.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[-2:]))
    image = as_tensor(photograph(height=5, width=18))
    assert torch.equal(upscale(image), torch.nn.Upsample(scale_factor=2)(image)) and seen == [(16, 20)]


def test_a_grey_network_is_used_but_not_fine_tuned_on_colour(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = model(channels=1)
    assert cv2.imwrite("in.png", photograph(height=8, width=8))
    with pytest.raises(SystemExit):
        run(infer, "in.png", "--model", path, "--out", "o")
    assert cv2.imread("o/in.png").shape == (16, 16, 3)
    refused(r"--model: .* takes 1 and gives 1 channels; expected 3, RGB", run, add, "--model", path)


def unknown(folder):
    net = build_network({"network_g": EDSR}, "network_g", "cpu")
    torch.save(net.state_dict(), folder / "m.pth")


def damaged(folder):
    state = Compact().state_dict()
    state["body.0.weight"][0, 0, 0, 0] = torch.nan
    torch.save(state, folder / "m.pth")


def with_own_call(folder):
    """DRUNet, which takes a noise level beside the image, so that spandrel calls it in its own way."""
    torch.save(DRUNet(in_nc=4, out_nc=3, nc=[8, 8, 8, 8], nb=3).state_dict(), folder / "m.pth")


BAD = {
    "unknown": (unknown, "m.pth is of no network that spandrel knows, it starts with .*; give its options by --opt or"),
    "not finite": (damaged, r"m.pth: body.0.weight has values that are not finite"),
    "own call": (with_own_call, "m.pth is a DRUNet network, which takes more than an image"),
    "no file": (lambda folder: None, "m.pth does not exist"),
    "text": (lambda folder: (folder / "m.pth").write_text("no network"), "m.pth is not a readable checkpoint"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_file_that_cannot_be_used_is_named(kind, photographs, tmp_path, train):
    make, message = BAD[kind]
    make(tmp_path)
    path = tmp_path / "m.pth"
    refused(message, run, evaluate, "--gt", photographs, "--model", path)
    refused(message, train, tiny_options(photographs, network_g=of_file(path)))
    assert not (tmp_path / "experiments").exists()


def test_options_that_do_not_go_with_a_file_are_refused(model, photographs, train):
    path = model()
    with pytest.raises(UserError, match=r"--checkpoint: not with --model"):
        run(evaluate, "--gt", photographs, "--model", path, "--checkpoint", path)
    with pytest.raises(UserError, match=r"--scale: 4, but the network of .* is of scale 2"):
        run(evaluate, "--gt", photographs, "--model", path, "--scale", 4)
    refused(r"--scale: missing; --bicubic needs it", run, evaluate, "--gt", photographs, "--bicubic")
    with pytest.raises(UserError, match=r"network_g.upscale: 2 does not fit scale: 4"):
        train(tiny_options(photographs, network_g=of_file(path), scale=4))
    refused(r"network_g.file: missing", train, tiny_options(photographs, network_g={"type": "SpandrelNetwork"}))
    refused(r"tlw add: expected IN.yml OUT.yml, or --model FILE", run, add, "in.yml")
