"""Make the tables and figures of docs/RESULTS.md from docs/results/*.csv.

    python scripts/results.py            # --check: exit code 1 if the page is out of date

A CSV has a row for each loss: its iterations and seeds, and for each metric the mean, the mean difference to the base,
taken seed by seed, and the spreads of both over the seeds; ``scripts/evidence_report.py`` writes it. In the page, what
stands between ``<!-- table NAME BASE -->`` and ``<!-- end -->`` is the table of NAME.csv: the row of the base with its
values, the others with their differences. The figure of the same differences, where the page shows it, is
docs/results_NAME.png.
"""

import argparse
import csv
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tlw_basicsr.pictures import pyplot, save
from tlw_basicsr.tools.report import markdown_table

DOCS = Path(__file__).resolve().parents[1] / "docs"
BLOCK = re.compile(r"(<!-- table (\w+) (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
# heading, digits, and whether higher is better
METRICS = {
    "psnr_y": ("PSNR", 3, True), "ssim_y": ("SSIM", 4, True), "d": ("D", 4, False), "lite0": ("Lite0", 4, False),
    "haarpsi": ("HaarPSI", 4, True), "vif": ("VIF", 4, True), "gmsd": ("GMSD", 4, False),
}  # fmt: skip
BETTER, WORSE, LEVEL = "#0072b2", "#d55e00", "0.55"
Rows = list[dict[str, str]]


def read(name: str) -> Rows:
    """The rows of a CSV."""
    with (DOCS / f"results/{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def number(row: dict[str, str], column: str) -> float | None:
    """A value, or None where there is none."""
    return float(row[column]) if row.get(column) else None


def verdict(row: dict[str, str], metric: str) -> str:
    """``✓`` where the loss is better than the base by more than twice the spread of the differences, ``✗`` if worse."""
    value, deviation = (number(row, f"{metric}_difference{suffix}") for suffix in ("", "_spread"))
    if value is None or deviation is None or abs(value) <= 2 * deviation:
        return ""
    return "✓" if (value > 0) == METRICS[metric][2] else "✗"


def list_metrics(rows: Rows) -> list[str]:
    """The metrics that a CSV has."""
    return [metric for metric in METRICS if any(row.get(f"{metric}_difference") for row in rows)]


def table(rows: Rows, base: str) -> list[str]:
    """The lines of a table: the base with its values, the others with their differences to it."""
    metrics = list_metrics(rows)
    headings = ["loss, iterations (seeds)", *(f"{METRICS[m][0]} {'↑' if METRICS[m][2] else '↓'}" for m in metrics)]
    lines = []
    for row in rows:
        cells = [f"{row['loss']}, {int(row['iterations']):,} ({row['seeds']})"]
        for metric in metrics:
            digits, kind = METRICS[metric][1], "" if row["loss"] == base else "_difference"
            value, deviation = (number(row, f"{metric}{kind}{suffix}") for suffix in ("", "_spread"))
            text = "" if value is None else f"{value:{'+' if kind else ''}.{digits}f}".replace("-", "−")
            if kind and deviation is not None:
                text += f" ± {deviation:.{digits}f} {verdict(row, metric)}"
            cells.append(text.strip())
        lines.append(cells)
    return markdown_table(headings, lines, 1)


def draw(rows: Rows, base: str, path: Path) -> None:
    """The paired differences with their spreads: a panel for each metric, a line for each loss; right is better."""
    metrics = list_metrics(rows)
    shown = [row for row in rows if row["loss"] != base]
    size = (1.6 + 2.1 * len(metrics), 1 + 0.34 * len(shown))
    figure, axes = pyplot().subplots(1, len(metrics), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, metric in zip(axes[0], metrics, strict=True):
        name, _, higher = METRICS[metric]
        for place, row in enumerate(shown):
            value, deviation = (number(row, f"{metric}_difference{suffix}") for suffix in ("", "_spread"))
            if value is not None:
                colour = {"✓": BETTER, "✗": WORSE, "": LEVEL}[verdict(row, metric)]
                axis.errorbar(value, place, xerr=deviation or 0, fmt="o", color=colour, ms=5, capsize=3)
        axis.axvline(0, color="0.3", lw=1)
        axis.set_title(f"{name} {'↑' if higher else '↓'}", fontsize=10)
        axis.grid(axis="x", color="0.9")
        axis.locator_params(axis="x", nbins=3)
        axis.tick_params(axis="x", labelsize=7)
        if not higher:
            axis.invert_xaxis()
    axes[0][0].set_yticks(range(len(shown)), [row["loss"] for row in shown], fontsize=9)
    axes[0][0].set_ylim(len(shown) - 0.5, -0.5)
    figure.suptitle(
        f"Difference to {base}, seed by seed: right is better; blue and orange by more than twice the spread"
    )
    save(figure, path, 90)


def fill(page: str) -> str:
    """The page with the tables of today's CSVs."""
    return BLOCK.sub(lambda found: "\n".join([found[1], *table(read(found[2]), found[3]), "", found[4]]), page)


def main(argv: Sequence[str] | None = None) -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if the page is out of date")
    check = parser.parse_args(argv).check
    path = DOCS / "RESULTS.md"
    page = path.read_text("utf-8")
    filled = fill(page)
    if check:
        sys.exit(f"{path} is out of date; run python scripts/results.py" if filled != page else 0)
    path.write_text(filled, "utf-8")
    for _, name, base, _ in BLOCK.findall(page):
        if f"(results_{name}.png)" in page:
            draw(read(name), base, DOCS / f"results_{name}.png")


if __name__ == "__main__":
    main()
