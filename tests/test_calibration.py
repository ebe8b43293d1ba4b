"""The metrics and LR images are those that others made with MATLAB, see ``docs/calibration.md``; skipped without them."""

import re

import cv2
import numpy as np
import pytest

from tlw_basicsr import cli
from tlw_basicsr.tools.evaluation import evaluate

NAMES = ("baby", "bird", "butterfly", "head", "woman")
VALUE = re.compile(r"^x(\d) \d (\w+)_(RCAN|RCANplus)_x\d\.png: PSNR= ([\d.]+) SSIM= ([\d.]+)", re.MULTILINE)
MEAN = re.compile(r"^x(\d): PSNR= ([\d.]+) SSIM= ([\d.]+)", re.MULTILINE)


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
@pytest.mark.parametrize("method", ["RCAN", "RCANplus"])
def test_psnr_and_ssim_are_those_that_rcans_authors_published(benchmark_images, method, scale):
    folder = benchmark_images("Set5_published") / "RCAN"
    text = (folder / "PSNR_SSIM_Results_BI_model.txt").read_text()
    published = {found[1]: found[3:] for found in VALUE.findall(text) if found[::2][:2] == (str(scale), method)}
    means = [found[1:] for found in MEAN.findall(text) if found[0] == str(scale)]
    published["mean"] = means[("RCAN", "RCANplus").index(method)]
    rows = evaluate({"field": folder / f"{method}_x{scale}"}, folder / f"HR_x{scale}", scale)
    ours = {row["image"]: (row["psnr_y"], row["ssim_y"]) for row in rows}
    ours["mean"] = tuple(np.mean(list(ours.values()), axis=0))
    assert ours.keys() == published.keys() == {*NAMES, "mean"}
    for name, values in published.items():
        assert ours[name] == pytest.approx(tuple(map(float, values)), abs=1e-6), name


@pytest.mark.parametrize(
    ("benchmark", "scale", "option"),
    [
        *[("EDSR", scale, "") for scale in (2, 3, 4)],
        ("EDSR", 8, "--rounding once"),
        *[("RCAN", scale, "--borders replicate") for scale in (2, 3, 4)],
    ],
)
def test_lr_images_are_those_of_the_benchmarks_bit_by_bit(benchmark_images, tmp_path, benchmark, scale, option):
    folder = benchmark_images("Set5_published") / benchmark
    hr, lr = folder / "HR", folder / f"LR_bicubic/X{scale}"
    if benchmark == "RCAN":
        hr, lr = folder / f"HR_x{scale}", folder / f"LRBI_x{scale}"
    prepare = ["prepare", "--gt", str(hr), "--out", str(tmp_path), "--scales", str(scale), "--workers", "1"]
    cli.main(prepare)
    cli.main([*prepare, *option.split()])
    usual = tmp_path / f"LRbicx{scale}"
    made = next((path for path in tmp_path.glob("LRbic*_*")), usual)
    assert (made != usual) == bool(option)
    same = {path: [] for path in (made, usual)}
    for name, (path, equal) in ((n, item) for n in NAMES for item in same.items()):
        published = cv2.imread(str(next(lr.glob(f"{name}*"))))
        equal.append(np.array_equal(cv2.imread(str(path / f"{name}.png")), published))
    assert all(same[made]) and (not option or not all(same[usual]))
