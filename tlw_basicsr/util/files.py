"""Files: read without running code, written whole or not at all, and locked against other processes."""

import os
import re
import secrets
import socket
import stat
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from shutil import rmtree
from typing import Any, BinaryIO

import torch

from tlw_basicsr.util.errors import UserError, first_line, reason_of

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None


@contextmanager
def open_regular(path: str | Path, what: str) -> Iterator[BinaryIO]:
    """Open a regular file, named by option ``what``, for reading; a fifo or a device might never end."""
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
    try:
        with open(descriptor, "rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"{place} can't be read ({reason_of(error)})") from error


def read_bytes(path: str | Path, what: str = "", most: int | None = None) -> bytes:
    """Return the content of a regular file of at most ``most`` bytes."""
    with open_regular(path, what) as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise UserError(f"{what}: {path} has {size:,} bytes; accepted are at most {most:,}")
        return file.read()


def load_file(path: str | Path, what: str) -> dict[str, Any]:
    """Load the dict of a file of ``torch.save`` without running code (``weights_only=True``), on the CPU.

    Raises:
        UserError: The file does not exist, is damaged, holds no dict, or holds objects other than tensors and plain
            values; the message begins with ``what``, the option that names it.
    """
    with open_regular(path, what) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about old formats
        try:
            check_archive(file)
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch, zipfile and pickle each raise what they like
            if isinstance(error, OSError) and error.errno:
                raise
            raise UserError(
                f"{what}: {path} is not a readable checkpoint: it is damaged, another kind of file, or holds objects "
                f"other than tensors and plain values, which are not loaded ({first_line(error)[:200]})"
            ) from error
    if not isinstance(content, dict):
        raise UserError(f"{what}: {path} must hold a dict of tensors, it holds a {type(content).__name__}")
    return content


def check_archive(file: BinaryIO) -> None:
    """Compare the checksums of a zip archive with its content, which torch's own reader does not."""
    if file.read(4) == b"PK\x03\x04":  # files of torch before 1.6 are no archives
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            # all checksums are 0 where torch was set to leave them out
            damaged = archive.testzip() if any(member.CRC for member in members) else None
            # torch's reader takes a member for a folder by this bit, and returns memory that nothing was written to
            folder = next((member.filename for member in members if member.external_attr & 0x10), None)
            if damaged or folder:
                raise zipfile.BadZipFile(f"{damaged or folder} is damaged")
    file.seek(0)


@contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing that gets the name ``path`` once it is complete and on the disk.

    Until then it is a temporary file beside ``path``, and an earlier file of the name stays as it was.
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
            with suppress(OSError), ExitStack() as stack:  # the rename survives a loss of power, where that can be had
                folder = os.open(path.parent, os.O_RDONLY)
                stack.callback(os.close, folder)
                os.fsync(folder)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} can't be written ({reason_of(error)})") from error


def temporary_name(path: Path) -> Path:
    """Return a name beside ``path`` that no other process uses, on this machine or another."""
    return path.with_name(f".{path.name[-60:]}.{secrets.token_hex(4)}.tmp")


def remove_leftovers(*folders: str | Path) -> None:
    """Remove what a killed process has left under names of :func:`temporary_name`; call it under the folder's lock."""
    for file in [file for folder in folders for file in Path(folder).glob(".*.tmp")]:
        if re.fullmatch(r"\..+\.[0-9a-f]{8}\.tmp", file.name):
            with suppress(OSError):
                rmtree(file) if file.is_dir() else file.unlink()


def save_file(content: dict[str, Any], path: str | Path) -> None:
    """Write ``content`` with ``torch.save``, see :func:`whole_file`."""
    with whole_file(path) as file:
        torch.save(content, file)


def write_text(text: str, path: str | Path) -> None:
    """Write a text file, see :func:`whole_file`."""
    with whole_file(path) as file:
        file.write(text.encode())


# filelock is no substitute: its descriptor can't be handed to a child that keeps the lock, and it does not say who
# holds a lock.

_LOCKS: set[int] = set()


def _close_locks() -> None:
    for descriptor in _LOCKS:
        os.close(descriptor)
    _LOCKS.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_locks)  # a worker that outlives its parent must not keep the lock


@contextmanager
def hold_lock(path: Path, what: str, warn: Callable[[str], object], wait: bool = False) -> Iterator[tuple[int, ...]]:
    """Hold the lock ``path`` alone; the system releases it when the process ends, however that happens.

    A forked process does not hold the lock; one that is started with the descriptor does. The lock's file stays there,
    and says who holds it. Another holder is an error, or with ``wait`` waited for. ``warn`` gets one line where that is
    so, or where the system or the file system has no locks.

    Yields:
        The descriptor, in a tuple for ``subprocess``'s ``pass_fds``; an empty tuple where there are no locks.
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
            if not wait or fcntl is None:
                raise UserError(f"{what} is in use by {holder}; its lock is {path}") from error
            warn(f"{what} is in use by {holder}; waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            warn(f"{what} can't be locked ({reason_of(error)}): make sure that no other process uses it")
            yield ()
            return
        os.truncate(descriptor, 0)
        now = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {now}".encode())
        yield (descriptor,)
    finally:
        _LOCKS.discard(descriptor)
        os.close(descriptor)
