"""How fast the data come, on one core: data sets with and without a cache.

python scripts/benchmark_data.py --gt datasets/DIV2K/tiles512/HR --gt-size 192 --need 1600

The data sets take turns in every round. LR images for PairedImageDataset and the cache are made in a temporary folder,
which TMPDIR names.
"""

import argparse
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import tlw_basicsr  # noqa: F401  comes first, see its compat.py

# isort: split

import cv2
import torch
from basicsr.data import build_dataset

from tlw_basicsr.data.cache import use_cache
from tlw_basicsr.tools.prepare import prepare
from tlw_basicsr.tools.report import markdown_table
from tlw_basicsr.util.errors import UserError, run


def time_loading(gt: Path, scale: int, gt_size: int, number: int, rounds: int) -> dict[str, Any]:
    """Images a second of the data sets, which take turns, and what the caches took."""
    with TemporaryDirectory() as folder:
        made = Path(folder, "made")
        prepare(gt, made, scales=[scale], workers=1)  # both have the same HR images, as PNG and cut to the scale
        common = {"name": gt.name, "dataroot_gt": str(made / "HR"), "io_backend": {"type": "disk"}, "phase": "train"}
        common |= {"scale": scale, "gt_size": gt_size, "use_hflip": True, "use_rot": True}
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
    cores = f"cores for {need or 0:.0f} a second"
    rows = [
        [name, f"{rate:.0f}", f"{1e3 / rate:.2f}", f"{rate / base:.1f}", f"{(need or 0) / rate:.2f}"]
        for name, rate in figures["images_per_s"].items()
    ]
    headings = [f"{figures['images']} images", "a second", "ms an image", "times Paired", cores]
    print("\n".join(markdown_table(headings, rows, 1)))
    for name, cache in figures["caches"].items():
        took = f"{cache['s']:.1f} s, {cache['cpu_s']:.1f} s of CPU, {cache['bytes'] / 1e6:.0f} MB of disk"
        print(f"Filling the cache of {name}: {took}")


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gt", type=Path, required=True, help="folder of HR images")
    parser.add_argument("--gt-size", type=int, default=192)
    parser.add_argument("--scale", type=int, default=4)
    parser.add_argument("--number", type=int, default=50, help="images of each data set in a round")
    parser.add_argument("--need", type=float, help="images a second that the training takes")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    if min(args.rounds, args.number, args.scale) < 1:
        raise UserError("--rounds, --number, --scale: expected numbers of at least 1")
    torch.set_num_threads(1)  # a loader's worker has one
    cv2.setNumThreads(1)
    report_loading(time_loading(args.gt, args.scale, args.gt_size, args.number, args.rounds), args.need)


if __name__ == "__main__":
    run(main)
