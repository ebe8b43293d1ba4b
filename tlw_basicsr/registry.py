"""Registered parts (networks, losses, metrics, data sets, models): finding them, and which options their code reads."""

import ast
import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache
from types import ModuleType
from typing import Any

from basicsr.utils.registry import MODEL_REGISTRY, Registry

from tlw_basicsr.util.errors import UserError, short
from tlw_basicsr.util.kinds import (
    ANY,
    Option,
    Options,
    Schema,
    check_section,
    describe_parameters,
    find_close,
    suggestion,
)

OURS, BASICSR, OTHER = "tlw_basicsr", "basicsr", "other"
NOT_OF_A_PART = ("abc", "builtins", "typing", "torch")  # packages whose code reads no options


# ------------------------------------------------------------------------------------------------- finding


def lookup(registry: Registry, section: Mapping[str, Any] | None, place: str, key: str = "type") -> Callable:
    """The object that ``section[key]`` names in a BasicSR registry.

    Raises:
        UserError: nothing of that name is registered; the message lists what is.
    """
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
    """The names of a registry, as options give them."""
    return sorted(name.removesuffix("_basicsr") for name in registry.keys())  # noqa: SIM118, a Registry is no dict


def overrides(model: Any, *methods: str) -> bool:
    """Whether a class among the model's bases that is neither BasicSR's nor ours has one of the methods of its own."""
    if not inspect.isclass(model):
        return False
    return any(
        name in vars(c) for c in inspect.getmro(model) for name in methods if find_package(c) not in (OURS, BASICSR)
    )


def find_package(part: Any) -> str:
    """The top-level package that a class or function is defined in."""
    return str(part.__module__).split(".")[0]


def find_origin(part: Callable) -> str:
    """``OURS`` or ``BASICSR``, or ``OTHER`` where a class (or one of its bases) or function is a third party's."""
    packages = {find_package(c) for c in _classes(part)}
    return OTHER if packages - {OURS, BASICSR} else BASICSR if BASICSR in packages else OURS


def _classes(part: Callable) -> list[Any]:
    bases = inspect.getmro(part) if inspect.isclass(part) else (part,)
    return [c for c in bases if find_package(c) not in NOT_OF_A_PART]


# ------------------------------------------------------------------------------------------------- what code reads


def read_keys(part: Callable) -> frozenset[str]:
    """The keys that the modules of a class (and its bases) or function look up anywhere: its options are among them."""
    return frozenset().union(*(_keys_of(c.__module__) for c in _classes(part)))


def read_package_keys(part: Callable) -> frozenset[str]:
    """As :func:`read_keys`, of all loaded modules of the package that the part is of: a helper may read an option."""
    packages = {find_package(c) for c in _classes(part)} - {OURS}
    packages = packages - {BASICSR} or packages
    modules = [name for name in list(sys.modules) if name.split(".")[0] in packages]
    return frozenset().union(*map(_keys_of, modules))


def find_popped_keys(part: Callable) -> frozenset[str]:
    """The keys that the modules of a class (and its bases) take out of a section by ``x.pop("key")``."""
    trees = (_parse(sys.modules.get(c.__module__)) for c in _classes(part))
    return frozenset().union(*(_walk_keys(tree, ("pop",), calls_only=True) for tree in trees))


@cache
def _keys_of(module: str) -> frozenset[str]:
    """The string constants that a module's source looks up, as ``x["key"]``, ``x.get("key")`` or ``"key" in x``."""
    return frozenset(_walk_keys(_parse(sys.modules.get(module)), ("get", "pop", "setdefault")))


def _parse(module: ModuleType | None) -> ast.AST:
    try:
        return ast.parse(inspect.getsource(module)) if module else ast.Module([], [])
    except (OSError, TypeError, SyntaxError, ValueError):  # no source
        return ast.Module([], [])


def _walk_keys(tree: ast.AST, methods: Collection[str], calls_only: bool = False) -> Iterator[str]:
    for node in ast.walk(tree):
        found: list[ast.expr] = []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            found = node.args[:1] if node.func.attr in methods else []
        elif calls_only:
            continue
        elif isinstance(node, ast.Subscript):
            found = [node.slice]
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
            found = [node.left]
        elif isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple | ast.List):
            found = node.iter.elts
        yield from (n.value for n in found if isinstance(n, ast.Constant) and isinstance(n.value, str))


@cache
def _mentions(module: str, word: str) -> bool:
    return any(isinstance(n, ast.Constant) and n.value == word for n in ast.walk(_parse(sys.modules.get(module))))


