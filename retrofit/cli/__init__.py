"""The command line: `arguments` to a request, `commands` to calls of the library."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence

from retrofit.cli.arguments import parse
from retrofit.cli.requests import reading
from retrofit.cli.terminal import Terminal
from retrofit.errors import PeerError, RetrofitError, UnequalError, UnfinishedError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    0: done; 1: a conversion, comparison or process that failed; 2: a bad request; 128 + the number
    of the signal that ended it.

    Args:
        argv: the words after `retrofit`; by default those that were typed.
    """
    request, telling = parse(argv)
    terminal = Terminal(quiet=telling.quiet, as_json=telling.json)
    try:
        with _warnings_in_one_line(terminal), _terminable():
            if sys.stderr.isatty():  # in a log a bad request is one line
                terminal.say(f"reading {reading(request)}")
            # Not before: it imports torch, which takes seconds, and what was asked for is right.
            from retrofit.cli.commands import carry_out  # noqa: PLC0415

            code = carry_out(request, terminal)
        terminal.end(code)
        sys.stdout.flush()
    except RetrofitError as error:
        if telling.debug:
            traceback.print_exc()
        failed = isinstance(error, (PeerError, UnequalError, UnfinishedError))
        return terminal.fail(str(error), 1 if failed else 2)
    except _Terminated as stop:
        return terminal.fail(": ".join(("terminated", *stop.args)), 128 + signal.SIGTERM)
    except KeyboardInterrupt as stop:
        return terminal.fail(": ".join(("interrupted", *stop.args)), 128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of the output, such as head, has left
        _silence()
        return 128 + signal.SIGPIPE
    except Exception as error:  # the user's model may raise anything
        try:
            sys.stdout.flush()
        except OSError:  # on a full disk, say; Python would try again, and exit with 120
            _silence()
        if telling.debug:
            raise
        return terminal.fail(f"{type(error).__name__}: {error} (--debug shows where)", 1)
    return code


@contextlib.contextmanager
def _warnings_in_one_line(terminal: Terminal) -> Iterator[None]:
    """Print a warning in the block as every other message."""
    before = warnings.showwarning
    warnings.showwarning = terminal.warn
    try:
        yield
    finally:
        warnings.showwarning = before


class _Terminated(KeyboardInterrupt):
    """SIGTERM ends a command as Ctrl-C does: everything is put back on the way out."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Raise _Terminated in the block on SIGTERM."""
    if threading.current_thread() is not threading.main_thread():  # no other may set handlers
        yield
        return

    def stop(*_: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _silence() -> None:
    """Send what is still to be printed nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
