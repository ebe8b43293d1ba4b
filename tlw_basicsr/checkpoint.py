"""Files of tensors: looked through before they are loaded, read without running code, written whole or not at all."""

import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from numbers import Number
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.optim import Optimizer

from tlw_basicsr.errors import UserError, reason_of, short
from tlw_basicsr.kinds import is_number

# ------------------------------------------------------------------------------------------------- reading


def load_file(path: str | Path, what: str) -> dict[str, Any]:
    """Load a ``torch.save`` file with ``weights_only=True``, on the CPU.

    Before anything is built from it, its checksums and the sizes that it declares are compared with what is there.

    Args:
        path: the file.
        what: the option that names it, for the message.

    Returns:
        The dict it holds; its tensors are dense and as large as their data.

    Raises:
        UserError: no such file, damaged, not a dict, or a pickle with more than tensors and plain values in it.
    """
    try:
        if Path(path).is_dir():
            raise UserError(f"{what}: {path} is a folder, not a file")
        if not Path(path).exists():
            raise UserError(f"{what}: {path} does not exist")
        if not Path(path).is_file():
            raise UserError(f"{what}: {path} is no file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old formats, sparse tensors
            _check_sizes(Path(path))
            content = torch.load(path, map_location="cpu", weights_only=True)
        _check_content(content)
    except UserError:
        raise
    except Exception as error:  # torch, zipfile and pickle each raise what they like
        reason = f"{error}" if isinstance(error, _Refused) else type(error).__name__
        raise UserError(
            f"{what}: {path} is no readable checkpoint: damaged, another kind of file, or with objects in it that "
            f"are not plain tensors and values, which are not loaded ({reason})"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{what}: {path} must hold a dict of tensors, it holds a {type(content).__name__}")
    return content


PLAIN = {  # what torch.save writes of dense tensors and plain values
    "collections": ("OrderedDict", "Counter"),
    "torch._utils": ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter"),
    "torch": ("Size", "device"),
    "builtins": ("set",),
    "__builtin__": ("set",),
    "_codecs": ("encode",),
}
DTYPES = {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
MOST_VALUES, DEEPEST = 5_000_000, 60  # of a file's nested dicts and lists


class _Refused(Exception):
    """Why a file is not loaded."""


class _Stub(dict):
    """Stands for every class and function that a pickle names, and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, _: Any) -> None: ...

    def append(self, _: Any) -> None: ...

    def extend(self, _: Any) -> None: ...


class _Storage:
    """Stands for a kind of storage, which is named, but not called."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise _Refused("it asks for memory of its own")


class _Scan(pickle._Unpickler):  # Python's: the memo of C's is as large as a pickle of some bytes wants it
    """Reads a pickle without calling anything that it names; collects the bytes that its storages declare.

    What builds more than tensors of these storages and plain values is refused, also where torch would call it:
    ``torch.Tensor(30000, 30000)`` or ``bytearray(10**9)`` take a few bytes of a file and gigabytes of memory.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="utf-8")
        self.declared: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> type:
        itemsize = 1
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            itemsize = getattr(getattr(getattr(torch, name, None), "dtype", None), "itemsize", 1)
            return type("_Storage", (_Storage,), {"itemsize": itemsize})
        if name not in PLAIN.get(module, ()) and not (module == "torch" and name in DTYPES):
            raise _Refused(f"it names {module}.{name}"[:200])
        return _Stub

    def persistent_load(self, saved_id: Any) -> Any:
        if isinstance(saved_id, tuple) and len(saved_id) >= 5 and saved_id[0] == "storage":
            _, kind, key, _, numel, *_ = saved_id
            size = int(numel) * getattr(kind, "itemsize", 1)
            self.declared[str(key)] = max(size, self.declared.get(str(key), 0))
        return _Stub()


def _check_sizes(path: Path) -> None:
    """Compare the sizes that a file of ``torch.save`` declares with its own, and its checksums with its content."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":  # the format of before torch 1.6: pickles, the fourth is the content
            file.seek(0)
            scan = _Scan(file)
            for _ in range(4):
                scan.load()
            if sum(scan.declared.values()) > size:
                raise _Refused(f"it declares {sum(scan.declared.values()):,} bytes of tensors and is {size:,} bytes")
            return
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            names = {m.filename: m for m in members}
            root = next((name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")), None)
            if root is None or f"{root}constants.pkl" in names:
                raise _Refused("a TorchScript archive" if root else "no file of torch.save")
            packed = any(m.compress_type != zipfile.ZIP_STORED for m in members)
            if packed or sum(m.file_size for m in members) > size:
                raise _Refused("its members are compressed, torch writes them plain")
            for member in members:
                if member.CRC:  # 0 where torch has been told to leave it out
                    with archive.open(member) as stream:  # raises where the checksum is another
                        while stream.read(2**20):
                            pass
            with archive.open(f"{root}data.pkl") as stream:
                scan = _Scan(stream)
                scan.load()
    for key, declared in scan.declared.items():
        record = names.get(f"{root}data/{key}")
        if record is None or declared > record.file_size:
            has = record.file_size if record else 0
            raise _Refused(f"it declares {declared:,} bytes for a tensor's data of {has:,}")


def _check_content(content: Any) -> None:
    """Refuse tensors that are not dense, or large ones that are larger than their data (a stride of 0).

    Also dicts and lists that are too many, or without end, for whoever goes through them: a file of some bytes may have
    lists of the same lists.
    """
    seen: dict[int, tuple[int, int]] = {}

    def size(value: Any, depth: int) -> tuple[int, int]:
        """How many values it has, what is shared counted each time, and how deep it is."""
        if isinstance(value, torch.Tensor):
            if value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu":
                raise _Refused("a tensor in it is not a dense one")
            if value.numel() * value.element_size() > max(value.untyped_storage().nbytes(), 2**24):
                raise _Refused("a tensor in it is larger than its data")
        if not isinstance(value, (dict, list, tuple, set)):
            return 1, 1
        if id(value) not in seen:
            count = height = 1
            if depth <= DEEPEST:
                for item in chain(value.keys(), value.values()) if isinstance(value, dict) else value:
                    more, below = size(item, depth + 1)
                    count, height = count + more, max(height, below + 1)
            if depth > DEEPEST or height > DEEPEST or count > MOST_VALUES:
                raise _Refused("its dicts and lists are nested too deeply, or hold too much")
            seen[id(value)] = count, height
        return seen[id(value)]

    size(content, 1)


def network_state(path: str | Path, param_key: str | None, what: str) -> dict[str, torch.Tensor]:
    """State dict of a network in BasicSR's format ``{'params': …, 'params_ema': …}``, ``module.`` removed.

    Args:
        path: the file.
        param_key: the entry to take; ``'params'`` where it is missing; None for a file that is the state dict.
        what: the option that names the file, for the message.

    Raises:
        UserError: as :func:`load_file`, or no such entry, or it holds something else than named tensors.
    """
    return entry_of(load_file(path, what), param_key, path, what)


def entry_of(content: dict[str, Any], param_key: str | None, path: str | Path, what: str) -> dict[str, torch.Tensor]:
    """:func:`network_state` of the file's content."""
    if param_key is not None:
        entry = content.get(param_key, content.get("params"))
        if entry is None:
            keys = ", ".join(short(key) for key in list(content)[:4])
            raise UserError(f"{what}: {path} has no entry {param_key!r} (BasicSR's format), it starts with {keys}")
        content = entry
    if not isinstance(content, dict) or not all(torch.is_tensor(v) for v in content.values()):
        raise UserError(f"{what}: {path} does not hold a network's tensors under {param_key!r}")
    return {str(name).removeprefix("module."): tensor for name, tensor in content.items()}


def check_fit(state: dict[str, torch.Tensor], net: torch.nn.Module, strict: bool, path: str | Path, what: str) -> None:
    """Raise a :class:`UserError` that names the first difference unless ``state`` fits ``net``.

    With ``strict=False`` names may differ, and so may shapes, as in BasicSR; but one tensor must fit. What is to be
    loaded must be of the network's kind of numbers, and finite.
    """
    own = net.state_dict()
    missing = [name for name in own if name not in state]
    unknown = [name for name in state if name not in own]
    shapes = [name for name in own if name in state and own[name].shape != state[name].shape]
    name = type(net).__name__
    if not strict and len(missing) + len(shapes) == len(own):
        raise UserError(f"{what}: {path} is of another network, none of its tensors fits {name}")
    if strict and (missing or unknown):
        example = f"{missing[0]} is missing" if missing else f"{unknown[0]:.80} is not in {name}"
        raise UserError(
            f"{what}: {path} is of another network than network {name} of the options: {len(missing)} tensors missing,"
            f" {len(unknown)} unknown ({example})"
        )
    if strict and shapes:
        first = shapes[0]
        raise UserError(
            f"{what}: {path} is of another network than network {name} of the options: {first} is "
            f"{tuple(state[first].shape)}, not {tuple(own[first].shape)}"
        )
    check_values(state, {n: v for n, v in own.items() if n in state and n not in shapes}, path, what)


def check_values(state: dict[str, torch.Tensor], own: dict[str, torch.Tensor], path: str | Path, what: str) -> None:
    """Raise a :class:`UserError` unless the tensors of ``state`` that ``own`` names are of its kind, and finite.

    Floating point may be of another precision.
    """
    for name, ours in own.items():
        theirs = state[name]
        if theirs.is_floating_point() != ours.is_floating_point() or theirs.is_complex() != ours.is_complex():
            raise UserError(f"{what}: {path}: {name} is of {theirs.dtype}, expected is {ours.dtype}")
        if ours.is_floating_point() and not torch.isfinite(theirs.to(ours.dtype)).all():
            raise UserError(f"{what}: {path}: {name} has values that are not finite (NaN or infinite in {ours.dtype})")


RANGES: dict[str, Callable[[Any], bool]] = {
    "lr": lambda v: v >= 0,
    "initial_lr": lambda v: v >= 0,
    "eps": lambda v: v >= 0,
    "weight_decay": lambda v: v >= 0,
    "betas": lambda v: len(v) == 2 and all(0 <= beta < 1 for beta in v),
}


def check_optimizer_state(theirs: Any, optimizer: Optimizer, where: str) -> None:
    """Check a saved optimiser state against the optimiser that is to take it.

    Raises:
        UserError: other parameters, other shapes, or values that are not finite.
    """
    own = optimizer.state_dict()["param_groups"]
    groups = theirs.get("param_groups") if isinstance(theirs, dict) else None
    if not isinstance(groups, list) or not isinstance(theirs.get("state"), dict):
        raise UserError(f"{where} is not an optimiser's state")
    counts = [len(g["params"]) if isinstance(g, dict) and isinstance(g.get("params"), list) else -1 for g in groups]
    if counts != [len(g["params"]) for g in own]:
        raise UserError(f"{where} is of other networks: of {counts} parameters, not {[len(g['params']) for g in own]}")
    adam = isinstance(optimizer, torch.optim.Adam)
    for group, ours in zip(groups, own, strict=True):
        for key in ours.keys() - {"params"}:
            # torch adds flags from version to version
            fits = _alike(group[key], ours[key]) if key in group else ours[key] is None or isinstance(ours[key], bool)
            if not fits or not RANGES.get(key, lambda _: True)(group[key]):
                raise UserError(f"{where}: {key}: expected a value like {ours[key]!r}, got {short(group.get(key))}")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, p in zip((n for g in groups for n in g["params"]), parameters, strict=True):
        values = theirs["state"].get(number, {})
        if not isinstance(values, dict) or (adam and values and not {"step", "exp_avg", "exp_avg_sq"} <= values.keys()):
            raise UserError(f"{where}: the state of parameter {number} is not complete")
        for key, value in values.items():
            if key == "step" and is_number(value) and value >= 0:  # of older versions
                continue
            if adam and (not torch.is_tensor(value) or (key == "step" and (value.numel() != 1 or not value >= 0))):
                raise UserError(f"{where}: {key} of parameter {number} is no tensor as Adam has it")
            if not torch.is_tensor(value):
                continue
            if key.startswith(("exp_avg", "max_exp_avg")) and value.shape != p.shape:
                raise UserError(f"{where}: {key} of parameter {number} is {tuple(value.shape)}, not {tuple(p.shape)}")
            if not value.is_floating_point() or not torch.isfinite(value).all():
                raise UserError(f"{where}: {key} of parameter {number} is of {value.dtype} or has values not finite")


def check_scheduler_state(theirs: Any, ours: dict[str, Any], where: str) -> None:
    """Check a saved scheduler state against that of the scheduler that is to take it.

    Raises:
        UserError: something is missing or of another kind.
    """
    if not isinstance(theirs, dict) or "last_epoch" not in theirs:
        raise UserError(f"{where} is not a scheduler's state")
    for key, value in ours.items():
        if key in theirs and not _alike(theirs[key], value):
            raise UserError(f"{where}: {key}: expected a value like {short(value)}, got {short(theirs[key])}")
    lists = [theirs[key] for key in ("restarts", "periods", "cumulative_period", "restart_weights") if key in theirs]
    if len({len(numbers) for numbers in lists}) > 1:
        raise UserError(f"{where}: its restarts and their weights are of different numbers")


def _alike(a: Any, b: Any) -> bool:
    """Whether ``a`` may stand where ``b`` stands, by its kind."""
    if b is None or isinstance(b, bool):
        return a is None or isinstance(a, bool)
    if isinstance(b, Number):
        return is_number(a)
    if isinstance(b, dict):
        return isinstance(a, dict) and all(is_number(n) for pair in a.items() for n in pair)
    if isinstance(b, (list, tuple)):
        return isinstance(a, (list, tuple)) and all(is_number(n) for n in a)
    return True


# ------------------------------------------------------------------------------------------------- writing


@contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to, which gets the name ``path`` when it is complete and on the disk.

    It is a temporary file beside ``path``, synced, then renamed.

    Raises:
        UserError: it can't be written (a full disk, a folder without permission); an earlier file is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[-60:]}.{os.getpid()}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync_folder(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} can't be written ({reason_of(error)})") from error


def _sync_folder(folder: Path) -> None:
    """Let a rename survive a loss of power, where the file system knows of that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_file(content: dict[str, Any], path: str | Path) -> None:
    """Write ``content`` by ``torch.save``, see :func:`whole_file`."""
    with whole_file(path) as file:
        torch.save(content, file)


def write_text(text: str, path: str | Path) -> None:
    """Write a text file, see :func:`whole_file`."""
    with whole_file(path) as file:
        file.write(text.encode())
