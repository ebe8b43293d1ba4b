"""Kinds of option values, read from annotated signatures and checked with one-line errors.

A parameter that is an option says what it accepts and means where it is declared::

    def __init__(self, k_start: Annotated[float, FRACTION, "k at the start of the training"] = 0.3): ...

:func:`describe_parameters` reads that; the checks and the tables of the documentation are made of it.
"""

import difflib
import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from tlw_basicsr.util.errors import UserError, short


class Kind(NamedTuple):
    """What values an option accepts: a text for people, the check itself, and what of it a JSON schema can say."""

    text: str
    accepts: Callable[[Any], bool]
    schema: Mapping[str, Any] = MappingProxyType({})


class Option(NamedTuple):
    """An option: its kind, its meaning and its default, ``inspect.Parameter.empty`` where it must be given."""

    kind: Kind
    meaning: str = ""
    default: Any = inspect.Parameter.empty


Schema = Mapping[str, Kind]
Options = dict[str, Any]


def is_number(value: Any) -> bool:
    """Whether ``value`` is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def whole(minimum: int, maximum: int | None = None) -> Kind:
    """A whole number of at least ``minimum``."""
    return Kind(
        f"a whole number of at least {minimum}" + ("" if maximum is None else f" and at most {maximum:,}"),
        lambda v: isinstance(v, int) and not isinstance(v, bool) and minimum <= v and (maximum is None or v <= maximum),
        {"type": "integer", "minimum": minimum} | ({} if maximum is None else {"maximum": maximum}),
    )


def one_of(*choices: Any) -> Kind:
    """One of some values; 1 is not True."""
    return Kind(
        "one of " + ", ".join(str(c).lower() if isinstance(c, bool) else str(c) for c in choices),
        lambda v: any(type(v) is type(c) and v == c for c in choices),
        {"enum": list(choices)},
    )


def or_none(kind: Kind) -> Kind:
    """``kind``, or ``~``."""
    schema = {"anyOf": [kind.schema, {"type": "null"}]} if kind.schema else {}
    return Kind(kind.text + ", or ~", lambda v: v is None or kind.accepts(v), schema)


ANY = Kind("anything", lambda _: True)
STR = Kind("text", lambda v: isinstance(v, str) and v != "", {"type": "string", "minLength": 1})
BOOL = Kind("true or false", lambda v: isinstance(v, bool), {"type": "boolean"})
WHOLE = Kind("a whole number", lambda v: isinstance(v, int) and not isinstance(v, bool), {"type": "integer"})
NUMBER = Kind("a number", is_number, {"type": "number"})
POSITIVE = Kind("a number above 0", lambda v: is_number(v) and v > 0, {"type": "number", "exclusiveMinimum": 0})
NOT_NEGATIVE = Kind("a number of at least 0", lambda v: is_number(v) and v >= 0, {"type": "number", "minimum": 0})
BETWEEN_0_AND_1 = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
FRACTION = Kind("a number in (0, 1)", lambda v: is_number(v) and 0 < v < 1, BETWEEN_0_AND_1)
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


def list_kinds(call: Callable, without: Collection[str] = ()) -> dict[str, Kind]:
    """Return the kinds of the options among the parameters of ``call``, see :func:`describe_parameters`."""
    return {name: option.kind for name, option in describe_parameters(call, without).items()}


def describe_parameters(call: Callable, without: Collection[str] = ()) -> dict[str, Option]:
    """Return the options among the parameters of ``call`` in their order, without ``*args`` and ``**kwargs``."""
    parameters = inspect.signature(call).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return {p.name: _describe(p) for p in named if p.name not in ("self", *without)}


def _describe(parameter: inspect.Parameter) -> Option:
    annotation, facts = parameter.annotation, ()
    if get_origin(annotation) is Annotated:
        annotation, *facts = get_args(annotation)
    # the core's have the parts of a Kind, and know nothing of options
    kinds = [Kind(fact.text, fact.accepts, fact.schema) for fact in facts if not isinstance(fact, str)]
    kind = kinds[0] if kinds else _kind_of(annotation, parameter.default)
    return Option(kind, next((fact for fact in facts if isinstance(fact, str)), ""), parameter.default)


def _kind_of(annotation: Any, default: Any) -> Kind:
    """The kind of a parameter's values, from its annotation, else from its default."""
    types = {bool: BOOL, str: STR, int: WHOLE, float: NUMBER}
    if get_origin(annotation) is Literal:
        return one_of(*get_args(annotation))
    if annotation in types:
        return types[annotation]
    if annotation == str | None:
        return or_none(STR)
    if annotation is inspect.Parameter.empty and type(default) in types:
        if isinstance(default, bool):
            return BOOL
        # a default of 1 may well mean a float, or one for each side
        numbers = Kind(NUMBER.text, lambda v: is_number(v) or isinstance(v, list), {"type": ["number", "array"]})
        text = Kind("text or ~", lambda v: v is None or isinstance(v, str), {"type": ["string", "null"]})
        return numbers if is_number(default) else text
    return ANY
