"""What more than one test module uses beside the fixtures: models, images, logs, files."""

import importlib.util
import os
import re
import subprocess
import sys
import zlib

import cv2
import lmdb
import pytest
import torch
from torch import nn

from tests.conftest import DEVICE, ROOT, as_tensor, photograph, tiny_options, write_yaml
from tlw_basicsr import TLWMixin, UserError
from tlw_basicsr.engine.options import parse_options
from tlw_basicsr.engine.preflight import check_files
from tlw_basicsr.engine.rehearsal import rehearse
from tlw_basicsr.models import build_model
from tlw_basicsr.models.guard import list_parameters
from tlw_basicsr.util.files import load_file


def built(photographs, tmp_path, options=tiny_options, **changes):
    opt = options(photographs, **changes)
    opt |= {"is_train": True, "dist": False, "rank": 0, "world_size": 1}
    opt["path"] |= {"models": str(tmp_path), "training_states": str(tmp_path)}
    model = build_model(opt)
    if isinstance(model, TLWMixin):
        model.set_epoch(0)
    return model


def feed_noise(model, base="SRModel", samples=2, size=(8, 8)):
    """Set random images as ``feed_data`` does; the video models have three frames a sample."""
    frames = (3,) if base in ("EDVRModel", "VideoRecurrentModel") else ()
    gt_frames = (3,) if base == "VideoRecurrentModel" else ()
    model.lq = torch.rand(samples, *frames, 3, *size, device=model.device)
    model.gt = torch.rand(samples, *gt_frames, 3, *(model.opt["scale"] * n for n in size), device=model.device)
    model.gt_usm = model.gt


def iterate(model, iteration, *names):
    """Run one iteration; returns for each of the named networks whether its parameters changed."""
    before = [[p.detach().clone() for p in getattr(model, name).parameters()] for name in names]
    model.optimize_parameters(iteration)
    after = [list(getattr(model, name).parameters()) for name in names]
    return [not same(old, new) for old, new in zip(before, after, strict=True)]


def gradient_norm(optimizer):
    return torch.cat([p.grad.flatten() for p in list_parameters(optimizer)]).norm().item()


def batch(pair):
    sr, gt = pair
    return {"lq": torch.nn.functional.avg_pool2d(sr, 2), "gt": gt}


GAN = {
    "network_d": {"type": "UNetDiscriminatorSN", "num_in_ch": 3, "num_feat": 4},
    "train__optim_d": {"type": "Adam", "lr": 1e-3},
    "train__gan_opt": {"type": "GANLoss", "gan_type": "vanilla", "loss_weight": 0.1},
}


EVERY_BASE = {
    "SRModel": {},
    "SwinIRModel": {"network_g": {
        "type": "SwinIR", "upscale": 2, "in_chans": 3, "img_size": 8, "window_size": 4, "img_range": 1.0, "depths": [1],
        "embed_dim": 8, "num_heads": [2], "mlp_ratio": 2, "upsampler": "pixelshuffledirect", "resi_connection": "1conv",
    }},
    "SRGANModel": GAN,
    "ESRGANModel": GAN,
    "RealESRNetModel": {"gt_usm": True},
    "RealESRGANModel": {**GAN, "l1_gt_usm": True, "percep_gt_usm": True, "gan_gt_usm": False},
    "EDVRModel": {"scale": 4, "network_g": {
        "type": "EDVR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "num_frame": 3, "deformable_groups": 1,
        "num_extract_block": 1, "num_reconstruct_block": 1,
    }},
    "VideoRecurrentModel": {"scale": 4, "network_g": {"type": "BasicVSR", "num_feat": 8, "num_block": 1}},
}  # fmt: skip


def same(a, b):
    """Bit-equal, through dicts and lists."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def check_same_end(one, other, iteration):
    """The networks and the state of an iteration are the same in two experiments, to the bit."""
    files = [*one.glob(f"models/net_*_{iteration}.pth"), one / f"training_states/{iteration}.state"]
    assert len(files) > 1
    for path in files:
        assert same(load_file(path, ""), load_file(other / path.relative_to(one), "")), path.name


def check_resume(train, folder, opt, stop):
    """Train in one go, and in two parts: the ends are the same. Returns the two experiments."""
    whole = train(opt, root=folder / "whole")
    train({**opt, "train": {**opt["train"], "total_iter": stop}}, root=folder / "cut")
    resumed = train(opt, "--auto_resume", root=folder / "cut")
    check_same_end(whole, resumed, opt["train"]["total_iter"])
    return whole, resumed


def log_lines(experiment):
    """The iterations' values of the newest run, which may have begun in the second of the one before."""
    newest = log_text(experiment).rsplit("Version Information", 1)[1]
    lines = [line for line in newest.splitlines() if "iter:" in line and "epoch:" in line]
    return [
        dict(re.findall(r"(\w+): +([-\d.e+]+)", line.replace("iter:", " iter: ").replace(",", ""))) for line in lines
    ]


