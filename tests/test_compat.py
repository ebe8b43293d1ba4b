"""Beside any BasicSR from 1.3.4 on, and beside forks that ship a ``basicsr`` of their own."""

import os
import pkgutil
import sys
from pathlib import Path
from types import SimpleNamespace

import basicsr
import pytest
import torch
from basicsr.utils import img_process_util

from tests.conftest import ROOT, tiny_options, write_yaml
from tests.helpers import TRAIN, refused, run_python, write_pairs
from tlw_basicsr import compat

LACKS = [
    "archs/rcan_arch.py", "models/hifacegan_model.py", "models/video_*.py", "models/edvr_model.py", "utils/lmdb_util.py",
    "utils/color_util.py",
]  # fmt: skip
TRAIN_PY = """
import tlw_basicsr
from basicsr.train import train_pipeline

train_pipeline({root!r})
"""


# what the fork's text has instead
CHANGED = {
    "models/sr_model.py": [("metric_data['img']", "metric_data['img1']")],
    "metrics/psnr_ssim.py": [
        ("def calculate_psnr(img,", "def calculate_psnr(img1,"),
        ("    assert img.shape == img2.shape", "    img = img1\n    assert img.shape == img2.shape"),
    ],
    # where colours were before 1.4.0
    "utils/__init__.py": [("from .color_util", "from .matlab_functions")],
}
OWN_NETWORK = """
from torch import nn
from basicsr.utils.registry import ARCH_REGISTRY
@ARCH_REGISTRY.register()
class Own(nn.Sequential):
    def __init__(self, scale=2):
        super().__init__(nn.Conv2d(3, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale))
"""


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """A folder with a ``basicsr`` that lacks what forks leave out, has a network of its own, and calls metrics as 1.3.4."""
    folder = tmp_path_factory.mktemp("fork")
    installed = Path(basicsr.__file__).parent
    lacks = {path for pattern in LACKS for path in installed.glob(pattern)}
    for path in set(installed.rglob("*.py")) - lacks:
        name = path.relative_to(installed).as_posix()
        text = path.read_text("utf-8")
        for old, new in CHANGED.get(name, []):
            assert old in text
            text = text.replace(old, new, 1)
        if name == "utils/matlab_functions.py":
            text += "\n\n" + (installed / "utils/color_util.py").read_text("utf-8")
        target = folder / "basicsr" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text.replace("basicsr.utils.color_util", "basicsr.utils.matlab_functions"))
    (folder / "basicsr/archs/own_arch.py").write_text(OWN_NETWORK)
    return folder


def run(fork, folder, *command):
    write_yaml(folder, fork_options(folder))
    done = run_python(folder, *command, PYTHONPATH=os.pathsep.join([str(fork), str(ROOT)]))
    return done.stdout + done.stderr


def fork_options(folder):
    opt = tiny_options(
        "",
        name="fork",
        num_gpu=0,
        network_g={"type": "Own", "scale": 2},
        train__total_iter=2,
        train__tlw__k_unit="iter",
    )
    for section in opt["datasets"].values():
        section.update(write_pairs(folder))
    opt["val"] |= {"val_freq": 2, "metrics": {"psnr": {"type": "calculate_psnr", "crop_border": 2}}}
    opt["val"]["metrics"]["y"] = {"type": "tlw_psnr_y"}
    return {**opt, "logger": {**opt["logger"], "save_checkpoint_freq": 2}}


def test_training_beside_a_fork(fork, tmp_path):
    """By our train.py, which names the fork and what it lacks; a validation has metrics of both names of an image."""
    log = run(fork, tmp_path, *TRAIN)
    assert f"of {fork}/basicsr; it lacks basicsr.archs.rcan_arch.RCAN: without it there is no TLWRCAN." in log
    assert "l_w: " in log and "# psnr: " in log and "# y: " in log and "fails" not in log


def test_a_forks_own_train_program(fork, tmp_path):
    (tmp_path / "train.py").write_text(TRAIN_PY.format(root=str(tmp_path)))
    log = run(fork, tmp_path, "train.py", "-opt", "options.yml")
    assert "l_w: " in log and "# psnr: " in log
    assert (tmp_path / "experiments/fork/models/net_w_2.pth").is_file()


NAMES = [
    "basicsr.utils.matlab_functions.rgb2ycbcr", "basicsr.utils.color_util.rgb2ycbcr", "basicsr.losses.losses.L1Loss",
    "basicsr.losses.losses.GANLoss", "basicsr.losses.basic_loss.L1Loss", "basicsr.models.losses.PerceptualLoss",
    "basicsr.losses.losses.weighted_loss",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_of_all_versions(name):
    """Plugins are written for one version's modules, and used with another's."""
    assert callable(pkgutil.resolve_name(name))
    assert pkgutil.resolve_name("basicsr.losses.losses._reduction_modes") == ["none", "mean", "sum"]


def test_stylegan2_runs_without_its_extension():
    activation = pkgutil.resolve_name("basicsr.ops.fused_act.FusedLeakyReLU")(3)
    activation.bias.data = torch.tensor([0.5, 0.0, -0.5])
    for shape in ((2, 3), (2, 3, 4, 5)):
        x = torch.randn(shape, requires_grad=True)
        shifted = x + activation.bias.view(1, 3, *[1] * (len(shape) - 2))
        assert torch.allclose(activation(x), 2**0.5 * torch.where(shifted > 0, shifted, 0.2 * shifted))


def test_a_part_that_is_missing_is_named_where_it_is_used(monkeypatch):
    monkeypatch.setattr(compat, "MISSING", {})
    part = compat.part_of_basicsr("basicsr.archs.none_arch", "None_", "Sub")
    assert "; it lacks basicsr.archs.none_arch.None_: without it there is no Sub." in compat.tell_basicsr()
    message = r"Sub needs basicsr.archs.none_arch.None_, which basicsr .* lacks; the one of pip"
    refused(message, type("Sub", (part,), {}))


def test_two_earlier_runs_may_be_moved_aside_in_one_second(tmp_path, monkeypatch):
    monkeypatch.setattr(compat.time, "strftime", lambda _: "20260101_000000")
    for number in range(3):
        pkgutil.resolve_name("basicsr.utils.misc.mkdir_and_rename")(str(tmp_path / "run"))
        (tmp_path / f"run/{number}").touch()
    aside = "run_archived_20260101_000000"
    assert [path.name for path in sorted(tmp_path.glob("*/*"))] == ["2", "0", "1"]
    assert {path.name for path in tmp_path.iterdir()} == {"run", aside, f"{aside}_2"}


def test_functions_are_replaced_where_plugins_have_them(monkeypatch):
    """Also in modules that were imported before; one of other arguments is another function."""

    def original(img, kernel): ...

    def other_arguments(img, kernel, more): ...

    plugin = SimpleNamespace(blur=original)
    monkeypatch.setitem(sys.modules, "some_plugin", plugin)
    monkeypatch.setattr(img_process_util, "filter2D", original)
    compat.replace_functions()
    assert plugin.blur is img_process_util.filter2D is compat.filter2D
    monkeypatch.setattr(img_process_util, "filter2D", other_arguments)
    compat.replace_functions()
    assert img_process_util.filter2D is other_arguments
