"""``tlw evaluate`` on small data, against numbers worked out in the test."""

import csv
import json
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import torch
from basicsr.archs import build_network
from basicsr.metrics import calculate_psnr, calculate_ssim
from basicsr.utils.matlab_functions import imresize as basicsr_imresize

from tests.conftest import as_tensor, photograph, write_yaml
from tests.helpers import refused, write
from tlw_basicsr import UserError
from tlw_basicsr.metrics.paper_metrics import lpips_model
from tlw_basicsr.tools import evaluation
from tlw_basicsr.tools.evaluation import FIELD, METRICS, Pair, bicubic, evaluate, means, measure

EDSR = {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 4, "num_block": 1, "upscale": 2}


@pytest.fixture
def gt_folder(tmp_path):
    """Two photographs, whose sides are no multiples of 28 nor of the scale."""
    for number, shape in enumerate([(59, 75), (64, 57)]):
        write(tmp_path / f"gt/p{number}.png", photograph("coffee", 100, 150 + 60 * number, *shape)[..., ::-1])
    return tmp_path / "gt"


def as_levels(sr):
    """(1, 3, H, W) in [0, 1] to the 8-bit image that OpenCV reads."""
    return (sr[0].permute(1, 2, 0).numpy()[..., ::-1] * 255).round().clip(0, 255).astype(np.uint8)


def read_csv(path, column="psnr_y"):
    with open(path) as file:
        return {(row["image"], row["protocol"]): float(row[column]) for row in csv.DictReader(file)}


def test_the_paper_protocol_by_hand(gt_folder):
    """Crop to 56×56 from the top left, float bicubic down and up by BasicSR's own code, nothing rounded."""
    rows = evaluate({"paper": bicubic(2, quantize=False)}, gt_folder, 2)
    for row in rows:
        gt = cv2.imread(str(gt_folder / f"{row['image']}.png"))[:56, :56, ::-1].astype(np.float32) / 255
        sr = basicsr_imresize(basicsr_imresize(np.ascontiguousarray(gt), 0.5), 2).clip(0, 1)
        y = [16 + i.astype(np.float64) @ (219 * np.array([0.299, 0.587, 0.114])) for i in (sr, gt)]
        assert row["psnr_y"] == pytest.approx(10 * np.log10(255**2 / ((y[0] - y[1]) ** 2).mean()), abs=1e-3)
        assert row["l1"] == pytest.approx(np.abs(sr - gt).mean(), rel=1e-4)
        assert row["mse"] == pytest.approx(((sr - gt) ** 2).mean(), rel=1e-4)


def test_at_3_the_paper_protocol_crops_to_84(tmp_path):
    write(tmp_path / "a.png", photograph("coffee", 0, 0, 100, 170))
    (pair, *_) = evaluation.pairs(tmp_path, 3, evaluation.PAPER)
    assert pair.lq.shape == (1, 3, 28, 56)


