"""The bridge to BasicSR's registries: finds parts by name and checks options against their signatures."""

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from basicsr.utils.registry import Registry

from tlw_basicsr.util.errors import UserError, short
from tlw_basicsr.util.kinds import ANY, Option, Options, check_section, describe_parameters, suggestion

OURS, BASICSR, OTHER = "tlw_basicsr", "basicsr", "other"
NEUTRAL = ("abc", "builtins", "typing", "torch")  # packages of base classes that do not make a part a third party's


def lookup(registry: Registry, section: Mapping[str, Any] | None, place: str, key: str = "type") -> Callable:
    """Return the class or function that ``section[key]`` names in a BasicSR registry."""
    if not isinstance(section, dict):
        raise UserError(f"{place}: expected a section with '{key}', got {short(section)}")
    names = list_names(registry)
    place = f"{place}.{key}" if place else key
    if key not in section:
        raise UserError(f"{place}: missing; accepted are {', '.join(names)}")
    name = section[key]
    for candidate in (name, f"{name}_basicsr"):
        if isinstance(name, str) and candidate in registry:
            return dict(iter(registry))[candidate]
    raise UserError(
        f"{place}: {short(name)} is not registered{suggestion(name, names, 0.8)}; a part of another repository needs "
        f"plugins: [the module that registers it]; accepted are {', '.join(names)}"
    )


def list_names(registry: Registry) -> list[str]:
    """Return the names in a registry as options give them, sorted."""
    return sorted(name.removesuffix("_basicsr") for name in registry.keys())  # noqa: SIM118, a Registry is no dict


def find_package(part: Any) -> str:
    """Return the top-level package that defines a class or function."""
    return str(part.__module__).split(".")[0]


def find_origin(part: Callable) -> str:
    """Return ``OTHER`` if a class, one of its bases or a function is a third party's, else ``BASICSR`` or ``OURS``."""
    bases = inspect.getmro(part) if inspect.isclass(part) else (part,)
    packages = {find_package(base) for base in bases} - {*NEUTRAL}
    return OTHER if packages - {OURS, BASICSR} else BASICSR if BASICSR in packages else OURS


def check_arguments(
    section: Options,
    place: str,
    call: Callable,
    given: Collection[str] = ("type",),
    extra: Collection[str] = (),
) -> None:
    """Check options that become keyword arguments of ``call`` against its signature.

    Values are checked only for our own parts: the annotations of others are not binding. ``given`` are keys of the
    section that are no arguments, ``extra`` parameters that are no options. Where ``call`` takes any keyword, only near
    misses of its parameters are refused.
    """
    parameters = describe_parameters(call, extra)
    ours = find_package(call) == OURS
    schema = dict.fromkeys(given, ANY)
    schema |= {name: option.kind if ours else ANY for name, option in parameters.items()}
    required = [name for name, option in parameters.items() if option.default is inspect.Parameter.empty]
    check_section(section, place, schema, required, strict=not is_open_ended(call))
    for key in section.keys() - schema.keys():  # BasicSR's metrics take any keyword and ignore it
        if near := suggestion(key, schema.keys() - section.keys(), 0.8):
            raise UserError(f"{place}.{key}: unknown option{near}")


def keep_arguments(section: Options, call: Callable) -> Options:
    """Return the keys of a section that are arguments of ``call``; a model takes the others out itself."""
    known = inspect.signature(call).parameters
    return {key: value for key, value in section.items() if key != "type" and (key in known or is_open_ended(call))}


def is_open_ended(call: Callable) -> bool:
    """Whether ``call`` takes any keyword argument."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(call).parameters.values())


def find_doubts(section: Options, call: Callable) -> str:
    """Return what annotations and defaults of ``call`` say against options that it refuses: ``; …``, or empty."""
    parameters: dict[str, Option] = describe_parameters(call)
    wrong = [key for key, value in section.items() if key in parameters and not parameters[key].kind.accepts(value)]
    return "".join(f"; {key}: expected {parameters[key].kind.text}, got {short(section[key])}" for key in wrong)
