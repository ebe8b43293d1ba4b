"""Options that remember which of their keys were asked for, and what follows for those that nobody read."""

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from typing import Any

from basicsr.utils.registry import DATASET_REGISTRY

from tlw_basicsr.engine.schema import DATASET_SECTIONS, LoggerOptions, TopOptions, TrainOptions, ValOptions
from tlw_basicsr.registry import OTHER, find_origin, lookup
from tlw_basicsr.util.errors import UserError
from tlw_basicsr.util.kinds import Options, find_close, list_kinds

PATH_KEYS = ("pretrain_network", "strict_load", "param_key")  # each followed by the name of a network
Place = tuple[Any, ...]  # keys from the top of the options, such as ("train", "optim_g", "lr")


class Asked:
    """The places that were asked for, given or not, and the section whose ``type`` was asked for last."""

    def __init__(self) -> None:
        self.places: set[Place] = set()
        self.newest: Place = ()


class MissingOption(KeyError):
    """A key that was asked for and is not there; ``args[0]`` is its place, such as ``train.total_iter``."""


class Recorded(dict):  # its methods are dict's
    """A dict of nested options that notes every key that is asked for; copies of it share the notes.

    ``f(**options)`` and ``dict(options)`` count as reading all keys: they go through the overridden ``keys`` because
    ``__iter__`` is overridden, too.
    """

    def __init__(self, content: dict, asked: Asked, place: Place = ()) -> None:
        nested = {
            key: Recorded(value, asked, (*place, key)) if isinstance(value, dict) else value
            for key, value in dict.items(content)
        }
        super().__init__(nested)
        self.asked, self.place = asked, place

    def _note(self, *keys: Any) -> None:
        self.asked.places.update((*self.place, key) for key in keys)
        if "type" in keys:
            self.asked.newest = self.place

    def __missing__(self, key: Any) -> Any:
        raise MissingOption(".".join(map(str, (*self.place, key))))

    def pop(self, key: Any, *default: Any) -> Any:  # noqa: D102
        self._note(key)
        return super().pop(key, *default) if default or super().__contains__(key) else self.__missing__(key)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.keys())

    def __or__(self, other: Any) -> dict:
        return {**self, **other}

    def __ror__(self, other: Any) -> dict:
        return {**other, **self}

    def copy(self) -> "Recorded":  # noqa: D102
        return Recorded(self, self.asked, self.place)

    __copy__ = copy

    def __deepcopy__(self, memo: dict) -> "Recorded":
        content = {key: deepcopy(value, memo) for key, value in dict.items(self)}
        return Recorded(content, self.asked, self.place)


def _noting(name: str) -> Callable:
    """Return dict's method of this name; it notes the key that it is called with, or all where there is none."""
    method = getattr(dict, name)

    def noting(self: Recorded, *arguments: Any) -> Any:
        self._note(*(arguments[:1] or dict.keys(self)))
        return method(self, *arguments)

    return noting


for _name in ("__getitem__", "__contains__", "get", "setdefault", "keys", "values", "items"):
    setattr(Recorded, _name, _noting(_name))


def check_unread(given: Options, asked: Asked | None, model: type | Any, opt: Options) -> list[str]:
    """Check the keys that are given, that no schema of ours knows and that nobody asked for.

    One that is nearly a key that is known or was asked for is an error, and so is a network, a loss or an optimiser
    that the model never asked for. Without a rehearsal, ``asked`` is None, and only near misses of our schemas are
    found.

    Returns:
        A line for every key that is legal and has no effect.
    """
    name = opt.get("base_model", "SRModel") if opt["model_type"] == "TLWModel" else opt["model_type"]
    known: dict[Place, set[str]] = {
        (): {*list_kinds(TopOptions)},
        ("path",): {"resume_state", "ignore_resume_networks", "strict_load"},
        ("train",): {*list_kinds(TrainOptions)},
        ("val",): {*list_kinds(ValOptions)},
        ("logger",): {*list_kinds(LoggerOptions)},
    }
    for key in opt:
        if str(key).startswith("network_"):
            known["path",] |= {f"{beginning}_{key.removeprefix('network_')}" for beginning in PATH_KEYS}
    readers: dict[Place, str] = {}
    code: dict[Place, str] = {(): read_code(model)}
    for key, dataset in opt["datasets"].items():
        kind = lookup(DATASET_REGISTRY, dataset, f"datasets.{key}")
        known["datasets", key] = {*list_kinds(DATASET_SECTIONS[find_origin(kind)])}
        readers["datasets", key] = kind.__name__
        code["datasets", key] = read_code(kind)
    notes: list[str] = []

    def check(section: Options, place: Place) -> None:
        names, was_read = known.get(place, set()), asked.places if asked else set()
        read = {p[-1] for p in was_read if p[:-1] == place}
        for key, value in section.items():
            here = (*place, key)
            full = ".".join(map(str, here))
            if asked and opt["is_train"] and value and key not in read and _is_part(here):
                _refuse_part(full, key, opt, name, model, notes)
            elif key not in names and key not in read and (asked or place in known) and not _is_part(here):
                near = find_close(key, {*names, *read} - section.keys(), 0.8)
                if place == ("path",) and re.fullmatch(f"({'|'.join(PATH_KEYS)})_[a-z]", str(key)):
                    near = ""  # of a network that is not there, not a slip
                # by chance, as Real-ESRGAN's noise_range, or in another iteration
                later = re.search(f"(['\"]){re.escape(str(key))}\\1", code.get(place, code[()]))
                if near and not later and value is not None:
                    raise UserError(f"{full}: unknown option (did you mean {near}?); nothing reads it")
                if asked:
                    reader = readers.get(place, name)
                    hint = near and f"; did you mean {near}?"
                    verdict = f"nothing in {reader} reads this option{hint}"
                    notes.append(f"{full}: {f'{reader} has not read it yet, but may' if later else verdict}")
            if isinstance(value, dict) and (here in known or key in read):
                check(value, here)

    check({key: value for key, value in given.items() if key != "datasets"}, ())
    for key in opt["datasets"]:  # also where nothing has asked for the set
        check(given["datasets"][key], ("datasets", key))
    return notes


def read_code(part: Any) -> str:
    """Return the source of a class with its bases, or of a function, where it can be read."""
    texts = []
    for each in inspect.getmro(part) if inspect.isclass(part) else [part]:
        with suppress(OSError, TypeError):
            texts.append(inspect.getsource(each))
    return "".join(texts)


def _is_part(place: Place) -> bool:
    """Whether a place is that of a network, a loss or an optimiser."""
    text = ".".join(map(str, place))
    return re.fullmatch(r"network_\w+|train\.(optim_\w+|\w+_opt)", text) is not None


def _refuse_part(place: str, key: str, opt: Options, name: str, model: Any, notes: list[str]) -> None:
    """Refuse a network, loss or optimiser without effect, but not an optimiser that a plugin's YAML has left over."""
    other = find_origin(model) == OTHER
    if key.startswith("optim_") and other and key.replace("optim", "network") not in opt:
        notes.append(f"{place}: {name} never asks for it, so it has no effect")
        return
    later = "; if it is read later in the training, set train.rehearse: false" if other else ""
    raise UserError(
        f"{place}: {name} never asks for it, so it would have no effect; delete it, choose a model that does, or load "
        f"one by plugins:{later}"
    )
