"""The size that is told of an image is the size that every program reads."""

import io
import struct
import warnings
import zlib

import cv2
import numpy as np
import pytest
import torch
from basicsr.data import build_dataset
from PIL import Image

from tests.conftest import photograph
from tests.helpers import refused
from tlw_basicsr import compat
from tlw_basicsr.data import images
from tlw_basicsr.data.images import image_size, is_grey, read_8bit, read_picture
from tlw_basicsr.engine.preflight import check_images
from tlw_basicsr.tools.evaluation import bicubic, evaluate
from tlw_basicsr.tools.inference import png_chunk
from tlw_basicsr.tools.prepare import prepare

KINDS = ["PNG", "late PNG", "TIFF", "JPEG", "WEBP", "AVIF", "JPEG2000"]
HEIGHT, WIDTH = 64, 96


def exif_last(png):
    """A PNG whose EXIF stands behind its pixels."""
    chunks, place = [], 8
    while place < len(png):
        (length,) = struct.unpack(">I", png[place : place + 4])
        chunks.append(png[place : place + 12 + length])
        place += 12 + length
    exif = [chunk for chunk in chunks if chunk[4:8] == b"eXIf"]
    rest = [chunk for chunk in chunks if chunk[4:8] != b"eXIf"]
    return png[:8] + b"".join([*rest[:-1], *exif, rest[-1]])


def write_oriented(path, kind, orientation, alpha=None):
    """A photograph with an EXIF orientation; skips what this Pillow or OpenCV lacks."""
    image = Image.fromarray(photograph("coffee", 100, 150, HEIGHT, WIDTH))
    if alpha is not None:
        image.putalpha(Image.fromarray(alpha))
    exif = Image.Exif()
    exif[0x112] = orientation
    content, form = io.BytesIO(), kind.removeprefix("late ")
    try:
        image.save(content, form, exif=exif, **({"lossless": True, "exact": True} if form == "WEBP" else {}))
    except (KeyError, OSError):
        pytest.skip(f"Pillow writes no {form}")
    data = exif_last(content.getvalue()) if kind == "late PNG" else content.getvalue()
    path.write_bytes(data)
    if cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) is None:
        pytest.skip(f"OpenCV reads no {form}")
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", KINDS)
def test_every_program_reads_the_size_that_is_told(tmp_path, kind, orientation):
    suffix = {"JPEG2000": "jp2"}.get(kind, kind.split()[-1].lower())
    (tmp_path / "gt").mkdir()
    (tmp_path / "lq").mkdir()
    path = write_oriented(tmp_path / f"gt/a.{suffix}", kind, orientation)
    whole = read_8bit(path)
    height, width = image_size(path, "--gt")
    picture = (read_picture(path).image[0].permute(1, 2, 0).numpy()[..., ::-1] * 255).round()
    assert (height, width) == whole.shape[:2] == picture.shape[:2]
    assert abs(picture - whole).max() <= (12 if kind in ("JPEG", "AVIF", "JPEG2000") else 0)  # two decoders

    prepare(tmp_path / "gt", tmp_path / "out", scales=[2])
    assert np.array_equal(cv2.imread(str(tmp_path / "out/HR/a.png")), whole)
    prepare(tmp_path / "gt", tmp_path / "tiles", crop_size=32, step=16, threshold=0)
    assert len(list((tmp_path / "tiles/HR").iterdir())) == 15

    (tmp_path / "out/LRbicx2/a.png").rename(tmp_path / "lq/a.png")
    opt = {
        "name": "pairs", "type": "PairedImageDataset", "dataroot_gt": str(tmp_path / "gt"), "phase": "val", "scale": 2,
        "dataroot_lq": str(tmp_path / "lq"), "io_backend": {"type": "disk"},
    }  # fmt: skip
    check_images(opt, "datasets.val", {})
    item = build_dataset(opt)[0]
    assert item["gt"].shape == (3, height, width) and item["lq"].shape == (3, height // 2, width // 2)
    rows = evaluate({"field": bicubic(2)}, tmp_path / "gt", 2, lq_folder=tmp_path / "lq")
    assert rows[0]["psnr_y"] > 20


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "late PNG", "WEBP", "AVIF"])
def test_alpha_lies_as_the_colours_do(tmp_path, kind, orientation):
    """Of one colour, so that only the format can tell."""
    alpha = np.zeros((HEIGHT, WIDTH), np.uint8)
    alpha[:10, :30] = 255
    path = write_oriented(tmp_path / "a", kind, orientation, alpha)
    picture = read_picture(path)
    assert picture.alpha.shape == tuple(picture.image.shape[-2:])
    turns = read_8bit(path).shape[:2] != (HEIGHT, WIDTH) if orientation > 4 else kind not in ("AVIF",)
    expected = images.turn(alpha, orientation if turns else 1)
    assert abs(picture.alpha * 255 - expected).max() < 60


def test_huge_images_and_broken_ones(tmp_path, monkeypatch):
    cv2.imwrite(str(tmp_path / "a.png"), photograph(height=20, width=30))
    for limit in (400, 10):  # Pillow warns, and it refuses twice as many
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert image_size(tmp_path / "a.png", "x") == read_picture(tmp_path / "a.png").image.shape[-2:] == (20, 30)
        assert limit == Image.MAX_IMAGE_PIXELS
    (tmp_path / "b.png").write_bytes(b"nothing")
    for name, message in (("b.png", "x: .*b.png is not an image that can be read"), ("c.png", "c.png does not exist")):
        refused(message, image_size, tmp_path / name, "x")


