"""Turn the text of a BasicSR training YAML into its TLW version, leaving every other character as it is."""

import math
import re
from collections.abc import Iterator
from typing import Any

import yaml

from tlw_basicsr.core.arguments import is_number
from tlw_basicsr.util.errors import UserError, short
from tlw_basicsr.util.kinds import FOLDER_NAME, Options
from tlw_basicsr.util.yaml_options import load_yaml

BASE_OF = {
    **{"L1Loss": "l1", "MSELoss": "mse", "CharbonnierLoss": "l1"},
    **{"CharbonnierLossColor": "l1", "PSNRLoss": "mse"},  # of SwinFIR and NAFNet
}
KEPT = ("type", "loss_weight", "reduction")
DISTANCE = {"type": "SSIMDistance"}  # needs no download, as in the recipes
K_START, K_END = 0.3, 0.9
MEAN_K = K_START + (K_END - K_START) / math.e  # the average over a training of k_decay iterations
LAST_K = K_START + (K_END - K_START) * (1 - 1 / math.e)
NEW_KEY_BEFORE = {"base_model": "model_type", "tlw": "pixel_opt"}  # other new keys follow the type of their section

Edit = tuple[int, int, str]  # replace text[start:end]


def add_tlw(
    text: str, name: str, *, keep_balance: bool = False, new_name: str | None = None, base: str | None = None
) -> str:
    """Return the TLW version of a BasicSR training YAML, with ``preset: economy``.

    Comments, order, anchors and spelling stay; new keys stand beside those that they belong to. A file that has
    ``model_type: TLWModel`` already is returned as it is.

    Args:
        text: Text of the YAML.
        name: Name of the file, for messages.
        keep_balance: Change ``loss_weight`` so that the pixel loss weighs against the other losses as before.
        new_name: Name of the experiment; None for ``NAME_TLW``.
        base: ``l1`` or ``mse``, what TLW weights; None for what the pixel loss is, where that is known.
    """
    opt = load_yaml(text, name)
    if not isinstance(opt, dict):
        raise UserError(f"{name}: must hold options, 'key: value'")
    if opt.get("model_type") == "TLWModel":
        return text
    new = _with_tlw(opt, name, keep_balance, new_name, base)
    try:
        edits = _edits(text, yaml.compose(text, Loader=yaml.SafeLoader), opt, new)
        # from the end; of edits at one place a deletion first, then the last
        for start, end, written in sorted(edits, key=lambda edit: edit[:2])[::-1]:
            text = text[:start] + written + text[end:]
        right = load_yaml(text, name) == new
    except (KeyError, UserError):  # a key that its section does not hold itself
        right = False
    if not right:
        raise UserError(
            f"{name}: can't be rewritten without changing other sections (anchors or an unusual layout around "
            "name, model_type or pixel_opt); add TLW by hand, the README shows the lines"
        )
    return text


def _edits(text: str, section: yaml.MappingNode, old: Options, new: Options) -> Iterator[Edit]:
    """Yield the edits that turn a mapping of the text, whose options are ``old``, into one of ``new``."""
    nodes = {key.value: (key, value) for key, value in section.value}
    for name, was, value in _changes(old, new):
        neighbour = name if was is not ... else NEW_KEY_BEFORE.get(name, "type")
        key, node = nodes[neighbour]
        key_start, (start, end) = key.start_mark.index, _span(text, key, node)
        line_end = text.find("\n", end) % (len(text) + 1)
        if was is ...:
            newline = "\r\n" if "\r\n" in text else "\n"
            separator = ", " if section.flow_style else newline + " " * key.start_mark.column
            if name in NEW_KEY_BEFORE:
                yield key_start, key_start, f"{name}: {_flow(value)}{separator}"
            else:
                place = end if section.flow_style else len(text[:line_end].rstrip("\r"))
                yield place, place, f"{separator}{name}: {_flow(value)}"
        elif value is not ...:
            is_alias = start != node.start_mark.index
            inside = isinstance(was, dict) and "type" in {k.value for k, _ in node.value} and not is_alias
            if name == "train" or inside:
                yield from _edits(text, node, was, value)
            else:
                yield start, end, _flow(value)
        elif not section.flow_style:
            yield text.rfind("\n", 0, key_start) + 1, line_end + 1, ""
        elif before := re.search(r",\s*$", text[:key_start]):
            yield before.start(), end, ""
        else:
            yield key_start, end + len(text[end:]) - len(text[end:].lstrip(", \r\n")), ""


