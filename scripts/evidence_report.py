"""Tables and figures of what ``scripts/evidence.py`` has measured.

  python scripts/evidence_report.py OUT [--figures DIR]

writes ``OUT/report.md`` and, into DIR (by default OUT), ``scatter.png``, ``learning.png``, ``weights.png`` and
``crops.png``; the last two are of scikit-image's photographs, which no training has seen.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import evidence
import numpy as np
import skimage.data
import torch
from basicsr.utils.registry import ARCH_REGISTRY
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from tlw_basicsr.archs.tlw_weight_net_arch import TLWWeightNet
from tlw_basicsr.functional import error_weights, k_schedule
from tlw_basicsr.pictures import levels, shown

LABELS = {
    "L1": "L1", "MSE": "MSE", "Random": "L1, random weights", "Error": "L1, error's weights",
    "Uncertainty": "L1+uncertainty", "TLW": "L1+TLW", "MSETLW": "MSE+TLW", "Exact": "L1+TLW, exact",
}  # fmt: skip
COLOURS = dict(
    zip(LABELS, ("#000000", "#e69f00", "#999999", "#56b4e9", "#cc79a7", "#0072b2", "#d55e00", "#009e73"), strict=True)
)
METRICS = {  # heading, digits, whether higher is better
    "psnr_y": ("PSNR (dB)", 3, True),
    "ssim_y": ("SSIM", 4, True),
    "d": ("D (trained on)", 4, False),
    "lite0": ("EfficientNet-Lite0", 4, False),
    "haarpsi": ("HaarPSI", 4, True),
    "vif": ("VIF", 4, True),
    "gmsd": ("GMSD", 4, False),
}
Values = dict[str, dict[str, dict[int, dict[str, float]]]]  # of a set, a row and a seed: the metrics' means


def load(out: Path) -> tuple[dict[str, dict[str, Any]], Values]:
    """The records of the runs by their names, and the measures."""
    records = {file.stem: json.loads(file.read_text("utf-8")) for file in sorted((out / "runs").glob("*.json"))}
    images: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for file in sorted((out / "measures").glob("*/*.json")):
        for name, row in json.loads(file.read_text("utf-8")).items():
            images[file.parent.name, name].append(row)
    values: Values = defaultdict(lambda: defaultdict(dict))
    for (of_set, name), rows in images.items():
        if name in records:
            record = records[name]
            means = {metric: mean(row[metric] for row in rows) for metric in rows[0]}
            values[of_set][f"{record['variant']} {record['iterations']}"][record["seed"]] = means
    return records, values


def label(row: str) -> str:
    """A row's name for people."""
    variant, iterations = row.rsplit(" ", 1)
    return f"{LABELS.get(variant, variant)}, {int(iterations):,}"


def text(numbers: Sequence[float], digits: int, sign: str = "") -> str:
    """Mean ± sample standard deviation."""
    spread = f" ± {stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{mean(numbers):{sign}.{digits}f}{spread}"


def tables(values: Values, against: Sequence[str]) -> str:
    """For each test set a table of the values and, for each row of ``against``, one of the differences to it.

    A difference is taken seed by seed; it is bold where it is more than twice its spread from 0.
    """
    lines = []
    for of_set in sorted(values, key=evidence.SETS.index):
        rows = values[of_set]
        metrics = [metric for metric in METRICS if metric in next(iter(next(iter(rows.values())).values()))]
        head = "| " + " | ".join(["loss, iterations", *(METRICS[m][0] for m in metrics), "seeds"]) + " |"
        rule = "|---|" + "---:|" * (len(metrics) + 1)
        lines += [f"### {of_set}", "", head, rule]
        for row, seeds in rows.items():
            cells = [text([v[m] for v in seeds.values()], METRICS[m][1]) for m in metrics]
            lines.append("| " + " | ".join([label(row), *cells, str(len(seeds))]) + " |")
        for base in (b for b in against if b in rows):
            lines += ["", f"Difference to {label(base)}:", "", head, rule]
            for row, seeds in rows.items():
                common = sorted(set(seeds) & set(rows[base]))
                if row == base or not common:
                    continue
                cells = []
                for m in metrics:
                    differences = [seeds[s][m] - rows[base][s][m] for s in common]
                    cell = text(differences, METRICS[m][1], "+")
                    outside = len(common) > 1 and abs(mean(differences)) > 2 * stdev(differences)
                    cells.append(f"**{cell}**" if outside else cell)
                lines.append("| " + " | ".join([label(row), *cells, str(len(common))]) + " |")
        lines.append("")
    return "\n".join(lines)


