"""Tables in Markdown: all that the scripts print and write are made here."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


def markdown_table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    words: Collection[str] | None = None,
    *,
    padded: bool = False,
) -> str:
    """Write a table whose columns of words are flush left and whose numbers are flush right.

    Args:
        words: the headings of the columns of words; by default that of the first column alone.
        padded: make all cells of a column equally wide, for a table that is read in a terminal.
    """
    words = head[:1] if words is None else words
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    columns = []
    for name, column in zip(head, zip(*cells, strict=True), strict=True):
        width = max(map(len, column)) if padded else 0
        if name in words:
            columns.append(["---".ljust(width, "-"), *(cell.ljust(width) for cell in column)])
        else:
            columns.append(["---:".rjust(width, "-"), *(cell.rjust(width) for cell in column)])
    rule, header, *lines = zip(*columns, strict=True)
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, rule, *lines))
