"""How fast the data come: BicubicSRDataset, and MATLAB's bicubic against BasicSR's loops, in one process.

python scripts/benchmark_data.py --gt datasets/DIV2K/tiles512/HR --gt-size 192 --need 100
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import tlw_basicsr  # noqa: F401  comes first, see its compat.py

# isort: split

import numpy as np
import torch
from basicsr.utils.matlab_functions import imresize as basicsr_imresize

from tlw_basicsr import BicubicSRDataset, imresize
from tlw_basicsr.util.errors import UserError, run


def compare(image: np.ndarray, factor: float, rounds: int) -> dict[str, float]:
    """Medians of the seconds of a processor that both take, their ratio, and how much their results differ."""
    times: dict[str, list[float]] = {"basicsr": [], "ours": []}
    results = {}
    for _ in range(rounds + 1):  # the first is a warm-up
        for name, resize in (("basicsr", basicsr_imresize), ("ours", imresize)):
            start = time.process_time()  # not the clock's: others may use the machine too
            results[name] = resize(image, factor)
            times[name].append(time.process_time() - start)
    basicsr, ours = (median(values[1:]) for values in times.values())
    difference = float(np.abs(results["basicsr"] - results["ours"]).max())
    return {"basicsr_s": basicsr, "ours_s": ours, "ratio": basicsr / ours, "difference": difference}


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gt", type=Path, help="folder of HR images for the first part")
    parser.add_argument("--gt-size", type=int, default=192)
    parser.add_argument("--scale", type=int, default=4, help="of the first part")
    parser.add_argument("--scales", type=int, nargs="+", default=[2, 3, 4], help="of the second part: 1/2, 1/3, …")
    parser.add_argument("--need", type=float, help="images a second that the training takes")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    if min(args.rounds, args.scale, *args.scales) < 1:
        raise UserError("--rounds, --scale, --scales: expected numbers of at least 1")
    torch.set_num_threads(1)  # a loader's worker has one
    figures: dict[str, Any] = {}
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
    figures["imresize"] = {f"1/{scale}": compare(image, 1 / scale, args.rounds) for scale in args.scales}
    for factor, of_one in figures["imresize"].items():
        print(
            f"imresize 2040×1080 by {factor}: BasicSR {of_one['basicsr_s'] * 1e3:.1f} ms, ours "
            f"{of_one['ours_s'] * 1e3:.1f} ms, {of_one['ratio']:.1f} times as fast, largest difference "
            f"{of_one['difference']:.1e}"
        )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2), "utf-8")


if __name__ == "__main__":
    run(main)
