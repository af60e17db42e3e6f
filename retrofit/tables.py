"""Text for a terminal: single lines and aligned tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

WIDEST = 200  # characters of a line in a REPL
NAME = 40  # characters of a name in it


def one_line(text: str) -> str:
    """Write a text without line breaks, and with what a terminal would obey written out.

    Names and messages may come from a file that somebody else has made.
    """
    joined = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in joined)


def shortened(text: str, most: int = NAME) -> str:
    """Write a text in one line of at most `most` characters: a long one loses its middle."""
    line = one_line(text)
    if len(line) <= most:
        return line
    end = (most - 3) // 2
    return f"{line[: most - 3 - end]}...{line[len(line) - end :]}"


def counted(number: int, noun: str) -> str:
    """Write a number and what it counts: 1 layer, 1,024 images."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def in_short(value: object, text: str) -> str:
    """Write `Class(text)` as the repr of a result, in one line whatever `text` holds."""
    return f"{shortened(f'{type(value).__name__}({text}', WIDEST - 1)})"


def in_full(value: DataclassInstance) -> str:
    """Write a dataclass with all its fields, as dataclasses do where they have no other repr."""
    told = (f"{field.name}={getattr(value, field.name)!r}" for field in fields(value))
    return f"{type(value).__qualname__}({', '.join(told)})"


def few(names: Sequence[str]) -> str:
    """List the first three names, and hint at the others."""
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


@dataclass(frozen=True)
class Table:
    """A table for people; its text is as wide as its widest cells, a terminal may fold it.

    Attributes:
        header: the headings.
        rows: the cells.
        right: headings of the columns that are flush right.
        paths: headings of the columns of names, which may be shortened in the middle.
        spare: headings of the columns that a narrow terminal goes without, the first one first.
    """

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    right: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    spare: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Align the columns two spaces apart, each as wide as its widest cell."""
        rows = [[one_line(cell) for cell in row] for row in self.rows]
        widths = [max(len(row[i]) for row in (self.header, *rows)) for i in range(len(self.header))]
        lines = []
        for row in (self.header, ["-" * width for width in widths], *rows):
            cells = [
                cell.rjust(width) if name in self.right else cell.ljust(width)
                for name, cell, width in zip(self.header, row, widths, strict=True)
            ]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)


@dataclass(frozen=True)
class Facts:
    """Facts in two columns: what it is, and the fact."""

    pairs: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        """Align the facts."""
        return "\n".join(f"{what:<20}{fact}" for what, fact in self.pairs)


Part = Table | Facts | str  # of what a result prints: a table, facts, or lines


def printed(parts: Iterable[Part]) -> str:
    """Join what a result prints as plain text."""
    return "\n".join(map(str, parts))