def _span(text: str, key: yaml.Node, value: yaml.Node) -> tuple[int, int]:
    """Return start and end of a key's value; of an alias, whose node lies where its anchor is, those of its name."""
    start, end = value.start_mark.index, value.end_mark.index
    if start < key.end_mark.index:
        alias = re.compile(r"\*[^\s,\]}]+").search(text, key.end_mark.index)
        return alias.span() if alias else (start, end)
    if isinstance(value, yaml.CollectionNode) and not value.flow_style:
        end = start + len(text[start:end].rstrip())
    return start, end


def describe_changes(before: str, after: str) -> list[str]:
    """Return a line for each key of a YAML that :func:`add_tlw` has changed, with what follows from it."""
    old, new = load_yaml(before, "before"), load_yaml(after, "after")
    if old == new:
        return []
    pixel_opt, old_pixel_opt = new["train"]["pixel_opt"], old["train"]["pixel_opt"]
    start, mean, end = (f"{2 * k:.2g}" for k in (K_START, MEAN_K, LAST_K))
    effect = f"about 2k times L1: {start} in the beginning, {mean} on average, {end} at the end"
    if pixel_opt["base"] == "mse":
        effect = "each pixel's squared error is divided by its error and weighted, so its size is not that of MSE"
    reasons = {
        "name": "so that the next training leaves the folder of the one without TLW alone",
        "train.pixel_opt.reduction": "TLW's loss is a mean, smaller than the sum by the number of values",
        "train.pixel_opt.eps": "TLW takes |x̂ − x| itself, not Charbonnier's root",
        "train.pixel_opt.type": effect,
        "train.pixel_opt.loss_weight": "keeps the balance with the other losses on average over the training",
        "train.tlw": "k rises over the whole training",
    }
    lines = []
    for place, was, value in _differences(old, new):
        if value is ...:
            change = f"{_flow(was)} is deleted"
        else:
            change = f"{_flow(value)} is new" if was is ... else f"{_flow(was)} → {_flow(value)}"
        lines.append(f"{place}: {change}" + (f" ({reasons[place]})" if place in reasons else ""))
    others = [key for key in new["train"] if key.endswith("_opt") and key != "pixel_opt" and new["train"][key]]
    if others and pixel_opt.get("loss_weight") == old_pixel_opt.get("loss_weight"):
        lines.append(f"the balance with {', '.join(others)} changes; --keep-balance sets loss_weight to keep it")
    return lines


def _changes(old: Options, new: Options) -> Iterator[tuple[str, Any, Any]]:
    """Yield key, old and new value where they differ; ``...`` stands for a key that is missing."""
    for key in dict.fromkeys([*old, *new]):
        if old.get(key, ...) != new.get(key, ...):
            yield key, old.get(key, ...), new.get(key, ...)


