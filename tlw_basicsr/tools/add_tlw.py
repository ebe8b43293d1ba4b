"""Turn the text of a BasicSR training YAML into its TLW version, leaving every other character as it is."""

import math
import re
from typing import Any

import yaml

from tlw_basicsr.util.errors import UserError, short
from tlw_basicsr.util.kinds import FOLDER_NAME, Options, is_number
from tlw_basicsr.util.yaml_options import load_yaml

BASE_OF = {"L1Loss": "l1", "MSELoss": "mse", "CharbonnierLoss": "l1"}
DISTANCE = {"type": "LPIPSDistance", "net": "vgg"}
K_START, K_END = 0.3, 0.9

Edit = tuple[int, int, str]  # replace text[start:end]


def add_tlw(text: str, name: str, *, keep_balance: bool = False, new_name: str | None = None) -> str:
    """The TLW version of a BasicSR training YAML, with ``preset: economy``.

    Comments, order, anchors and spelling stay; keys are added beside those that they belong to. A file that has
    ``model_type: TLWModel`` already comes back as it is. :func:`describe_changes` tells what is changed.

    Args:
        text: of the YAML.
        name: of the file, for messages.
        keep_balance: change ``loss_weight`` so that the pixel loss weighs against the other losses as before.
        new_name: of the experiment, so that its folder is not that of the training without TLW; None for ``NAME_TLW``.

    Raises:
        UserError: it is no training YAML, has no pixel loss or one that TLW can't take the place of, or its anchors
            tie the pixel loss to other sections.
    """
    opt = load_yaml(text, name)
    if not isinstance(opt, dict):
        raise UserError(f"{name}: must hold options, 'key: value'")
    if opt.get("model_type") == "TLWModel":
        return text
    expected = _change(opt, name, keep_balance, new_name)
    document = _Document(text, name)
    root = document.root
    train = document.mapping(root, "train")
    pixel_opt = document.mapping(train, "pixel_opt")
    edits = [
        document.replace(root, "model_type", "TLWModel"),
        document.add_before(train, "pixel_opt", "tlw", _flow(expected["train"]["tlw"])),
    ]
    if "name" in expected:
        edits.append(document.replace(root, "name", _flow(expected["name"])))
    if "base_model" in expected:
        edits.append(document.add_before(root, "model_type", "base_model", expected["base_model"]))
    new_pixel_opt = expected["train"]["pixel_opt"]
    if pixel_opt is None or document.key(pixel_opt, "type") is None:  # an alias, or merged into the section
        edits.append(document.replace(train, "pixel_opt", _flow(new_pixel_opt)))
    else:
        edits.append(document.replace(pixel_opt, "type", "TLWLoss"))
        for key in ("base", "loss_weight", "distance"):
            if key in new_pixel_opt and document.key(pixel_opt, key) is None:
                edits.append(document.add_after(pixel_opt, "type", key, _flow(new_pixel_opt[key])))
            elif new_pixel_opt.get(key) != opt["train"]["pixel_opt"].get(key):
                edits.append(document.replace(pixel_opt, key, _flow(new_pixel_opt[key])))
        if document.key(pixel_opt, "reduction") is not None:
            edits.append(document.replace(pixel_opt, "reduction", "mean"))
        if document.key(pixel_opt, "eps") is not None:
            edits.append(document.delete(pixel_opt, "eps"))
    # from the end; of equal places the last first
    for start, end, new in sorted(edits, key=lambda edit: edit[0])[::-1]:
        text = text[:start] + new + text[end:]
    try:
        right = load_yaml(text, name) == expected
    except UserError:
        right = False
    if not right:
        raise UserError(
            f"{name}: can't be rewritten without changing other sections (anchors or an unusual layout around "
            "name, model_type or pixel_opt); add TLW by hand, the README shows the lines"
        )
    return text


def describe_changes(before: str, after: str) -> list[str]:
    """What :func:`add_tlw` has changed in a YAML, a line for each key, with what follows from it."""
    old, new = load_yaml(before, "before"), load_yaml(after, "after")
    if old == new:
        return []
    pixel_opt, kind = new["train"]["pixel_opt"], old["train"]["pixel_opt"].get("type")
    reasons = {
        "name": "so that the next training leaves the folder of the one without TLW alone",
        "train.pixel_opt.reduction": "TLW's loss is a mean, by the number of values smaller than the sum",
        "train.pixel_opt.eps": "TLW takes |x̂ − x| itself, not Charbonnier's root",
        "train.pixel_opt.type": _tell_balance(kind),
        "train.pixel_opt.loss_weight": "keeps the balance with the other losses on the average of the training",
        "train.tlw": "k rises over the whole training",
    }
    lines = []
    for place, was, is_now in _differences(old, new):
        what = f"{was} → {is_now}" if was and is_now else f"{is_now} is new" if is_now else f"{was} is deleted"
        reason = reasons.get(place)
        lines.append(f"{place}: {what}{f' ({reason})' if reason else ''}")
    others = [key for key in new["train"] if key.endswith("_opt") and key != "pixel_opt" and new["train"][key]]
    if others and pixel_opt.get("loss_weight") == old["train"]["pixel_opt"].get("loss_weight"):
        lines.append(
            f"beside {', '.join(others)} the balance of the losses moves; --keep-balance sets loss_weight for it"
        )
    return lines


