"""Tables and figures of what ``scripts/evidence.py`` has measured.

  python scripts/evidence_report.py OUT [--figures DIR]

writes ``OUT/report.md``, ``OUT/results.csv``, which ``scripts/results.py`` reads, and, into DIR (by default OUT),
``learning.png`` and ``weights.png``; the latter is of scikit-image's photographs, which no training has seen.
"""

import argparse
import importlib
import json
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import evidence
import numpy as np
import skimage.data
import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn

from tlw_basicsr import TLWWeightNet, error_weights, k_schedule
from tlw_basicsr.pictures import draw_error, draw_weights, levels, save, shown
from tlw_basicsr.tools.evaluation import METRICS as ALL_METRICS
from tlw_basicsr.tools.evaluation import Metric
from tlw_basicsr.tools.report import csv_text, format_value, markdown_table, spread
from tlw_basicsr.util.errors import UserError, run
from tlw_basicsr.util.files import write_text

LABELS = {
    "L1": "L1", "MSE": "MSE", "Random": "L1, random weights", "Error": "L1, error's weights",
    "Uncertainty": "L1+uncertainty", "TLW": "L1+TLW", "MSETLW": "MSE+TLW", "Plain": "L1+TLW, plain φ",
    "MSEPlain": "MSE+TLW, plain φ", "Exact": "L1+TLW, exact", "TLWSSIM": "L1+TLW, D = 1 − SSIM",
    "LDL": "L1, LDL's weights", "PSPL": "L1, PSPL's weights", "Start": "before fine-tuning",
}  # fmt: skip
PALETTE = (  # readable without seeing colours
    "#000000", "#e69f00", "#999999", "#56b4e9", "#cc79a7", "#0072b2", "#d55e00", "#009e73", "#7f3c8d", "#8c6d31",
    "#e41a1c", "#b5bd00", "#17becf",
)  # fmt: skip
VARIANTS = {  # of the search
    "prior": "φ from the error, one image, lr 3e-4", "prior_lr1e-3": "φ from the error, one image",
    "n4": "plain φ, E step in 4", "fast": "plain φ, E work of fast",
    "D_random": "D of random VGG features", "D_ssim": "D = 1 − SSIM", "prior_none": "φ without prior",
    "k0.9": "k = 0.9 throughout", "k0.5": "k = 0.5 throughout", "lr1e-4": "φ's lr 1e-4", "lr3e-3": "φ's lr 3e-3",
    "n2": "E step in 2", "n32": "E step in 32", "S1": "S = 1", "det": "no sampling", "imp": "with r_s",
    "fp32": "D in fp32",
}  # fmt: skip
METRICS = {  # in the order of the tables; of D and Lite0 only the files know the values
    "psnr_y": replace(ALL_METRICS["psnr_y"], digits=3),
    "ssim_y": ALL_METRICS["ssim_y"],
    "d": Metric(lambda *_: math.nan, "D (trained on)", 4, False),
    "lite0": Metric(lambda *_: math.nan, "EfficientNet-Lite0", 4, False),
    **{name: ALL_METRICS[name] for name in ("haarpsi", "vif", "gmsd")},
}
Values = dict[str, dict[str, dict[int, dict[str, float]]]]  # of a set, a row and a seed: the metrics' means


def load(out: Path) -> tuple[dict[str, dict[str, Any]], Values]:
    """The records of the runs by their names, and the measures of those that are measured on every image."""
    records = {file.stem: json.loads(file.read_text("utf-8")) for file in sorted((out / "runs").glob("*.json"))}
    images: dict[str, dict[str, list[dict[str, float]]]] = defaultdict(lambda: defaultdict(list))
    files = sorted((out / "measures").glob("*/*.json"))
    for file in files:
        for name, row in json.loads(file.read_text("utf-8")).items():
            images[name][file.parent.name].append(row)
    values: Values = defaultdict(lambda: defaultdict(dict))
    for name, sets in images.items():
        if name not in records or sum(map(len, sets.values())) < len(files):
            continue  # not measured on every image yet
        record = records[name]
        for of_set, rows in sets.items():
            means = {metric: mean(row[metric] for row in rows) for metric in rows[0]}
            values[of_set][row_of(record)][record["seed"]] = means
    return records, values


