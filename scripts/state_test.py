"""Resume a training from damaged states and networks, and count how it ends: none may crash or be half taken.

    python scripts/state_test.py --cases 400 --seed 0

A case changes the newest state, or a network of it, at a random place, or by a named change that has once crashed or
misled a training; the state before it is whole. A right end is exit code 0, by the changed state if it is still right,
else by the one before it, or exit code 2 with one line. Exit code 1 if a case ends otherwise. Linux only.
"""

import argparse
import io
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))
import kill_test

SECONDS = 60
JUNK: list[Any] = [
    torch.ones(1).expand(10**5, 10**5),
    None, -1, 0, 0.5, 1e9, 10**9, 2**70, -(2**70), float("nan"), float("inf"), "x", "", "\x1b[2J\nERROR: x", b"x",
    True, (), [], {}, [None], [0, 45], {"a": None}, [[]], {0: []}, torch.zeros(0), torch.ones(()), torch.ones(7),
    torch.tensor(1j), torch.ones(1).to(torch.float8_e4m3fn), torch.full((4, 3, 3, 3), torch.nan),
    torch.tensor(True), torch.tensor(10**15), torch.eye(3).to_sparse(), torch.empty(3, device="meta"),
]  # fmt: skip
DTYPES = [torch.complex64, torch.float8_e5m2, torch.int32, torch.bool, torch.float64, torch.float16]
NAMES = ["get_lr", "step", "items", "copy", "state", "params", "optimizer", "last_epoch", "lr", "_metadata", 0, -1, ""]


def list_places(content: Any, prefix: tuple = ()) -> list[tuple]:
    """The places of all values in nested dicts, lists and tuples; of long lists the first ones."""
    places = []
    for key, value in list(content.items() if isinstance(content, dict) else enumerate(content))[:30]:
        places.append((*prefix, key))
        if isinstance(value, (dict, list, tuple)):
            places += list_places(value, (*prefix, key))
    return places


def put(content: Any, place: Sequence[Any], value: Any) -> Any:
    """``content`` with ``value`` at ``place``."""
    if not place:
        return value
    key, *rest = place
    section = list(content) if isinstance(content, tuple) else content
    section[key] = put(section[key], rest, value) if rest else value
    return tuple(section) if isinstance(content, tuple) else section


def change_value(rng: random.Random, content: Any) -> Any:
    """One value is another, gone, twice there, under another name or of another kind."""
    *path, key = rng.choice(list_places(content))
    way, found = rng.randrange(8), reduce(lambda section, part: section[part], path, content)
    section = list(found) if isinstance(found, tuple) else found
    value, is_dict = section[key], isinstance(section, dict)
    if way == 0:
        del section[key]
    elif way == 1 and is_dict:
        section[rng.choice(NAMES)] = rng.choice(JUNK)
    elif way == 2 and is_dict:
        section[rng.choice(NAMES)] = section.pop(key)
    elif way == 3 and not is_dict:
        section.append(value)
    elif way == 4 and torch.is_tensor(value):
        section[key] = value.to(rng.choice(DTYPES))
    elif way == 5 and torch.is_tensor(value):
        section[key] = value[..., None]
    else:
        section[key] = rng.choice(JUNK)
    return put(content, path, tuple(section) if isinstance(found, tuple) else section)


