"""Train a tiny network for long, and measure what must not grow: memory, open files, logs beyond their rate.

    python scripts/soak_test.py --iterations 2000

The training validates, saves checkpoints (of which three are kept) and writes to TensorBoard. Exit code 1 if something
grows. Reads /proc: Linux only.
"""

import argparse
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))
import kill_test

PAGE = 4096 / 2**20  # MiB
SLOPE = 8.0  # MiB per 1,000 iterations, and from the first third to the last; a leaked image or graph is more
FILES = 3  # that may be open for a moment, such as a checkpoint that is written


def soak(folder: Path, iterations: int, warm_up: int, workers: int) -> dict[str, Any]:
    """Run the training in ``folder``, watch its process, and return what it took.

    The memory's slope is that of a straight line through the samples after ``warm_up``.
    """
    opt = kill_test.options(folder, iterations, num_feat=4, workers=workers)
    opt["logger"].update(print_freq=10, save_checkpoint_freq=50, use_tb_logger=True)
    opt["val"]["val_freq"] = 100
    (folder / "options.yml").write_text(yaml.safe_dump(opt))
    process = kill_test.start(folder)
    proc = Path(f"/proc/{process.pid}")
    log = next((folder / "experiments/kill_test").glob("train_*.log"))
    samples = []
    while process.is_alive():
        try:
            resident = int((proc / "statm").read_text().split()[1]) * PAGE
            files = len(list((proc / "fd").iterdir()))
        except OSError:
            break
        if not resident:  # it has ended
            break
        lines = re.findall(r"iter: +([\d,]+)", log.read_text())
        samples.append((int(lines[-1].replace(",", "")) if lines else 0, resident, files))
        time.sleep(0.25)
    kill_test.finish(process, folder)
    warm = np.array([s for s in samples if s[0] >= warm_up])
    text = log.read_text()
    return {
        "iterations": iterations,
        "samples": len(warm),
        "memory_mib_of_thirds": [round(float(np.median(third[:, 1])), 1) for third in np.array_split(warm, 3)],
        "memory_slope_mib_per_1000": round(float(np.polyfit(warm[:, 0] / 1000, warm[:, 1], 1)[0]), 3),
        "open_files": [int(warm[:, 2].min()), int(warm[:, 2].max())],
        "log_lines_of_iterations": len(re.findall(r"\[epoch:", text)),
        "log_lines_expected": iterations // opt["logger"]["print_freq"],
        "log_kib": round(len(text) / 1024, 1),
        "states_kept": len(list((folder / "experiments/kill_test/training_states").iterdir())),
    }


def is_flat(figures: dict[str, Any], _: argparse.Namespace) -> bool:
    """Whether neither memory nor files have grown, and logs have by their rate."""
    first, _, last = figures["memory_mib_of_thirds"]
    fewest, most = figures["open_files"]
    flat = max(figures["memory_slope_mib_per_1000"], last - first) < SLOPE and most - fewest <= FILES
    return flat and figures["log_lines_of_iterations"] == figures["log_lines_expected"]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--warm-up", type=int, default=500, help="iterations before memory is measured")
    parser.add_argument("--workers", type=int, default=0, help="of the data loader")
    kill_test.run_test(parser, lambda at, a: soak(at, a.iterations, a.warm_up, a.workers), is_flat)


if __name__ == "__main__":
    main()