@pytest.mark.parametrize(
    ("bits", "rows"),
    [(1, [b"\x7f"]), (2, [b"\x6f"]), (4, [b"\x12", b"\x0f"]), (8, [b"\1\2\3"]), (16, [b"\0\1\0\2\1\0"])],
)
def test_one_transparent_level_of_grey_is_alpha(tmp_path, bits, rows):
    """Level 1 of 2^bits is transparent: where it is in the rows, from the left or the top, no other is."""
    write_png(tmp_path / "a.png", rows, len(rows[0]) * 8 // bits, 0, bits, transparent=1)
    picture = read_picture(tmp_path / "a.png")
    level = 1 / (2**bits - 1)
    assert picture.image.shape[1] == 1 and picture.levels == (65535 if bits == 16 else 255)
    assert np.array_equal(picture.alpha == 0, abs(picture.image[0, 0].numpy() - level) < level / 2)
    assert set(picture.alpha.ravel()) == {0, 1}


def test_cmyk_of_a_tiff_becomes_rgb(tmp_path):
    cmyk = Image.fromarray(photograph(height=12, width=10)).convert("CMYK")
    cmyk.save(tmp_path / "a.tif")
    picture = read_picture(tmp_path / "a.tif")
    assert picture.alpha is None
    assert abs(picture.image[0].permute(1, 2, 0).numpy() * 255 - np.array(cmyk.convert("RGB"))).max() < 1e-3


def test_of_several_images_in_a_file_none_is_lost_without_a_word(tmp_path):
    first, *others = [Image.fromarray(np.full((8, 9, 3), level, np.uint8)) for level in (10, 90, 170)]
    for name, kind in (("a.tif", "TIFF"), ("a.png", "PNG"), ("a.webp", "WEBP"), ("a.jpg", "MPO")):
        first.save(tmp_path / name, kind, save_all=True, append_images=others)
    for name in ("a.tif", "a.png", "a.webp"):
        refused(f"{name}: holds 3 images; accepted are files of one", read_picture, tmp_path / name)
    assert abs(read_picture(tmp_path / "a.jpg").image * 255 - 10).max() < 3  # an ordinary photograph


def test_filter2d_is_a_convolution_for_any_batch_and_layout():
    """BasicSR's own fails where torch pads to another layout."""
    torch.manual_seed(0)
    image, kernels = torch.rand(2, 3, 9, 11), torch.rand(2, 5, 5)
    expected = [
        cv2.filter2D(one.permute(1, 2, 0).numpy(), -1, kernel.numpy(), borderType=cv2.BORDER_REFLECT_101)
        for one, kernel in zip(image, kernels, strict=True)
    ]
    for layout in (torch.contiguous_format, torch.channels_last):
        got = compat.filter2D(image.contiguous(memory_format=layout), kernels)
        assert np.allclose(got.permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)
        one = compat.filter2D(image.contiguous(memory_format=layout), kernels[:1])
        assert torch.allclose(one[0], got[0], atol=1e-5)


def test_what_replaces_basicsrs_functions_is_in_its_place():
    from basicsr.models import realesrgan_model, sr_model
    from basicsr.utils import img_process_util, imwrite

    assert realesrgan_model.filter2D is img_process_util.filter2D is compat.filter2D
    assert sr_model.imwrite is imwrite is images.imwrite


@pytest.mark.parametrize("mode", ["1", "P", "L", "LA", "16 bits", "16 bits and alpha"])
def test_grey_is_what_holds_grey_levels_alone(tmp_path, mode):
    """Whatever the kind of file; with a coloured pixel, or as three channels, the picture is in colour."""
    levels = np.where(photograph(height=20, width=30)[..., :1] > 120, 255, 0).astype(np.uint8)
    rgb, path = Image.fromarray(levels.repeat(3, axis=2)), tmp_path / "a.png"
    if mode.startswith("16"):  # the kind of a PNG is a byte of its head
        kind = 4 if mode.endswith("alpha") else 0
        channels = np.dstack([levels, levels // 2]) if kind else levels
        write_png(path, [row.tobytes() for row in channels.astype(">u2") * 257], 30, kind, 16)
    else:
        rgb.convert(mode).save(path)
    assert is_grey(path) and read_picture(path).image.shape[1] == 1
    picture = read_picture(path)
    assert np.array_equal(picture.image[0, 0], levels[..., 0] / 255)
    assert not mode.startswith("16") or picture.levels == 65535
    assert mode != "16 bits and alpha" or np.array_equal((picture.alpha * 255).round(), levels[..., 0] // 2)
    rgb.putpixel((3, 4), (255, 0, 0))
    for colour in (rgb.convert("P"), rgb, Image.fromarray(levels.repeat(3, axis=2))):
        colour.save(path)
        assert not is_grey(path) and read_picture(path).image.shape[1] == 3


def write_png(path, rows, width, kind, bits, transparent=None):
    """A PNG by hand, of kinds that OpenCV and Pillow don't write."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), bits, kind, 0, 0, 0))]
    if transparent is not None:
        chunks.append((b"tRNS", struct.pack(">H", transparent)))
    chunks += [(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks))
