"""Kinds of option values, read from annotated signatures and checked with one-line errors.

A parameter that is an option says what it accepts and means where it is declared::

    def __init__(self, k_start: Annotated[float, FRACTION, "k at the start of the training"] = 0.3): ...

:func:`describe_parameters` reads that; the checks and the tables of the documentation are made of it.
"""

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from tlw_basicsr.core.arguments import BOOL, NUMBER, PLAIN, Kind, find_kind, is_number, or_none
from tlw_basicsr.util.errors import UserError, short


class Option(NamedTuple):
    """An option: its kind, its meaning and its default, ``inspect.Parameter.empty`` where it must be given."""

    kind: Kind
    meaning: str = ""
    default: Any = inspect.Parameter.empty


Schema = Mapping[str, Kind]
Options = dict[str, Any]


ANY = Kind("anything", lambda _: True)
DICT = Kind("a section of 'key: value'", lambda v: isinstance(v, dict), {"type": "object"})
LIST = Kind("a list", lambda v: isinstance(v, list), {"type": "array"})
NAMES = Kind(
    "a list of names",
    lambda v: isinstance(v, list) and all(isinstance(n, str) for n in v),
    {"type": "array", "items": {"type": "string"}},
)
NAMES_OR_TEXT = Kind(
    "a list of names, or text with them",
    lambda v: isinstance(v, str) or NAMES.accepts(v),
    {"anyOf": [{"type": "string"}, NAMES.schema]},
)
FOLDER_NAME = Kind(
    "a plain folder name, without / or ..",
    lambda v: isinstance(v, str) and v.isprintable() and v not in ("", "..") and Path(v).name == v,
    {"type": "string", "minLength": 1, "pattern": r"^[^/]*$"},
)
SUFFIX = Kind(
    "text without /, or ~",
    lambda v: v is None or (isinstance(v, str) and v.isprintable() and not set(v) & set("/\\")),
    {"anyOf": [{"type": "null"}, {"type": "string", "pattern": r"^[^/\\]*$"}]},
)
TEMPLATE = Kind(
    "text with one {} and no other braces",
    lambda v: isinstance(v, str) and v.count("{}") == v.count("{") == v.count("}") == 1,
    {"type": "string", "pattern": r"^[^{}]*\{\}[^{}]*$"},
)


def find_close(word: Any, choices: Collection[Any], cutoff: float = 0.6) -> str:
    """Return the choice that is spelt most like ``word``, or an empty text if none is similar."""
    close = difflib.get_close_matches(short(word).strip("'"), sorted(map(str, choices)), n=1, cutoff=cutoff)
    return close[0] if close else ""


def suggestion(word: Any, choices: Collection[Any], cutoff: float = 0.6) -> str:
    """Return `` (did you mean …?)``, or an empty text if no choice is similar."""
    close = find_close(word, choices, cutoff)
    return f" (did you mean {close}?)" if close else ""


def check_section(
    section: Any, place: str, schema: Schema, required: Collection[str] = (), strict: bool = True
) -> None:
    """Check the keys and values of the section at ``place``, such as ``train.tlw``; empty for the top.

    Without ``strict`` a key that is not in ``schema`` is refused only where it is nearly a missing required one.
    """
    if not isinstance(section, dict):
        raise UserError(f"{place}: expected a section of 'key: value', got {short(section)}")
    prefix = f"{place}." if place else ""
    missing = [key for key in required if key not in section]
    for key, value in section.items():
        if key in schema:
            if not schema[key].accepts(value):
                raise UserError(f"{prefix}{key}: expected {schema[key].text}, got {short(value)}")
        elif strict or suggestion(key, missing):
            known = sorted({*schema, *required})
            hint = suggestion(key, missing) or suggestion(key, known)
            raise UserError(f"{prefix}{key}: unknown option{hint}; accepted are {', '.join(known)}")
    if missing:
        kind = schema.get(missing[0], ANY)
        raise UserError(f"{prefix}{missing[0]}: missing{'' if kind is ANY else f'; expected {kind.text}'}")


def list_kinds(call: Callable) -> dict[str, Kind]:
    """Return the kinds of the options among the parameters of ``call``, see :func:`describe_parameters`."""
    return {name: option.kind for name, option in describe_parameters(call).items()}


def describe_parameters(call: Callable, without: Collection[str] = ()) -> dict[str, Option]:
    """Return the options among the parameters of ``call`` in their order, without ``*args`` and ``**kwargs``."""
    parameters = inspect.signature(call).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return {p.name: _describe(p) for p in named if p.name not in ("self", *without)}


def _describe(parameter: inspect.Parameter) -> Option:
    annotation, facts = parameter.annotation, []
    if get_origin(annotation) is Annotated:
        annotation, *facts = get_args(annotation)
    meaning = next((fact for fact in facts if isinstance(fact, str)), "")
    kind = find_kind(parameter.annotation) or _guess_kind(annotation, parameter.default)
    return Option(kind, meaning, parameter.default)


def _guess_kind(annotation: Any, default: Any) -> Kind:
    """The kind of a parameter's values where no fact of its annotation says it."""
    optional = get_origin(annotation) in (Union, UnionType) and get_args(annotation)[1:] == (NoneType,)
    plain = get_args(annotation)[0] if optional else annotation
    if kind := find_kind(plain) or {dict: DICT, list: LIST}.get(plain):
        return or_none(kind) if optional else kind
    if annotation is inspect.Parameter.empty and type(default) in PLAIN:
        if isinstance(default, bool):
            return BOOL
        # a default of 1 may well mean a float, or one for each side
        numbers = Kind(NUMBER.text, lambda v: is_number(v) or isinstance(v, list), {"type": ["number", "array"]})
        text = Kind("text or ~", lambda v: v is None or isinstance(v, str), {"type": ["string", "null"]})
        return numbers if is_number(default) else text
    return ANY