def test_the_field_protocol_rounds_lr_and_sr_and_cuts_the_border(gt_folder):
    seen = []

    def upscale(lq):
        seen.append(lq)
        return bicubic(2)(lq) + 0.3 / 255  # less than a half: rounded away

    rows = evaluate({"field": upscale}, gt_folder, 2)
    for row, lq in zip(rows, seen, strict=True):
        assert torch.equal(lq * 255, (lq * 255).round())
        gt = cv2.imread(str(gt_folder / f"{row['image']}.png"))
        gt = gt[: gt.shape[0] // 2 * 2, : gt.shape[1] // 2 * 2]
        sr = as_levels(bicubic(2)(lq))
        assert row["psnr_y"] == pytest.approx(calculate_psnr(sr, gt, 2, test_y_channel=True))
        assert row["ssim_y"] == pytest.approx(calculate_ssim(sr, gt, 2, test_y_channel=True))


def test_grey_levels_as_y(tmp_path):
    """Y of RGB has 219 levels for 255 of grey: 1.32 dB more. It is asked of what holds grey levels alone."""
    gt = as_tensor(photograph("coffee", 50, 80, 48, 48))[:, :1].expand(-1, 3, -1, -1)
    sr = (gt + 0.1 * torch.rand(1, 1, 48, 48)).clamp(0, 1)
    as_rgb, as_y = (measure(sr, Pair("", "", sr, gt, 2, FIELD, grey), FIELD.metrics) for grey in (False, True))
    assert as_rgb["psnr_y"] - as_y["psnr_y"] == pytest.approx(20 * np.log10(255 / 219), abs=0.03)
    assert as_rgb["ssim_y"] != as_y["ssim_y"]
    write(tmp_path / "grey.png", as_levels(gt)[..., 0])
    write(tmp_path / "three.png", as_levels(gt))
    rows = (evaluate({"field": bicubic(2)}, tmp_path, 2, grey_as_y=flag) for flag in (False, True))
    before, after = ({row["image"]: row["psnr_y"] for row in each} for each in rows)
    assert after["three"] == before["three"] == before["grey"] > after["grey"] + 1


def test_a_network_by_the_program_with_csv_and_json(gt_folder, tmp_path, script):
    net = build_network(EDSR)
    torch.save({"params": net.state_dict()}, tmp_path / "net.pth")
    write_yaml(tmp_path, {"scale": 2, "network_g": EDSR, "path": {"pretrain_network_g": "net.pth"}}, "net.yml")
    network = ["--opt", "net.yml"]  # which names the checkpoint
    arguments = ["--gt", gt_folder, *network, "--perceptual", "--csv", "a.csv", "--json", "a.json"]
    script("evaluate.py", "--scale", 2, *arguments)
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["field"].keys() == {"psnr_y", "ssim_y", "gmsd", "haarpsi", "vif"}
    assert written["paper"].keys() == {"psnr_y", "l1", "mse", "gmsd", "haarpsi", "vif"}
    rows = read_csv(tmp_path / "a.csv")
    assert list(rows) == [(image, protocol) for image in ("p0", "p1") for protocol in ("field", "paper")]
    expected = means(evaluate({"paper": lambda lq: net(lq)}, gt_folder, 2))["paper"]["psnr_y"]
    assert written["paper"]["psnr_y"] == pytest.approx(expected, abs=1e-4)
    assert np.mean([rows[image, "paper"] for image in ("p0", "p1")]) == pytest.approx(written["paper"]["psnr_y"])

    line = script("evaluate.py", "--gt", gt_folder, "--scale", 3, *network, code=2)
    assert line == "error: --scale: 3, but the network of net.yml is of scale 2\n"


YOUNG = "(params_ema, a young average: 14% of it is the training's first network)"


@pytest.mark.parametrize(
    ("iteration", "ema", "expected"), [(2000, False, "(params)"), (2000, True, YOUNG), ("latest", True, "(params_ema)")]
)
def test_every_number_says_whose_it_is(gt_folder, tmp_path, script, iteration, ema, expected):
    name, entries = f"net_g_{iteration}.pth", ["params", "params_ema"][: 1 + ema]
    torch.save(dict.fromkeys(entries, build_network(EDSR).state_dict()), tmp_path / name)
    write_yaml(tmp_path, {"network_g": EDSR, "train": {"ema_decay": 0.999, "total_iter": 9000}}, "net.yml")
    arguments = ["--opt", "net.yml", "--checkpoint", name, "--protocol", "field"]
    assert f"{name} {expected}" in script("evaluate.py", "--gt", gt_folder, "--scale", 2, *arguments)
    checkpoint = ["--network", EDSR, "--checkpoint", name]
    assert f"by {name} ({entries[-1]})" in script("inference.py", gt_folder, *checkpoint, "--out", "o")


def test_sr_images_of_a_folder(gt_folder, tmp_path, script):
    """They are compared as if a network had made them; what is larger than HR is cut as HR is."""
    for number, name in enumerate(("p0_mine.png", "p1x2.png")):
        image = cv2.imread(str(gt_folder / f"p{number}.png"))
        write(tmp_path / "sr" / name, cv2.GaussianBlur(image, (5, 5), 0))
    arguments = ["evaluate.py", "--gt", "gt", "--scale", 2, "--sr", "sr"]
    out = script(*arguments, "--csv", "a.csv")
    assert "gt, ×2, sr, mean of 2 images" in out and "paper" not in out
    sr, gt = (cv2.imread(str(tmp_path / name))[:64, :56] for name in ("sr/p1x2.png", "gt/p1.png"))
    expected = calculate_psnr(sr, gt, 2, test_y_channel=True)
    assert read_csv(tmp_path / "a.csv")["p1", "field"] == pytest.approx(expected)
    (tmp_path / "sr/p1x2.png").unlink()
    assert "sr: no image for p1; accepted names are p1, p1x2 and p1_…" in script(*arguments, code=2)


def test_published_sr_images_have_their_published_values(benchmark_images, tmp_path):
    published = benchmark_images("Set5_published/RCAN")
    for folder in ("HR_x4", "RCAN_x4"):
        (tmp_path / folder).mkdir()
        for path in (published / folder).glob("*.png"):
            (tmp_path / folder / f"{path.name.split('_')[0]}.png").symlink_to(path)
    rows = evaluate({"field": tmp_path / "RCAN_x4"}, tmp_path / "HR_x4", 4)
    assert means(rows)["field"] == pytest.approx({"psnr_y": 32.63, "ssim_y": 0.9002}, abs=0.01)


def test_lr_images_of_a_folder(gt_folder, tmp_path):
    """LR images as they are on disk; HR is cut to their size."""
    files = ("p0.png", "p1x2.png")
    for number, name in enumerate(files):
        gt = cv2.imread(str(gt_folder / f"p{number}.png"))
        write(tmp_path / "lq" / name, cv2.resize(gt[:50, :40], (20, 25), interpolation=cv2.INTER_AREA))
    rows = evaluate({"field": bicubic(2)}, gt_folder, 2, lq_folder=tmp_path / "lq")
    for row, name in zip(rows, files, strict=True):
        lq = cv2.imread(str(tmp_path / "lq" / name))[..., ::-1].copy()
        gt = cv2.imread(str(gt_folder / f"{row['image']}.png"))[:50, :40]
        expected = calculate_psnr(as_levels(bicubic(2)(as_tensor(lq))), gt, 2, test_y_channel=True)
        assert row["psnr_y"] == pytest.approx(expected)


WRONG = {
    "--gt nowhere": "--gt: nowhere is not a folder",
    "--scale 9": "--scale: expected 1 to 8, got 9",
    "--scale 3": "--gt: gt/p0.png is 59×75 pixels",
    "--lq gt --protocol both": "--protocol both: the paper's",
    "--lq gt": "--lq: gt/p0.png is larger than gt/p0.png by 1/2",
    "--lq other": "--lq other: no LR image for gt/p0.png; expected is the name p0 or p0x2",
    "--json no/x.json": "--json: no/x.json can't be written",
    "--csv gt": "--csv: gt can't be written",
    "--checkpoint y": "--checkpoint: not with --bicubic",
    "--gt small --perceptual --protocol field": "--gt: small/s.png has 40×46 pixels to compare by the protocol field; "
    "VIF needs 41 a side",
    "--gt small --lpips": "--gt: small/s.png has 28×28 pixels to compare by the protocol paper; LPIPS-vgg needs 32 a side",
    "--gt small --lq other": "--gt: small/s.png has 14×48 pixels to compare by the protocol field; SSIM needs 15 a side",
}
WRONG = {f"--bicubic {words}": message for words, message in WRONG.items()} | {
    "--opt x.yml": "-opt: x.yml does not exist",
    "--sr nowhere": "--sr: nowhere is not a folder",
    "--sr gt --protocol paper": "--protocol paper: the paper's",
    "--sr gt --checkpoint y": "--checkpoint: not with --sr",
}


def test_wrong_arguments_are_one_line_before_measuring(gt_folder, tmp_path, script, monkeypatch):
    monkeypatch.setattr(evaluation, "measure", lambda *_: pytest.fail("has measured"))
    for name, height, width in (("other/q", 96, 96), ("other/s", 7, 24), ("small/s", 41, 47)):
        write(tmp_path / f"{name}.png", photograph(height=height, width=width))
    for words, message in WRONG.items():
        assert script("evaluate.py", "--gt", "gt", "--scale", 2, *words.split(), code=2).startswith(f"error: {message}")


def test_small_values_are_printed_with_six_digits(gt_folder, script):
    out = script("evaluate.py", "--gt", gt_folder, "--scale", 2, "--bicubic", "--protocol", "paper")
    expected = means(evaluate({"paper": bicubic(2, quantize=False)}, gt_folder, 2))["paper"]["mse"]
    assert f"mse {expected:.6g}" in out and float(out.rpartition("mse ")[2]) == pytest.approx(expected, rel=1e-5)


def test_lpips_without_the_weights_says_where_to_put_them(gt_folder, script, tmp_path, monkeypatch):
    lpips_model.cache_clear()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=OSError("no connection")))
    out = script("evaluate.py", "--gt", gt_folder, "--scale", 2, "--bicubic", "--lpips", code=2)
    assert "error: --lpips: " in out and "OSError: no connection" in out
    assert str(tmp_path / "checkpoints/vgg16-") in out


