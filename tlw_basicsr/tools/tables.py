"""The paper's comparison: train the cells of a table that are missing, measure them, write the table."""

import csv
import hashlib
import io
import json
import math
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from tlw_basicsr.engine.options import check_options
from tlw_basicsr.engine.preflight import check_folders
from tlw_basicsr.engine.resume import list_states
from tlw_basicsr.pictures import spread_figure
from tlw_basicsr.tools.evaluation import PROTOCOLS, Upscaler, bicubic, csv_text, evaluate, json_text, means
from tlw_basicsr.tools.inference import upscaler_of
from tlw_basicsr.tools.recipes import list_cells, recipe
from tlw_basicsr.util.errors import UserError, expanded
from tlw_basicsr.util.files import hold_lock, write_text
from tlw_basicsr.util.kinds import Options
from tlw_basicsr.util.yaml_options import force_options, load_yaml

TEST_SETS = ("Set5", "Set14", "BSD100", "Urban100", "Manga109", "T91", "BSDS200", "General100")
METRICS = {  # name: (heading, digits, factor, whether higher is better)
    "psnr_y": ("PSNR (dB)", 2, 1, True),
    "ssim_y": ("SSIM", 4, 1, True),
    "lpips_vgg": ("LPIPS-vgg", 4, 1, False),
    "lpips_alex": ("LPIPS-alex", 4, 1, False),
    "gmsd": ("GMSD", 4, 1, False),
    "haarpsi": ("HaarPSI", 4, 1, True),
    "vif": ("VIF", 4, 1, True),
    "l1": ("L1 ×10²", 3, 100, False),
    "mse": ("MSE ×10³", 3, 1000, False),
}
CSV_COLUMNS = (
    *("scale", "protocol", "set", "network", "loss", "metric", "mean", "spread", "seeds", "difference", "best"),
    *("iterations", "seconds"),
)
TEX = {
    "×10²": r"$\times 10^2$",
    "×10³": r"$\times 10^3$",
    "_": r"\_",
    "%": r"\%",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
}
PROTOCOL_NAMES = {
    "field": "the field's protocol (8-bit LR and SR, border of the scale removed)",
    "paper": "the paper's protocol (HR cut to a multiple of 28, float images, no border removed)",
}


@dataclass(frozen=True)
class Variant:
    """A loss of the table: that of a recipe, with further options of its own.

    Attributes:
        name: its row.
        loss: the loss in the recipe's name, such as ``L1TLW``.
        forced: entries ``section:key=value``.
    """

    name: str
    loss: str
    forced: tuple[str, ...] = ()

    @property
    def unweighted(self) -> str:
        """The loss that it is compared with."""
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
        """Of the experiment."""
        return f"{self.network}_{self.variant.name}_x{self.scale}_seed{self.seed}"


@dataclass
class Run:
    """What is common to all cells.

    Attributes:
        out: folder of the results.
        data: folder of the test sets.
        train_data: folder of the HR images to train on; None for the recipes'.
        sets: names of the test sets.
        iters: iterations; None for the recipes'.
        distance: options of D; None for the recipes', the paper's.
        forced: entries ``section:key=value`` for every cell that has the section.
        with_lpips: measure LPIPS, and keep the checkpoint with the best LPIPS-vgg on Set5; else the last one.
        grey_as_y: see :func:`tlw_basicsr.tools.evaluation.evaluate`; likewise ``with_perceptual``.
        with_perceptual: see ``grey_as_y``.
    """

    out: Path
    data: Path
    train_data: Path | None = None
    sets: Sequence[str] = TEST_SETS
    iters: int | None = None
    distance: Options | None = None
    forced: Sequence[str] = ()
    with_lpips: bool = True
    grey_as_y: bool = False
    with_perceptual: bool = False
    missing: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.missing = [name for name in self.sets if not (self.data / name).is_dir()]
        self.sets = [name for name in self.sets if name not in self.missing]
        if not self.sets:
            raise UserError(f"--data: {self.data} has none of the test sets {', '.join(self.missing)}")

    @property
    def keeps_best(self) -> bool:
        """Whether the network counts that is best by LPIPS-vgg on Set5, not the last one."""
        return self.with_lpips and (self.data / "Set5").is_dir()


def list_losses(network: str, scale: int) -> list[str]:
    """The losses that a network is compared with at a scale."""
    return sorted(loss for n, loss, s in list_cells() if (n, s) == (network, scale))