def write(path, image=32):
    """Write an image as OpenCV has it, BGR, or a square part of a photograph of this side; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(image, int):
        image = photograph("coffee", zlib.crc32(path.name.encode()) % 90, 100, image, image)
    assert cv2.imwrite(str(path), image)
    return path


def write_pairs(folder, side=32, scale=2, **options):
    """Two pairs of images, and the options of the data set."""
    for name in ("a.png", "b.png"):
        write(folder / "gt" / name, side)
        write(folder / "lq" / name, side // scale)
    folders = {"dataroot_gt": str(folder / "gt"), "dataroot_lq": str(folder / "lq")}
    return {"name": "pairs", "type": "PairedImageDataset", **folders, "io_backend": {"type": "disk"}, **options}


def single(folder, name="alone", **options):
    """The options of a data set of LR images alone."""
    data = {"name": name, "type": "SingleImageDataset", "dataroot_lq": str(folder), "io_backend": {"type": "disk"}}
    return {**data, **options}


def write_lmdb(folder, keys, side=32):
    image = cv2.imencode(".png", photograph("coffee", 100, 100, side, side))[1].tobytes()
    with lmdb.open(str(folder), map_size=2**24) as env, env.begin(write=True) as transaction:
        for key in keys:
            transaction.put(key.encode(), image)
    (folder / "meta_info.txt").write_text("".join(f"{key}.png ({side},{side},3) 1\n" for key in keys))
    return folder


EDSR = {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "num_block": 4, "upscale": 2}


SWINIR = {
    "type": "SwinIR", "upscale": 2, "img_size": 32, "window_size": 8, "depths": [2], "embed_dim": 12, "num_heads": [2],
    "mlp_ratio": 2, "upsampler": "pixelshuffle",
}  # fmt: skip


SHUFFLED = {"type": "RRDBNet", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "num_block": 1, "scale": 2}


def quick(photographs, **changes):
    """A training without validation, saved in every second of six iterations."""
    options = {"train__total_iter": 6, "logger__save_checkpoint_freq": 2, "datasets__val": ..., "val": ...}
    return tiny_options(photographs, **{**options, **changes})


def log_text(experiment):
    return "".join(path.read_text() for path in sorted(experiment.glob("train_*.log")))


def environment(**more):
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def run_python(folder, *arguments, code=0, **env):
    """Run Python in a folder, with this package on its path: it ends with ``code``; returns its output."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, env=environment(**env), stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done


TRAIN = ("-m", "tlw_basicsr.train", "-opt", "options.yml")


def start(folder, opt, *arguments):
    """Start a training as a program."""
    write_yaml(folder, opt)
    return subprocess.Popen(
        [sys.executable, *TRAIN, *arguments], cwd=folder, env=environment(), stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for(process, what):
    for line in process.stderr:
        if what in line:
            return
    raise AssertionError(f"ended before {what!r}")


def load_script(name):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PHOTOGRAPHS = [("astronaut", 30, 180), ("astronaut", 300, 100), ("coffee", 100, 200), ("chelsea", 80, 120)]
PHOTOGRAPHS += [("rocket", 200, 250)]


def real_pairs():
    """x̂ and x of five photographs: x̂ is the bicubic ×4."""
    gt = torch.cat([as_tensor(photograph(name, top, left, 64, 64)) for name, top, left in PHOTOGRAPHS])
    lq = nn.functional.interpolate(gt, scale_factor=0.25, mode="bicubic", antialias=True)
    return nn.functional.interpolate(lq, scale_factor=4, mode="bicubic").clamp(0, 1).to(DEVICE), gt.to(DEVICE)


def refused(message, call, *args, **kwargs):
    """The call ends in a ``UserError`` of one line, in which ``message``, a regular expression, is found."""
    with pytest.raises(UserError, match=message) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)


def check_all(folder, opt, *arguments, is_train=True):
    """All checks before a training or test: the options' own, the files' headers and the rehearsal; gives the notes."""
    argv = ["-opt", str(write_yaml(folder, opt)), *arguments]
    parsed, args = parse_options(str(folder), is_train, argv)
    check_files(parsed)
    return rehearse(parsed, args.given)[1]
