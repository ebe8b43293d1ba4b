"""Files: looked through before they are read, read without running code, written whole or not at all, locked."""

import os
import pickle
import secrets
import socket
import stat
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from io import BytesIO
from pathlib import Path
from shutil import rmtree
from typing import Any, BinaryIO, NamedTuple

import torch

from tlw_basicsr.util.errors import UserError, reason_of

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

# ------------------------------------------------------------------------------------------------- reading


@contextmanager
def open_regular(path: str | Path, what: str) -> Iterator[BinaryIO]:
    """A file to read from. Fifos, devices and folders are refused: of some, reading would never end.

    Args:
        path: the file.
        what: the option that names it, or nothing, for the message.

    Raises:
        UserError: it does not exist, is not a regular file, or can't be read.
    """
    place = f"{what}: {path}" if what else f"{path}:"
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise UserError(f"{place} does not exist") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{place} can't be read ({reason_of(error)})") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{place} is not a regular file")
    with open(descriptor, "rb") as file:
        yield file


def read_bytes(path: str | Path, what: str = "", most: int | None = None) -> bytes:
    """The content of a regular file, see :func:`open_regular`; with ``most``, of at most so many bytes."""
    with open_regular(path, what) as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise UserError(f"{what}: {path} is of {size:,} bytes; accepted are at most {most:,}")
        try:
            return file.read()
        except OSError as error:
            raise UserError(f"{what or path}: {path} can't be read ({reason_of(error)})") from error


def load_file(path: str | Path, what: str) -> dict[str, Any]:
    """Load a ``torch.save`` file with ``weights_only=True``, on the CPU.

    Before anything is built from it, its checksums and the sizes that it declares are compared with what is there.

    Args:
        path: the file.
        what: the option that names it, for the message.

    Returns:
        The dict it holds, of dicts, lists, tuples, plain values and dense tensors as large as their data. Nothing in it
        is shared but tensors, and going through all of it takes time and memory in proportion to the file.

    Raises:
        UserError: no such file, damaged, not a dict, or a pickle with more than tensors and plain values in it.
    """
    with open_regular(path, what) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old formats
        try:
            size = os.fstat(file.fileno()).st_size
            scan_file(file, Path(path), size)
            content = Copier(size).copy(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:  # torch, zipfile and pickle each raise what they like
            if isinstance(error, OSError) and error.errno:
                raise UserError(f"{what}: {path} can't be read ({reason_of(error)})") from error
            reason = f"{error}" if isinstance(error, Refused) else type(error).__name__
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
    "_codecs": ("encode",),
}
KEYS = (str, int, float, bytes, type(None))  # of dicts; tuples of tuples may take for ever to hash
MOST_VALUES, DEEPEST, LONGEST_KEY = 5_000_000, 60, 500
SMALL = 2**24  # bytes, which anything may take


class Refused(Exception):
    """Why a file is not loaded."""


class Storage(NamedTuple):
    """Stands for a tensor's data, of which ``numbytes`` are declared, or for a kind of them."""

    itemsize: int
    numbytes: int = 0


class Opaque:
    """Stands for a tensor, or for what is made of plain values; it can't be changed."""

    def __setstate__(self, _: Any) -> None:
        raise Refused("it changes a tensor")


class Section(dict):
    """Stands for an OrderedDict or a Counter; the attributes that it is given are left out."""

    def __setstate__(self, _: Any) -> None: ...


PyUnpickler: Any = pickle._Unpickler  # type: ignore[attr-defined]