# ------------------------------------------------------------------------------------------------- options


def cell_options(run: Run, cell: Cell) -> Options:
    """The options of a training: those of the cell's recipe with what the run changes."""
    opt = read_recipe(cell.network, cell.variant.loss, cell.scale)
    opt.update(name=cell.name, manual_seed=cell.seed)
    train = opt["train"]
    data = opt["datasets"]["train"]
    if run.train_data:
        data.update(dataroot_gt=str(run.train_data), name=run.train_data.name)
    folder = expanded(data["dataroot_gt"], "datasets.train.dataroot_gt")
    data["dataroot_gt"] = str(folder.resolve())  # the training runs in run.out
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


def read_recipe(network: str, loss: str, scale: int) -> Options:
    """The options of a training of the comparison."""
    name = f"{network}_{loss}_x{scale}"
    return load_yaml(recipe(name), name)


def has_section(opt: Options, entry: str) -> bool:
    """Whether the options have the sections of an entry ``section:key=value``."""
    *sections, _ = entry.partition("=")[0].split(":")
    place: Any = opt
    for section in sections:
        place = place.get(section) if isinstance(place, dict) else None
    return isinstance(place, dict)


def check_forced(run: Run, cells: Sequence[Cell]) -> None:
    """Raise a :class:`UserError` if an entry of ``--force_yml`` belongs to no loss of the cells' networks."""
    pairs = {(cell.network, cell.scale) for cell in cells}
    recipes = [read_recipe(*cell) for cell in list_cells() if (cell[0], cell[2]) in pairs]
    for entry in run.forced:
        if not any(has_section(opt, entry) for opt in recipes):
            raise UserError(f"--force_yml {entry}: no cell has this section")


# ------------------------------------------------------------------------------------------------- one cell


def record_path(run: Run, name: str) -> Path:
    """The file with what is known of a cell: seconds of training, results."""
    return run.out / "cells" / f"{name}.json"


def read_record(run: Run, name: str) -> dict[str, Any]:
    """A cell's record; empty if there is none yet.

    Raises:
        UserError: the file is damaged.
    """
    path = record_path(run, name)
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: damaged; delete it, and the cell is measured again") from error


