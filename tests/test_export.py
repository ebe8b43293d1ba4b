"""ONNX and safetensors files of a network, read by onnxruntime and safetensors themselves."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from basicsr.archs import build_network
from safetensors import safe_open

from tests.conftest import as_tensor, photograph
from tests.helpers import EDSR, SHUFFLED, SWINIR, same
from tlw_basicsr import UserError
from tlw_basicsr.tools import export
from tlw_basicsr.util.files import load_file


def saved(folder, options):
    torch.manual_seed(0)
    net = build_network(dict(options)).eval().requires_grad_(False)
    ema = {name: v * 0.9 if v.is_floating_point() else v for name, v in net.state_dict().items()}
    torch.save({"params": net.state_dict(), "params_ema": ema}, folder / "net_g.pth")
    return net


def results(path, image):
    return torch.from_numpy(onnxruntime.InferenceSession(str(path)).run(None, {"lq": image.numpy()})[0])


@pytest.mark.parametrize("options", [EDSR, SHUFFLED, SWINIR], ids=lambda o: o["type"])
def test_onnx_gives_the_networks_results_for_any_size_and_batch(tmp_path, script, options):
    net = saved(tmp_path, options)
    arguments = ("--network", options, "--checkpoint", "net_g.pth", "--param_key", "params")
    assert "for any batch and size" in script("export.py", "net.onnx", *arguments)
    for size in ((40, 56), (16, 16)):  # neither is one of those that it was traced with
        image = torch.cat([as_tensor(photograph(top=top, height=size[0], width=size[1])) for top in (0, 200)])
        assert (results(tmp_path / "net.onnx", image) - net(image)).abs().max() < 1e-4
    model = onnx.load(tmp_path / "net.onnx")
    onnx.checker.check_model(model)
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert about["architecture"] == options["type"] and about["scale"] == "2"
    assert json.loads(about["options"]) == {key: value for key, value in options.items() if key != "type"}
    assert about["size_multiple"] == {"EDSR": "1", "RRDBNet": "2", "SwinIR": "8"}[options["type"]]


def test_onnx_for_one_size_alone(tmp_path, script):
    net = saved(tmp_path, EDSR)
    arguments = ("--checkpoint", "net_g.pth", "--param_key", "params", "--size", 24)
    out = script("export.py", "net.ONNX", "--network", EDSR, *arguments, 16)
    assert "for images of 24×16, one at a time" in out
    image = as_tensor(photograph(height=24, width=16))
    assert (results(tmp_path / "net.ONNX", image) - net(image)).abs().max() < 1e-4
    with pytest.raises(Exception, match="invalid dimensions"):
        results(tmp_path / "net.ONNX", torch.zeros(1, 3, 16, 24))
    saved(tmp_path, SWINIR)
    out = script("export.py", "b.onnx", "--network", SWINIR, *arguments, 20, code=2)
    assert "--size: expected multiples of 8 for SwinIR" in out
    assert not (tmp_path / "b.onnx").exists()


def test_safetensors_holds_the_weights_and_says_what_they_are(tmp_path, script):
    saved(tmp_path, EDSR)
    for key in ("params", "params_ema"):
        arguments = ("--network", EDSR, "--checkpoint", "net_g.pth", "--param_key", key)
        script("export.py", "net.SafeTensors", *arguments)
        with safe_open(tmp_path / "net.SafeTensors", "pt") as file:
            about = file.metadata()
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, a file is no dict
        assert same(state, dict(load_file(tmp_path / "net_g.pth", "")[key]))
        assert about["architecture"] == "EDSR" and json.loads(about["options"])["num_block"] == EDSR["num_block"]


class SizeInItsWeights(torch.nn.Upsample):
    """Can't be exported for any size."""

    def forward(self, x):
        big = super().forward(x)
        return big * float(np.prod([int(side) for side in big.shape[2:]])) if x.shape[2] > 16 else big


class RandomResult(torch.nn.Upsample):
    def forward(self, x):
        return super().forward(x) + torch.rand(()).item()


@pytest.mark.parametrize("kind", [SizeInItsWeights, RandomResult])
def test_a_file_whose_results_differ_is_not_written(tmp_path, kind):
    with pytest.raises(UserError, match="--size HEIGHT WIDTH"):
        export.export_onnx(kind(scale_factor=2), {"type": kind.__name__}, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_wrong_usage_is_one_line(tmp_path, script, monkeypatch):
    saved(tmp_path, EDSR)
    arguments = ("--network", EDSR, "--checkpoint", "net_g.pth")
    lacking = "need {}, not installed here: pip install 'tlw_basicsr[export]'"
    for out, missing, message in (
        ("net.pt", "", "accepted are names that end in .onnx or .safetensors"),
        ("no/a.safetensors", "", "can't be written"),
        ("a.onnx", "onnxscript", lacking.format("onnxscript")),
        ("a.safetensors", "safetensors", lacking.format("safetensors")),
    ):
        monkeypatch.setattr(export, "find_spec", lambda name, missing=missing: None if name == missing else name)
        assert message in script("export.py", out, *arguments, code=2)
    assert {p.name for p in tmp_path.iterdir()} == {"net_g.pth"}