def save(figure: Figure, path: Path) -> None:
    """Write a figure and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def scatter(values: Values, rows: Sequence[str], path: Path, title: str) -> None:
    """PSNR against every other metric, means of the test sets; a point with its spread for each row."""
    metrics = [m for m in METRICS if m != "psnr_y"]
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.6), layout="constrained")
    for axis, metric in zip(axes.ravel(), metrics, strict=True):
        for row in rows:
            seeds = values["Set5"][row]
            points = [[mean(values[s][row][seed][m] for s in values) for m in ("psnr_y", metric)] for seed in seeds]
            x, y = np.transpose(points)
            spread = [np.std(v, ddof=1) if len(v) > 1 else 0 for v in (x, y)]
            variant = row.rsplit(" ", 1)[0]
            axis.errorbar(
                x.mean(), y.mean(), spread[1], spread[0], "o", color=COLOURS.get(variant, "#009e73"), capsize=3,
                label=f"{label(row)} ({len(x)})",
            )  # fmt: skip
        heading, _, higher = METRICS[metric]
        axis.set(xlabel="Y-PSNR (dB)", ylabel=f"{heading}, {'higher' if higher else 'lower'} is better")
        if not higher:
            axis.invert_yaxis()
        axis.grid(color="0.9")
    figure.suptitle(f"{title}: better is to the upper right")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, title="loss, iterations (seeds)")
    save(figure, path)


def learning(records: dict[str, dict[str, Any]], path: Path) -> None:
    """Over the training: correlation of the weights with the error, and what they gain in the weight criterion."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
    named = set()
    for record in records.values():
        log = [row for row in record["log"] if "wc_ratio" in row]
        variant = record["variant"]
        if not log or variant not in LABELS:
            continue
        iterations, name = [row["iteration"] for row in log], LABELS[variant]
        for axis, key in zip(axes, ("correlation", "wc_ratio"), strict=True):
            first = name if name not in named else None
            axis.plot(iterations, [row[key] for row in log], "o-", ms=3, color=COLOURS[variant], label=first)
        if "error" not in named:
            line = [row["wc_ratio_error"] for row in log]
            axes[1].plot(iterations, line, "k--", label="error's weights, on the same x̂")
        named |= {name, "error"}
    axes[0].set(ylabel="correlation of w and |x̂ − x|", ylim=(-0.5, 1))
    axes[1].set(ylabel="WC of w / WC of the constant map k", yscale="log")
    axes[1].axhline(1, color="0.6", lw=1)
    for axis in axes:
        axis.set(xlabel="iteration", xscale="log")
        axis.grid(color="0.9")
        axis.legend()
    figure.suptitle("What the weighting network has learned, on two held-out photographs; a line for each seed")
    save(figure, path)


def network(out: Path, name: str, records: dict[str, dict[str, Any]]) -> nn.Module:
    """The SR network of a run."""
    options = dict(records[name]["setting"]["network"])
    net = ARCH_REGISTRY.get(options.pop("type"))(**options)
    net.load_state_dict(torch.load(out / "nets" / f"{name}.pth", map_location="cpu", weights_only=True))
    return net.eval()


def photographs() -> dict[str, tuple[Tensor, Tensor]]:
    """LR and HR parts of scikit-image's photographs."""
    images = {"astronaut": skimage.data.astronaut()[:256, 96:352], "chelsea": skimage.data.chelsea()[20:276, 60:316]}
    images["coffee"] = skimage.data.coffee()[60:316, 150:406]
    return {name: evidence.pair(np.ascontiguousarray(image), torch.device("cpu")) for name, image in images.items()}


@torch.no_grad()
def weights(out: Path, name: str, records: dict[str, dict[str, Any]], path: Path) -> None:
    """x, x̂, the error, the error's weights and the trained φ's on photographs that no training has seen."""
    record = records[name]
    state = torch.load(out / "nets" / f"{name}_phi.pth", map_location="cpu", weights_only=True)
    changes = evidence.PHI | record["changes"]
    net_w = TLWWeightNet(num_feat=changes["num_feat"], prior=changes["prior"])
    net_w.load_state_dict(state)
    net, k = network(out, name, records), k_schedule(record["iterations"], k_decay=record["iterations"])
    pairs = photographs()
    figure, axes = plt.subplots(len(pairs), 5, figsize=(17, 3.5 * len(pairs) + 0.6), layout="constrained")
    for row, (lq, gt) in zip(axes, pairs.values(), strict=True):
        sr = net(lq).clamp(0, 1)
        w = net_w.eval()(sr, gt, k)[0].mean(0)
        by_error = error_weights(sr, gt, k)[0].mean(0)
        error = levels(sr[0], gt[0])
        row[0].imshow(shown(gt[0]))
        row[1].imshow(shown(sr[0]))
        drawn = row[2].imshow(error, cmap="magma", vmin=0, vmax=np.percentile(error, 99))
        figure.colorbar(drawn, ax=row[2], shrink=0.7, extend="max")
        limit = max(float(np.percentile((m - k).abs(), 99)) for m in (w, by_error))
        for axis, shown_map in ((row[3], by_error), (row[4], w)):
            drawn = axis.imshow(shown_map, cmap="PuOr_r", vmin=k - limit, vmax=k + limit)
        figure.colorbar(drawn, ax=row[4], shrink=0.7, extend="both")
    titles = ("HR image x", "SR image x̂", "error |x̂ − x|, levels of 255", "error's weights", "weights of φ")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    for axis in axes.ravel():
        axis.set_axis_off()
    name = f"{LABELS[record['variant']]}, {record['iterations']:,} iterations"
    figure.suptitle(f"{name}: weights around their mean k = {k:.2f} (white)")
    save(figure, path)


