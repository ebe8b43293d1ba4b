"""``docs/options.md``: every option in tables, made of the annotations that the checks go by."""

import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any

import yaml

from tlw_basicsr.archs.sr_archs import TLWHAT, TLWRCAN, TLWVDSR, UncertaintyHead
from tlw_basicsr.core.distances import LPIPSDistance, SSIMDistance
from tlw_basicsr.core.tlw import ECONOMY_NET_W, ECONOMY_OPTIM_W, PRESETS
from tlw_basicsr.core.weight_net import TLWWeightNet
from tlw_basicsr.engine.schema import (
    BasicSROptions,
    BicubicSROptions,
    DistOptions,
    ImageOptions,
    LoaderOptions,
    LoggerOptions,
    TopOptions,
    TrainOptions,
    UncertaintyOptions,
    ValOptions,
)
from tlw_basicsr.losses.tlw_loss import TLWLoss, describe_options
from tlw_basicsr.losses.uncertainty_loss import UncertaintyLoss
from tlw_basicsr.util.kinds import Option, describe_parameters

HEAD = """\
# Options

Every option that this package or BasicSR's loops read. `python scripts/generate_options.py` makes this page of the code
that checks them. Options of other networks, losses and metrics are the parameters of their classes and functions. A key
that nothing reads is an error where it is one of ours or nearly one that is read, else a line of the log.
"""


def write_tables() -> str:
    """The page."""
    parts: list[tuple[str, dict[str, Option]]] = [
        ("The top of the file", describe_parameters(TopOptions)),
        ("`train`", describe_parameters(TrainOptions)),
        ("`train.tlw`", describe_options()),
        ("`train.pixel_opt`: `TLWLoss`", describe_documented(TLWLoss)),
        ("`distance`: `LPIPSDistance`", describe_documented(LPIPSDistance)),
        ("`distance`: `SSIMDistance`", describe_documented(SSIMDistance)),
        ("`network_w`: `TLWWeightNet`", describe_documented(TLWWeightNet)),
        ("`datasets`: what every loader reads", describe_parameters(LoaderOptions)),
        ("`datasets`: images", _without(describe_parameters(ImageOptions), LoaderOptions)),
        ("`datasets`: `BicubicSRDataset`", _without(describe_parameters(BicubicSROptions), ImageOptions)),
        (
            "`datasets`: BasicSR's, such as `PairedImageDataset`",
            _without(describe_parameters(BasicSROptions), ImageOptions),
        ),
        ("`val`", describe_parameters(ValOptions)),
        ("`logger`", describe_parameters(LoggerOptions)),
        ("`dist_params`", describe_parameters(DistOptions)),
        ("`train.pixel_opt`: `UncertaintyLoss`", describe_documented(UncertaintyLoss)),
        ("`train.uncertainty`", describe_parameters(UncertaintyOptions)),
        *((f"`network_g`: `{c.__name__}`", describe_documented(c)) for c in (TLWVDSR, TLWRCAN, TLWHAT)),
        ("`network_u`: `UncertaintyHead`", describe_documented(UncertaintyHead)),
    ]
    text = [HEAD]
    for title, options in parts:
        text += [f"## {title}", "", *write_table(options.items()), ""]
        if title == "`train.tlw`":
            text += [*write_presets(), ""]
    return "\n".join(text).rstrip() + "\n"


def describe_documented(call: Callable) -> dict[str, Option]:
    """The options that are parameters of ``call``; what has no meaning in its annotation has that of the docstring."""
    told = read_arguments(inspect.getdoc(call) or "")
    options = describe_parameters(call)
    return {name: option._replace(meaning=option.meaning or told.get(name, "")) for name, option in options.items()}


def read_arguments(docstring: str) -> dict[str, str]:
    """The arguments of a docstring's section ``Args:`` and what it says of them, for Markdown."""
    section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)*)", docstring, re.MULTILINE)
    entries = re.split(r"^    (?=\w+(?:, \w+)*: )", section[1] if section else "", flags=re.MULTILINE)[1:]
    told = {}
    for names, text in (entry.split(": ", 1) for entry in entries):
        text = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", " ".join(text.split())).replace("``", "`").rstrip(".")
        text = re.sub(r"\bNone\b", "~", text)
        told |= dict.fromkeys(names.split(", "), text)
    return {name: told.get(text[5:-1], text) if text.startswith("see `") else text for name, text in told.items()}


def _without(options: dict[str, Option], section: Callable) -> dict[str, Option]:
    return {name: option for name, option in options.items() if name not in describe_parameters(section)}


def write_table(options: Iterable[tuple[str, Option]]) -> list[str]:
    """The lines of one table."""
    lines = ["| option | default | accepted | meaning |", "|---|---|---|---|"]
    for name, option in options:
        default = "" if option.default is inspect.Parameter.empty else f"`{write_value(option.default)}`"
        cells = (f"`{name}`", default, option.kind.text, option.meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def write_presets() -> list[str]:
    """What the presets of ``train.tlw`` stand for."""
    lines = ["| preset | stands for |", "|---|---|"]
    for name, values in PRESETS.items():
        also = ""
        if name == "economy":
            also = (
                f"; without `network_w`, `TLWWeightNet` of `{write_value(ECONOMY_NET_W)}`; without `optim_w`, Adam of "
                f"`{write_value(ECONOMY_OPTIM_W)}`"
            )
        lines.append(f"| `{name}` | {f'`{write_value(values)}`' if values else 'the defaults'}{also} |")
    return lines


def write_value(value: Any) -> str:
    """A value as YAML, in a line."""
    if value is None:
        return "~"
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, dict):
        value = {key: list(item) if isinstance(item, tuple) else item for key, item in value.items()}
    return yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False).splitlines()[0].strip()