def _differences(old: Any, new: Any, place: str = "") -> list[tuple[str, str, str]]:
    """Place, old and new value of all that differs; empty text where there is none."""
    found = []
    for key in [*old, *(key for key in new if key not in old)]:
        where = f"{place}.{key}".lstrip(".")
        a, b = old.get(key, ...), new.get(key, ...)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, where)
        elif a != b:
            found.append((where, *("" if value is ... else _flow(value) for value in (a, b))))
    return found


def _tell_balance(kind: str) -> str:
    if BASE_OF.get(kind) == "mse":
        return "each pixel's squared error is divided by its error and weighted: of another size than MSE"
    start, mean, end = (f"{2 * k:.2g}" for k in (K_START, _mean_k(), _last_k()))
    return f"about 2k times L1: {start} in the beginning, {mean} on the average, {end} in the end"


def _mean_k() -> float:
    """The average of k over a training of ``k_decay`` iterations."""
    return K_START + (K_END - K_START) / math.e


def _last_k() -> float:
    return K_START + (K_END - K_START) * (1 - 1 / math.e)


def _change(opt: Options, name: str, keep_balance: bool, new_name: str | None) -> Options:
    """The options with TLW, as a dict; or a :class:`UserError` that says why there can't be."""
    for key in ("model_type", "network_g", "train"):
        if key not in opt:
            raise UserError(f"{name}: {key} is missing; expected is a training YAML of BasicSR")
    train = opt["train"]
    if not isinstance(train, dict) or not isinstance(train.get("pixel_opt"), dict):
        raise UserError(f"{name}: train.pixel_opt is missing; TLW takes the place of a pixel loss, and there is none")
    for key in ("optim_g", "total_iter"):
        if key not in train:
            raise UserError(f"{name}: train.{key} is missing; expected is a training YAML of BasicSR")
    if not is_number(train["total_iter"]) or train["total_iter"] < 1:
        raise UserError(f"{name}: train.total_iter: expected a number of at least 1, got {short(train['total_iter'])}")
    if not isinstance(opt["model_type"], str):
        raise UserError(f"{name}: model_type: expected text, got {short(opt['model_type'])}")
    # copies, since an alias shares its section with the anchor's
    pixel_opt = dict(train["pixel_opt"])
    train = {**train, "pixel_opt": pixel_opt}
    new = {**opt, "train": train}
    kind = pixel_opt.get("type")
    if not isinstance(kind, str) or kind not in BASE_OF:
        raise UserError(f"{name}: train.pixel_opt.type: {short(kind)}; accepted are {', '.join(BASE_OF)}")
    if opt.get("name") is not None or new_name is not None:
        new["name"] = new_name if new_name is not None else f"{opt['name']}_TLW"
        if not FOLDER_NAME.accepts(new["name"]):
            raise UserError(f"{name}: name: expected {FOLDER_NAME.text}, got {short(new['name'])}")
    if "name" not in opt:
        new.pop("name", None)
    if new["model_type"] != "SRModel":
        new["base_model"] = new["model_type"]
    new["model_type"] = "TLWModel"
    # the paper's decay, 100 epochs of 100, whatever an epoch is
    decay = int(train["total_iter"])
    train["tlw"] = {"preset": "economy", "k_start": K_START, "k_end": K_END, "k_decay": decay, "k_unit": "iter"}
    if keep_balance:
        factor = _balance(opt, kind, name)
        weight = pixel_opt.get("loss_weight", 1.0)
        if not is_number(weight):
            raise UserError(f"{name}: train.pixel_opt.loss_weight: expected a number, got {short(weight)}")
        pixel_opt["loss_weight"] = float(f"{weight * factor:.4g}")
    pixel_opt.pop("eps", None)
    pixel_opt |= {"type": "TLWLoss", "base": BASE_OF[kind], "distance": DISTANCE}
    if "reduction" in pixel_opt:
        pixel_opt["reduction"] = "mean"
    return new


