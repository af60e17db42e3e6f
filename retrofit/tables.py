"""Text for a terminal: single lines and aligned tables."""

from __future__ import annotations

from collections.abc import Sequence


def one_line(text: str) -> str:
    """Write a text without line breaks, and with what a terminal would obey written out.

    Names and messages may come from a file that somebody else has made.
    """
    joined = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in joined)


def few(names: Sequence[str]) -> str:
    """List the first three names, and hint at the others."""
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> str:
    """Align columns two spaces apart, each as wide as its widest cell.

    `right` lists the headings of the columns that are flush right.
    """
    flush = right.split(",")
    rows = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = []
    for row in (header, ["-" * width for width in widths], *rows):
        cells = [
            cell.rjust(width) if name in flush else cell.ljust(width)
            for name, cell, width in zip(header, row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