class Scan(PyUnpickler):  # Python's: the memo of C's is as large as a pickle of some bytes wants it
    """Reads a pickle without calling anything that it names; collects the bytes that its storages declare.

    What builds more than tensors of these storages and plain values is refused, also where torch would call it:
    ``torch.Tensor(30000, 30000)`` or ``bytearray(10**9)`` take a few bytes of a file and gigabytes of memory. So do
    many copies of one dict, and keys that are tuples of tuples.

    Args:
        file: with the pickle.
        most: values and characters that may be copied.
    """

    def __init__(self, file: BinaryIO, most: int) -> None:
        super().__init__(file, encoding="utf-8")
        self.declared: dict[str, int] = {}
        self.left = most

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a class or function."""
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return Storage(getattr(getattr(getattr(torch, name, None), "dtype", None), "itemsize", 1))
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name not in PLAIN.get(module, ()):
            raise Refused(f"it names {module}.{name}"[:200])
        return lambda *arguments: self.build(name, arguments)

    def build(self, name: str, arguments: tuple) -> Any:
        """What stands for the result of a call."""
        self.left -= sum(len(a) for a in arguments if isinstance(a, (str, bytes, dict, list, tuple)))
        if self.left < 0:
            raise Refused("it copies more than it holds")
        if name.startswith("_rebuild_tensor"):
            storage, offset, size, stride, *more = arguments
            itemsize = more[2].itemsize if name.endswith("v3") else storage.itemsize
            last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
            values = 1
            for length in size:
                values *= length
            if min(offset, *size, *stride, 0) < 0 or (values and (last + 1) * itemsize > storage.numbytes):
                raise Refused("a tensor in it is larger than its data")
            if values * itemsize > max(storage.numbytes, SMALL):
                raise Refused("a tensor in it is larger than its data")
        return Section() if name in ("OrderedDict", "Counter") else Opaque()

    def persistent_load(self, pid: Any) -> Storage:
        """What stands for the data of a tensor."""
        kind, key, _, numel = pid[1:5]
        size = int(numel) * kind.itemsize
        self.declared[str(key)] = max(size, self.declared.get(str(key), 0))
        return Storage(kind.itemsize, size)

    def check_keys(self, keys: list[Any]) -> None:
        """Refuse keys that are not plain."""
        if not all(isinstance(key, KEYS) for key in keys):
            raise Refused("it has a dict whose keys are not plain values")

    def load_setitem(self) -> None:
        """As the base class's, of plain keys."""
        self.check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        """As the base class's, of plain keys."""
        self.check_keys(self.stack[::2])
        super().load_setitems()

    dispatch = {  # noqa: RUF012, as in the base class
        **PyUnpickler.dispatch,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }


def scan_file(file: BinaryIO, path: Path, size: int) -> None:
    """Compare the sizes that a file of ``torch.save`` declares with its own, and its checksums with its content.

    Raises:
        Refused: it asks for more than it holds; other exceptions where it can't be read.
    """
    start = file.read(4)
    file.seek(0)
    if start != b"PK\x03\x04":  # the format of before torch 1.6: pickles, then the data
        scan = Scan(file, size + SMALL)
        for _ in range(5):
            scan.load()
        if sum(scan.declared.values()) > size:
            raise Refused(f"it declares {sum(scan.declared.values()):,} bytes of tensors and is {size:,} bytes")
        return
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: member for member in archive.infolist()}
        root = next((name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")), None)
        if root is None or f"{root}constants.pkl" in members:
            raise Refused("a TorchScript archive" if root else "no file of torch.save")
        # torch has a reader of its own, which looks names up without case: both must see the same
        reader: Any = torch._C.PyTorchFileReader(str(path))
        read_size = getattr(reader, "get_record_size", lambda record: len(reader.get_record(record)))  # not in 2.11
        names = {name.removeprefix(root) for name in members}
        if len({name.lower() for name in names}) < len(archive.infolist()) or names != set(reader.get_all_records()):
            raise Refused("its list of members is not one")
        for name, member in members.items():
            if member.compress_type != zipfile.ZIP_STORED:
                raise Refused("its members are compressed, torch writes them plain")
            if (
                read_size(name.removeprefix(root)) != member.file_size
                or reader.get_record_header_offset(name.removeprefix(root)) != member.header_offset
            ):
                raise Refused("its list of members is not one")
            if member.CRC:  # 0 where torch has been told to leave it out
                with archive.open(member) as stream:  # raises where the checksum is another
                    while stream.read(2**20):
                        pass
        if sum(member.file_size for member in members.values()) > size:
            raise Refused("its members overlap")
        scan = Scan(BytesIO(archive.read(f"{root}data.pkl")), size + SMALL)
        scan.load()
    for key, declared in scan.declared.items():
        record = members.get(f"{root}data/{key}")
        if record is None or declared > record.file_size:
            has = record.file_size if record else 0
            raise Refused(f"it declares {declared:,} bytes for a tensor's data of {has:,}")


class Copier:
    """Copies nested values of a file into plain dicts, lists and tuples, in which nothing is shared but tensors.

    What is shared counts each time, as for whoever goes through it: a file of some bytes may have lists of the same
    lists. So whatever is done with the copy ends.

    Args:
        size: of the file, in bytes.
    """

    def __init__(self, size: int) -> None:
        self.values, self.bytes = min(size, MOST_VALUES), 8 * size + 4 * SMALL  # a value takes a byte

    def copy(self, value: Any, depth: int = 0) -> Any:
        """A copy.

        Raises:
            Refused: it is nested too deeply, holds too much, or a kind of value that is not plain.
        """
        self.values -= 1
        self.bytes -= value.nbytes if torch.is_tensor(value) else len(value) if isinstance(value, (str, bytes)) else 0
        if self.values < 0 or self.bytes < 0 or depth > DEEPEST:
            raise Refused("its dicts and lists are nested too deeply, or hold too much")
        if isinstance(value, torch.Tensor):
            if value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu":
                raise Refused("a tensor in it is not a dense one")
            return value.detach()
        if isinstance(value, dict):
            if any(isinstance(key, (str, bytes)) and len(key) > LONGEST_KEY for key in dict.keys(value)):
                raise Refused(f"a name in it is of more than {LONGEST_KEY} characters")
            return {key: self.copy(item, depth + 1) for key, item in dict.items(value)}
        if isinstance(value, (list, tuple)):
            kind = list if isinstance(value, list) else tuple
            return kind(self.copy(item, depth + 1) for item in value)
        if not isinstance(value, (*KEYS, torch.dtype, torch.device)):
            raise Refused(f"it holds a {type(value).__name__}")
        return value


# ------------------------------------------------------------------------------------------------- writing


@contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to, which gets the name ``path`` when it is complete and on the disk.

    It is a temporary file beside ``path``, synced, then renamed.

    Raises:
        UserError: it can't be written (a full disk, a folder without permission); an earlier file is untouched.
    """
    path = Path(path)
    temporary = temporary_name(path)
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


def temporary_name(path: Path) -> Path:
    """A name beside ``path`` that no other process has, in this container or another."""
    return path.with_name(f".{path.name[-60:]}.{secrets.token_hex(4)}.tmp")


def remove_leftovers(*folders: str | Path) -> None:
    """Remove the unfinished files of a run that was killed while it wrote; under its lock, as they may be another's."""
    for file in [file for folder in folders for file in Path(folder).glob(".*.tmp")]:
        with suppress(OSError):
            rmtree(file) if file.is_dir() else file.unlink()


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


# ------------------------------------------------------------------------------------------------- locks


_LOCKS: set[int] = set()


def _let_locks_go() -> None:
    """A worker that outlives its process must not keep the lock."""
    for descriptor in _LOCKS:
        os.close(descriptor)
    _LOCKS.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_locks_go)


@contextmanager
def hold_lock(path: Path, what: str, warn: Callable[[str], object]) -> Iterator[tuple[int, ...]]:
    """Within it, this process alone holds the lock ``path``; the system takes it from a process that ends.

    A process that is forked from this one does not hold it; one that is started with the descriptor does.

    Args:
        path: a file, made where it is missing and left there; it says who holds it.
        what: is locked, for the message.
        warn: called with a line where the system or the file system has no locks.

    Yields:
        The descriptor, or nothing.

    Raises:
        UserError: another process holds it; the message says which.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    _LOCKS.add(descriptor)
    try:
        try:
            if fcntl is None:
                raise OSError("this system has none")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 300).decode(errors="replace") or "another process"
            raise UserError(f"{what} is in use by {holder}; its lock is {path}") from error
        except OSError as error:
            warn(f"{what} can't be locked ({reason_of(error)}): see to it that no other process uses it")
            yield ()
            return
        os.truncate(descriptor, 0)
        now = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {now}".encode())
        yield (descriptor,)
    finally:
        _LOCKS.discard(descriptor)
        os.close(descriptor)
