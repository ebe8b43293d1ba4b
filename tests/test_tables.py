"""``tlw tables``: trains what is missing, measures, writes the table."""

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.conftest import ROOT, photograph
from tests.helpers import refused, same
from tlw_basicsr.commands.tables import choose_cells, parse
from tlw_basicsr.tools.tables import Cell, Run, Variant, cell_options, first_difference, is_trained, write_tables
from tlw_basicsr.util.files import load_file

FORCED = [
    *("network_g:num_feat=4", "network_g:num_block=1", "network_w:num_feat=4"),
    *("datasets:train:gt_size=32", "datasets:train:batch_size_per_gpu=2", "datasets:train:num_worker_per_gpu=0"),
    *("train:optim_g:lr=1e-3", "num_gpu=0"),
]


@pytest.fixture
def folders(tmp_path, photographs):
    """Training photographs and a test set Set5."""
    (tmp_path / "data/Set5").mkdir(parents=True)
    for number in range(2):
        image = photograph("coffee", 90, 120 + 80 * number, 60, 60)
        cv2.imwrite(str(tmp_path / f"data/Set5/{number}.png"), image[..., ::-1])
    return tmp_path


@pytest.fixture
def reproduce(folders, photographs, script, monkeypatch):
    """Run the command; returns what it printed."""

    def run(*arguments, train_data=photographs, code=0):
        argv = ["--networks", "EDSR", "--scales", "4", "--data", "data", "--out", "out", "--no-lpips"]
        argv += ["--train-data", train_data] if train_data else []
        argv += ["--distance", "{type: SSIMDistance, kernel_size: 5}", "--force_yml", *FORCED]
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        return script("reproduce_tables.py", *argv, *arguments, code=code)

    return run


def modified(folder):
    files = (path for path in folder.rglob("*") if not path.name.startswith(("table_", "compare_")))
    return {path: path.stat().st_mtime_ns for path in files if path.is_file()}


