"""The paper's comparison: train the cells of a table that are missing, measure them, write the table."""

import hashlib
import json
import math
import re
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby, product
from operator import itemgetter
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from tlw_basicsr.engine.options import check_options, read_options
from tlw_basicsr.engine.preflight import check_folders
from tlw_basicsr.engine.resume import list_states
from tlw_basicsr.pictures import spread_figure
from tlw_basicsr.tools.evaluation import BICUBIC, METRICS, PROTOCOLS, Source, evaluate, means
from tlw_basicsr.tools.experiment import load_trained
from tlw_basicsr.tools.recipes import CELLS, recipe
from tlw_basicsr.tools.report import Row, csv_text, format_value, json_text, markdown_table, spread
from tlw_basicsr.util.errors import UserError, expanded
from tlw_basicsr.util.files import hold_lock, write_text
from tlw_basicsr.util.kinds import Options
from tlw_basicsr.util.yaml_options import force_options, load_yaml

TEST_SETS = ("Set5", "Set14", "BSD100", "Urban100", "Manga109", "T91", "BSDS200", "General100")
PLOTTED = ("psnr_y", "lpips_vgg", "haarpsi")
PROTOCOL_NAMES = {
    "field": "the field's protocol (8-bit LR and SR, border of the scale removed)",
    "paper": "the paper's protocol (HR cut to a multiple of 28, float images, no border removed)",
}
TRAIN = Path(__file__).parents[1] / "train.py"
Record = dict[str, Any]
RECORD = {"options": dict, "settings": dict, "images": dict, "results": dict, "seconds": (int, float)}


@dataclass(frozen=True)
class Variant:
    """A loss of the table: the loss of a recipe, with further options."""

    name: str  # of its row
    loss: str  # in the recipe's name, such as L1TLW
    forced: tuple[str, ...] = ()  # further options, entries section:key=value

    @property
    def unweighted(self) -> str:
        """The unweighted loss that it is compared with."""
        return "MSE" if self.loss.startswith("MSE") or "train:pixel_opt:base=mse" in self.forced else "L1"


@dataclass(frozen=True)
class Cell:
    """One training."""

    network: str
    variant: Variant
    scale: int
    seed: int

    @property
    def name(self) -> str:
        """Name of the experiment."""
        return f"{self.network}_{self.variant.name}_x{self.scale}_seed{self.seed}"


@dataclass
class Run:
    """What is common to all cells."""

    out: Path  # folder of the results
    data: Path  # folder of the test sets
    train_data: Path | None = None  # folder of HR images; None for that of the recipes
    sets: Sequence[str] = TEST_SETS
    iters: int | None = None  # None for those of the recipes
    distance: Options | None = None  # options of D; None for those of the recipes, the paper's
    forced: Sequence[str] = ()  # entries section:key=value for every cell that has the section
    with_lpips: bool = True  # and keep the checkpoint with the best LPIPS-vgg on Set5, otherwise the last one
    grey_as_y: bool = False
    with_perceptual: bool = False
    missing: list[str] = field(default_factory=list, init=False)  # of the sets
    # a hash of a folder's files: what was measured or trained on other images shows
    fingerprint: Callable[[Path], str] = field(default_factory=lambda: cache(hash_files), init=False)

    def __post_init__(self) -> None:
        self.missing = [name for name in self.sets if not (self.data / name).is_dir()]
        self.sets = [name for name in self.sets if name not in self.missing]
        if not self.sets:
            raise UserError(f"--data: {self.data} has none of the test sets {', '.join(self.missing)}")

    @property
    def keeps_best(self) -> bool:
        """Whether the network counts that is best by LPIPS-vgg on Set5, not the last one."""
        return self.with_lpips and (self.data / "Set5").is_dir()


