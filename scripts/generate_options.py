"""Write ``docs/options.md``, tables of all options, from the annotations that the checks of options go by.

With ``--check`` nothing is written, and the exit code is 1 if the page is out of date.
"""

import argparse
import inspect
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tlw_basicsr.archs.sr_archs import TLWHAT, TLWRCAN, TLWVDSR, UncertaintyHead
from tlw_basicsr.core.distances import LPIPSDistance, SSIMDistance
from tlw_basicsr.core.tlw import ECONOMY_NET_W, ECONOMY_OPTIM_W, PRESETS
from tlw_basicsr.core.weight_net import TLWWeightNet
from tlw_basicsr.core.weightings import LDLWeights, PSPLWeights
from tlw_basicsr.engine import schema
from tlw_basicsr.losses.tlw_loss import TLWLoss, describe_options
from tlw_basicsr.losses.uncertainty_loss import UncertaintyLoss
from tlw_basicsr.util.kinds import Option, describe_parameters

PAGE = Path(__file__).resolve().parents[1] / "docs/options.md"
HEAD = """\
# Options

Every option that this package or BasicSR's loops read. `python scripts/generate_options.py` writes this page from the
code that checks them. Options of other networks, losses and metrics are the parameters of their classes and functions.
A key that nothing reads is an error if it belongs to one of our sections or is spelt nearly like a key that is read;
otherwise the log mentions it.

x is the HR image, x̂ the SR image, w the weights, k their mean, D the distance by which they are learned. E steps train
the weighting network, M steps the SR network, see [the method](method.md).
"""
Table = dict[str, Option]


def main() -> None:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if the page is out of date")
    check, page = parser.parse_args().check, write_page()
    if not check:
        PAGE.write_text(page, "utf-8")
    elif PAGE.read_text("utf-8") != page:
        sys.exit(f"{PAGE} is out of date; run python scripts/generate_options.py")


def write_page() -> str:
    """Return the text of the page."""
    tables: dict[str, Table] = {
        "The top of the file": describe_parameters(schema.TopOptions),
        "`train`": describe_parameters(schema.TrainOptions),
        "`train.tlw`": describe_options(),
        "`train.pixel_opt`: `TLWLoss`": describe_documented(TLWLoss),
        "`weights`: `LDLWeights`": describe_documented(LDLWeights),
        "`weights`: `PSPLWeights`": describe_documented(PSPLWeights),
        "`distance`: `LPIPSDistance`": describe_documented(LPIPSDistance),
        "`distance`: `SSIMDistance`": describe_documented(SSIMDistance),
        "`network_w`: `TLWWeightNet`": describe_documented(TLWWeightNet),
        "`datasets`: what every loader reads": describe_parameters(schema.LoaderOptions),
        "`datasets`: images": describe_more(schema.ImageOptions, schema.LoaderOptions),
        "`datasets`: `BicubicSRDataset`": describe_more(schema.BicubicSROptions, schema.ImageOptions),
        "`datasets`: BasicSR's, such as `PairedImageDataset`": describe_more(
            schema.BasicSROptions, schema.ImageOptions
        ),
        "`val`": describe_parameters(schema.ValOptions),
        "`logger`": describe_parameters(schema.LoggerOptions),
        "`dist_params`": describe_parameters(schema.DistOptions),
        "`train.pixel_opt`: `UncertaintyLoss`": describe_documented(UncertaintyLoss),
        "`train.uncertainty`": describe_parameters(schema.UncertaintyOptions),
        **{f"`network_g`: `{net.__name__}`": describe_documented(net) for net in (TLWVDSR, TLWRCAN, TLWHAT)},
        "`network_u`: `UncertaintyHead`": describe_documented(UncertaintyHead),
    }
    text = [HEAD]
    for title, table in tables.items():
        text += [f"## {title}", "", *write_table(table), ""]
        if title == "`train.tlw`":
            text += [*write_presets(), ""]
    return "\n".join(text).rstrip() + "\n"


def describe_more(section: Callable, base: Callable) -> Table:
    """Return the options of ``section`` that ``base`` does not have."""
    known = describe_parameters(base)
    return {name: option for name, option in describe_parameters(section).items() if name not in known}


def describe_documented(call: Callable) -> Table:
    """Return the options that are parameters of ``call``; its docstring explains those that are not annotated."""
    meanings = read_arguments(inspect.getdoc(call) or "")
    options = describe_parameters(call)
    return {name: option._replace(meaning=option.meaning or meanings.get(name, "")) for name, option in options.items()}


def read_arguments(docstring: str) -> dict[str, str]:
    """Return the text of every argument in the section ``Args:`` of a docstring, as Markdown."""
    section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)*)", docstring, re.MULTILINE)
    entries = re.split(r"^    (?=\w+(?:, \w+)*: )", section[1] if section else "", flags=re.MULTILINE)[1:]
    meanings = {}
    for names, text in (entry.split(": ", 1) for entry in entries):
        text = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", " ".join(text.split())).replace("``", "`").rstrip(".")
        meanings |= dict.fromkeys(names.split(", "), re.sub(r"\bNone\b", "~", text))
    return {
        name: meanings.get(text[5:-1], text) if text.startswith("see `") else text for name, text in meanings.items()
    }


def write_table(table: Table) -> list[str]:
    """Return the lines of one table."""
    lines = ["| option | default | accepted | meaning |", "|---|---|---|---|"]
    for name, option in table.items():
        default = "" if option.default is inspect.Parameter.empty else f"`{write_value(option.default)}`"
        cells = (f"`{name}`", default, option.kind.text, option.meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def write_presets() -> list[str]:
    """Return the table of what the presets of ``train.tlw`` stand for."""
    lines = ["| preset | stands for |", "|---|---|"]
    for name, values in PRESETS.items():
        meaning = f"`{write_value(values)}`" if values else "the defaults"
        if name == "economy":
            meaning += f"; without `network_w`, `TLWWeightNet` of `{write_value(ECONOMY_NET_W)}`"
            meaning += f"; without `optim_w`, Adam of `{write_value(ECONOMY_OPTIM_W)}`"
        lines.append(f"| `{name}` | {meaning} |")
    return lines


def write_value(value: Any) -> str:
    """Return a value as YAML in one line."""
    if value is None:
        return "~"
    value = json.loads(json.dumps(value))  # tuples become lists
    return yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False).splitlines()[0].strip()


if __name__ == "__main__":
    main()