def save_bytes(content: Any) -> bytes:
    """As ``torch.save`` writes it."""
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def damage_bytes(rng: random.Random, content: Any) -> bytes:
    """Cut, other bits, or bytes in between."""
    data, way = bytearray(save_bytes(content)), rng.randrange(3)
    if way == 0:
        del data[rng.randrange(len(data)) :]
    elif way == 1:
        for _ in range(rng.randrange(1, 10)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    else:
        position = rng.randrange(len(data))
        data[position:position] = rng.randbytes(50)
    return bytes(data)


def attack_state() -> dict[str, Callable[[dict[str, Any]], bytes]]:
    """Changes of a state that have once crashed or misled a training."""
    optimizer, moments = ("optimizers", 0), ("optimizers", 0, "state", 0)
    places: dict[str, tuple[tuple, Any]] = {
        "params 0 is a list": ((*optimizer, "param_groups", 0, "params", 0), []),
        "complex step": ((*moments, "step"), torch.tensor(1j)),
        "complex moment": ((*moments, "exp_avg"), torch.zeros(4, 3, 3, 3, dtype=torch.complex64)),
        "float8 moment": ((*moments, "exp_avg"), torch.zeros(4, 3, 3, 3).to(torch.float8_e4m3fn)),
        "moment of another shape": ((*moments, "exp_avg_sq"), torch.ones(3)),
        "amsgrad": ((*optimizer, "param_groups", 0, "amsgrad"), True),
        "tensor for lr": ((*optimizer, "param_groups", 0, "lr"), torch.ones(2)),
        "lr of 1e300": ((*optimizer, "param_groups", 0, "lr"), 1e300),
        "get_lr": (("schedulers", 0, "get_lr"), 3),
        "milestones": (("schedulers", 0, "milestones"), {7: 10**9, 3: 1}),
        "gamma": (("schedulers", 0, "gamma"), torch.ones(3)),
        "restarts": (("schedulers", 0, "restarts"), (0, 5)),
        "base_lrs": (("schedulers", 0, "base_lrs"), []),
        "count of text": (("accumulated",), [{"count": "x", "gradients": []}, None]),
        "gradients": (("accumulated",), [{"count": 1, "gradients": [torch.ones(1)] * 99}, None]),
        "numpy of floats": (("random", 0, "numpy"), ("MT19937", [2**70] * 624, 1, 0, 0.0)),
        "python": (("random", 0, "python"), (3, (1,) * 625, None)),
        "torch": (("random", 0, "torch"), torch.zeros(3, dtype=torch.uint8)),
        "cuda": (("random", 0, "cuda"), [3]),
        "k": (("tlw", "k"), "x"),
        "position": (("position", "iters_per_epoch"), "x"),
        "iter": (("iter",), 10**18),
        "options": (("options", "network_g", "num_feat"), torch.ones(3)),
        "options of a terminal": (("options", "train", "pixel_opt"), "\x1b[2J\n2026-01-01 00:00:00,000 ERROR: x"),
        "best": (("best_metric_results",), {"val": {"psnr": {"better": "higher", "val": "x", "iter": 1}}}),
        "guard": (("guard", "in_row"), "x"),
        "scaler": (("amp",), {"scaler": {"scale": "x"}}),
    }
    attacks = {name: lambda c, p=place, v=value: save_bytes(put(c, p, v)) for name, (place, value) in places.items()}

    def build(content: dict[str, Any]) -> bytes:
        # BUILD on an OrderedDict gives it attributes, which hide its methods
        changed = OrderedDict(content)
        changed.__dict__.update({"get": 3, "keys": 3, "copy": 3})
        return save_bytes(changed)

    return {**attacks, "BUILD": build, "empty": lambda c: b"", "a list": lambda c: save_bytes([c])}


def make_cases(number: int, seed: int, files: dict[str, Any]) -> Iterator[tuple[str, str, Callable[[], bytes]]]:
    """``number`` random changes, then the named ones: name, file, and what makes its new content."""
    rng = random.Random(seed)
    state, *networks = files
    for index in range(number):
        file = state if rng.random() < 0.75 else rng.choice(networks)
        own, content = random.Random(rng.random()), deepcopy(files[file])
        if rng.random() < 0.15:
            yield f"random {index}", file, partial(damage_bytes, own, content)
        else:
            yield f"random {index}", file, lambda own=own, c=content: save_bytes(change_value(own, c))
    for name, attack in attack_state().items():
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
    process = kill_test.start(whole)
    process.join()
    if process.exitcode:
        raise SystemExit(f"the untouched training ended with {process.exitcode}, see {whole / 'output.txt'}")
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
    parser.add_argument("--out", type=Path, help="folder to work in, which must not exist; default: a temporary one")
    args = parser.parse_args()
    folder = (args.out or Path(tempfile.mkdtemp())).resolve()
    figures = state_test(folder, args.cases, args.seed, args.only)
    print(json.dumps(figures, indent=2, ensure_ascii=False))
    if args.out is None:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(bool(figures["wrong"]))


if __name__ == "__main__":
    main()
