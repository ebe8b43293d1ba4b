"""Errors that are the user's to mend, told in one line."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LONGEST = 4000  # characters of a message


class UserError(Exception):
    """A wrong option, image or checkpoint. The message names the key or file and says what is accepted."""

    def __str__(self) -> str:
        # A data loader's worker wraps the message in its traceback, of which the last line is ours.
        text = super().__str__().strip()
        if text.startswith("Caught "):
            text = text.splitlines()[-1].split("UserError: ", 1)[-1]
        # a wrong value may be a tensor of many lines, or hold what a terminal would obey
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))
        return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"


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


@contextmanager
def files_in_a_line() -> Iterator[None]:
    """Tell an error of the operating system, such as a full disk, as a :class:`UserError` that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or 'a file'} can't be read or written ({reason_of(error)})") from error


def run(main: Callable[[], None]) -> None:
    """Run a program: a :class:`UserError` is one line on stderr and exit code 2, Ctrl-C is 130.

    With ``TLW_TRACEBACK=1`` in the environment the error comes with its traceback.
    """
    try:
        main()
    except UserError as error:
        if os.environ.get("TLW_TRACEBACK") == "1":
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped by the user", file=sys.stderr, flush=True)
        sys.exit(130)