def read_csv(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_a_run_trains_what_is_missing_and_a_second_one_nothing(folders, reproduce):
    out_folder, before = folders / "out", {}
    common, variant = (
        ["--sets", "Set5", "Set14", "--iters", "4"],
        ["--variant", "Fast", "L1TLW", "train:tlw:preset=fast"],
    )
    for more, message in (
        ([], "1 cells, 1 to train, 4 iterations"),
        (variant, "2 cells, 1 to train, 4 iterations"),
        (variant, "2 cells, 0 to train, 0 iterations"),
    ):
        out = reproduce(*common, "--losses", "L1", *more)
        assert message in out and "Left out, not in data: Set14" in out
        after = modified(out_folder)
        assert before.items() <= after.items()  # what was there is left as it was
        assert " 0 to train" not in message or before == after
        before = after

    assert cv2.imread(str(out_folder / "table_x4_EDSR.png")).std() > 5
    compared = {(line["image"], line["result"]): line for line in read_csv(out_folder / "compare_x4.csv")}
    assert {result for _, result in compared} == {"bicubic", "EDSR L1 (params)", "EDSR Fast (params)"}
    for line in read_csv(out_folder / "cells/EDSR_Fast_x4_seed0_Set5.csv"):
        of_page = compared[line["image"], "EDSR Fast (params)"]
        if line["protocol"] == "field":
            assert float(of_page["psnr_y"]) == pytest.approx(float(line["psnr_y"]))
            assert float(of_page["ssim_y"]) == pytest.approx(float(line["ssim_y"]))
            assert 0 < float(of_page["d"]) < 1
    assert '"weights": {"EDSR Fast (params)": "data:image/webp' in (out_folder / "compare_x4.html").read_text("utf-8")
    text = (out_folder / "table_x4.md").read_text("utf-8")
    for line in (
        "Trained for 4 iterations on",
        "Left out, not in the data folder: Set14.",
        "Fast: L1TLW with train:tlw:preset=fast.",
    ):
        assert line in text
    rows = {(line["protocol"], line["loss"], line["metric"]): line for line in read_csv(out_folder / "table_x4.csv")}
    assert {loss for _, loss, _ in rows} == {"bicubic", "L1", "Fast"}
    record = json.loads((out_folder / "cells/EDSR_L1_x4_seed0.json").read_text())
    for protocol in ("field", "paper"):
        values = {loss: float(rows[protocol, loss, "psnr_y"]["mean"]) for loss in ("bicubic", "L1", "Fast")}
        difference = float(rows[protocol, "Fast", "psnr_y"]["difference"])
        assert difference == pytest.approx(values["Fast"] - values["L1"])
        best = [loss for loss in values if rows[protocol, loss, "psnr_y"]["best"] == "1"]
        assert best == [max(values, key=values.get)]
        assert record["results"]["Set5"][protocol]["psnr_y"] == values["L1"]
        assert f"{values['L1']:.2f}" in text
    states = out_folder.glob("experiments/EDSR_*_x4_seed0/training_states/4.state")
    fast, plain = (load_file(path, "") for path in sorted(states))
    assert fast["tlw"]["last_e_step"] == 3  # the preset was used
    assert not same(fast["optimizers"], plain["optimizers"])

    line = reproduce("--sets", "Set5", "--losses", "L1", "--iters", "6", code=2)
    assert "EDSR_L1_x4_seed0 was trained with other options (train.total_iter: 4, now 6" in line


def test_an_interrupted_run_goes_on(folders, photographs, reproduce):
    """A training that fails is reported with its reason; with that mended the run continues."""
    data = shutil.copytree(photographs, folders / "photos")
    content = (data / "photo3.png").read_bytes()
    (data / "photo3.png").write_bytes(content[: len(content) // 2])
    arguments = ["--sets", "Set5", "--iters", "10", "--losses", "L1"]
    out = reproduce(*arguments, train_data=data, code=2)
    assert "EDSR_L1_x4_seed0: the training ended with 2: " in out
    assert "photo3.png: not an image that can be read" in out.splitlines()[-1]
    (data / "photo3.png").write_bytes(content)
    reproduce(*arguments, train_data=data)
    assert json.loads((folders / "out/cells/EDSR_L1_x4_seed0.json").read_text())["trained"] is True


def test_wrong_arguments_are_one_line_before_the_trainings(folders, reproduce):
    (folders / "data/Tiny").mkdir()
    cv2.imwrite(str(folders / "data/Tiny/a.png"), photograph(height=30, width=26))
    for arguments, message in (
        (["--losses", "L3"], "--losses: EDSR have no L3; accepted are L1, L1Error, "),
        (["--networks", "EDRS"], "--networks: EDRS; accepted are EDSR, HAT, RCAN, RRDB, VDSR"),
        (["--scales", "4", "0"], "--scales: no recipe of EDSR is for ×0"),
        (["--networks", "EDSR", "HAT", "--scales", "4", "6"], "--scales: no recipe of EDSR, HAT is for ×6"),
        (["--iters", "3", "--force_yml", "datasets:train:dataroot_gt=no"], "EDSR_L1_x4_seed0: datasets.train.datar"),
        (["--sets", "Set6"], "--data: data has none of the test sets Set6"),
        (["--iters", "0"], "--iters: expected a number of at least 1, got 0"),
        (["--variant", "a/b", "L1"], "--variant a/b L1: expected NAME LOSS KEY=VALUE"),
        (["--train-data", "nowhere"], "--train-data: nowhere is not a folder"),
        (["--distance", "{type: [}"], "--distance, line 1: not valid YAML"),
        (["--sets", "Tiny", "--losses", "L1"], "a.png is 30×26"),
    ):
        assert message in reproduce("--sets", "Set5", *arguments, code=2)
        assert not (folders / "out/experiments").exists()
    # what only the rehearsal of the first training sees comes after the bar
    out = reproduce("--sets", "Set5", "--force_yml", "train:optim_g:foo=1", code=2)
    message = "error: EDSR_L1_x4_seed0: the training ended with 2: train.optim_g.foo: unknown option; accepted are "
    assert out.splitlines()[-1].startswith(message)
    assert not (folders / "out/experiments/EDSR_L1_x4_seed0").exists()


def test_the_options_data_is_found_and_an_option_that_no_training_has_taken_can_be_mended(
    folders, photographs, reproduce
):
    """The data lies below the folder of the start. That the network makes no RGB image is seen by the training alone."""
    shutil.copytree(photographs, folders / "datasets/DIV2K/tiles512/HR")
    arguments = ["--sets", "Set5", "--iters", "1", "--losses", "L1", "--variant", "Odd", "L1"]
    assert "Odd" in reproduce(*arguments, "network_g:num_out_ch=5", train_data=None, code=2)
    reproduce(*arguments, "network_g:res_scale=0.5", train_data=None)
    assert "Trained for 1 iterations on DIV2K" in (folders / "out/table_x4.md").read_text("utf-8")


def test_a_loss_that_a_network_does_not_have_is_left_out(capsys):
    arguments = ["--losses", "L1", "MSE", "L1", "--networks", "EDSR", "HAT", "--scales", "2", "4"]
    cells = choose_cells(parse(arguments))
    expected = ["EDSR_L1_x2", "EDSR_MSE_x2", "EDSR_L1_x4", "EDSR_MSE_x4", "HAT_L1_x4"]
    assert [cell.name for cell in cells] == [f"{name}_seed0" for name in expected]
    assert "Left out, no recipe: HAT ×4 with MSE" in capsys.readouterr().out
    # the paper's comparison: 3 networks × 3 scales × 4 losses, and HAT's 3
    cells = choose_cells(parse([]))
    assert len([cell for cell in cells if cell.variant.name != "L1Uncertainty"]) == 3 * 3 * 4 + 2
    assert len([cell for cell in cells if cell.network == "HAT"]) == 3


def processes_of(folder):
    """Trainings of this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().decode(errors="replace")
            if str(folder) in line and "train.py\0" in line:
                found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").is_file(), reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_program_ended_by_a_signal(folders, photographs, number):
    """SIGTERM ends the training, too, which saves; after SIGKILL of the program alone a second one keeps off it."""
    command = [
        *(sys.executable, str(ROOT / "scripts/reproduce_tables.py"), "--networks", "EDSR", "--scales", "4"),
        *("--data", "data", "--train-data", str(photographs), "--out", "out", "--no-lpips", "--sets", "Set5"),
        *("--losses", "L1", "--iters", "100000", "--force_yml", *FORCED, "logger:save_checkpoint_freq=100000"),
    ]
    run = {"cwd": folders, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    states = folders / "out/experiments/EDSR_L1_x4_seed0/training_states"
    with subprocess.Popen(command, **run) as program:
        try:
            for _ in range(1200):
                if list(folders.glob("out/experiments/*/train_*.log")) and processes_of(folders):
                    break
                time.sleep(0.1)
            time.sleep(1)
            program.send_signal(number)
            program.wait(60)
            if number == signal.SIGTERM:
                assert program.returncode == 128 + number
                assert processes_of(folders) == []
                return
            second = subprocess.run(command, **run, check=False, timeout=120)
            assert second.returncode == 2
            assert "the cell EDSR_L1_x4_seed0 is in use by process" in second.stderr
            assert len(processes_of(folders)) == 1
        finally:
            for pid in processes_of(folders):
                os.kill(pid, signal.SIGKILL)
    assert not states.exists() or not list(states.iterdir())


def test_without_iters_the_options_are_the_recipes(tmp_path):
    (tmp_path / "Set5").mkdir()
    run = Run(tmp_path, tmp_path, sets=["Set5"])
    opt = cell_options(run, Cell("HAT", Variant("L1TLW", "L1TLW"), 4, 7))
    assert opt["train"]["total_iter"] == 480_000
    assert opt["train"]["tlw"] == {"k_start": 0.3, "k_end": 0.9, "k_decay": 100, "k_unit": "epoch"}
    assert opt["val"]["save_best"] == "lpips_vgg"
    assert opt["manual_seed"] == 7
    short = cell_options(Run(tmp_path, tmp_path, sets=["Set5"], iters=50), Cell("HAT", Variant("L1TLW", "L1TLW"), 4, 7))
    assert short["train"]["tlw"] == {"k_start": 0.3, "k_end": 0.9, "k_decay": 50, "k_unit": "iter"}
    assert short["val"]["val_freq"] == 5


def test_the_tables_text(tmp_path):
    """Two seeds: mean and sample standard deviation; PSNR is best where it is high, L1 where it is low."""
    (tmp_path / "Set5").mkdir()
    (tmp_path / "cells").mkdir()
    run = Run(tmp_path, tmp_path, sets=["Set5"])
    cells = [Cell("EDSR", Variant(loss, loss), 4, seed) for loss in ("L1", "L1TLW") for seed in (0, 1)]
    values = dict(zip(["bicubic_x4", *(cell.name for cell in cells)], (28, 30.0, 30.4, 30.5, 30.5), strict=True))
    for name, psnr in values.items():
        paper = {"psnr_y": psnr, "l1": 1 / psnr}
        results = {"Set5": {"field": {"psnr_y": psnr, "ssim_y": 0.9}, "paper": paper}}
        (tmp_path / f"cells/{name}.json").write_text(json.dumps({"entry": "params_ema", "results": results}))
    text = write_tables(run, cells, 4)[0].read_text("utf-8")
    assert "±: standard deviation over the seeds.\n" in text and "its params_ema.\n" in text
    deviation = np.std([30.0, 30.4], ddof=1)
    assert f"| EDSR | L1 | 30.20 ± {deviation:.2f} | **0.9000 ± 0.0000** |" in text
    assert "| EDSR | L1TLW | **30.50 ± 0.00** (+0.30) | **0.9000 ± 0.0000** (+0.0000) |" in text
    assert "| – | bicubic | 28.00 | 3.571 |" in text
    assert "| EDSR | L1TLW | **30.50 ± 0.00** (+0.30) | **3.279 ± 0.000** (-0.033) |" in text
    assert "| network | loss | PSNR (dB) ↑ | SSIM ↑ |" in text


def test_what_a_cell_and_a_loss_are_compared_with():
    assert "(a.b: 1, now 3)" in first_difference({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2})
    assert "(e: None, now 4)" in first_difference({"a": 1}, {"a": 1, "d": None, "e": 4})
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 1}}) == ""
    assert Variant("L1TLW", "L1TLW").unweighted == Variant("a", "L1Random").unweighted == "L1"
    assert Variant("MSETLW", "MSETLW").unweighted == "MSE"
    assert Variant("b", "L1Random", ("train:pixel_opt:base=mse",)).unweighted == "MSE"


DAMAGED = ["{", "[" * 10**5, "\xff", "[]", "5"]
DAMAGED += ['{"results": 5}', '{"options": []}', '{"seconds": "a"}', '{"images": 1}']


def test_a_damaged_record_is_named(folders):
    (folders / "out/cells").mkdir(parents=True)
    run = Run(folders / "out", folders / "data", sets=["Set5"])
    for content in DAMAGED:
        (folders / "out/cells/EDSR_L1_x4_seed0.json").write_text(content, "latin-1")
        refused(r"EDSR_L1_x4_seed0.json: damaged; delete it", is_trained, run, Cell("EDSR", Variant("L1", "L1"), 4, 0))


def test_what_is_measured_or_trained_on_other_images_is_not_taken(folders, photographs, reproduce):
    """A set's name is not its content; results that are not numbers are measured again."""
    data = shutil.copytree(photographs, folders / "photos")
    arguments = ["--sets", "other", "--losses", "L1", "--iters", "2"]
    shutil.move(folders / "data/Set5", folders / "data/other")

    def measured():
        reproduce(*arguments, train_data=data)
        lines = read_csv(folders / "out/table_x4.csv")
        return {(line["loss"], line["protocol"]): float(line["mean"]) for line in lines if line["metric"] == "psnr_y"}

    first = measured()
    cv2.imwrite(str(folders / "data/other/0.png"), photograph("rocket", 90, 120, 60, 60)[..., ::-1])
    assert all(abs(value - first[key]) > 0.01 for key, value in measured().items())
    record = folders / "out/cells/EDSR_L1_x4_seed0.json"
    content, second = json.loads(record.read_text()), measured()
    for broken in ({}, {"other": 5}, {"other": {"field": {}, "paper": 1}}, {"other": {"field": {"psnr_y": "a"}}}):
        record.write_text(json.dumps({**content, "results": broken}))
        assert measured() == second
    cv2.imwrite(str(data / "photo0.png"), photograph("rocket"))
    assert "EDSR_L1_x4_seed0 was trained on other images in" in reproduce(*arguments, train_data=data, code=2)
