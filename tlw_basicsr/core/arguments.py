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


class Accepted(NamedTuple):
    """What an argument may be, in words, as a check, and as much of it as a JSON schema can say."""

    text: str
    accepts: Callable[[Any], bool]
    schema: Mapping[str, Any] = MappingProxyType({})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def whole(minimum: int, maximum: float = float("inf")) -> Accepted:
    """A whole number from ``minimum`` to ``maximum``."""
    schema = {"type": "integer", "minimum": minimum}
    if maximum != float("inf"):
        schema["maximum"] = maximum
    limit = "" if maximum == float("inf") else f" and at most {maximum:,}"
    return Accepted(
        f"a whole number of at least {minimum}{limit}", lambda v: _is_whole(v) and minimum <= v <= maximum, schema
    )


def or_none(accepted: Accepted) -> Accepted:
    """The same, or None, which is ``~`` in a YAML."""
    schema = {"anyOf": [accepted.schema, {"type": "null"}]} if accepted.schema else {}
    return Accepted(f"{accepted.text}, or ~", lambda v: v is None or accepted.accepts(v), schema)


NUMBER = Accepted("a number", _is_number)
POSITIVE = Accepted("a number above 0", lambda v: _is_number(v) and v > 0, {"type": "number", "exclusiveMinimum": 0})
FRACTION = Accepted(
    "a number in (0, 1)",
    lambda v: _is_number(v) and 0 < v < 1,
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
)
PLAIN = {
    bool: Accepted("true or false", lambda v: isinstance(v, bool)),
    int: Accepted("a whole number", _is_whole),
    float: NUMBER,
    str: Accepted("text", lambda v: isinstance(v, str) and v != ""),
}


def find_accepted(annotation: Any) -> Accepted | None:
    """What an annotation accepts, or None where it does not say."""
    if get_origin(annotation) is Annotated:
        annotation, *facts = get_args(annotation)
        return next((fact for fact in facts if isinstance(fact, Accepted)), None) or find_accepted(annotation)
    if get_origin(annotation) is Literal:
        choices = get_args(annotation)
        names = ", ".join(str(c).lower() if isinstance(c, bool) else str(c) for c in choices)
        return Accepted(f"one of {names}", lambda v: any(type(v) is type(c) and v == c for c in choices))
    return PLAIN.get(annotation)


def checked(init: Callable[P, None]) -> Callable[P, None]:
    """Decorate a constructor: its arguments are checked by their annotations, and a wrong one is a ValueError."""
    signature = inspect.signature(init)
    accepted = {name: find_accepted(parameter.annotation) for name, parameter in signature.parameters.items()}

    @functools.wraps(init)
    def checking(*args: P.args, **kwargs: P.kwargs) -> None:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            kind = accepted[name]
            if kind is not None and not kind.accepts(value):
                owner = type(args[0]).__name__
                raise ValueError(f"{owner}: {name}: expected {kind.text}, got {reprlib.repr(value)}")
        init(*args, **kwargs)

    return checking
