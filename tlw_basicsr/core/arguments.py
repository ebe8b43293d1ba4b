"""What an argument accepts: written in its annotation, and checked when an object is built.

``Annotated[float, FRACTION, "mean of the weights at t = 0"]`` is a float in (0, 1) with a description.
``Literal["l1", "mse"]`` and plain ``bool``, ``int``, ``float`` and ``str`` speak for themselves.
"""

import functools
import inspect
import reprlib
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, ParamSpec, get_args, get_origin

P = ParamSpec("P")


class Kind(NamedTuple):
    """What values are accepted: a text for people, the check itself, and what of it a JSON schema can say."""

    text: str
    accepts: Callable[[Any], bool]
    schema: Mapping[str, Any] = MappingProxyType({})


def is_number(value: Any) -> bool:
    """Whether ``value`` is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_whole(value: Any) -> bool:
    """Whether ``value`` is of Python's whole numbers."""
    return isinstance(value, int) and not isinstance(value, bool)


def whole(minimum: int, maximum: int | None = None) -> Kind:
    """A whole number from ``minimum`` to ``maximum``."""
    text, schema = f"a whole number of at least {minimum}", {"type": "integer", "minimum": minimum}
    if maximum is None:
        return Kind(text, lambda v: is_whole(v) and minimum <= v, schema)
    text += f" and at most {maximum:,}"
    return Kind(text, lambda v: is_whole(v) and minimum <= v <= maximum, {**schema, "maximum": maximum})


def one_of(*choices: Any) -> Kind:
    """One of some values; 1 is not True."""
    names = ", ".join(str(c).lower() if isinstance(c, bool) else str(c) for c in choices)
    return Kind(
        f"one of {names}", lambda v: any(type(v) is type(c) and v == c for c in choices), {"enum": list(choices)}
    )


def or_none(kind: Kind) -> Kind:
    """``kind``, or None, which is ``~`` in a YAML."""
    schema = {"anyOf": [kind.schema, {"type": "null"}]} if kind.schema else {}
    return Kind(f"{kind.text}, or ~", lambda v: v is None or kind.accepts(v), schema)


STR = Kind("text", lambda v: isinstance(v, str) and v != "", {"type": "string", "minLength": 1})
BOOL = Kind("true or false", lambda v: isinstance(v, bool), {"type": "boolean"})
WHOLE = Kind("a whole number", is_whole, {"type": "integer"})
NUMBER = Kind("a number", is_number, {"type": "number"})
POSITIVE = Kind("a number above 0", lambda v: is_number(v) and v > 0, {"type": "number", "exclusiveMinimum": 0})
FRACTION = Kind(
    "a number in (0, 1)",
    lambda v: is_number(v) and 0 < v < 1,
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
)
PLAIN = {bool: BOOL, str: STR, int: WHOLE, float: NUMBER}


def find_kind(annotation: Any) -> Kind | None:
    """What an annotation accepts, or None where it does not say."""
    if get_origin(annotation) is Annotated:
        annotation, *facts = get_args(annotation)
        return next((fact for fact in facts if isinstance(fact, Kind)), None) or find_kind(annotation)
    if get_origin(annotation) is Literal:
        return one_of(*get_args(annotation))
    return PLAIN.get(annotation)


def checked(init: Callable[P, None]) -> Callable[P, None]:
    """Decorate a constructor: its arguments are checked by their annotations, and a wrong one is a ValueError."""
    signature = inspect.signature(init)
    kinds = {name: find_kind(parameter.annotation) for name, parameter in signature.parameters.items()}

    @functools.wraps(init)
    def checking(*args: P.args, **kwargs: P.kwargs) -> None:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            kind = kinds[name]
            if kind is not None and not kind.accepts(value):
                owner = type(args[0]).__name__
                raise ValueError(f"{owner}: {name}: expected {kind.text}, got {reprlib.repr(value)}")
        init(*args, **kwargs)

    return checking
