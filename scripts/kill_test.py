"""Kill a training again and again by SIGKILL, go on each time, and compare its end with that of an untouched one.

    python scripts/kill_test.py --kills 25 --seed 0

Every iteration writes networks and a state, so that many kills land within a write: half of them come at a random
moment after a further iteration, half within the write that follows it. At the end the networks, EMA and the
optimisers' states must be those of the untouched training, bit for bit. Exit code 1 if they are not, or if the kills
were too few, never within a write, or not each followed by a resumption.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.conftest import tiny_options
from tests.helpers import same, write
from tlw_basicsr.util.files import load_file

# a server that has imported everything and run nothing: every training is a fork of it
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tlw_basicsr.engine.pipeline", "tests.bad_input"])


def options(folder: Path, iterations: int, num_feat: int, workers: int) -> dict[str, Any]:
    """A small training on photographs whose files are large for it: every iteration is saved, three are kept."""
    for number in range(4):
        write(folder / f"photographs/{number}.png", 64)
    opt = tiny_options(folder / "photographs", name="kill_test", num_gpu=0, network_w__num_feat=num_feat // 2)
    opt["network_g"].update(num_feat=num_feat, num_block=2)
    opt["datasets"]["train"]["num_worker_per_gpu"] = workers
    opt["train"]["optim_g"] = opt["train"]["optim_w"] = {"type": "Adam", "lr": 1e-4}
    opt["train"]["total_iter"], opt["train"]["scheduler"]["milestones"] = iterations, [iterations // 2]
    opt["val"]["val_freq"] = 7
    opt["logger"].update(save_checkpoint_freq=1, keep_checkpoints=3)
    return opt


def train(folder: str, log: str) -> None:
    """Train in this process, or go on from what is found in ``folder``."""
    from tlw_basicsr.engine.pipeline import train_pipeline
    from tlw_basicsr.util.errors import run as run_program

    # a data loader's workers are children of the training, as ordinarily: they end when it is killed
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    os.chdir(folder)
    with open(log, "a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    run_program(lambda: train_pipeline(folder, ["-opt", "options.yml", "--auto_resume"]))


def start(folder: Path) -> Any:
    """Start a training; it is running when this returns."""
    log = folder / "output.txt"
    offset = log.stat().st_size if log.exists() else 0
    process = CONTEXT.Process(target=train, args=(str(folder), str(log)))
    process.start()
    while process.is_alive() and (not log.exists() or b"Training:" not in log.read_bytes()[offset:]):
        time.sleep(0.005)
    return process


def finish(process: Any, folder: Path) -> None:
    """Wait for the end of a training, which must be a right one."""
    process.join()
    if process.exitcode:
        raise SystemExit(f"the training ended with {process.exitcode}, see {folder / 'output.txt'}")


def unfinished(experiment: Path) -> str:
    """What a kill has left: ``file`` half written, ``iteration`` of which files are missing, or nothing."""
    if list(experiment.rglob(".*.tmp")):
        return "file"
    names = {kind: {p.stem.rsplit("_", 1)[-1] for p in experiment.glob(f"models/net_{kind}_[0-9]*")} for kind in "gw"}
    states = {p.stem for p in experiment.glob("training_states/*.state")}
    return "" if names["g"] == names["w"] == states else "iteration"


def newest(states: Path) -> int:
    """The last iteration that has a state; 0 without any."""
    return max((int(p.stem) for p in states.glob("*.state") if p.stem.isdecimal()), default=0)


def kill_test(folder: Path, kills: int, seed: int, iterations: int, num_feat: int, workers: int) -> dict[str, Any]:
    """Run both trainings in ``folder``; return the numbers of kills by where they fell, and which files differ."""
    ends = {}
    for name in ("whole", "killed"):
        (folder / name).mkdir(parents=True)
        text = yaml.safe_dump(options(folder, iterations, num_feat, workers))
        (folder / name / "options.yml").write_text(text)
        ends[name] = folder / name / "experiments/kill_test"
    process = start(folder / "whole")
    began = time.monotonic()
    finish(process, folder / "whole")
    duration = time.monotonic() - began

    generator = random.Random(seed)
    found = {"kills": 0, "file": 0, "iteration": 0, "": 0}
    states = ends["killed"] / "training_states"
    while found["kills"] < kills:
        process = start(folder / "killed")
        before = newest(states)
        while process.is_alive() and newest(states) == before:
            time.sleep(0.001)
        if generator.random() < 0.5:
            process.join(generator.uniform(0, 2 * duration / iterations))
        else:  # within the next write
            while process.is_alive() and not any(ends["killed"].glob("*/.*.tmp")):
                pass
        if not process.is_alive():
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        found["kills"] += 1
        found[unfinished(ends["killed"])] += 1
    finish(start(folder / "killed"), folder / "killed")

    names = [f"models/net_{n}_{i}.pth" for n in "gw" for i in (iterations, "latest")]
    names += [f"training_states/{iterations}.state"]
    different = [n for n in names if not same(*(load_file(end / n, "file") for end in ends.values()))]
    return {
        "kills": found["kills"],
        "within_a_file": found["file"],
        "between_files_of_an_iteration": found["iteration"],
        "resumed": (folder / "killed/output.txt").read_text().count("Resuming after iteration"),
        "left_over": len(list(ends["killed"].rglob("*.tmp"))),
        "checkpoints_kept": len(list(ends["killed"].glob("training_states/*.state"))),
        "different_files": different,
    }


def run_test(
    parser: argparse.ArgumentParser,
    test: Callable[[Path, argparse.Namespace], dict[str, Any]],
    is_right: Callable[[dict[str, Any], argparse.Namespace], bool],
) -> None:
    """Run a test in the folder ``--out``, print its figures, and end with 1 if they are not right."""
    parser.add_argument("--out", type=Path, help="folder to work in, which must not exist; default: a temporary one")
    args = parser.parse_args()
    folder = (args.out or Path(tempfile.mkdtemp())).resolve()
    figures = test(folder, args)
    print(json.dumps(figures, indent=2, ensure_ascii=False))
    if args.out is None:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(not is_right(figures, args))


def is_right(figures: dict[str, Any], args: argparse.Namespace) -> bool:
    """Whether the ends are the same, and the kills were enough, some within a write, each followed by a resumption."""
    within = figures["within_a_file"] + figures["between_files_of_an_iteration"]
    tested = figures["kills"] == args.kills == figures["resumed"] and within
    return bool(tested and not figures["different_files"] and not figures["left_over"])


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--iterations", type=int, default=100, help="at least three times the kills")
    parser.add_argument("--num-feat", type=int, default=128, help="channels of the network: how large the files are")
    parser.add_argument("--workers", type=int, default=0, help="of the data loader")
    run_test(parser, lambda at, a: kill_test(at, a.kills, a.seed, a.iterations, a.num_feat, a.workers), is_right)


if __name__ == "__main__":
    main()
