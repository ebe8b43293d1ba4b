"""Beside any BasicSR from 1.3.4 on, and beside forks that ship a ``basicsr`` of their own."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import basicsr
import pytest

from tests.conftest import ROOT, write_yaml
from tests.helpers import write
from tlw_basicsr import UserError, compat

LACKS = [
    "archs/rcan_arch.py", "models/hifacegan_model.py", "models/video_*.py", "models/edvr_model.py", "utils/lmdb_util.py",
    "utils/color_util.py",
]  # fmt: skip
TRAIN_PY = """
import tlw_basicsr
from basicsr.train import train_pipeline

train_pipeline({root!r})
"""


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """A folder with a ``basicsr`` that lacks what forks leave out, has a network of its own, and calls metrics as 1.3.4."""
    folder = tmp_path_factory.mktemp("fork")
    installed = Path(basicsr.__file__).parent
    lacks = {path for pattern in LACKS for path in installed.glob(pattern)}
    for path in installed.rglob("*.py"):
        target = folder / "basicsr" / path.relative_to(installed)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text("utf-8")
        if path in lacks:
            continue
        if path.name == "sr_model.py":
            text = text.replace("metric_data['img']", "metric_data['img1']")
        if path.name == "psnr_ssim.py":
            text = text.replace("def calculate_psnr(img,", "def calculate_psnr(img1,").replace(
                "    assert img.shape == img2.shape", "    img = img1\n    assert img.shape == img2.shape", 1
            )
        if path.name == "__init__.py" and path.parent.name == "utils":
            start = text.index("from .color_util")
            text = text[:start] + text[text.index("\n", start) + 1 :]
        target.write_text(text)
    colours = (installed / "utils/color_util.py").read_text("utf-8")
    old = folder / "basicsr/utils/matlab_functions.py"  # where they were before 1.4.0
    old.write_text(old.read_text() + "\n\n" + colours)
    (folder / "basicsr/utils/__init__.py").open("a").write(
        "\nfrom .matlab_functions import bgr2ycbcr, rgb2ycbcr, rgb2ycbcr_pt, ycbcr2bgr, ycbcr2rgb\n"
    )
    for path in (folder / "basicsr").rglob("*.py"):
        path.write_text(path.read_text().replace("basicsr.utils.color_util", "basicsr.utils.matlab_functions"))
    (folder / "basicsr/archs/own_arch.py").write_text(
        "from torch import nn\n\nfrom basicsr.utils.registry import ARCH_REGISTRY\n\n\n"
        "@ARCH_REGISTRY.register()\nclass Own(nn.Sequential):\n    def __init__(self, scale=2):\n"
        "        super().__init__(nn.Conv2d(3, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale))\n"
    )
    return folder


def run(fork, folder, *command):
    paths = os.pathsep.join([str(fork), str(ROOT)])
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def fork_options(folder, **changes):
    for name in ("a.png", "b.png"):
        write(folder / "gt" / name, 32)
        write(folder / "lq" / name, 16)
    pairs = {
        "type": "PairedImageDataset", "dataroot_gt": str(folder / "gt"), "dataroot_lq": str(folder / "lq"),
        "io_backend": {"type": "disk"},
    }  # fmt: skip
    train = {"gt_size": 16, "use_hflip": True, "use_rot": True, "num_worker_per_gpu": 0, "batch_size_per_gpu": 2}
    return {
        "name": "fork",
        "model_type": "TLWModel",
        "scale": 2,
        "num_gpu": 0,
        "manual_seed": 0,
        "datasets": {"train": {"name": "t", **pairs, **train}, "val": {"name": "v", **pairs}},
        "network_g": {"type": "Own", "scale": 2},
        "network_w": {"type": "TLWWeightNet", "num_feat": 4},
        "path": {},
        "train": {
            "optim_g": {"type": "Adam", "lr": 1e-3},
            "optim_w": {"type": "Adam", "lr": 1e-3},
            "scheduler": {"type": "MultiStepLR", "milestones": [4]},
            "total_iter": 2,
            "pixel_opt": {"type": "TLWLoss", "distance": {"type": "SSIMDistance", "kernel_size": 5}},
            "tlw": {"k_unit": "iter", "k_decay": 2},
        },
        "val": {
            "val_freq": 2,
            "save_img": False,
            "metrics": {"psnr": {"type": "calculate_psnr", "crop_border": 2}, "y": {"type": "tlw_psnr_y"}},
        },
        "logger": {"print_freq": 1, "save_checkpoint_freq": 2, "use_tb_logger": False},
        **changes,
    }


def test_training_beside_a_fork(fork, tmp_path):
    """By our train.py, which names the fork and what it lacks; a validation has metrics of both names of an image."""
    yaml = write_yaml(tmp_path, fork_options(tmp_path))
    log = run(fork, tmp_path, "-m", "tlw_basicsr.train", "-opt", str(yaml))
    assert f"of {fork}/basicsr; it lacks basicsr.archs.rcan_arch.RCAN: without it there is no TLWRCAN." in log
    assert "l_w: " in log and "# psnr: " in log and "# y: " in log and "fails" not in log


def test_a_forks_own_train_program(fork, tmp_path):
    yaml = write_yaml(tmp_path, fork_options(tmp_path))
    (tmp_path / "train.py").write_text(TRAIN_PY.format(root=str(tmp_path)))
    log = run(fork, tmp_path, "train.py", "-opt", str(yaml))
    assert "l_w: " in log and "# psnr: " in log
    assert (tmp_path / "experiments/fork/models/net_w_2.pth").is_file()


def test_names_of_all_versions():
    """Plugins are written for one version's modules, and used with another's."""
    for module, name in [
        ("basicsr.utils.matlab_functions", "rgb2ycbcr"),
        ("basicsr.utils.color_util", "rgb2ycbcr"),
        ("basicsr.losses.losses", "L1Loss"),
        ("basicsr.losses.losses", "GANLoss"),
        ("basicsr.losses.basic_loss", "L1Loss"),
        ("basicsr.models.losses", "PerceptualLoss"),
    ]:
        assert callable(getattr(importlib.import_module(module), name))


def test_a_part_that_is_missing_is_told_where_it_is_used(monkeypatch):
    monkeypatch.setattr(compat, "MISSING", {})
    part = compat.part_of_basicsr("basicsr.archs.none_arch", "None_", "Sub")
    assert "; it lacks basicsr.archs.none_arch.None_: without it there is no Sub." in compat.tell_basicsr()

    class Sub(part):
        pass

    with pytest.raises(
        UserError, match=r"Sub needs basicsr.archs.none_arch.None_, which basicsr .* lacks; the one of pip"
    ):
        Sub()


def test_functions_are_replaced_where_plugins_have_them(monkeypatch):
    """Also in modules that were imported before."""
    import types

    from basicsr.utils import img_process_util

    def original(img, kernel): ...

    plugin = types.ModuleType("some_plugin")
    plugin.blur = original
    monkeypatch.setitem(sys.modules, "some_plugin", plugin)
    monkeypatch.setattr(img_process_util, "filter2D", original)
    compat.replace_functions()
    assert plugin.blur is img_process_util.filter2D is compat.filter2D

    def other_arguments(img, kernel, more): ...

    monkeypatch.setattr(img_process_util, "filter2D", other_arguments)
    compat.replace_functions()
    assert img_process_util.filter2D is other_arguments
