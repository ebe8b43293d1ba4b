"""What more than one test module uses beside the fixtures: models, images, logs, files."""

import os
import re
import subprocess
import sys

import cv2
import lmdb
import torch
from torch import nn

from tests.conftest import DEVICE, ROOT, as_tensor, photograph, tiny_options, write_yaml
from tlw_basicsr import TLWMixin
from tlw_basicsr.engine.options import parse_options
from tlw_basicsr.engine.preflight import check_files
from tlw_basicsr.engine.rehearsal import rehearse
from tlw_basicsr.models import build_model


def built(photographs, tmp_path, options=tiny_options, **changes):
    opt = options(photographs, **changes)
    opt |= {"is_train": True, "dist": False, "rank": 0, "world_size": 1}
    opt["path"] |= {"models": str(tmp_path), "training_states": str(tmp_path)}
    model = build_model(opt)
    if isinstance(model, TLWMixin):
        model.set_epoch(0)
    return model


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


def log_lines(experiment):
    """The iterations' values in the newest log."""
    newest = max(experiment.glob("train_*.log"), key=lambda p: p.stat().st_mtime_ns)
    lines = [line for line in newest.read_text().splitlines() if "iter:" in line and "epoch:" in line]
    return [
        dict(re.findall(r"(\w+): +([-\d.e+]+)", line.replace("iter:", " iter: ").replace(",", ""))) for line in lines
    ]


def write(path, side=32):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), photograph("coffee", hash(path.name) % 90, 100, side, side))


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


def start(folder, opt, *arguments, **env):
    """Start a training as a program."""
    write_yaml(folder, opt)
    return subprocess.Popen(
        [sys.executable, "-m", "tlw_basicsr.train", "-opt", "options.yml", *arguments],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), **env}, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for(process, what):
    for line in process.stderr:
        if what in line:
            return
    raise AssertionError(f"ended before {what!r}")


PHOTOGRAPHS = [
    ("astronaut", 30, 180),
    ("astronaut", 300, 100),
    ("coffee", 100, 200),
    ("chelsea", 80, 120),
    ("rocket", 200, 250),
]


def real_pairs():
    """x̂ and x of five photographs: x̂ is the bicubic ×4."""
    gt = torch.cat([as_tensor(photograph(name, top, left, 64, 64)) for name, top, left in PHOTOGRAPHS])
    lq = nn.functional.interpolate(gt, scale_factor=0.25, mode="bicubic", antialias=True)
    return nn.functional.interpolate(lq, scale_factor=4, mode="bicubic").clamp(0, 1).to(DEVICE), gt.to(DEVICE)


def check_all(folder, opt, *arguments, is_train=True):
    """All checks before a training or test: the options' own, the files' headers and the rehearsal; gives the notes."""
    argv = ["-opt", str(write_yaml(folder, opt)), *arguments]
    parsed, args = parse_options(str(folder), is_train, argv)
    check_files(parsed)
    return rehearse(parsed, args.given)[1]