def _differences(old: Options, new: Options, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield :func:`_changes` with the places of their keys, down to the values of sections that both have."""
    for key, was, value in _changes(old, new):
        if isinstance(was, dict) and isinstance(value, dict):
            yield from _differences(was, value, f"{place}{key}.")
        else:
            yield f"{place}{key}", was, value


def _with_tlw(opt: Options, name: str, keep_balance: bool, new_name: str | None, base: str | None) -> Options:
    """Return the options with TLW, or raise a :class:`UserError` that says why that is impossible."""
    for key in ("model_type", "network_g", "train"):
        if key not in opt:
            raise UserError(f"{name}: {key} is missing; expected is a training YAML of BasicSR")
    train = opt["train"]
    if not isinstance(train, dict) or not isinstance(train.get("pixel_opt"), dict):
        raise UserError(f"{name}: train.pixel_opt is missing; TLW takes the place of a pixel loss")
    for key in ("optim_g", "total_iter"):
        if key not in train:
            raise UserError(f"{name}: train.{key} is missing; expected is a training YAML of BasicSR")
    if not is_number(train["total_iter"]) or train["total_iter"] < 1:
        raise UserError(f"{name}: train.total_iter: expected a number of at least 1, got {short(train['total_iter'])}")
    if not isinstance(opt["model_type"], str):
        raise UserError(f"{name}: model_type: expected text, got {short(opt['model_type'])}")
    pixel_opt = dict(train["pixel_opt"])
    train = {**train, "pixel_opt": pixel_opt}
    new = {**opt, "train": train}
    kind = pixel_opt.get("type")
    if not isinstance(kind, str) or (kind not in BASE_OF and base is None):
        accepted = f"{', '.join(BASE_OF)}, or any with --base l1 or --base mse"
        raise UserError(f"{name}: train.pixel_opt.type: {short(kind)}; accepted are {accepted}")
    if pixel_opt.get("toY"):
        raise UserError(f"{name}: train.pixel_opt.toY: TLW weights the pixels of all channels; delete it")
    if "name" in opt and (opt["name"] is not None or new_name is not None):
        new["name"] = new_name if new_name is not None else f"{opt['name']}_TLW"
        if not FOLDER_NAME.accepts(new["name"]):
            raise UserError(f"{name}: name: expected {FOLDER_NAME.text}, got {short(new['name'])}")
    if new["model_type"] != "SRModel":
        new["base_model"] = new["model_type"]
    new["model_type"] = "TLWModel"
    # like the paper's decay of 100 epochs out of 100, whatever an epoch is
    decay = int(train["total_iter"])
    train["tlw"] = {"preset": "economy", "k_start": K_START, "k_end": K_END, "k_decay": decay, "k_unit": "iter"}
    if keep_balance:
        factor = _balance(opt, kind, base or BASE_OF[kind], name)
        weight = pixel_opt.get("loss_weight", 1.0)
        if not is_number(weight):
            raise UserError(f"{name}: train.pixel_opt.loss_weight: expected a number, got {short(weight)}")
        pixel_opt["loss_weight"] = float(f"{weight * factor:.4g}")
    for key in pixel_opt.keys() - set(KEPT):
        del pixel_opt[key]
    pixel_opt |= {"type": "TLWLoss", "base": base or BASE_OF[kind], "distance": DISTANCE}
    if "reduction" in pixel_opt:
        pixel_opt["reduction"] = "mean"
    return new


def _balance(opt: Options, kind: str, base: str, name: str) -> float:
    """Return the factor of ``loss_weight`` that keeps the pixel loss as large as before on average over the training.

    TLW's L1 is the mean of w·2|x̂ − x|, which is 2k times L1 if w and the error are independent.
    """
    if base == "mse":
        raise UserError(f"{name}: --keep-balance: not with {kind}, since TLW's loss is not a multiple of it")
    factor = 1 / (2 * MEAN_K)
    if opt["train"]["pixel_opt"].get("reduction") == "sum":
        data = (opt.get("datasets") or {}).get("train") or {}
        batch, side = data.get("batch_size_per_gpu"), data.get("gt_size")
        if not isinstance(batch, int) or not isinstance(side, int):
            raise UserError(f"{name}: --keep-balance: reduction: sum needs batch_size_per_gpu and gt_size")
        factor *= batch * side * side * (1 if data.get("color") == "y" else 3)
    return factor


def _flow(value: Any) -> str:
    """Return a value as YAML in one line."""
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000).removesuffix("...\n").strip()