def _balance(opt: Options, kind: str, name: str) -> float:
    """What ``loss_weight`` is multiplied by, so that the pixel loss is of the old size on the average of the training.

    TLW's L1 is the mean of w·2|x̂ − x|, so 2k times L1 where w and the error have nothing to do with each other.
    """
    if BASE_OF[kind] == "mse":
        raise UserError(f"{name}: --keep-balance: not with {kind}, of which TLW's loss is no multiple")
    factor = 1 / (2 * _mean_k())
    if opt["train"]["pixel_opt"].get("reduction") == "sum":
        data = (opt.get("datasets") or {}).get("train") or {}
        batch, side = data.get("batch_size_per_gpu"), data.get("gt_size")
        if not isinstance(batch, int) or not isinstance(side, int):
            raise UserError(f"{name}: --keep-balance: of reduction: sum it needs batch_size_per_gpu and gt_size")
        factor *= batch * side * side * (1 if data.get("color") == "y" else 3)
    return factor


def _flow(value: Any) -> str:
    """A value as YAML in a line."""
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000).removesuffix("...\n").strip()


class _Document:
    """Places of keys and values in the text of a YAML file."""

    def __init__(self, text: str, name: str) -> None:
        self.text, self.name = text, name
        self.newline = "\r\n" if "\r\n" in text else "\n"
        self.root = yaml.compose(text, Loader=yaml.SafeLoader)

    def key(self, mapping: yaml.MappingNode, key: str) -> tuple[yaml.Node, yaml.Node] | None:
        """Key and value nodes, None if the key is not written in the mapping itself."""
        return next(((k, v) for k, v in mapping.value if k.value == key), None)

    def mapping(self, parent: yaml.MappingNode | None, key: str) -> yaml.MappingNode | None:
        """The mapping of a key; None if it is an alias of one elsewhere."""
        pair = parent and self.key(parent, key)
        if not pair or not isinstance(pair[1], yaml.MappingNode) or self._is_alias(*pair):
            return None
        return pair[1]

    @staticmethod
    def _is_alias(key: yaml.Node, value: yaml.Node) -> bool:
        return value.start_mark.index < key.end_mark.index

    def _pair(self, mapping: yaml.MappingNode | None, key: str) -> tuple[yaml.Node, yaml.Node]:
        pair = mapping and self.key(mapping, key)
        if not pair:
            raise UserError(f"{self.name}: {key} is not written in its section itself; add TLW by hand")
        return pair

    def _match(self, pattern: str, at: int) -> re.Match[str]:
        found = re.compile(pattern).match(self.text, at)
        if not found:
            raise UserError(f"{self.name}: an unusual layout; add TLW by hand")
        return found

    def _value_span(self, key: yaml.Node, value: yaml.Node) -> tuple[int, int]:
        if self._is_alias(key, value):
            return self._match(r"\s*:\s*(\*[^\s,\]}]+)", key.end_mark.index).span(1)
        start, end = value.start_mark.index, value.end_mark.index
        block = isinstance(value, yaml.CollectionNode) and not value.flow_style
        return start, start + len(self.text[start:end].rstrip()) if block else end

    def replace(self, mapping: yaml.MappingNode | None, key: str, new: str) -> Edit:
        """Another value for a key."""
        return (*self._value_span(*self._pair(mapping, key)), new)

    def add_before(self, mapping: yaml.MappingNode | None, key: str, new_key: str, value: str) -> Edit:
        """A new key on a line of its own before ``key``, or in front of it within braces."""
        node, _ = self._pair(mapping, key)
        separator = ", " if mapping and mapping.flow_style else self.newline + " " * node.start_mark.column
        return node.start_mark.index, node.start_mark.index, f"{new_key}: {value}{separator}"

    def add_after(self, mapping: yaml.MappingNode, key: str, new_key: str, value: str) -> Edit:
        """A new key on the line after ``key`` and its comment, or behind it within braces."""
        node, value_node = self._pair(mapping, key)
        _, end = self._value_span(node, value_node)
        if mapping.flow_style:
            return end, end, f", {new_key}: {value}"
        line_end = self._match(r"[^\r\n]*", end).end()
        return line_end, line_end, f"{self.newline}{' ' * node.start_mark.column}{new_key}: {value}"

    def delete(self, mapping: yaml.MappingNode, key: str) -> Edit:
        """Without a key and its line, or its part within braces."""
        node, value_node = self._pair(mapping, key)
        start, (_, end) = node.start_mark.index, self._value_span(node, value_node)
        if mapping.flow_style:
            before = re.compile(r",\s*$").search(self.text, 0, start)
            return (before.start(), end, "") if before else (start, self._match(r"\s*,\s*", end).end(), "")
        line_start = self.text.rfind("\n", 0, start) + 1
        line_end = self.text.find("\n", end)
        return line_start, len(self.text) if line_end < 0 else line_end + 1, ""
