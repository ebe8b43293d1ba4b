"""What a program is doing, for whoever looks at it on a terminal."""

import sys


def announce(text: str) -> None:
    """Print a line on stderr, if that is a terminal."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)