def asks_for(model: Callable, key: str) -> bool:
    """Whether a model's code reads the section ``key`` (a loss, an optimiser, a network), as far as its source tells.

    A third party's may go through all keys that begin or end alike; such a word in its source counts.
    """
    if key in read_keys(model) or not inspect.isclass(model):
        return True
    if find_origin(model) != OTHER:
        return False
    ends = {"_opt", "network_", "optim_"}
    if any(_mentions(c.__module__, end) for c in _classes(model) for end in ends if end in key):
        return True
    return key in read_package_keys(model)


def list_models_asking_for(key: str) -> list[str]:
    """The registered models whose code reads the section ``key``."""
    return sorted(n.removesuffix("_basicsr") for n, m in MODEL_REGISTRY if inspect.isclass(m) and key in read_keys(m))


# ------------------------------------------------------------------------------------------------- checking


def check_read_section(
    section: Any,
    place: str,
    schema: Schema,
    reader: Callable,
    notes: list[str],
    required: Collection[str] = (),
) -> None:
    """Check a section that the code of ``reader`` looks up keys in, so that one that nothing reads does nothing.

    Ours refuses such a key. Of BasicSR's a near miss of one that is read and not given is refused, since it would be
    silently without effect; what is no near miss is legal in BasicSR and noted, as is every one of a third party's.

    Args:
        section: its keys and values.
        place: its place, such as ``datasets.train``; empty for the top.
        schema: the kinds of the known keys.
        reader: the class or function that is given the section.
        notes: a line is added for each key that nothing reads.
        required: keys that must be there.

    Raises:
        UserError: see :func:`tlw_basicsr.util.kinds.check_section`.
    """
    origin = find_origin(reader)
    read = read_keys(reader)
    unread = [key for key in section if key not in schema and key not in read] if isinstance(section, dict) else []
    if origin == OURS:
        check_section(section, place, schema, required, read)
        return
    packages_read = read_package_keys(reader) if unread else frozenset()
    for key in unread:
        known = {*schema, *required, *read, *(packages_read if origin == OTHER else ())} - section.keys()
        missing = [name for name in required if name not in section]
        near = find_close(key, known, 0.8) or find_close(key, missing)
        full = f"{place}.{key}" if place else str(key)
        if not isinstance(key, str) or (near and origin == BASICSR and key not in packages_read):
            raise UserError(f"{full}: unknown option{near and f' (did you mean {near}?)'}; known are {_join(schema)}")
        if origin == BASICSR or key not in packages_read:
            hint = near and f"; did you mean {near}?"
            notes.append(f"{full}: nothing in {getattr(reader, '__name__', reader)} reads this option{hint}")
    check_section(section, place, schema, required, {*read, *unread})


def _join(words: Collection[Any]) -> str:
    return ", ".join(sorted(map(str, words)))


def check_arguments(
    section: Options,
    place: str,
    call: Callable,
    given: Collection[str] = ("type",),
    extra: Collection[str] = (),
    notes: list[str] | None = None,
    others: Collection[str] = (),
) -> None:
    """Check options that become keyword arguments of ``call`` against its signature.

    Values are checked by the annotations of our own parts alone: those of others are no law.

    Args:
        section: the options.
        place: their place.
        call: a class or function.
        given: keys of the section that are not arguments.
        extra: parameters that are not options.
        notes: a line is added for each key that a third party's ``**kwargs`` may or may not read.
        others: keys that the model takes out of the section before.

    Raises:
        UserError: a key is no parameter, a parameter without default is missing, or a value is of the wrong kind.
    """
    parameters = describe_parameters(call, extra)
    law = find_package(call) == OURS
    schema = dict.fromkeys(given, ANY)
    schema |= {name: option.kind if law else ANY for name, option in parameters.items()}
    required = [name for name, option in parameters.items() if option.default is inspect.Parameter.empty]
    if is_open_ended(call):
        check_read_section(section, place, schema, call, [] if notes is None else notes, required)
    else:
        check_section(section, place, schema, required, others)


def keep_arguments(section: Options, call: Callable) -> Options:
    """The keys of a section that are arguments of ``call``; what else is there its model takes out itself."""
    known = inspect.signature(call).parameters
    return {key: value for key, value in section.items() if key != "type" and (key in known or is_open_ended(call))}


def is_open_ended(call: Callable) -> bool:
    """Whether ``call`` takes any keyword argument."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(call).parameters.values())


def find_doubts(section: Options, call: Callable) -> str:
    """What may be wrong with options that ``call`` refuses, by its annotations and defaults: ``; …``, or nothing."""
    parameters: dict[str, Option] = describe_parameters(call)
    wrong = [key for key, value in section.items() if key in parameters and not parameters[key].kind.accepts(value)]
    return "".join(f"; {key}: expected {parameters[key].kind.text}, got {short(section[key])}" for key in wrong)