def row_of(record: dict[str, Any]) -> str:
    """The row that a run belongs to."""
    return f"{record['variant']} {record['iterations']}"


def label(row: str) -> str:
    """A row's name for people."""
    variant, iterations = row.rsplit(" ", 1)
    return f"{(LABELS | VARIANTS).get(variant, variant)}, {int(iterations):,}"


def text(numbers: Sequence[float], digits: int, sign: str = "") -> str:
    """Mean ± sample standard deviation."""
    return format_value(mean(numbers), spread(numbers), digits, sign)


def mean_of_sets(values: Values) -> Values:
    """The means of the test sets, as a set of their own."""
    rows: dict[str, dict[int, dict[str, float]]] = defaultdict(dict)
    for row, seeds in next(iter(values.values())).items():
        for seed, metrics in seeds.items():
            rows[row][seed] = {m: mean(of_set[row][seed][m] for of_set in values.values()) for m in metrics}
    return {f"Mean of {', '.join(values)}": rows}


def tables(values: Values, against: Sequence[str]) -> str:
    """For each test set a table of the values and, for each row of ``against``, one of the differences to it.

    A difference is taken seed by seed; it is bold where it is more than twice its spread from 0.
    """
    lines = []
    for of_set, rows in (mean_of_sets(values) | values).items():
        metrics = [metric for metric in METRICS if metric in next(iter(next(iter(rows.values())).values()))]
        headings = ["loss, iterations", *(METRICS[m].label for m in metrics), "seeds"]
        table = [
            [label(row), *(text([v[m] for v in seeds.values()], METRICS[m].digits) for m in metrics), str(len(seeds))]
            for row, seeds in rows.items()
        ]
        lines += [f"### {of_set}", "", *markdown_table(headings, table, 1)]
        for base in (b for b in against if b in rows):
            table = []
            for row, seeds in rows.items():
                common = sorted(set(seeds) & set(rows[base]))
                if row != base and common:
                    pairs = [(seeds[seed], rows[base][seed]) for seed in common]
                    table.append([label(row), *(difference(pairs, metric) for metric in metrics), str(len(common))])
            lines += ["", f"Difference to {label(base)}:", "", *markdown_table(headings, table, 1)]
        lines.append("")
    return "\n".join(lines)


def summarize(values: Values, base: str) -> list[dict[str, Any]]:
    """Means over the test sets: of the values, and of the differences to ``base`` seed by seed, with their spread."""
    ((_, rows),) = mean_of_sets(values).items()
    table = []
    for row, seeds in rows.items():
        variant, iterations = row.rsplit(" ", 1)
        cells: dict[str, Any] = {"loss": (LABELS | VARIANTS).get(variant, variant), "iterations": iterations}
        common = [] if row == base else sorted(set(seeds) & set(rows[base]))
        cells["seeds"] = len(common or seeds)
        for metric, about in METRICS.items():
            columns = {"": [of_seed[metric] for of_seed in seeds.values()]}
            columns["_difference"] = [seeds[seed][metric] - rows[base][seed][metric] for seed in common]
            for suffix, numbers in columns.items():
                deviation = spread(numbers)
                cells[metric + suffix] = f"{mean(numbers):.{about.digits + 1}f}" if numbers else ""
                cells[f"{metric}{suffix}_spread"] = "" if deviation is None else f"{deviation:.{about.digits + 1}f}"
        table.append(cells)
    return table


def difference(pairs: Sequence[tuple[dict[str, float], dict[str, float]]], metric: str) -> str:
    """A metric's paired difference over the seeds, bold where it is more than twice its spread from 0."""
    differences = [ours[metric] - base[metric] for ours, base in pairs]
    cell, deviation = text(differences, METRICS[metric].digits, "+"), spread(differences)
    return f"**{cell}**" if deviation is not None and abs(mean(differences)) > 2 * deviation else cell


