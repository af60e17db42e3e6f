"""Text for a terminal: single lines and aligned tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


def one_line(text: str) -> str:
    """Write a text without line breaks, and with what a terminal would obey written out.

    Names and messages may come from a file that somebody else has made.
    """
    joined = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in joined)


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