def test_what_is_not_finite_or_of_another_scale_is_not_measured(gt_folder):
    with pytest.raises(UserError, match=r"not finite on .*p0.png"):
        evaluate({"field": lambda lq: bicubic(2)(lq) / 0}, gt_folder, 2, with_perceptual=True)
    refused("--scale 2 does not fit", evaluate, {"paper": lambda lq: lq}, gt_folder, 2)


@pytest.mark.parametrize(
    ("name", "grey_as_y", "published"),
    [
        ("Set5", True, [33.66, 30.39, 28.42]),
        ("Set14", True, [30.24, 27.55, 26.00]),
        ("Set14", False, [30.33, 27.63, 26.09]),
    ],
)
def test_bicubic_rows_are_the_published_ones(benchmark_images, name, grey_as_y, published):
    """Y-PSNR in dB at ×2, ×3, ×4."""
    for scale, value in enumerate(published, 2):
        rows = evaluate({"field": bicubic(scale)}, benchmark_images(name), scale, grey_as_y=grey_as_y)
        assert means(rows)["field"]["psnr_y"] == pytest.approx(value, abs=0.02)


def test_lpips_of_both_networks(gt_folder, monkeypatch):
    """On seeded random weights, which need no download; 8-bit images in the field's protocol."""
    compared, lpips = [], evaluation.lpips

    def random_lpips(sr, gt, net):
        compared.append((net, sr))
        return lpips(sr, gt, net, "random")

    monkeypatch.setattr(evaluation, "lpips", random_lpips)
    rows = evaluate({"field": bicubic(2), "paper": bicubic(2, quantize=False)}, gt_folder, 2, with_lpips=True)
    assert all(0 < row[f"lpips_{net}"] < 1 for row in rows for net in ("vgg", "alex"))
    assert [net for net, _ in compared] == ["vgg", "alex"] * 4
    field, paper = compared[0][1] * 255, compared[2][1] * 255
    torch.testing.assert_close(field, field.round())
    assert (paper - paper.round()).abs().max() > 0.1