def learned(records: dict[str, dict[str, Any]], rows: Sequence[str]) -> str:
    """A table of what the weights are at the end of the trainings, on two held-out photographs."""
    headings = ["loss, iterations", "WC / constant's", "correlation with the error", "standard deviation", "seeds"]
    table = []
    for row in rows:
        ends = [r["log"][-1] for r in records.values() if row_of(r) == row and r["log"]]
        if any("wc_ratio" in end for end in ends):
            cells = [text([end[key] for end in ends], 2) for key in ("wc_ratio", "correlation", "w_std")]
            table.append([label(row), *cells, str(len(ends))])
    return "\n".join(["### Weights at the end", "", *markdown_table(headings, table, 1)])


def colours(rows: Sequence[str]) -> list[str]:
    """A colour for each row, the same for a loss in every figure."""
    fixed = dict(zip(LABELS, PALETTE, strict=False))
    free = iter([*PALETTE[len(LABELS) :], *PALETTE] * len(rows))
    return [fixed.get(row.rsplit(" ", 1)[0]) or next(free) for row in rows]


def learning(records: dict[str, dict[str, Any]], rows: Sequence[str], path: Path) -> None:
    """Over the training: correlation of the weights with the error, and what they gain in the weight criterion."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    by_error: dict[int, list[float]] = defaultdict(list)
    for row, colour in zip(rows, colours(rows), strict=True):
        chosen = [record for record in records.values() if row_of(record) == row]
        name = label(row)
        for log in ([look for look in record["log"] if "wc_ratio" in look] for record in chosen):
            for axis, key in zip(axes, ("correlation", "wc_ratio"), strict=True):
                steps = [look["iteration"] for look in log]
                axis.plot(steps, [look[key] for look in log], "o-", ms=3, color=colour, label=name)
            name = ""
            for look in log:
                by_error[look["iteration"]].append(look["wc_ratio_error"])
    steps = sorted(by_error)
    axes[1].plot(steps, [mean(by_error[i]) for i in steps], "k--", label="error's weights, same x̂")
    axes[1].axhline(1, color="0.6", lw=1)
    axes[0].set(ylabel="correlation of w and |x̂ − x|", ylim=(-0.3, 1))
    axes[1].set(ylabel="WC of w / WC of the constant map k", yscale="log", yticks=[0.5, 1, 2, 4, 8])
    axes[1].yaxis.set_major_formatter("{x:g}")
    axes[1].yaxis.set_minor_formatter("")
    for axis in axes:
        axis.set(xlabel="iteration", xscale="log")
        axis.grid(color="0.9")
        axis.legend(fontsize=9)
    figure.suptitle("What the weighting network has learned, on two held-out photographs; a line for each seed")
    save(figure, path, 90)


def network(out: Path, name: str, records: dict[str, dict[str, Any]]) -> nn.Module:
    """The SR network of a run."""
    return evidence.build_network(records[name]["setting"]["network"], out / "nets" / f"{name}.pth").eval()


def photographs() -> dict[str, tuple[Tensor, Tensor]]:
    """LR and HR parts of scikit-image's photographs."""
    images = {"astronaut": skimage.data.astronaut()[:256, 96:352], "chelsea": skimage.data.chelsea()[20:276, 60:316]}
    images["coffee"] = skimage.data.coffee()[60:316, 150:406]
    return {name: evidence.pair(np.ascontiguousarray(image), torch.device("cpu")) for name, image in images.items()}


def weighting_network(out: Path, name: str, records: dict[str, dict[str, Any]]) -> TLWWeightNet:
    """The weighting network of a run."""
    net_w = evidence.build_net_w(records[name]["loss"], records[name]["changes"])
    net_w.load_state_dict(evidence.load(out / "nets" / f"{name}_phi.pth"))
    return net_w.eval()


