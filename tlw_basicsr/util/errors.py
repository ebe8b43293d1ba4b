"""User-facing errors, reported in one line."""

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
        # A data loader's worker wraps the message in its traceback, whose last line is ours.
        text = super().__str__().strip()
        if text.startswith("Caught "):
            text = text.splitlines()[-1].split("UserError: ", 1)[-1]
        return clean(text)


def clean(text: str) -> str:
    """Return ``text`` from a file as one line of bounded length, without control characters."""
    text = clean_line(" ".join(text.split()))
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"


def clean_line(text: str) -> str:
    """Return ``text`` with its control characters escaped, except tabs."""
    return "".join(c if c.isprintable() or c == "\t" else repr(c)[1:-1] for c in text)


class _Repr(reprlib.Repr):
    """Python's ``repr`` of bounded length, made in bounded time."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict = 3, 6
        self.maxstring = self.maxother = self.maxlong = 100

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > 4000:  # Python refuses to write larger ones
            return f"a number of {x.bit_length():,} bits"
        return super().repr_int(x, level)


_REPR = _Repr()


def short(value: Any) -> str:
    """Return ``repr(value)`` for a message, shortened where it is long."""
    text = _REPR.repr(value)
    return text if len(text) <= 300 else f"{text[:150]} … {text[-140:]}"


def coloured(word: str, colour: int) -> str:
    """Return a word for stderr in one of ANSI's colours, if that is a terminal and ``NO_COLOR`` is not set."""
    plain = not sys.stderr.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return word if plain else f"\033[{colour}m{word}\033[0m"


def first_line(error: BaseException) -> str:
    """Return the type and the first line of an error's message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def reason_of(error: BaseException) -> str:
    """Return the operating system's words for ``error`` or what led to it, else the first line of its message."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.strerror:
            return chain.strerror
        chain = chain.__cause__ or chain.__context__
    return first_line(error)


def expanded(path: str | Path, where: str) -> Path:
    """Return ``path`` with the home folder for its ``~``; ``where`` is the option's place, for the message."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{where}: {path}: there is no such home folder; accepted are ~/… and whole paths") from error


@contextmanager
def files_in_a_line() -> Iterator[None]:
    """Report an error of the operating system as a :class:`UserError`: a file's, or a data loader's killed process."""
    try:
        yield
    except BrokenPipeError:  # nobody reads the output any more
        raise
    except OSError as error:
        raise UserError(f"{error.filename or 'a file'} can't be read or written ({reason_of(error)})") from error
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise UserError(
            f"a process that loads data was killed, perhaps because memory ran out; lower num_worker_per_gpu or the "
            f"batch, or give it more memory ({first_line(error)})"
        ) from error


def run(main: Callable[[], None]) -> None:
    """Run a program: a :class:`UserError` is one line on stderr and exit code 2, Ctrl-C is 130.

    So are an error of the operating system, such as a full disk, and a killed process of a data loader. Where nobody
    reads the output any more (``… | head``), it ends quietly with 141, as other programs do. With ``TLW_TRACEBACK=1``
    in the environment the error comes with its traceback.
    """
    try:
        with files_in_a_line():
            main()
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would flush it once more
        sys.exit(141)
    except UserError as error:
        if os.environ.get("TLW_TRACEBACK") == "1":
            raise
        print(f"{coloured('error:', 31)} {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped by the user", file=sys.stderr, flush=True)
        sys.exit(130)