def hash_files(folder: Path) -> str:
    """A hash of the names and contents of a folder's files."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        content = path.read_bytes()
        total.update(f"{path.name}\0{len(content)}\0".encode() + content)
    return total.hexdigest()[:16]


def cell_options(run: Run, cell: Cell) -> Options:
    """The options of a training: those of the cell's recipe with what the run changes."""
    name = f"{cell.network}_{cell.variant.loss}_x{cell.scale}"
    opt = load_yaml(recipe(name), name)
    opt.update(name=cell.name, manual_seed=cell.seed)
    train = opt["train"]
    data = opt["datasets"]["train"]
    if run.train_data:
        data.update(dataroot_gt=str(run.train_data), name=run.train_data.name)
    for key in ("dataroot_gt", "cache"):  # the training runs in run.out
        data[key] = str(expanded(data[key], f"datasets.train.{key}").resolve())
    if not (run.data / "Set5").is_dir():
        del opt["datasets"]["val"], opt["val"]
    else:
        opt["datasets"]["val"]["dataroot_gt"] = str((run.data / "Set5").resolve())
        if not run.with_lpips:
            del opt["val"]["metrics"]["lpips_vgg"], opt["val"]["save_best"]
    opt["logger"]["use_tb_logger"] = False
    if run.iters:
        every = max(run.iters // 10, 1)
        train["total_iter"] = run.iters
        opt["logger"].update(print_freq=max(run.iters // 50, 1), save_checkpoint_freq=every)
        if "val" in opt:
            opt["val"]["val_freq"] = every
        if "tlw" in train:  # k goes its whole way, as in the paper's 100 epochs
            train["tlw"].update(k_unit="iter", k_decay=run.iters)
        if "uncertainty" in train:
            train["uncertainty"]["stage_one_iter"] = run.iters // 2
    if run.distance and "distance" in train["pixel_opt"]:
        train["pixel_opt"]["distance"] = deepcopy(run.distance)
    force_options(opt, [entry for entry in run.forced if has_section(opt, entry)])
    force_options(opt, list(cell.variant.forced))
    return opt


def has_section(opt: Options, entry: str) -> bool:
    """Whether the options have the sections of an entry ``section:key=value``."""
    place: Any = opt
    for section in entry.partition("=")[0].split(":")[:-1]:
        place = place.get(section) if isinstance(place, dict) else None
    return isinstance(place, dict)


def check_forced(run: Run, cells: Sequence[Cell]) -> None:
    """Raise a :class:`UserError` if an entry of ``--force_yml`` belongs to no loss of the cells' networks."""
    pairs = {(cell.network, cell.scale) for cell in cells}
    names = [name for name, (network, _, scale) in CELLS.items() if (network, scale) in pairs]
    recipes = [load_yaml(recipe(name), name) for name in names]
    for entry in run.forced:
        if not any(has_section(opt, entry) for opt in recipes):
            raise UserError(f"--force_yml {entry}: no cell has this section")


def record_path(run: Run, name: str) -> Path:
    """The file with what is known of a cell: its options, seconds of training, results."""
    return run.out / "cells" / f"{name}.json"


def read_record(run: Run, name: str) -> Record:
    """A cell's record; empty if there is none yet."""
    path = record_path(run, name)
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        record = None
    if isinstance(record, dict) and all(isinstance(record[key], RECORD[key]) for key in RECORD.keys() & record.keys()):
        return record
    raise UserError(f"{path}: damaged; delete it, and the cell is measured again")


def write_record(run: Run, name: str, record: Record) -> None:
    """Write a cell's record."""
    write_text(json_text(record, 1), record_path(run, name))


def is_trained(run: Run, cell: Cell) -> bool:
    """Whether a cell's training has ended."""
    record = read_record(run, cell.name)
    opt = json.loads(json.dumps(cell_options(run, cell)))
    trained = record.get("trained") is True
    difference = ""
    if trained or list_states(run.out / "experiments" / cell.name / "training_states"):
        old = deepcopy(record.get("options", opt))
        for each in (old, opt):
            each["datasets"]["train"].pop("cache", None)  # changes no image
        difference = first_difference(old, opt)
    if trained and not difference and "train_images" in record:
        images = Path(opt["datasets"]["train"]["dataroot_gt"])
        if images.is_dir() and record["train_images"] != run.fingerprint(images):
            difference = f"on other images in {images}"
    if difference:
        raise UserError(
            f"{run.out}: {cell.name} was trained {difference}; name another --out, or delete "
            f"{record_path(run, cell.name)} and {run.out / 'experiments' / cell.name}"
        )
    return trained


def check_cell(run: Run, cell: Cell) -> None:
    """Check a training's options and the folders that they name."""
    try:
        opt = cell_options(run, cell)
        check_options(opt, is_train=True)
        for key, dataset in opt["datasets"].items():
            check_folders(dataset, f"datasets.{key}")
    except UserError as error:
        raise UserError(f"{cell.name}: {error}") from error


def first_difference(old: Any, new: Any, place: str = "") -> str:
    """Where two options differ first: ``with other options (place: old, now new)``; empty if they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = (key for key in [*old, *new] if old.get(key) != new.get(key))
        return next((first_difference(old.get(key), new.get(key), f"{place}.{key}".lstrip(".")) for key in keys), "")
    return f"with other options ({place}: {old!r}, now {new!r})"


def train(run: Run, cell: Cell, report: Callable[[int], object]) -> None:
    """Train a cell, or go on with it; ``report`` is called with the iterations done.

    The training is a process of its own. What ends this one, such as Ctrl-C or ``sys.exit`` of a signal's handler, lets
    it save and end, too.
    """
    opt, file = cell_options(run, cell), run.out / "options" / f"{cell.name}.yml"
    command = [sys.executable, str(TRAIN), "-opt", str(file.resolve()), "--auto_resume"]
    lock = record_path(run, cell.name).with_suffix(".lock")
    with hold_lock(lock, f"the cell {cell.name}", warnings.warn) as descriptors:
        record = read_record(run, cell.name)
        record |= {"options": opt, "train_images": run.fingerprint(Path(opt["datasets"]["train"]["dataroot_gt"]))}
        write_record(run, cell.name, record)
        write_text(yaml.safe_dump(opt, sort_keys=False), file)
        start, lines = time.perf_counter(), []
        # a terminal's Ctrl-C reaches it through this process alone
        options: dict[str, Any] = {"cwd": run.out, "start_new_session": True, "pass_fds": descriptors}
        options |= {"text": True, "errors": "replace", "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with subprocess.Popen(command, **options) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    lines.append(line.rstrip())
                    if found := re.search(r"\biter:\s*([\d,]+)", line):
                        report(int(found[1].replace(",", "")))
            except BaseException:
                process.terminate()
                process.stdout.read()  # until it has saved and ended
                raise
        record["seconds"] = record.get("seconds", 0) + time.perf_counter() - start
        record["trained"] = process.returncode == 0
        write_record(run, cell.name, record)
    if process.returncode:
        reason = next((line for line in reversed(lines) if line.startswith("error: ")), (lines or ["no output"])[-1])
        raise UserError(f"{cell.name}: the training ended with {process.returncode}: {reason.removeprefix('error: ')}")


def measure(run: Run, name: str, scale: int, checkpoint: Path | None) -> Record:
    """Measure a network, or bicubic, on the test sets that are not measured yet; returns the cell's record."""
    record = read_record(run, name)
    key = "bicubic" if checkpoint is None else hashlib.sha256(checkpoint.read_bytes()).hexdigest()[:16]
    asked: dict[str, Any] = {key: getattr(run, key) for key in ("with_lpips", "with_perceptual", "grey_as_y")}
    settings = {"checkpoint": key, **asked}
    if record.get("settings") != settings or "images" not in record or "results" not in record:
        record.update(settings=settings, images={}, results={})
    source: Source = BICUBIC
    for name_of_set in run.sets:
        images = run.fingerprint(run.data / name_of_set)
        if record["images"].get(name_of_set) == images and is_measured(record["results"].get(name_of_set)):
            continue
        if checkpoint and source == BICUBIC:
            file = run.out / "options" / f"{name}.yml"
            trained = load_trained(read_options(str(file)), checkpoint)
            source, record["entry"] = trained.upscaler(scale=scale, origin=file), trained.entry
        rows = evaluate(dict.fromkeys(PROTOCOLS, source), run.data / name_of_set, scale, **asked)
        record["images"][name_of_set], record["results"][name_of_set] = images, means(rows)
        write_text(csv_text(rows), record_path(run, name).with_name(f"{name}_{name_of_set}.csv"))
        write_record(run, name, record)
    return record


def is_measured(result: Any) -> bool:
    """Whether a record's result has numbers of both protocols, or None for an infinite one."""
    for name, protocol in PROTOCOLS.items():
        values = result.get(name) if isinstance(result, dict) else None
        if not isinstance(values, dict) or not values.keys() >= set(protocol.metrics):
            return False
        if not all(value is None or isinstance(value, (int, float)) for value in values.values()):
            return False
    return True


def find_network(run: Run, cell: Cell) -> Path:
    """The network that counts: the best one by LPIPS-vgg on Set5, or the last one."""
    return run.out / "experiments" / cell.name / "models" / f"net_g_{'best' if run.keeps_best else 'latest'}.pth"


def long_table(run: Run, cells: Sequence[Cell], scale: int) -> list[Row]:
    """The table in its long form: a row for each protocol, test set, metric, and network and loss, bicubic first.

    ``difference`` is that of the means to the unweighted loss; ``values`` holds the values of the seeds.
    """
    bicubic_record = read_record(run, f"bicubic_x{scale}")
    lines: list[tuple[str, Variant, int, list[Record]]] = [("", Variant("bicubic", ""), 0, [bicubic_record])]
    chosen = [cell for cell in cells if cell.scale == scale]
    for (network, variant), group in groupby(chosen, key=lambda cell: (cell.network, cell.variant)):
        of_line = list(group)
        iterations = int(cell_options(run, of_line[0])["train"]["total_iter"])
        lines.append((network, variant, iterations, [read_record(run, cell.name) for cell in of_line]))
    table: list[Row] = []
    for protocol, name_of_set in product(PROTOCOLS, run.sets):
        for metric in bicubic_record["results"][name_of_set][protocol]:
            column: list[Row] = []
            for network, variant, iterations, records in lines:
                values = [record["results"][name_of_set][protocol][metric] for record in records]
                values = [math.inf if value is None else value for value in values]
                seconds = mean(record.get("seconds", 0) for record in records)
                column.append({
                    "scale": scale, "protocol": protocol, "set": name_of_set, "network": network, "loss": variant.name,
                    "metric": metric, "mean": mean(values), "spread": spread(values), "seeds": len(values),
                    "difference": None, "best": 0, "iterations": iterations,
                    "seconds": round(seconds, 1) if network else 0, "values": values,
                })  # fmt: skip
            means_of = {(row["network"], row["loss"]): row["mean"] for row in column}
            best = (max if METRICS[metric].higher else min)(means_of.values())
            for row, (network, variant, *_) in zip(column, lines, strict=True):
                row["best"] = int(row["mean"] == best)
                base = (network, variant.unweighted)
                if base in means_of and variant.unweighted != variant.name:
                    row["difference"] = row["mean"] - means_of[base]
            table += column
    return table


def describe(run: Run, cells: Sequence[Cell]) -> list[str]:
    """What the reader of a table must know."""
    opts = [cell_options(run, cell) for cell in cells]
    iterations = sorted({int(opt["train"]["total_iter"]) for opt in opts})
    train_sets = sorted({opt["datasets"]["train"]["name"] for opt in opts})
    distances = {
        yaml.safe_dump(opt["train"]["pixel_opt"]["distance"], default_flow_style=True, width=1000).strip()
        for opt in opts
        if "distance" in opt["train"]["pixel_opt"]
    }
    entries = sorted({read_record(run, cell.name).get("entry") or "parameters" for cell in cells})
    scaled = "" if run.iters is None else " (--iters: scaled down, not the paper's training)"
    seeds = sorted({cell.seed for cell in cells})
    network = "the one with the best LPIPS-vgg on Set5" if run.keeps_best else "the last one"
    variants = dict.fromkeys(cell.variant for cell in cells)
    lines = {
        f"Trained for {', '.join(f'{n:,}' for n in iterations)} iterations on {', '.join(train_sets)}{scaled}; "
        f"seeds {', '.join(map(str, seeds))}, one start for all losses each.": True,
        f"The network that counts: {network}, its {' or '.join(entries)}.": True,
        f"Distance D of TLW: {', '.join(sorted(distances))}.": distances,
        f"Options changed: {', '.join(run.forced)}.": run.forced,
        **{f"{v.name}: {v.loss} with {', '.join(v.forced)}.": v.forced for v in variants},
        "In brackets: the difference to the unweighted loss. Bold: the best of the column.": True,
        "±: standard deviation over the seeds.": len(seeds) > 1,
        f"Left out, not in the data folder: {', '.join(run.missing)}.": run.missing,
        "Left out: LPIPS, by --no-lpips.": not run.with_lpips,
        "Grey images: their levels are Y (field's protocol).": run.grey_as_y,
    }
    return [line for line, applies in lines.items() if applies]


def markdown(table: Sequence[Row], notes: Sequence[str]) -> str:
    """The table as Markdown: a section for each protocol and test set."""
    text = [f"# ×{table[0]['scale']}", "", *(f"- {note}" for note in notes), ""]
    for (protocol, name_of_set), group in groupby(table, key=itemgetter("protocol", "set")):
        lines: dict[tuple[str, str], list[str]] = defaultdict(list)
        metrics = {}
        for row in group:
            metric = metrics[row["metric"]] = METRICS[row["metric"]]
            cell = format_value(row["mean"], row["spread"], metric.digits, factor=metric.factor)
            cell = f"**{cell}**" if row["best"] else cell
            if row["difference"] is not None:
                cell += f" ({format_value(row['difference'], None, metric.digits, '+', metric.factor)})"
            lines[row["network"] or "–", row["loss"]].append(cell)
        headings = ["network", "loss", *(metric.heading for metric in metrics.values())]
        rows = [[*names, *line] for names, line in lines.items()]
        text += [f"## {name_of_set}, {PROTOCOL_NAMES[protocol]}", "", *markdown_table(headings, rows, 2), ""]
    return "\n".join(text)


def plot(run: Run, table: Sequence[Row]) -> list[Path]:
    """Write ``table_x{scale}_{network}.png`` for every network: bicubic and its losses, with the seeds' spread.

    There is a row for each metric of :data:`PLOTTED` that was measured, and a column for each test set.
    """
    paths, scale = [], table[0]["scale"]
    for network in dict.fromkeys(row["network"] for row in table if row["network"]):
        chosen = [row for row in table if row["network"] in ("", network) and row["protocol"] == "paper"]
        panels = []
        for metric, name_of_set in product(PLOTTED, run.sets):
            column = [row["values"] for row in chosen if (row["metric"], row["set"]) == (metric, name_of_set)]
            factor = METRICS[metric].factor
            if column:
                panels.append((name_of_set, METRICS[metric].heading, [[factor * v for v in line] for line in column]))
        title = f"{network} ×{scale}, the paper's protocol"
        if any(row["seeds"] > 1 for row in chosen):
            title += ": mean and standard deviation over the seeds"
        paths.append(run.out / f"table_x{scale}_{network}.png")
        spread_figure(list(dict.fromkeys(row["loss"] for row in chosen)), panels, paths[-1], title, len(run.sets))
    return paths


def write_tables(run: Run, cells: Sequence[Cell], scale: int) -> list[Path]:
    """Write ``table_x{scale}.md`` and ``.csv``, and a plot for each network; returns their paths."""
    table = long_table(run, cells, scale)
    notes = describe(run, [cell for cell in cells if cell.scale == scale])
    paths = [run.out / f"table_x{scale}.{suffix}" for suffix in ("md", "csv")]
    write_text(markdown(table, notes), paths[0])
    write_text(csv_text([{key: row[key] for key in row if key != "values"} for row in table]), paths[1])
    return paths + plot(run, table)
