"""Reads YAML safely, and applies the changes of ``--force_yml``."""

import re
from typing import Any

import yaml

from tlw_basicsr.util.errors import UserError, short
from tlw_basicsr.util.kinds import Options

# YAML 1.1 takes 060 for octal and 1:30 for base 60, which nobody who trains a network means.
SURPRISING_NUMBER = re.compile(r"[-+]?(0[0-9_]+|[0-9_]+(:[0-9_]+)+(\.[0-9_]*)?)")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which reads ``1e-4`` as a number, and refuses what YAML reads otherwise than people do."""

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        if SURPRISING_NUMBER.fullmatch(node.value):
            problem = (
                f"{short(node.value)} is no plain number: YAML reads one with a leading 0 or a colon in another base; "
                "write it without them, and without commas (250,000 is 250 and 000)"
            )
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return self.construct_yaml_int(node) if node.tag.endswith(":int") else self.construct_yaml_float(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        texts: dict[str, str] = {}
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                text = f"{value.tag} {value.value}" if isinstance(value, yaml.ScalarNode) else str(id(value))
                if texts.setdefault(key.value, text) != text:
                    problem = f"the key {short(key.value)} is given twice, with different values"
                    raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge ``<<`` and keep only the last of equal keys, or merges of merges would grow without bound."""
        super().flatten_mapping(node)
        pairs = {}
        for key, value in node.value:
            pairs[(key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)] = key, value
        node.value = list(pairs.values())


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_yaml(text: str, name: str) -> Any:
    """Parse YAML without running code; ``name`` says in messages where it comes from."""
    try:
        return _unshared(yaml.load(text, Loader=_Loader), name)
    except (ValueError, RecursionError, OverflowError) as error:  # a date such as 2020-13-45; ten thousand brackets
        raise UserError(f"{name}: not valid YAML: {type(error).__name__}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{name}, line {mark.line + 1}" if mark else name
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{place}: not valid YAML: {problem}") from error


def _unshared(content: Any, name: str) -> Any:
    """Copy what YAML aliases share: BasicSR takes keys out of sections, so that no two places may share one."""
    count = 0

    def copied(value: Any) -> Any:
        nonlocal count
        count += 1
        if count > 100_000:
            raise UserError(f"{name}: its YAML aliases make more than 100,000 values")
        if isinstance(value, int) and value.bit_length() > 1000:
            raise UserError(f"{name}: it has a number of more than 300 digits")
        if isinstance(value, dict):
            return {key: copied(item) for key, item in value.items()}
        return [copied(item) for item in value] if isinstance(value, list) else value

    return copied(content)


def force_options(opt: Options, entries: list[str]) -> None:
    """Apply ``--force_yml`` entries such as ``train:ema_decay=0.999`` to ``opt``.

    A value is YAML, or ``none``. The last key of an entry may be new; the sections before it must exist.
    """
    for entry in entries:
        keys, separator, text = entry.partition("=")
        *sections, last = [key.strip() for key in keys.split(":")]
        if not separator or not all([*sections, last]):
            raise UserError(f"--force_yml {entry}: expected key=value or section:key=value")
        place = opt
        for section in sections:
            place = place.get(section)
            if not isinstance(place, dict):
                raise UserError(f"--force_yml {entry}: the options have no section {short(section)}")
        text = text.strip()
        place[last] = None if text.lower() == "none" else load_yaml(text, f"--force_yml {entry}")
