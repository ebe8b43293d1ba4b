"""Turn the text of a BasicSR training YAML into its TLW version, leaving every other character as it is."""

import re
from typing import Any

import yaml

from tlw_basicsr.errors import UserError, short
from tlw_basicsr.kinds import is_number
from tlw_basicsr.options import load_yaml

BASE_OF = {"L1Loss": "l1", "MSELoss": "mse", "CharbonnierLoss": "l1"}
DISTANCE = "{type: LPIPSDistance, net: vgg}"
NETWORK_W = "{type: TLWWeightNet, num_feat: 64}"
OPTIM_W = "{type: Adam, lr: !!float 1e-4, betas: [0.5, 0.999]}"

Edit = tuple[int, int, str]  # replace text[start:end]


def add_tlw(text: str, name: str) -> str:
    """The TLW version of a BasicSR training YAML.

    Comments, order, anchors and spelling stay; keys are added beside those that they belong to. A file that has
    ``model_type: TLWModel`` already comes back as it is.

    Args:
        text: of the YAML.
        name: of the file, for messages.

    Raises:
        UserError: it is no training YAML, has no pixel loss or one that TLW can't take the place of, or its anchors
            tie the pixel loss to other sections.
    """
    opt = load_yaml(text, name)
    if not isinstance(opt, dict):
        raise UserError(f"{name}: must hold options, 'key: value'")
    if opt.get("model_type") == "TLWModel":
        return text
    expected = _changed(opt, name)
    document = _Document(text, name)
    root = document.root
    train = document.mapping(root, "train")
    pixel_opt = document.mapping(train, "pixel_opt")
    edits = [
        document.replace(root, "model_type", "TLWModel"),
        document.add_before(root, "network_g", "network_w", NETWORK_W),
        document.add_before(train, "optim_g", "optim_w", OPTIM_W),
        document.add_before(train, "pixel_opt", "tlw", _flow(expected["train"]["tlw"])),
    ]
    if "base_model" in expected:
        edits.append(document.add_before(root, "model_type", "base_model", expected["base_model"]))
    new_pixel_opt = expected["train"]["pixel_opt"]
    if pixel_opt is None or document.key(pixel_opt, "type") is None:  # an alias, or merged into the section
        edits.append(document.replace(train, "pixel_opt", _flow(new_pixel_opt)))
    else:
        edits.append(document.replace(pixel_opt, "type", "TLWLoss"))
        added = [("base", new_pixel_opt["base"]), ("num_samples", "3"), ("distance", DISTANCE)]
        edits += [document.add_after(pixel_opt, "type", key, value) for key, value in added]
        if document.key(pixel_opt, "reduction") is not None:
            edits.append(document.replace(pixel_opt, "reduction", "mean"))
        if document.key(pixel_opt, "eps") is not None:
            edits.append(document.delete(pixel_opt, "eps"))
    for start, end, new in sorted(edits, key=lambda edit: edit[0])[
        ::-1
    ]:  # from the end; of equal places the last first
        text = text[:start] + new + text[end:]
    try:
        right = load_yaml(text, name) == expected
    except UserError:
        right = False
    if not right:
        raise UserError(
            f"{name}: can't be rewritten without changing other sections (anchors or an unusual layout around "
            "model_type, network_g, optim_g or pixel_opt); add TLW by hand, the README shows the lines"
        )
    return text


def _changed(opt: dict[str, Any], name: str) -> dict[str, Any]:
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
    if new["model_type"] != "SRModel":
        new["base_model"] = new["model_type"]
    new["model_type"] = "TLWModel"
    new["network_w"] = load_yaml(NETWORK_W, name)
    train["optim_w"] = load_yaml(OPTIM_W, name)
    # the paper's decay, 100 epochs of 100, whatever an epoch is
    train["tlw"] = {"k_start": 0.3, "k_end": 0.9, "k_decay": int(train["total_iter"]), "k_unit": "iter"}
    pixel_opt.pop("eps", None)
    pixel_opt |= {"type": "TLWLoss", "base": BASE_OF[kind], "num_samples": 3, "distance": load_yaml(DISTANCE, name)}
    if "reduction" in pixel_opt:
        pixel_opt["reduction"] = "mean"
    return new


def _flow(value: dict[str, Any]) -> str:
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000).strip()


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

    def _value_span(self, key: yaml.Node, value: yaml.Node) -> tuple[int, int]:
        if self._is_alias(key, value):
            alias = re.compile(r"\s*:\s*(\*[^\s,\]}]+)").match(self.text, key.end_mark.index)
            return alias.span(1)
        start, end = value.start_mark.index, value.end_mark.index
        block = isinstance(value, yaml.CollectionNode) and not value.flow_style
        return start, start + len(self.text[start:end].rstrip()) if block else end

    def replace(self, mapping: yaml.MappingNode | None, key: str, new: str) -> Edit:
        """Another value for a key."""
        return (*self._value_span(*self._pair(mapping, key)), new)

    def add_before(self, mapping: yaml.MappingNode | None, key: str, new_key: str, value: str) -> Edit:
        """A new key on a line of its own before ``key``, or in front of it within braces."""
        node, _ = self._pair(mapping, key)
        separator = ", " if mapping.flow_style else self.newline + " " * node.start_mark.column
        return node.start_mark.index, node.start_mark.index, f"{new_key}: {value}{separator}"

    def add_after(self, mapping: yaml.MappingNode, key: str, new_key: str, value: str) -> Edit:
        """A new key on the line after ``key`` and its comment, or behind it within braces."""
        node, value_node = self._pair(mapping, key)
        _, end = self._value_span(node, value_node)
        if mapping.flow_style:
            return end, end, f", {new_key}: {value}"
        line_end = re.compile(r"[^\r\n]*").match(self.text, end).end()
        return line_end, line_end, f"{self.newline}{' ' * node.start_mark.column}{new_key}: {value}"

    def delete(self, mapping: yaml.MappingNode, key: str) -> Edit:
        """Without a key and its line, or its part within braces."""
        node, value_node = self._pair(mapping, key)
        start, (_, end) = node.start_mark.index, self._value_span(node, value_node)
        if mapping.flow_style:
            before = re.compile(r",\s*$").search(self.text, 0, start)
            return (
                (before.start(), end, "") if before else (start, re.compile(r"\s*,\s*").match(self.text, end).end(), "")
            )
        line_start = self.text.rfind("\n", 0, start) + 1
        line_end = self.text.find("\n", end)
        return line_start, len(self.text) if line_end < 0 else line_end + 1, ""


if __name__ == "__main__":
    from tlw_basicsr.cli import run_command

    run_command("add")
