"""Measured values as text: means and spreads, Markdown tables, CSV, JSON."""

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from statistics import stdev
from typing import Any

Row = dict[str, Any]


def spread(values: Sequence[float]) -> float | None:
    """The sample standard deviation, or None for a single value."""
    return stdev(values) if len(values) > 1 else None


def format_value(value: float, deviation: float | None, digits: int, sign: str = "", factor: float = 1) -> str:
    """``value ± deviation``, both times ``factor``; ``sign='+'`` writes the sign of a positive value too."""
    text = f"{value * factor:{sign}.{digits}f}"
    return text if deviation is None else f"{text} ± {deviation * factor:.{digits}f}"


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]], names: int) -> list[str]:
    """The lines of a Markdown table whose first ``names`` columns are aligned to the left, the others to the right."""
    lines = [f"| {' | '.join(cells)} |" for cells in (headings, *rows)]
    return [lines[0], "|" + "---|" * names + "---:|" * (len(headings) - names), *lines[1:]]


def csv_text(rows: Sequence[Row]) -> str:
    """The rows as CSV, with a column for every key of any row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def without_infinity(content: Any) -> Any:
    """``content`` with None for every number that is not finite, such as the PSNR of equal images: JSON has no such."""
    if isinstance(content, dict):
        return {key: without_infinity(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [without_infinity(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def json_text(content: Any, indent: int | None = 2) -> str:
    """The content as JSON; a number that is not finite becomes ``null``."""
    return json.dumps(without_infinity(content), indent=indent, allow_nan=False, ensure_ascii=False)
