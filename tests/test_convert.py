"""Published checkpoints, against plain formulations of the published networks with the published names."""

import json

import pytest
import torch
from basicsr.archs import build_network
from spandrel.architectures.HAT import HAT
from torch import nn
from torch.nn import functional as F

from tests.conftest import DATA
from tests.helpers import refused
from tlw_basicsr import fixed_sum
from tlw_basicsr.tools.convert import PUBLISHED, convert_file
from tlw_basicsr.util.files import load_file
from tlw_basicsr.util.yaml_options import load_yaml


def conv3(cin, cout, bias=True):
    return nn.Conv2d(cin, cout, 3, padding=1, bias=bias)


def named(**modules):
    """A module with these children and no forward."""
    parent = nn.Module()
    for name, module in modules.items():
        parent.add_module(name, module)
    return parent


class EDSR(nn.Module):
    def __init__(self, scale):
        super().__init__()
        steps = [3] if scale == 3 else [2] * (scale // 2)
        upsampler = [m for s in steps for m in (conv3(64, 64 * s * s), nn.PixelShuffle(s))]
        self.sub_mean, self.add_mean = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)  # in the file, not applied
        self.head = nn.Sequential(conv3(3, 64))
        blocks = [named(body=nn.Sequential(conv3(64, 64), nn.ReLU(), conv3(64, 64))) for _ in range(16)]
        self.body = nn.Sequential(*blocks, conv3(64, 64))
        self.tail = nn.Sequential(nn.Sequential(*upsampler), conv3(64, 3))

    def forward(self, x):
        x = first = self.head(x)
        for block in self.body[:16]:
            x = x + block.body(x)
        return self.tail(self.body[16](x) + first)


