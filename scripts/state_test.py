"""Resume a training from damaged states and networks, and count how it ends: none may crash or be half taken.

    python scripts/state_test.py --cases 400 --seed 0

A case changes the newest state, or a network of it, at a random place, or by a named change that has once crashed or
misled a training; the state before it is whole. A right end is exit code 0, by the changed state if it is still right,
else by the one before it, or exit code 2 with one line. Exit code 1 if a case ends otherwise. Linux only.
"""

import argparse
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))
import kill_test

from tests.bad_input import ATTACKS, broken_bytes, broken_content, saved

SECONDS = 60


def make_cases(number: int, seed: int, files: dict[str, Any]) -> Iterator[tuple[str, str, Callable[[], bytes]]]:
    """``number`` random changes, then the named ones: name, file, and what makes its new content."""
    rng = random.Random(seed)
    state, *networks = files
    for index in range(number):
        file = state if rng.random() < 0.75 else rng.choice(networks)
        own, content = random.Random(rng.random()), files[file]
        make = partial(broken_content, own, content)
        yield f"random {index}", file, make if rng.random() > 0.15 else partial(broken_bytes, own, saved(content))
    for name, attack in ATTACKS.items():
        yield name, state, partial(attack, deepcopy(files[state]))


def judge(code: int | None, text: str) -> str:
    """How a case ended, in a word or two."""
    if code is None:
        return "hang"
    if "Traceback" in text or "\x1b" in text or "\nERROR" in text or code not in (0, 2):
        return "crash"
    if code == 2:
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        return "one line" if len(errors) == 1 else "crash"
    return "the state before" if "the state before it is tried" in text else "taken"


def state_test(folder: Path, number: int, seed: int, only: str = "") -> dict[str, Any]:
    """Train in ``folder``, run every case, and return how many ended in which way, and which in a wrong one."""
    whole = folder / "whole"
    whole.mkdir(parents=True)
    opt = kill_test.options(folder, 4, num_feat=4, workers=0)
    opt["logger"].update(save_checkpoint_freq=2, keep_checkpoints=None)
    opt["val"]["val_freq"] = 2
    opt["train"]["accumulation_steps"] = 3
    (whole / "options.yml").write_text(yaml.safe_dump(opt))
    kill_test.finish(kill_test.start(whole), whole)
    opt["train"]["total_iter"] = 6
    experiment = Path("experiments/kill_test")
    names = ["training_states/4.state", "models/net_g_4.pth", "models/net_w_4.pth"]
    files = {name: torch.load(whole / experiment / name, weights_only=True) for name in names}
    ends: Counter[str] = Counter()
    wrong, slowest = {}, 0.0
    for name, file, make in (case for case in make_cases(number, seed, files) if only in case[0]):
        place = folder / "case"
        try:
            content = make()
        except Exception:  # torch can't save everything that a change makes
            ends["could not be made"] += 1
            continue
        shutil.copytree(whole, place)
        (place / "options.yml").write_text(yaml.safe_dump(opt))
        (place / experiment / file).write_bytes(content)
        began = time.monotonic()
        process = kill_test.CONTEXT.Process(target=kill_test.train, args=(str(place), str(place / "case.txt")))
        process.start()
        process.join(SECONDS)
        slowest, code = max(slowest, time.monotonic() - began), process.exitcode
        if code is None:
            process.kill()
            process.join()
        text = (place / "case.txt").read_text(errors="replace") if (place / "case.txt").exists() else ""
        end = judge(code, text)
        ends[end] += 1
        if end in ("hang", "crash"):
            wrong[f"{name} ({end})"] = [line[:300] for line in text.strip().splitlines()[-1:]]
        shutil.rmtree(place)
    return {"cases": ends.total(), "ends": dict(ends), "slowest_seconds": round(slowest, 1), "wrong": wrong}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=400, help="random ones; the named ones come after them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="only cases with this in their name")
    kill_test.run_test(
        parser, lambda at, a: state_test(at, a.cases, a.seed, a.only), lambda figures, _: not figures["wrong"]
    )


if __name__ == "__main__":
    main()