def write_record(run: Run, name: str, record: dict[str, Any]) -> None:
    """Write a cell's record."""
    path = record_path(run, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(json_text(record, 1), path)


def is_trained(run: Run, cell: Cell) -> bool:
    """Whether a cell's training has ended.

    Raises:
        UserError: it was begun with other options.
    """
    record = read_record(run, cell.name)
    opt = json.loads(json.dumps(cell_options(run, cell)))
    begun = record.get("trained") or list_states(run.out / "experiments" / cell.name / "training_states")
    if begun and record.get("options", opt) != opt:
        key = first_difference(record["options"], opt)
        raise UserError(
            f"{run.out}: {cell.name} was trained with other options ({key}); name another --out, or delete "
            f"{record_path(run, cell.name)} and {run.out / 'experiments' / cell.name}"
        )
    return record.get("trained", False)


def check_cell(run: Run, cell: Cell) -> None:
    """Check a training's options and the folders that they name.

    Raises:
        UserError: something is wrong with them.
    """
    try:
        opt = cell_options(run, cell)
        check_options(opt, is_train=True)
        for key, dataset in opt["datasets"].items():
            check_folders(dataset, f"datasets.{key}")
    except UserError as error:
        raise UserError(f"{cell.name}: {error}") from error


def first_difference(old: Any, new: Any, place: str = "") -> str:
    """Where two options differ first: ``place: old, now new``."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *new]:
            if old.get(key) != new.get(key):
                return first_difference(old.get(key), new.get(key), f"{place}.{key}".lstrip("."))
    return f"{place}: {old!r}, now {new!r}"


def train(run: Run, cell: Cell, report: Callable[[int], object]) -> None:
    """Train a cell, or go on with it; ``report`` is called with the iterations done.

    The training is a process of its own. What ends this one, such as Ctrl-C or ``sys.exit`` of a signal's handler, lets
    it save and end, too.

    Raises:
        UserError: the training fails, or another process is at it.
    """
    path = record_path(run, cell.name).with_suffix(".lock")
    with hold_lock(path, f"the cell {cell.name}", warnings.warn) as descriptors:
        _train(run, cell, report, descriptors)


def _train(run: Run, cell: Cell, report: Callable[[int], object], descriptors: tuple[int, ...]) -> None:
    opt, record = cell_options(run, cell), read_record(run, cell.name)
    record["options"] = opt
    write_record(run, cell.name, record)
    file = run.out / "options" / f"{cell.name}.yml"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(yaml.safe_dump(opt, sort_keys=False), file)
    program = Path(__file__).with_name("train.py")
    command = [sys.executable, str(program), "-opt", str(file.resolve()), "--auto_resume"]
    start, lines = time.perf_counter(), []
    # a terminal's Ctrl-C reaches it through this process alone
    options: dict[str, Any] = {"cwd": run.out, "start_new_session": True, "pass_fds": descriptors}
    options |= {"text": True, "errors": "replace", "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, **options) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.append(line.rstrip())
                found = re.search(r"\biter:\s*([\d,]+)", line)
                if found:
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


def measure(run: Run, name: str, scale: int, checkpoint: Path | None) -> dict[str, Any]:
    """Measure a network, or bicubic, on the test sets that are not measured yet; returns the cell's record."""
    record = read_record(run, name)
    key = "bicubic" if checkpoint is None else hashlib.sha256(checkpoint.read_bytes()).hexdigest()[:16]
    asked: dict[str, Any] = {
        "with_lpips": run.with_lpips,
        "with_perceptual": run.with_perceptual,
        "grey_as_y": run.grey_as_y,
    }
    settings = {"checkpoint": key, **asked}
    if record.get("settings") != settings:
        record.update(settings=settings, results={})
    upscalers: dict[str, Upscaler] | None = None
    for name_of_set in run.sets:
        if name_of_set in record["results"]:
            continue
        upscalers = upscalers or upscalers_of(run, name, scale, checkpoint)
        rows = evaluate(upscalers, run.data / name_of_set, scale, **asked)
        record["results"][name_of_set] = means(rows)
        record_path(run, name).parent.mkdir(parents=True, exist_ok=True)
        write_text(csv_text(rows), record_path(run, name).with_name(f"{name}_{name_of_set}.csv"))
        write_record(run, name, record)
    return record


def upscalers_of(run: Run, name: str, scale: int, checkpoint: Path | None) -> dict[str, Upscaler]:
    """What makes the SR images of each protocol."""
    if checkpoint is None:
        return {key: bicubic(scale, protocol.quantize) for key, protocol in PROTOCOLS.items()}
    return dict.fromkeys(PROTOCOLS, upscaler_of(run.out / "options" / f"{name}.yml", checkpoint, scale))


def find_network(run: Run, cell: Cell) -> Path:
    """The network that counts: the best one by LPIPS-vgg on Set5, or the last one."""
    return run.out / "experiments" / cell.name / "models" / f"net_g_{'best' if run.keeps_best else 'latest'}.pth"


# ------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Value:
    """Mean and spread (sample standard deviation) of a metric over the seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return mean(self.values)

    @property
    def spread(self) -> float | None:
        """None with one seed."""
        return stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class TableRow:
    """One network and loss; ``network`` is empty for bicubic."""

    network: str
    loss: str
    unweighted: str | None
    records: tuple[dict[str, Any], ...]

    def value(self, name_of_set: str, protocol: str, metric: str) -> Value:
        """A metric's value."""
        values = [record["results"][name_of_set][protocol][metric] for record in self.records]
        return Value(tuple(math.inf if value is None else value for value in values))


def table_rows(run: Run, cells: Sequence[Cell], scale: int) -> list[TableRow]:
    """Bicubic, then every network and loss in the order of the cells."""
    rows = [TableRow("", "bicubic", None, (read_record(run, f"bicubic_x{scale}"),))]
    chosen = [cell for cell in cells if cell.scale == scale]
    for (network, variant), group in groupby(chosen, key=lambda cell: (cell.network, cell.variant)):
        records = tuple(read_record(run, cell.name) for cell in group)
        unweighted = variant.unweighted if variant.unweighted != variant.name else None
        rows.append(TableRow(network, variant.name, unweighted, records))
    return rows


@dataclass(frozen=True)
class TableCell:
    """A value of the table, the difference to the unweighted loss, whether it is the best of its column."""

    value: Value
    difference: float | None
    best: bool


def columns(run: Run, rows: Sequence[TableRow]) -> Iterator[tuple[str, str, str, list[TableCell]]]:
    """Test set, protocol, metric and its cells from top to bottom."""
    for protocol in PROTOCOLS:
        for name_of_set in run.sets:
            for metric in rows[0].records[0]["results"][name_of_set][protocol]:
                higher = METRICS[metric][3]
                values = [row.value(name_of_set, protocol, metric) for row in rows]
                best = (max if higher else min)(value.mean for value in values)
                by_name = {(row.network, row.loss): value for row, value in zip(rows, values, strict=True)}
                cells = []
                for row, value in zip(rows, values, strict=True):
                    base = by_name.get((row.network, row.unweighted or ""))
                    difference = value.mean - base.mean if base and row.unweighted else None
                    cells.append(TableCell(value, difference, value.mean == best))
                yield name_of_set, protocol, metric, cells


def heading(metric: str) -> str:
    """A metric's name with an arrow to where it is better."""
    name, _, _, higher = METRICS[metric]
    return f"{name} {'↑' if higher else '↓'}"


def formatted(cell: TableCell, metric: str, mark: Callable[[str], str], plus_minus: str = "±") -> str:
    """A value with its spread, marked if it is the best, and its difference in brackets."""
    _, digits, factor, _ = METRICS[metric]
    text = f"{cell.value.mean * factor:.{digits}f}"
    if cell.value.spread is not None:
        text += f" {plus_minus} {cell.value.spread * factor:.{digits}f}"
    text = mark(text) if cell.best else text
    return text if cell.difference is None else f"{text} ({cell.difference * factor:+.{digits}f})"


def description(run: Run, rows: Sequence[TableRow], cells: Sequence[Cell]) -> list[str]:
    """What the reader of a table must know."""
    opts = [record["options"] for row in rows[1:] for record in row.records]
    iterations = sorted({int(opt["train"]["total_iter"]) for opt in opts})
    train_sets = sorted({opt["datasets"]["train"]["name"] for opt in opts})
    distances = {
        yaml.safe_dump(opt["train"]["pixel_opt"]["distance"], default_flow_style=True, width=1000).strip()
        for opt in opts
        if "distance" in opt["train"]["pixel_opt"]
    }
    lines = []
    if iterations:
        lines.append(
            f"Trained for {', '.join(f'{n:,}' for n in iterations)} iterations on {', '.join(train_sets)}"
            + ("" if run.iters is None else " (--iters: scaled down, not the paper's training)")
            + f"; seeds {', '.join(map(str, sorted({cell.seed for cell in cells})))}, one start for all losses each."
        )
        lines.append(
            "The network that counts: "
            + ("the one with the best LPIPS-vgg on Set5." if run.keeps_best else "the last one.")
        )
    if distances:
        lines.append("Distance D of TLW: " + ", ".join(sorted(distances)) + ".")
    if run.forced:
        lines.append("Options changed: " + ", ".join(run.forced) + ".")
    for variant in dict.fromkeys(cell.variant for cell in cells):
        if variant.forced:
            lines.append(f"{variant.name}: {variant.loss} with {', '.join(variant.forced)}.")
    lines.append("In brackets: the difference to the unweighted loss. Bold: the best of the column.")
    if any(len(row.records) > 1 for row in rows):
        lines.append("±: standard deviation over the seeds.")
    if run.missing:
        lines.append(f"Left out, not in the data folder: {', '.join(run.missing)}.")
    if not run.with_lpips:
        lines.append("Left out: LPIPS, by --no-lpips.")
    if run.grey_as_y:
        lines.append("Grey images: their levels are Y (field's protocol).")
    return lines


def markdown(run: Run, rows: Sequence[TableRow], scale: int, notes: Sequence[str]) -> str:
    """The table as Markdown: a section for each protocol, a table for each test set."""
    text = [f"# ×{scale}", "", *(f"- {note}" for note in notes), ""]
    for (name_of_set, protocol), group in groupby(columns(run, rows), key=lambda column: column[:2]):
        chosen = list(group)
        headings = ["network", "loss", *(heading(metric) for _, _, metric, _ in chosen)]
        text += [f"## {name_of_set}, {PROTOCOL_NAMES[protocol]}", ""]
        text += ["| " + " | ".join(headings) + " |", "|---|---|" + "---:|" * len(chosen)]
        for number, row in enumerate(rows):
            values = [formatted(cells[number], metric, "**{}**".format) for _, _, metric, cells in chosen]
            text.append("| " + " | ".join([row.network or "–", row.loss, *values]) + " |")
        text.append("")
    return "\n".join(text)


def latex(run: Run, rows: Sequence[TableRow], scale: int, notes: Sequence[str]) -> str:
    """The table as LaTeX, for the ``booktabs`` package: a ``table`` for each protocol and test set."""
    text = [f"% {note}" for note in notes]
    for (name_of_set, protocol), group in groupby(columns(run, rows), key=lambda column: column[:2]):
        chosen = list(group)
        headings = ["network", "loss", *(tex(heading(metric)) for _, _, metric, _ in chosen)]
        text += [r"\begin{table}", r"\centering"]
        text.append(rf"\caption{{{tex(name_of_set)}, $\times {scale}$, {tex(PROTOCOL_NAMES[protocol])}.}}")
        text.append(rf"\begin{{tabular}}{{ll{'r' * len(chosen)}}}")
        text += [r"\toprule", " & ".join(headings) + r" \\", r"\midrule"]
        for number, row in enumerate(rows):
            values = [
                formatted(cells[number], metric, r"\textbf{{{}}}".format, r"$\pm$") for _, _, metric, cells in chosen
            ]
            text.append(" & ".join([tex(row.network) or "--", tex(row.loss), *values]) + r" \\")
        text += [r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
    return "\n".join(text)


def tex(text: str) -> str:
    """Plain text for LaTeX."""
    for plain, escaped in TEX.items():
        text = text.replace(plain, escaped)
    return text


def long_csv(run: Run, rows: Sequence[TableRow], scale: int) -> str:
    """The table as CSV, a line for each value, in the metrics' own units."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for name_of_set, protocol, metric, cells in columns(run, rows):
        for row, cell in zip(rows, cells, strict=True):
            iterations = int(row.records[0]["options"]["train"]["total_iter"]) if row.network else 0
            seconds = mean(record.get("seconds", 0) for record in row.records) if row.network else 0
            writer.writerow([
                scale, protocol, name_of_set, row.network, row.loss, metric, cell.value.mean, cell.value.spread,
                len(cell.value.values), cell.difference, int(cell.best), iterations, round(seconds, 1),
            ])  # fmt: skip
    return text.getvalue()


def plot(run: Run, rows: Sequence[TableRow], scale: int) -> list[Path]:
    """Write ``table_x{scale}_{network}.png`` for every network: bicubic and its losses, with the seeds' spread.

    There is a row for each of PSNR, LPIPS and HaarPSI that was measured, and a column for each test set.
    """
    paths = []
    for network, group in groupby((row for row in rows if row.network), key=lambda row: row.network):
        chosen = [row for row in rows if not row.network] + list(group)
        metrics = rows[0].records[0]["results"][run.sets[0]]["paper"]
        panels = []
        for metric in [m for m in ("psnr_y", "lpips_vgg", "haarpsi") if m in metrics]:
            for name_of_set in run.sets:
                values = [
                    [METRICS[metric][2] * v for v in row.value(name_of_set, "paper", metric).values] for row in chosen
                ]
                panels.append((name_of_set, heading(metric), values))
        paths.append(run.out / f"table_x{scale}_{network}.png")
        title = f"{network} ×{scale}, the paper's protocol"
        if any(len(row.records) > 1 for row in chosen):
            title += ": mean and standard deviation over the seeds"
        spread_figure([row.loss for row in chosen], panels, paths[-1], title, len(run.sets))
    return paths


def write_tables(run: Run, cells: Sequence[Cell], scale: int) -> list[Path]:
    """Write ``table_x{scale}.md``, ``.csv`` and ``.tex``, and a plot for each network; returns their paths."""
    rows = table_rows(run, cells, scale)
    notes = description(run, rows, [cell for cell in cells if cell.scale == scale])
    texts = {
        "md": markdown(run, rows, scale, notes),
        "csv": long_csv(run, rows, scale),
        "tex": latex(run, rows, scale, notes),
    }
    paths = []
    for suffix, text in texts.items():
        paths.append(run.out / f"table_x{scale}.{suffix}")
        write_text(text, paths[-1])
    return paths + plot(run, rows, scale)
