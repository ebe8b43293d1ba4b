"""Upscaling files by a trained network: every kind of image, tiles, exit codes."""

import struct

import cv2
import numpy as np
import pytest
import torch
from basicsr.archs import build_network
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import as_tensor, photograph, tiny_options, write_yaml
from tests.helpers import EDSR, SHUFFLED, SWINIR, refused, write
from tlw_basicsr import UserError, imresize
from tlw_basicsr.data.images import Picture, read_picture
from tlw_basicsr.networks import count_input_channels, get_size_multiple
from tlw_basicsr.tools.inference import DTYPES, NetworkUpscaler, png_chunk, upscale_picture, write_result
from tlw_basicsr.util.yaml_options import load_yaml


def network(options):
    return build_network(dict(options)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def trained(photographs, tmp_path_factory):
    """YAML and checkpoint of an EDSR ×2 that gives the nearest pixel's value and a little of its surroundings."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    net = network(EDSR)
    path = folder / "net_g.pth"
    torch.save({"params": net.state_dict(), "params_ema": {k: v * 0.9 for k, v in net.state_dict().items()}}, path)
    opt = tiny_options(photographs, network_g=EDSR, path={"pretrain_network_g": str(path)})
    return write_yaml(folder, opt), path, net


def as_levels(sr, levels):
    """(1, C, H, W) in [0, 1] to whole levels, as OpenCV reads them."""
    return np.floor(sr[0].clamp(0, 1).permute(1, 2, 0).numpy()[..., ::-1] * levels + 0.5)


def test_files_folders_and_globs(trained, script, tmp_path):
    yaml, checkpoint, net = trained
    (tmp_path / "in").mkdir()
    images = {name: photograph("coffee", 90 * i, 90 * i, 21, 18) for i, name in enumerate("abcd")}
    for name, image in images.items():
        write(tmp_path / "in" / f"{name}.png", image[..., ::-1])
    (tmp_path / "in/notes.txt").write_text("no image")
    one = write(tmp_path / "one.bmp", images["a"][..., ::-1])
    (tmp_path / "in/deeper").mkdir()
    more = ["--opt", yaml, "--param_key", "params", "--suffix", "_x2", "--out", "o"]
    out = script("inference.py", one, "in/[ab].png", "in", *more)
    assert "5 written, 0 skipped" in out  # an image that is named twice is done once
    assert "note: in: 1 folders in it are left out, such as deeper; 'in/**/*.png' goes into folders" in out
    assert {p.name for p in (tmp_path / "o").iterdir()} == {f"{n}_x2.png" for n in ("one", *"abcd")}
    for name, image in images.items():
        expected = as_levels(net(as_tensor(image)), 255)
        assert abs(cv2.imread(str(tmp_path / f"o/{name}_x2.png")).astype(int) - expected).max() <= 1
    # by options and checkpoint, the exponential moving average by default
    script("inference.py", one, "--network", EDSR, "--checkpoint", checkpoint, "--out", "ema")
    assert not np.array_equal(cv2.imread(str(tmp_path / "ema/one.png")), cv2.imread(str(tmp_path / "o/one_x2.png")))


def test_bit_depth_alpha_grey_and_palette_stay_what_they_are(trained, script, tmp_path):
    yaml, _, net = trained
    image = photograph(height=24, width=20)
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    deep = image.astype(np.uint16) * 257 + 3
    alpha = np.full(image.shape[:2], 255, np.uint8)
    alpha[:, 10:] = 20 + np.arange(10) * 20
    rgba = np.dstack([image[..., ::-1], alpha])
    folder = tmp_path / "in"
    folder.mkdir()
    files = {"grey": grey, "deep": deep[..., ::-1], "deepgrey": deep[..., 0], "rgba": rgba}
    for name, content in (files | {"deepalpha": rgba.astype(np.uint16) * 257}).items():
        write(folder / f"{name}.png", content)
    palette = Image.fromarray(image).quantize(16)
    palette.save(folder / "palette.png")
    Image.fromarray(np.dstack([grey, alpha]), "LA").save(folder / "greyalpha.png")
    script("inference.py", "in", "--opt", yaml, "--param_key", "params", "--out", "o")
    got = {p.stem: cv2.imread(str(p), cv2.IMREAD_UNCHANGED) for p in (tmp_path / "o").iterdir()}
    kinds = {name: (result.dtype.name, result.shape[2:]) for name, result in got.items()}
    assert kinds == {
        "grey": ("uint8", ()), "deep": ("uint16", (3,)), "deepgrey": ("uint16", ()), "rgba": ("uint8", (4,)),
        "deepalpha": ("uint16", (4,)), "palette": ("uint8", (3,)), "greyalpha": ("uint8", (4,)),
    }  # fmt: skip
    assert all(result.shape[:2] == (48, 40) for result in got.values())

    signal = torch.from_numpy(deep.astype(np.float32) / 65535).permute(2, 0, 1)[None]
    assert abs(got["deep"].astype(int) - as_levels(net(signal), 65535)).max() <= 2
    for result, source in (
        (got["grey"][..., None], np.dstack([grey] * 3)),
        (got["palette"], np.array(palette.convert("RGB"))),
        (got["rgba"][..., :3], image),
    ):
        sr = net(as_tensor(source))
        expected = sr.mean(1, keepdim=True) if result.shape[2] == 1 else sr
        assert abs(result.astype(int) - as_levels(expected, 255)).max() <= 1
    expected = imresize(alpha.astype(np.float32) / 255, 2).clip(0, 1) * 255
    assert abs(got["rgba"][..., 3] - expected).max() <= 0.51
    assert (got["rgba"][:, :12, 3] == 255).all()  # opaque stays opaque
    assert abs(got["deepalpha"][..., 3] / 257 - expected).max() <= 0.01
    assert np.ptp(got["greyalpha"][..., :3], axis=2).max() == 0
    assert np.array_equal(got["greyalpha"][..., 0], got["grey"])


def test_colours_next_to_transparency_do_not_take_the_hidden_colour():
    upscale = NetworkUpscaler(torch.nn.Upsample(scale_factor=4, mode="bicubic"), {"type": "D"})
    alpha = np.zeros((12, 14), np.float32)
    alpha[3:9, 5:] = 1
    for visible, hidden in ((1.0, 0.0), (0.0, 1.0), (0.25, 0.75)):
        image = torch.from_numpy(np.where(alpha > 0, visible, hidden).astype(np.float32)).expand(1, 3, -1, -1)
        sr = upscale_picture(upscale, Picture(image, alpha, 255))
        assert abs(sr[..., :3].astype(int) - round(visible * 255)).max() <= 1
        assert set(np.unique(sr[..., 3])) > {0, 255}
    clear = Picture(torch.full((1, 3, 4, 4), 0.5), np.zeros((4, 4), np.float32), 255)
    assert (upscale_picture(upscale, clear)[..., :3] == 128).all()


PROFILES = [
    ("png", "RGB", b"RGB ", True), ("png", "RGBA", b"RGB ", True), ("jpg", "RGB", b"RGB ", True),
    ("webp", "RGB", b"RGB ", True), ("tif", "RGB", b"RGB ", True), ("png", "L", b"GRAY", True),
    ("png", "LA", b"GRAY", False), ("jpg", "CMYK", b"CMYK", False),
]  # fmt: skip


def test_the_colour_space_stays_or_its_loss_is_reported(tmp_path):
    upscale, target = NetworkUpscaler(torch.nn.Identity(), {"type": "D"}), tmp_path / "o.png"
    for suffix, mode, space, kept in PROFILES:
        source = tmp_path / f"a.{suffix}"
        profile = bytes(16) + space + bytes(108)  # its head names its colour space
        Image.fromarray(photograph(height=12, width=10)).convert(mode).save(source, icc_profile=profile)
        note = write_result(upscale_picture(upscale, read_picture(source)), target, source)
        with Image.open(target) as result:
            assert result.info.get("icc_profile") == (profile if kept else None)
            result.load()
        assert note == "" if kept else f"its ICC profile is for {space.decode()} images and is not kept" in note


def test_the_gamma_of_a_png_stays(tmp_path):
    source, target = tmp_path / "a.png", tmp_path / "o.png"
    Image.fromarray(photograph(height=12, width=10)).save(source)
    content = source.read_bytes()
    chunks = png_chunk(b"gAMA", struct.pack(">I", 100_000)) + png_chunk(b"cHRM", bytes(range(32)))
    source.write_bytes(content[:33] + chunks + png_chunk(b"tEXt", b"a\0b") + content[33:])
    assert write_result(np.zeros((4, 4, 3), np.uint8), target, source) == ""
    assert target.read_bytes()[33:].startswith(chunks) and b"tEXt" not in target.read_bytes()
    assert Image.open(target).info["gamma"] == 1


def test_what_cant_be_done_is_skipped_and_counted(trained, script, tmp_path):
    yaml = trained[0]
    good = write(tmp_path / "good.png", photograph(height=12, width=12))
    write(tmp_path / "good.bmp", photograph(height=12, width=12))
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("not an image")
    content = cv2.imencode(".png", photograph(height=64, width=64))[1].tobytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    write(tmp_path / "float.tiff", np.zeros((8, 8), np.float32))
    write(tmp_path / "alpha.tiff", np.zeros((8, 8, 4), np.uint8))
    Image.new("LA", (8, 8)).save(tmp_path / "la.tiff")
    (tmp_path / "folder").mkdir()
    (tmp_path / "links").mkdir()
    (tmp_path / "links/broken.png").symlink_to("nothing")
    expected = {
        "none.png": "does not exist",
        "*.gif": "does not exist",
        "folder": "has no image",
        "empty.png": "not an image",
        "text.jpg": "not an image",
        "cut.png": "not an image",
        "float.tiff": "float32; accepted are 8 and 16 bits",
        "alpha.tiff": "accepted are PNG and WebP",
        "la.tiff": "accepted are PNG and WebP",
        "~nobody-here/a.png": "can't be read",
        300 * "x": "can't be read (File name too long)",
        "links": "broken.png: does not exist",
    }
    out = script("inference.py", *expected, good, "good.bmp", "--opt", yaml, "--out", "o", code=1)
    lines = [line for line in out.splitlines() if line.startswith("skipped: ")]
    for name, message in expected.items():
        assert any(name in line and message in line for line in lines), (name, lines)
    assert len(lines) == 12 and "2 written, 12 skipped" in out
    assert {p.name for p in (tmp_path / "o").iterdir()} == {"good_png.png", "good_bmp.png"}

    before = good.read_bytes()
    (tmp_path / "o2").mkdir()
    (tmp_path / "o2/good.png").symlink_to(good)  # nor is what a link of this name leads to replaced
    for folder in (".", "o2"):
        out = script("inference.py", good, "--opt", yaml, "--out", folder, code=1)
        assert "would replace the input" in out and good.read_bytes() == before
    assert (tmp_path / "o2/good.png").is_symlink()


def test_an_image_and_a_link_to_it_are_both_done(trained, script, tmp_path):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in/a.png", photograph(height=12, width=12))
    (tmp_path / "in/b.png").symlink_to("a.png")
    (tmp_path / "again").symlink_to("in")
    name = 240 * "n"
    write(tmp_path / f"in/{name}.png", photograph(height=8, width=8))
    more = ("--opt", trained[0], "--out", "o", "--suffix", "_x2" + 20 * "s")
    out = script("inference.py", "in", "again", "in/a.png", *more, code=1)
    assert "2 written, 1 skipped" in out
    assert out.count("skipped: ") == 1 and "can't be written (File name too long)" in out
    assert {p.name[:4] for p in (tmp_path / "o").iterdir()} == {"a_x2", "b_x2"}


def test_what_is_not_finite_is_no_image(script, tmp_path):
    net = network(EDSR)
    torch.save({"params": {name: 1e4 * v for name, v in net.state_dict().items()}}, tmp_path / "net.pth")
    write(tmp_path / "a.png", photograph(height=12, width=12))
    more = ("--network", EDSR, "--checkpoint", "net.pth", "--out", "o")
    out = script("inference.py", "a.png", *more, "--dtype", "fp16", code=1)
    assert "0 written, 1 skipped" in out and not list((tmp_path / "o").iterdir())
    assert "a.png: can't be upscaled (FloatingPointError: values are not finite in fp16; try bf16 or fp32)" in out

    class Infinite(torch.nn.Module):
        def forward(self, x):
            return x / 0

    for dtype, message in (("bf16", "in bf16; try fp32$"), ("fp32", "in fp32$")):
        with pytest.raises(FloatingPointError, match=message):
            upscale = NetworkUpscaler(Infinite(), {"type": "D"}, dtype=DTYPES[dtype])
            upscale_picture(upscale, read_picture(tmp_path / "a.png"))


def test_wrong_usage_is_one_line_and_exit_code_2(trained, script, tmp_path):
    yaml, checkpoint, _ = trained
    good = write(tmp_path / "good.png", photograph(height=12, width=12))
    other = {**EDSR, "num_feat": 4}
    (tmp_path / "yaml").mkdir()
    paths = ["x"], {"pretrain_network_g": 5}, {"pretrain_network_g": "~nobody-here/g.pth"}
    opts = [{"network_g": EDSR, "path": path} for path in paths]
    list_of_paths, number, nobody = (write_yaml(tmp_path / "yaml", opt, f"{i}.yml") for i, opt in enumerate(opts))
    for arguments, message in (
        (("--opt", "none.yml"), "none.yml does not exist"),
        (("--opt", yaml, "--checkpoint", "none.pth"), "none.pth does not exist"),
        (("--opt", yaml, "--tile", 32, "--overlap", 17), "expected an overlap of 0 to half the tile, got 17 of 32"),
        (("--opt", yaml, "--tile", -1), "--tile"),
        (("--opt", yaml, "--device", "cuda:99"), "--device: 'cuda:99' is not here"),
        (("--opt", yaml, "--device", "meta"), "--device: 'meta' is not here; accepted are auto, cpu"),
        (("--opt", yaml, "--suffix", "a/b"), "--suffix: expected a part of a file name"),
        (("--opt", yaml, "--suffix", 300 * "s"), "--suffix: expected a part of a file name, at most 100 characters"),
        (("--opt", yaml, "--out", 300 * "o"), "File name too long"),
        (("--opt", yaml, "--checkpoint", 5000 * "c"), "ccc"),
        (("--opt", list_of_paths), "path: expected a section of 'key: value', got ['x']"),
        (("--opt", number), "path.pretrain_network_g: expected the path of a checkpoint, or ~, got 5"),
        (("--opt", nobody), "path.pretrain_network_g: ~nobody-here/g.pth"),
        (("--network", "", "--checkpoint", checkpoint), "network_g: expected a section with 'type', got None"),
        (("--opt", yaml, "--out", "good.png"), "--out: good.png can't be made"),
        (("--network", other, "--checkpoint", checkpoint), "is of another network"),
        (("--network", {**EDSR, "num_feats": 4}, "--checkpoint", checkpoint), "network_g.num_feats: unknown option"),
        (("--network", EDSR), "--checkpoint: missing"),
    ):
        assert message in script("inference.py", good, *arguments, code=2)
    assert {p.name for p in tmp_path.iterdir()} == {"good.png", "yaml"}


@pytest.mark.parametrize("options", [{**EDSR, "num_block": 8}, SWINIR, SHUFFLED], ids=lambda o: o["type"])
def test_seams_of_tiles_are_below_one_level(options):
    """With an overlap of 16 LR pixels, where EDSR sees 19, RRDBNet 34 and SwinIR more."""
    torch.manual_seed(1)
    net, image = network(options), as_tensor(photograph(height=101, width=74))
    whole = NetworkUpscaler(net, options)(image).clamp(0, 1)
    tiled = NetworkUpscaler(net, options, tile=40, overlap=16)(image).clamp(0, 1)
    assert whole.shape == tiled.shape == (1, 3, 202, 148)
    assert (tiled - whole).abs().max() * 255 < 1
    hard = NetworkUpscaler(net, options, tile=40, overlap=0)(image).clamp(0, 1)
    assert (hard - whole).abs().max() * 255 > 2  # so the overlap is what does it


def test_tiles_that_overlap_by_what_a_network_sees_give_the_whole():
    torch.manual_seed(1)
    options = {**EDSR, "num_block": 1}  # sees 6 pixels to each side, 3/8 of the overlap
    net, image = network(options), as_tensor(photograph(height=203, width=131))
    whole, seen = net(image), []
    net.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[-2:].numel()))
    tiled = NetworkUpscaler(net, options, tile=64, overlap=16)
    seen.clear()
    assert (tiled(image) - whole).abs().max() < 1e-6
    assert len(seen) == 4 * 3 and sum(seen) == 12 * 63 * 55


@given(st.integers(1, 90), st.integers(0, 40), st.integers(1, 200), st.sampled_from([1, 2, 8]))
def test_any_tiling_of_a_local_network_is_the_whole(tile, overlap, length, multiple):
    double = torch.nn.Upsample(scale_factor=2)
    if tile < 2 * overlap:
        refused("half the tile", NetworkUpscaler, double, {"type": "D"}, tile, overlap)
        return
    image = torch.rand(1, 3, length, 3, generator=torch.Generator().manual_seed(0))
    upscale = NetworkUpscaler(double, {"type": "D", "window_size": multiple}, tile, overlap)
    assert torch.allclose(upscale(image), double(image), atol=1e-6)


class OfOneSize(torch.nn.Upsample):
    """A network that takes one size alone, and returns more than the image."""

    def forward(self, x):
        assert x.shape[-2:] == (24, 24)
        return super().forward(x), []


@pytest.mark.parametrize("size", [(24, 24), (10, 70), (61, 47)])
@pytest.mark.parametrize("tile", [None, 512])
def test_a_network_of_one_size_gets_tiles_of_it(size, tile):
    net, image = OfOneSize(scale_factor=2), torch.rand(1, 3, *size)
    upscale = NetworkUpscaler(net, {"type": "D", "patch_size": 20, "out_size": 24}, tile)
    assert torch.allclose(upscale(image), torch.nn.Upsample(scale_factor=2)(image), atol=1e-6)
    with pytest.raises(UserError, match="D fails on an image of 3 channels and 16×16 pixels"):
        NetworkUpscaler(net, {"type": "D", "out_size": 32}, tile)


def test_images_are_normalised_as_those_of_the_data_set(trained, photographs, tmp_path, script):
    path, _, net = trained
    image = photograph(height=40, width=30)
    write(tmp_path / "a.png", image[..., ::-1])
    opt = load_yaml(path.read_text(), "o")
    opt["datasets"]["train"] |= {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.25, 1.0]}
    script("inference.py", tmp_path / "a.png", "--opt", write_yaml(tmp_path, opt), "--out", tmp_path, "--suffix", "_sr")
    mean, std = (torch.tensor(opt["datasets"]["train"][key]).view(3, 1, 1) for key in ("mean", "std"))
    averaged = network(EDSR)
    averaged.load_state_dict({key: value * 0.9 for key, value in net.state_dict().items()})
    expected = (averaged((as_tensor(image) - mean) / std) * std + mean).clamp(0, 1)
    made = as_tensor(cv2.imread(str(tmp_path / "a_sr.png"))).flip(1)
    assert (made - expected).abs().max() < 0.6 / 255
    plain = averaged(as_tensor(image)).clamp(0, 1)
    assert (plain - expected).abs().max() > 2 / 255


@pytest.mark.parametrize("options", [SWINIR, SHUFFLED], ids=lambda o: o["type"])
def test_any_size_is_padded_to_what_the_network_takes(options):
    net = network(options)
    upscale = NetworkUpscaler(net, options)
    assert upscale.scale == 2
    for height, width in ((3, 1), (9, 17)):
        assert upscale(as_tensor(photograph(height=height, width=width))).shape[-2:] == (2 * height, 2 * width)
    image = as_tensor(photograph(height=16, width=16))
    assert torch.equal(upscale(image), net(image))


def test_what_a_network_takes_is_also_read_from_its_class():
    assert [get_size_multiple({"type": name}) for name in ("SwinIR", "TLWHAT", "RRDBNet", "D")] == [7, 7, 1, 1]
    assert [get_size_multiple(options) for options in (SHUFFLED, SWINIR)] == [2, 8]
    assert [count_input_channels({"type": name}) for name in ("SwinIR", "UncertaintyHead", "D")] == [3, 64, 3]
    options = {key: value for key, value in SWINIR.items() if key != "window_size"} | {"img_size": 28}
    upscale = NetworkUpscaler(network(options), options)
    assert upscale(as_tensor(photograph(height=9, width=17))).shape[-2:] == (18, 34)
    with pytest.raises(UserError, match=r"D fails on an image of 3 channels and 16×16 pixels \(RuntimeError: "):
        NetworkUpscaler(torch.nn.Conv2d(5, 3, 1), {"type": "D"})


@pytest.mark.parametrize(("dtype", "limit"), [("bf16", 4), ("fp16", 0.5)])
@pytest.mark.parametrize("options", [EDSR, SWINIR], ids=lambda o: o["type"])
def test_half_precision(options, dtype, limit):
    net, image = network(options), as_tensor(photograph(height=32, width=32))
    exact = NetworkUpscaler(net, options)(image)
    half = NetworkUpscaler(net, options, dtype=DTYPES[dtype])(image)
    assert half.dtype == torch.float32 and not torch.equal(half, exact)
    assert (half - exact).abs().max() * 255 < limit


def test_a_network_of_one_channel_takes_colours_one_by_one(tmp_path, script):
    options = {**SWINIR, "in_chans": 1}
    net = network(options)
    torch.save({"params": net.state_dict()}, tmp_path / "net.pth")
    image = photograph(height=16, width=16)
    write(tmp_path / "a.png", image[..., ::-1])
    write(tmp_path / "grey.png", image[..., 0])
    more = ("--network", options, "--checkpoint", "net.pth", "--out", "o")
    script("inference.py", "a.png", "grey.png", *more)
    expected = torch.cat([net(as_tensor(image)[:, i : i + 1]) for i in range(3)], dim=1)
    got, grey = (cv2.imread(str(tmp_path / f"o/{n}.png"), cv2.IMREAD_UNCHANGED).astype(int) for n in ("a", "grey"))
    assert abs(got - as_levels(expected, 255)).max() <= 1 and abs(grey - got[..., 2]).max() <= 1
