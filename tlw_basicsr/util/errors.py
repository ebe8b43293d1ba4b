"""Errors that are the user's to mend, told in one line."""

import os
import reprlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LONGEST = 4000  # characters of a message


class UserError(Exception):
    """A wrong option, image or checkpoint. The message names the key or file and says what is accepted."""

    def __str__(self) -> str:
        # A data loader's worker wraps the message in its traceback, of which the last line is ours.
        text = super().__str__().strip()
        if text.startswith("Caught "):
            text = text.splitlines()[-1].split("UserError: ", 1)[-1]
        return clean(text)


def clean(text: str) -> str:
    """``text`` in one line of bounded length, without what a terminal would obey: for all that comes from a file."""
    text = clean_line(" ".join(text.split()))
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"


def clean_line(text: str) -> str:
    """``text`` with its control characters written out, but tabs."""
    return "".join(c if c.isprintable() or c == "\t" else repr(c)[1:-1] for c in text)


class _Repr(reprlib.Repr):
    """Python's ``repr`` of bounded length, made in bounded time."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = 6
        self.maxstring = self.maxother = self.maxlong = 100

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > 4000:  # Python refuses to write larger ones
            return f"a number of {x.bit_length():,} bits"
        return super().repr_int(x, level)


_REPR = _Repr()


def short(value: Any) -> str:
    """``repr(value)`` for a message: of text and numbers of usual length as it is, else cut, however large it is."""
    text = _REPR.repr(value)
    return text if len(text) <= 300 else f"{text[:150]} … {text[-140:]}"


def first_line(error: BaseException) -> str:
    """The type and the first line of an error's message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def reason_of(error: BaseException) -> str:
    """The operating system's words for ``error``, if it or what led to it has any, else its first line."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.strerror:
            return chain.strerror
        chain = chain.__cause__ or chain.__context__
    return first_line(error)


def expanded(path: str | Path, where: str) -> Path:
    """``path`` with the home folder for its ``~``.

    Raises:
        UserError: ``~name`` of a user that there is not; ``where`` is the option's place.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{where}: {path}: there is no such home folder; accepted are ~/… and whole paths") from error


@contextmanager
def files_in_a_line() -> Iterator[None]:
    """Tell an error of the operating system, such as a full disk, as a :class:`UserError` that names the file."""
    try:
        yield
    except BrokenPipeError:  # nobody reads the output any more
        raise
    except OSError as error:
        raise UserError(f"{error.filename or 'a file'} can't be read or written ({reason_of(error)})") from error


@contextmanager
def killed_workers_in_a_line() -> Iterator[None]:
    """Tell the end of a data loader's process, such as by the system when memory is short, as a :class:`UserError`."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise UserError(
            f"a process that loads data was killed, for want of memory perhaps; lower num_worker_per_gpu or the "
            f"batch, or give it more memory ({first_line(error)})"
        ) from error


def run(main: Callable[[], None]) -> None:
    """Run a program: a :class:`UserError` is one line on stderr and exit code 2, Ctrl-C is 130.

    So are an error of the operating system, such as a full disk, and a killed process of a data loader. Where nobody
    reads the output any more (``… | head``), it ends quietly with 141, as other programs do. With ``TLW_TRACEBACK=1``
    in the environment the error comes with its traceback.
    """
    try:
        with files_in_a_line(), killed_workers_in_a_line():
            main()
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would flush it once more
        sys.exit(141)
    except UserError as error:
        if os.environ.get("TLW_TRACEBACK") == "1":
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped by the user", file=sys.stderr, flush=True)
        sys.exit(130)
