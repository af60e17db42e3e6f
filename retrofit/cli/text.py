"""What the commands print: errors, warnings and what is done in one line, facts in two columns."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from retrofit.tables import one_line


def fail(message: str, code: int) -> int:
    """Print an error in one line; return the exit code."""
    print(f"retrofit: {one_line(message)}", file=sys.stderr)
    return code


def say(what: str) -> None:
    """Say on stderr what is done now; of the processes that torchrun starts the first one does."""
    if os.environ.get("RANK", "0") == "0":
        print(f"retrofit: {one_line(what)} ...", file=sys.stderr, flush=True)


def show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning in one line; stands in for `warnings.showwarning`."""
    print(f"retrofit: warning: {one_line(str(message))}", file=sys.stderr)


@contextmanager
def if_stopped(left: str) -> Iterator[None]:
    """Let Ctrl-C (or SIGTERM) in the block say what it leaves behind."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise type(stop)(left) from stop


def facts_table(facts: Iterable[tuple[str, str]]) -> str:
    """Align facts in two columns."""
    return "\n".join(f"{what:<20}{fact}" for what, fact in facts)


def error_in_words(value: float) -> str:
    """Say what a standard error is of."""
    if math.isinf(value):
        return "not known, from one picture or from equal ones"
    return f"{value:.2%} of sigma (99 % of all channels)"