def test_every_metric_is_best_for_equal_images_and_knows_its_direction(gt_folder):
    (pair, *_) = evaluation.pairs(gt_folder, 2, FIELD)
    for name in METRICS.keys() - {"lpips_vgg", "lpips_alex"}:
        best, worse, worst = (METRICS[name].measure(pair.gt * share, pair) for share in (1, 0.9, 0.5))
        assert best > worse > worst if METRICS[name].higher else best < worse < worst, name


def test_images_of_one_name_are_measured_against_their_own_lr(tmp_path, script):
    """a.png and a.bmp are two images; equal images have no finite PSNR, and JSON no infinity."""
    for name, image in (
        ("a.png", np.full((48, 48, 3), 128, np.uint8)),
        ("a.bmp", photograph("coffee", 100, 190, 48, 48)),
    ):
        write(tmp_path / "gt" / name, image)
        write(tmp_path / "lq" / name, image[::2, ::2])
    arguments = ["--gt", "gt", "--scale", 2, "--bicubic", "--lq", "lq", "--csv", "a.csv", "--json", "a.json"]
    script("evaluate.py", *arguments)
    rows = read_csv(tmp_path / "a.csv")
    assert rows.keys() == {("a_png", "field"), ("a_bmp", "field")}
    assert rows["a_png", "field"] == np.inf and 20 < rows["a_bmp", "field"] < 40
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["field"]["psnr_y"] is None