@torch.no_grad()
def crops(out: Path, names: Sequence[str], records: dict[str, dict[str, Any]], path: Path, side: int = 64) -> None:
    """Where the networks differ most on each photograph: at 1:1, and enlarged with nearest pixels."""
    nets = {name: network(out, name, records) for name in names}
    pairs = photographs()
    count = len(names) + 1
    figure, axes = plt.subplots(len(pairs), count, figsize=(3.1 * count, 3.4 * len(pairs) + 0.5), layout="constrained")
    for row, (lq, gt) in zip(axes, pairs.values(), strict=True):
        images = [net(lq).clamp(0, 1) for net in nets.values()]
        difference = torch.stack(images).std(0).mean(1, keepdim=True)
        smooth = F.avg_pool2d(difference, side, 8)[0, 0]
        top, left = (8 * int(i) for i in divmod(int(smooth.argmax()), smooth.shape[1]))
        part = (..., slice(top, top + side), slice(left, left + side))
        for axis, name, image in zip(row, ["", *names], [gt, *images], strict=True):
            axis.imshow(shown(image[part][0]), interpolation="nearest")
            inset = axis.inset_axes((0.02, 0.02, 0.25, 0.25))
            inset.imshow(shown(image[part][0]), interpolation="antialiased")
            inset.set(xticks=[], yticks=[])
            axis.set_axis_off()
            psnr = "" if not name else f", {-10 * (image[part] - gt[part]).square().mean().log10():.2f} dB"
            axis.set_title((LABELS[records[name]["variant"]] if name else "HR") + psnr, fontsize=10)
    figure.suptitle(f"{side}² pixels where the networks differ most; small: fewer pixels of the screen for each")
    save(figure, path)


def main() -> None:
    """Parse the arguments and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of scripts/evidence.py")
    parser.add_argument("--figures", type=Path, help="folder of the figures")
    parser.add_argument("--rows", nargs="*", help="rows of the scatter plot, NAME_ITERATIONS; default: all")
    parser.add_argument("--title", default="Means of Set5, Set14 and BSD100")
    args = parser.parse_args()
    figures = args.figures or args.out
    records, values = load(args.out)
    of_set5 = values["Set5"]
    names = [*LABELS, *(record["variant"] for record in records.values())]
    order = sorted(of_set5, key=lambda row: (names.index(row.rsplit(" ", 1)[0]), int(row.rsplit(" ", 1)[1])))
    values = {s: {row: values[s][row] for row in order if row in values[s]} for s in values}
    against = [row for row in order if row.rsplit(" ", 1)[0] in ("L1", "Error")]
    (args.out / "report.md").write_text(tables(values, against), "utf-8")
    chosen = [row.replace("_", " ") for row in args.rows] if args.rows else order
    scatter(values, chosen, figures / "scatter.png", args.title)
    if any("wc_ratio" in row for record in records.values() for row in record["log"]):
        learning(records, figures / "learning.png")
    learned = [n for n in records if (args.out / "nets" / f"{n}_phi.pth").is_file() and records[n]["variant"] == "TLW"]
    if learned:
        weights(args.out, learned[0], records, figures / "weights.png")
    first = {r["variant"]: n for n, r in reversed(records.items()) if (args.out / "nets" / f"{n}.pth").is_file()}
    if all(variant in first for variant in ("L1", "TLW", "MSE")):
        crops(args.out, [first[v] for v in ("L1", "TLW", "MSE")], records, figures / "crops.png")
    print(f"{args.out / 'report.md'}, figures in {figures}")


if __name__ == "__main__":
    main()
