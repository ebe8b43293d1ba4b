"""How fast the data come: BicubicSRDataset, and MATLAB's bicubic against BasicSR's loops, in one process.

python scripts/benchmark_data.py --gt datasets/DIV2K/tiles512/HR --gt-size 192 --need 100
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tlw_basicsr  # noqa: I001, F401  comes first, see its compat.py
import numpy as np
import torch
from basicsr.utils.matlab_functions import imresize as basicsr_imresize

from tlw_basicsr import BicubicSRDataset, imresize
from tlw_basicsr.errors import run


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gt", type=Path, help="folder of HR images for the first part")
    parser.add_argument("--gt-size", type=int, default=192)
    parser.add_argument("--scale", type=int, default=4)
    parser.add_argument("--need", type=float, help="images a second that the training takes")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a loader's worker has one
    figures = {}
    if args.gt:
        dataset = BicubicSRDataset(
            {"dataroot_gt": str(args.gt), "io_backend": {"type": "disk"}, "scale": args.scale, "phase": "train",
             "gt_size": args.gt_size, "use_hflip": True, "use_rot": True}
        )  # fmt: skip
        number = min(len(dataset), 200)
        dataset[0]
        start = time.perf_counter()
        for index in range(number):
            dataset[index]
        figures["images_per_s_per_core"] = number / (time.perf_counter() - start)
        print(f"BicubicSRDataset: {figures['images_per_s_per_core']:.0f} images a second on one core")
        if args.need:
            figures["cores_needed"] = args.need / figures["images_per_s_per_core"]
            print(f"for {args.need:.0f} a second: {figures['cores_needed']:.2f} cores")
    image = np.random.default_rng(0).random((1080, 2040, 3), dtype=np.float32)
    times: dict[str, list[float]] = {"basicsr": [], "ours": []}
    for _ in range(args.rounds + 1):  # the first is a warm-up
        for name, resize in (("basicsr", basicsr_imresize), ("ours", imresize)):
            start = time.perf_counter()
            result = resize(image, 1 / args.scale)
            times[name].append(time.perf_counter() - start)
            figures[name] = result
    difference = float(np.abs(figures.pop("basicsr") - figures.pop("ours")).max())
    medians = {name: median(values[1:]) for name, values in times.items()}
    figures |= {"imresize_s": medians, "ratio": medians["basicsr"] / medians["ours"], "difference": difference}
    print(
        f"imresize 2040×1080 by 1/{args.scale}: BasicSR {medians['basicsr'] * 1e3:.1f} ms, ours "
        f"{medians['ours'] * 1e3:.1f} ms, {figures['ratio']:.1f} times as fast, largest difference {difference:.1e}"
    )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2), "utf-8")


if __name__ == "__main__":
    run(main)
