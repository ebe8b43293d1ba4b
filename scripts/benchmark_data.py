"""How fast the data come, on one core: data sets with and without a cache, and MATLAB's bicubic, against BasicSR's.

python scripts/benchmark_data.py --gt datasets/DIV2K/tiles512/HR --gt-size 192 --need 1600

The data sets take turns in every round. LR images for PairedImageDataset and the cache are made in a temporary folder,
which TMPDIR names.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import tlw_basicsr  # noqa: F401  comes first, see its compat.py

# isort: split

import cv2
import numpy as np
import torch
from basicsr.data import build_dataset
from basicsr.utils.matlab_functions import imresize as basicsr_imresize

from tlw_basicsr import imresize
from tlw_basicsr.data.cache import use_cache
from tlw_basicsr.tools.prepare import prepare
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


def time_loading(gt: Path, scale: int, gt_size: int, number: int, rounds: int) -> dict[str, Any]:
    """Images a second of the data sets, which take turns, and what the caches took."""
    with TemporaryDirectory() as folder:
        made = Path(folder, "made")
        prepare(gt, made, scales=[scale], workers=1)  # both have the same HR images, as PNG and cut to the scale
        common = {
            "name": gt.name,
            "scale": scale,
            "phase": "train",
            "gt_size": gt_size,
            "use_hflip": True,
            "use_rot": True,
        }
        common |= {"dataroot_gt": str(made / "HR"), "io_backend": {"type": "disk"}}
        kinds = {"PairedImageDataset": {"dataroot_lq": str(made / f"LRbicx{scale}")}, "BicubicSRDataset": {}}
        datasets, caches = {}, {}
        for kind, more in kinds.items():
            opt = {**common, **more, "type": kind, "cache": str(Path(folder, kind))}
            datasets[kind], datasets[f"{kind}, cache"] = build_dataset(opt), build_dataset(opt)
            start = time.perf_counter(), time.process_time()
            use_cache(datasets[f"{kind}, cache"], opt, "--gt")
            size = sum(file.stat().st_size for file in Path(folder, kind).iterdir())
            caches[kind] = {"s": time.perf_counter() - start[0], "cpu_s": time.process_time() - start[1], "bytes": size}
        times: dict[str, list[float]] = {name: [] for name in datasets}
        for turn in range(rounds + 1):  # the first is a warm-up
            for name, dataset in datasets.items():
                start = time.process_time()  # of one core, whatever others do on the machine
                for index in range(number):
                    _ = dataset[(turn * number + index) % len(dataset)]
                times[name].append((time.process_time() - start) / number)
        rates = {name: 1 / median(values[1:]) for name, values in times.items()}
        return {"images": len(list((made / "HR").iterdir())), "images_per_s": rates, "caches": caches}


def report_loading(figures: dict[str, Any], need: float | None) -> None:
    """Print the figures of :func:`time_loading` as a table."""
    base = figures["images_per_s"]["PairedImageDataset"]
    columns = [
        f"{figures['images']} images",
        "a second",
        "ms an image",
        "times Paired",
        f"cores for {need or 0:.0f} a second",
    ]
    print(f"| {' | '.join(columns)} |\n|---|--:|--:|--:|--:|")
    for name, rate in figures["images_per_s"].items():
        print(f"| {name} | {rate:.0f} | {1e3 / rate:.2f} | {rate / base:.1f} | {(need or 0) / rate:.2f} |")
    for name, cache in figures["caches"].items():
        took = f"{cache['s']:.1f} s, {cache['cpu_s']:.1f} s of CPU, {cache['bytes'] / 1e6:.0f} MB of disk"
        print(f"Filling the cache of {name}: {took}")


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gt", type=Path, help="folder of HR images for the first part")
    parser.add_argument("--gt-size", type=int, default=192)
    parser.add_argument("--scale", type=int, default=4, help="of the first part")
    parser.add_argument("--number", type=int, default=50, help="images of each data set in a round of the first part")
    parser.add_argument("--scales", type=int, nargs="*", default=[2, 3, 4], help="of the second part: 1/2, 1/3, …")
    parser.add_argument("--need", type=float, help="images a second that the training takes")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    if min(args.rounds, args.number, args.scale, *args.scales, 8) < 1:
        raise UserError("--rounds, --number, --scale, --scales: expected numbers of at least 1")
    torch.set_num_threads(1)  # a loader's worker has one
    cv2.setNumThreads(1)
    figures: dict[str, Any] = {}
    if args.gt:
        figures["loading"] = time_loading(args.gt, args.scale, args.gt_size, args.number, args.rounds)
        report_loading(figures["loading"], args.need)
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
