"""Files of tensors: looked through before they are loaded, read without running code, written whole or not at all."""

import os
import pickle
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import torch

from tlw_basicsr.errors import UserError, reason_of

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
TENSOR_TYPES = {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
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
        if name not in PLAIN.get(module, ()) and not (module == "torch" and name in TENSOR_TYPES):
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