class VDSR(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale
        self.conv1 = nn.Sequential(conv3(3, 64, False))
        self.trunk = nn.Sequential(*(named(conv=conv3(64, 64, False)) for _ in range(10)))
        self.conv2 = conv3(64, 3, False)

    def forward(self, x):
        up = F.interpolate(x, scale_factor=self.scale, mode="bicubic", align_corners=False)
        x = self.conv1(up).relu()
        for layer in self.trunk:
            x = layer.conv(x).relu()
        return self.conv2(x) + up


class RCAN(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

        def module(*layers):
            return named(module=nn.Sequential(*layers))

        def block():
            squeeze = [nn.AdaptiveAvgPool2d(1), nn.Conv2d(64, 4, 1), nn.ReLU(), nn.Conv2d(4, 64, 1), nn.Sigmoid()]
            return module(conv3(64, 64), nn.ReLU(), conv3(64, 64), module(*squeeze))

        self.sf = conv3(3, 64)
        self.rgs = nn.Sequential(*(module(*(block() for _ in range(20)), conv3(64, 64)) for _ in range(10)))
        self.conv1 = conv3(64, 64)
        self.upscale = nn.Sequential(conv3(64, 64 * scale**2), nn.PixelShuffle(scale))
        self.conv2 = conv3(64, 3)

    def forward(self, x):
        x = first = self.sf(x)
        for group in self.rgs:
            before = x
            for block in group.module[:20]:
                y = block.module[2](block.module[0](x).relu())
                x = x + y * block.module[3].module(y)
            x = before + group.module[20](x)
        return self.conv2(self.upscale(self.conv1(x) + first))


class PublishedHAT(nn.Module):
    def __init__(self, _):
        super().__init__()
        self.net = HAT(upscale=4, overlap_ratio=0)  # in the BGR order and the range of its input
        self.forward = self.net.forward


class WeightNet(nn.Module):
    def __init__(self, _):
        super().__init__()
        layers = []
        for cin, kernel in ((6, 7), (64, 5), (64, 3)):
            layers += [nn.Conv2d(cin, 64, kernel, padding=kernel // 2), nn.BatchNorm2d(64), nn.ReLU()]
        self.conv = nn.Sequential(*layers, conv3(64, 3), nn.Sigmoid())

    def forward(self, x, sr):
        return fixed_sum(self.conv(torch.cat([x, sr], dim=1)), 0.4)


NETS = {"edsr": EDSR, "vdsr": VDSR, "rcan": RCAN, "hat": PublishedHAT, "weight": WeightNet}
CASES = [(net, scale) for net in ("edsr", "vdsr", "rcan") for scale in (2, 3, 4)] + [("hat", 4), ("weight", 4)]


def published(net, scale):
    model = NETS[net](scale).eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):  # not the identity
            layer.running_mean.uniform_(-0.2, 0.2)
            layer.running_var.uniform_(0.5, 2)
            nn.init.uniform_(layer.weight, 0.5, 2)
    return model


@pytest.mark.parametrize(("net", "scale"), CASES)
@torch.no_grad()
def test_gives_on_rgb_what_the_original_gives_on_bgr(tmp_path, net, scale):
    original = published(net, scale)
    torch.save(original.state_dict(), tmp_path / "in.pth")
    options = convert_file(tmp_path / "in.pth", tmp_path / "out.pth", net, None if net in ("hat", "weight") else scale)
    assert options == tmp_path / "out.yml"
    content = load_yaml(options.read_text("utf-8"), "out.yml")
    section = content[PUBLISHED[net].section]
    assert content["path"] == {f"pretrain_{PUBLISHED[net].section}": str(tmp_path / "out.pth")}
    ours = build_network(section).eval()
    ours.load_state_dict(load_file(tmp_path / "out.pth", "")["params"])
    image, sr = torch.rand(2, 1, 3, 12, 14)
    bgr, bgr_sr = (2 * x.flip(-3) - 1 for x in (image, sr))
    if net == "weight":
        expected, result = original(bgr, bgr_sr).flip(-3), ours(sr, image, 0.4)
    else:
        expected, result = (original(bgr).flip(-3) + 1) / 2, ours(image)
    assert expected.std() > 1e-3
    assert (expected - expected.flip(-3)).abs().max() > 1e-3  # the channels' order matters
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("net", "scale"), CASES)
def test_the_formulations_have_the_published_names(net, scale):
    path = DATA.parent / "spec" / "official_checkpoint_keys.json"
    if not path.is_file():
        pytest.skip(f"the list of the published names is not in {path.parent}")
    key = "WNet" if net == "weight" else f"{net.upper()}_x{scale}"
    with torch.device("meta") if net != "hat" else torch.device("cpu"):
        state = NETS[net](scale).state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == json.loads(path.read_text())[key]


@pytest.fixture(scope="module")
def wrong_files(tmp_path_factory):
    """A folder of a good checkpoint of VDSR and of others."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with torch.random.fork_rng():
        state = VDSR(4).state_dict()
    for name, content in {
        "good": state,
        "list": [1, 2],
        "less": dict(list(state.items())[1:]),
        "basicsr": {"params": state},
        "lightning": {"state_dict": state, "epoch": 3},
        "more": {**state, "more.weight": torch.zeros(1)},
        "shape": {**state, "conv2.weight": torch.zeros(3, 32, 3, 3)},
    }.items():
        torch.save(content, folder / f"{name}.pth")
    content = (folder / "good.pth").read_bytes()
    (folder / "cut.pth").write_bytes(content[: len(content) // 2])
    (folder / "text.pth").write_text("not a checkpoint")
    return folder


WRONG = [
    ("missing.pth", "vdsr", "missing.pth does not exist"),
    ("cut.pth", "vdsr", "cut.pth is not a readable checkpoint"),
    ("text.pth", "vdsr", "text.pth is not a readable checkpoint"),
    ("list.pth", "vdsr", "list.pth must hold a dict"),
    ("basicsr.pth", "vdsr", "more than tensors, OrderedDict under 'params'; expected is a plain state dict"),
    ("lightning.pth", "vdsr", "more than tensors, OrderedDict under 'state_dict'; expected is a plain state dict"),
    ("less.pth", "vdsr", r"1 tensors missing.*; check --net and --scale"),
    ("more.pth", "vdsr", "is no published vdsr: it has a tensor 'more.weight'"),
    ("shape.pth", "vdsr", r"conv_last.weight is \(3, 32, 3, 3\), not \(3, 64, 3, 3\)"),
    *(("good.pth", net, f"is no published {net}") for net in ("edsr", "weight", "hat")),
]


def test_another_file_is_one_clear_line_and_nothing_is_written(tmp_path, wrong_files):
    for name, net, message in WRONG:
        refused(message, convert_file, wrong_files / name, tmp_path / "out.pth", net, 4)
    assert not list(tmp_path.iterdir())


def test_another_scale_is_refused(tmp_path):
    torch.save(EDSR(4).state_dict(), tmp_path / "in.pth")
    for net, scale, message in (
        ("edsr", 2, r"IN.pth as edsr ×2: .*in.pth is of another network.*; check --net and --scale$"),
        ("edsr", 5, "--scale: 5; published for edsr are 2, 3, 4"),
        *((net, None, f"--scale: missing; published for {net} are 2, 3, 4") for net in ("edsr", "vdsr", "rcan")),
        ("hat", 2, "--scale: 2; published for hat are 4"),
    ):
        refused(message, convert_file, tmp_path / "in.pth", tmp_path / "out.pth", net, scale)


def test_a_bad_number_is_not_reported_as_another_network(tmp_path):
    state = WeightNet(None).state_dict()
    torch.save({**state, "conv.0.bias": torch.full((64,), torch.nan)}, tmp_path / "in.pth")
    refused(r"IN.pth as weight: .*not finite[^;]*$", convert_file, tmp_path / "in.pth", tmp_path / "out.pth", "weight")
    torch.save(state, tmp_path / "in.pth")
    options = convert_file(tmp_path / "in.pth", tmp_path / "out.pth", "weight")
    assert "scale" not in options.read_text("utf-8")


def test_the_program(script, wrong_files):
    good = wrong_files / "good.pth"
    for target, code, message in (
        ("o.pth", 0, "Written: o.pth, o.yml\n"),
        (good, 2, f"error: OUT.pth: {good} is IN.pth; name another file\n"),
        ("x.pt", 2, "error: OUT.pth: x.pt must end in .pth\n"),
    ):
        arguments = (good, target, "--net", "vdsr", "--scale", 4)
        assert script("convert_official_checkpoint.py", *arguments, code=code).startswith(message)
