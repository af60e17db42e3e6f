"""Where a command speaks: results on stdout; what it does, and what went wrong, on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from retrofit.json_values import to_plain
from retrofit.tables import Part, one_line, printed


class Terminal:
    """What a command prints, as tables and lines for people or as one JSON object for programs.

    Args:
        quiet: print nothing but warnings and errors.
        as_json: print one object on stdout at the end, in place of tables and lines.
    """

    def __init__(self, *, quiet: bool = False, as_json: bool = False) -> None:
        # Of the processes that torchrun starts the first one speaks.
        first = os.environ.get("RANK", "0") == "0"
        self.progress = not quiet
        self._says = first and not quiet
        self._shows = not (quiet or as_json)
        self._facts: dict[str, Any] | None = {} if first and as_json else None

    def say(self, what: str) -> None:
        """Say what is done now."""
        if self._says:
            print(f"retrofit: {one_line(what)} ...", file=sys.stderr, flush=True)

    def show(self, *parts: Part) -> None:
        """Print a result for people."""
        if self._shows and sys.stdout.isatty():
            from retrofit.cli.fitted import print_fitted  # noqa: PLC0415 - rich, where it is used

            print_fitted(parts)
        elif self._shows:
            print(printed(parts), flush=True)

    def tell(self, **facts: Any) -> None:
        """Add facts to the JSON object: dataclasses, lists, dicts, numbers, texts."""
        if self._facts is not None:
            self._facts |= {name: to_plain(fact) for name, fact in facts.items()}

    def remark(self, text: str) -> None:
        """Tell of something that was left undone, in one line."""
        print(one_line(text), file=sys.stderr)

    def warn(self, message: Warning | str, *_: object, **__: object) -> None:
        """Print a warning in one line; stands in for `warnings.showwarning`."""
        self.remark(f"retrofit: warning: {message}")
        if self._facts is not None:
            self._facts.setdefault("warnings", []).append(one_line(str(message)))

    def fail(self, message: str, code: int) -> int:
        """Print an error in one line, and end; returns the exit code."""
        self.remark(f"retrofit: {message}")
        self.tell(error=one_line(message))
        with contextlib.suppress(OSError):  # whoever reads stdout may have gone
            self.end(code)
        return code

    def end(self, code: int) -> None:
        """Print the JSON object, once."""
        if self._facts is not None:
            facts, self._facts = self._facts, None
            print(json.dumps({"exit_code": code, **facts}, indent=2), flush=True)


@contextlib.contextmanager
def if_stopped(left: str, state: Path | None = None) -> Iterator[None]:
    """Let Ctrl-C (or SIGTERM) in the block say what it leaves behind, and a file to go on from."""
    try:
        yield
    except KeyboardInterrupt as stop:
        kept = state is not None and state.exists()
        goes_on = f"; {state} is kept, and the same command goes on from it" if kept else ""
        raise type(stop)(left + goes_on) from stop