@torch.no_grad()
def weights(out: Path, names: Sequence[str], records: dict[str, dict[str, Any]], path: Path) -> None:
    """x, x̂ of the first run, its error, the error's weights and those of each run's φ, on held-out photographs."""
    iterations = records[names[0]]["iterations"]
    net, k = network(out, names[0], records), k_schedule(iterations, k_decay=iterations)
    learned = [weighting_network(out, name, records) for name in names]
    pairs = list(photographs().values())[:2]
    count = 4 + len(names)
    figure, axes = plt.subplots(len(pairs), count, figsize=(3 * count, 3 * len(pairs) + 0.7), layout="constrained")
    for row, (lq, gt) in zip(axes, pairs, strict=True):
        sr = net(lq).clamp(0, 1)
        maps = [m[0] for m in (error_weights(sr, gt, k), *(net_w(sr, gt, k) for net_w in learned))]
        error = levels(sr[0], gt[0])
        row[0].imshow(shown(gt[0]))
        row[1].imshow(shown(sr[0]))
        drawn = draw_error(row[2], error, float(np.percentile(error, 99)))
        figure.colorbar(drawn, ax=row[2], shrink=0.7, extend="max")
        for axis, w in zip(row[3:], maps, strict=True):
            drawn = draw_weights(axis, w, 1 - k)
        figure.colorbar(drawn, ax=row[-1], shrink=0.7, extend="min")
    titles = [label(row_of(records[name])) for name in names]
    titles = ["HR image x", "SR image x̂", "error |x̂ − x|, levels of 255", "error's weights", *titles]
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=11)
    for axis in axes.ravel():
        axis.set_axis_off()
    figure.suptitle(f"Weights around their mean k = {k:.2f} (white)")
    save(figure, path, dpi=60)


def main() -> None:
    """Parse the arguments and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of scripts/evidence.py")
    parser.add_argument("--figures", type=Path, help="folder of the figures")
    parser.add_argument("--rows", nargs="*", help="rows to report and plot, NAME_ITERATIONS; default: all")
    parser.add_argument("--against", nargs="*", help="rows to take differences to; default: those of L1 and Error")
    parser.add_argument("--plugins", nargs="*", default=[], help="modules that register further networks")
    parser.add_argument("--weights", nargs="*", help="runs whose weights to draw, NAME_ITERATIONS_seedN")
    args = parser.parse_args()
    for plugin in args.plugins:
        importlib.import_module(plugin)
    figures = args.figures or args.out
    records, values = load(args.out)
    of_set5 = values["Set5"]
    names = [*LABELS, *(record["variant"] for record in records.values())]
    order = sorted(of_set5, key=lambda row: (names.index(row.rsplit(" ", 1)[0]), int(row.rsplit(" ", 1)[1])))
    chosen = [" ".join(row.rsplit("_", 1)) for row in args.rows] if args.rows else order
    against = [row for row in chosen if row.rsplit(" ", 1)[0] in ("L1", "Error")]
    if args.against is not None:
        against = [" ".join(row.rsplit("_", 1)) for row in args.against]
    for rows, known in ((chosen, order), (against, chosen)):
        for row in (row for row in rows if row not in known):
            accepted = ", ".join(row.replace(" ", "_") for row in known)
            raise UserError(f"{row.replace(' ', '_')} is not among the measured rows of the report: {accepted}")
    sets = sorted(values, key=[*evidence.SETS, *values].index)
    values = {s: {row: values[s][row] for row in chosen} for s in sets}
    report = f"{tables(values, against)}\n{learned(records, chosen)}\n"
    (args.out / "report.md").write_text(report, "utf-8")
    for base in against[:1]:
        write_text(csv_text(summarize(values, base)), args.out / "results.csv")
    with_phi = [row for row in chosen if any((args.out / "nets").glob(f"{row.replace(' ', '_')}_seed*_phi.pth"))]
    if with_phi:
        learning(records, with_phi, figures / "learning.png")
        names = args.weights or [f"{with_phi[0].replace(' ', '_')}_seed{min(values['Set5'][with_phi[0]])}"]
        weights(args.out, names, records, figures / "weights.png")
    print(f"{args.out / 'report.md'}, figures in {figures}")


if __name__ == "__main__":
    run(main)
