"""What the tests share: images, options, and running a training in this process."""

import logging
import os
import random
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
import torch
import yaml
from hypothesis import settings

import tlw_basicsr  # noqa: F401  before anything imports basicsr

# isort: split

from basicsr.utils import logger as basicsr_logger

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("TLW_TEST_DATA", ROOT.parent / "shared" / "data"))

# what the equations, losses, networks, models and the guard are tested on: TLW_TEST_DEVICE, else a GPU if there is one
DEVICE = torch.device(os.environ.get("TLW_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))

PSNR = {"type": "calculate_psnr", "crop_border": 2, "test_y_channel": True}

if "PYTEST_XDIST_WORKER" in os.environ:  # the other process has the other core
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
elif "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(2)
# the same examples in every run, on slow machines too
settings.register_profile("tlw", deadline=None, derandomize=True)
settings.load_profile("tlw")


@pytest.fixture(autouse=True)
def seeded():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def register(monkeypatch):
    """Register a class or function for one test; returns its name."""

    def add(registry, part):
        monkeypatch.setitem(registry._obj_map, part.__name__, part)
        return part.__name__

    return add


def reset_logger():
    """BasicSR keeps one logger a process; give every training its own log file."""
    logger = logging.getLogger("basicsr")
    for handler in list(logger.handlers):
        handler.close()
        logger.removeHandler(handler)
    basicsr_logger.initialized_logger.clear()


@pytest.fixture(autouse=True)
def fresh_logger():
    yield
    reset_logger()


@pytest.fixture
def benchmark_images():
    """Folder of a benchmark's images, or skip."""

    def find(name):
        folder = DATA / name
        if not folder.is_dir():
            pytest.skip(f"{name} is not in {DATA}; name the folder of the benchmarks by TLW_TEST_DATA")
        return folder

    return find


def photograph(name="astronaut", top=0, left=0, height=96, width=96):
    """A crop of one of scikit-image's photographs, uint8 RGB."""
    return np.ascontiguousarray(getattr(skimage.data, name)()[top : top + height, left : left + width])


def as_tensor(image):
    """uint8 (H, W, 3) to (1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255


@pytest.fixture(scope="session")
def device():
    return DEVICE


@pytest.fixture
def pair(device):
    """x̂ and x of two photographs, (2, 3, 48, 48) in [0, 1], on the device: x̂ is x, blurred."""
    gt = torch.cat(
        [as_tensor(photograph("astronaut", 60, 180, 48, 48)), as_tensor(photograph("coffee", 100, 200, 48, 48))]
    )
    gt = gt.to(device)
    sr = torch.nn.functional.avg_pool2d(gt, 3, 1, 1, count_include_pad=False)
    return sr, gt


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """A folder of six small photographs of different sizes."""
    folder = tmp_path_factory.mktemp("photographs")
    crops = [(0, 150), (100, 200), (200, 100), (300, 30), (50, 300), (350, 350)]
    for number, (top, left) in enumerate(crops):
        image = photograph("astronaut", top, left, 48 + 4 * number, 64)
        cv2.imwrite(str(folder / f"photo{number}.png"), image[..., ::-1])
    return folder


def tiny_options(photographs, **changes):
    """A training with TLW that takes a second, as the dict of a YAML file."""
    images = {"type": "BicubicSRDataset", "dataroot_gt": str(photographs), "io_backend": {"type": "disk"}}
    loading = {"gt_size": 16, "use_hflip": True, "use_rot": True, "num_worker_per_gpu": 0, "batch_size_per_gpu": 2}
    opt = {
        "name": "tiny",
        "model_type": "TLWModel",
        "scale": 2,
        "num_gpu": int(DEVICE.type == "cuda"),
        "manual_seed": 3,
        "datasets": {"train": {"name": "photos", **images, **loading}, "val": {"name": "photos_val", **images}},
        "network_g": {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 4, "num_block": 1, "upscale": 2},
        "network_w": {"type": "TLWWeightNet", "num_feat": 4},
        "path": {},
        "train": {
            "optim_g": {"type": "Adam", "lr": 1e-3},
            "optim_w": {"type": "Adam", "lr": 1e-3},
            "scheduler": {"type": "MultiStepLR", "milestones": [4], "gamma": 0.5},
            "total_iter": 8,
            "ema_decay": 0.9,
            "pixel_opt": {"type": "TLWLoss", "base": "l1", "distance": {"type": "SSIMDistance", "kernel_size": 5}},
            "tlw": {"k_start": 0.3, "k_end": 0.9, "k_decay": 4, "k_unit": "epoch"},
        },
        "val": {"val_freq": 4, "save_img": False, "metrics": {"psnr": dict(PSNR)}},
        "logger": {"print_freq": 1, "save_checkpoint_freq": 4, "use_tb_logger": False},
    }
    for place, value in changes.items():
        set_option(opt, place.replace("__", ":"), value)
    return opt


def plain_options(photographs, **changes):
    """The same training by BasicSR's own SRModel and L1."""
    without = {"network_w": ..., "train__optim_w": ..., "train__tlw": ...}
    l1 = {"model_type": "SRModel", "train__pixel_opt": {"type": "L1Loss"}}
    return tiny_options(photographs, **{**without, **l1, **changes})


def control_options(photographs, weights, **changes):
    """The same training with a control, ``weights`` without learning."""
    without = {"network_w": ..., "train__optim_w": ..., "train__pixel_opt__distance": ...}
    return tiny_options(photographs, **{**without, "train__pixel_opt__weights": weights, **changes})


def set_option(opt, place, value):
    """Set ``section:key``, or the place of these keys, in a dict of options; ``...`` deletes it."""
    *sections, last = place.split(":") if isinstance(place, str) else place
    for section in sections:
        opt = opt[section]
    if value is ...:
        del opt[last]
    else:
        opt[last] = value


def write_yaml(folder, opt, name="options.yml"):
    path = Path(folder) / name
    path.write_text(yaml.safe_dump(opt, sort_keys=False))
    return path


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Run a training by its options in this process, in ``tmp_path``; returns the experiment's folder."""
    from tlw_basicsr.engine.pipeline import train_pipeline

    def run(opt, *arguments, root=tmp_path):
        reset_logger()
        root.mkdir(exist_ok=True)
        monkeypatch.chdir(root)
        train_pipeline(str(root), ["-opt", str(write_yaml(root, opt)), *arguments])
        return root / "experiments" / opt["name"]

    return run


@pytest.fixture
def script(tmp_path, monkeypatch, capfd):
    """Run a script in this process, in ``tmp_path``: it ends with ``code``; returns stdout and stderr as one text.

    Wrong usage, 2, is one line on stderr, but for a progress bar.
    """

    def call(name, *arguments, code=0):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        capfd.readouterr()
        try:
            runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
            ended = 0
        except SystemExit as end:
            ended = end.code or 0
        out, err = capfd.readouterr()
        assert ended == code, err
        if code == 2:
            assert err.splitlines()[-1].startswith("error: ") and (err.count("\n") == 1 or "\r" in err), err
        return out + err

    return call
