"""The tables of `benchmark.py`: plain figures, and how they are written and recorded."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from markdown_table import markdown_table


@dataclass(frozen=True)
class Spread:
    """A figure that was measured several times."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        ordered = sorted(values)
        return cls(statistics.median(ordered), ordered[0], ordered[-1])

    @classmethod
    def ratio(cls, seconds: Sequence[float], reference: Sequence[float]) -> Spread:
        """Divide times of the same repetitions."""
        return cls.of(a / b for a, b in zip(seconds, reference, strict=True))


Cell = str | bool | int | float | Spread | None
Row = dict[str, Cell]


@dataclass(frozen=True)
class Table:
    """A text on what was measured, and the figures; `summary` has what follows from them."""

    title: str
    text: str
    rows: list[Row]
    summary: Row


@dataclass(frozen=True)
class Figure:
    """A cell of a table, as a line of a CSV file has it.

    Attributes:
        table: its title.
        row: from 1 on; 0 for what follows from the table.
        cell: what it says; of a `Spread` its fields.
    """

    table: str
    row: int
    column: str
    cell: Mapping[str, float] | Cell


def figures_of(table: Table) -> Iterator[Figure]:
    """List the cells of a table, row by row."""
    for i, row in enumerate([table.summary, *table.rows]):
        for column, cell in row.items():
            value = asdict(cell) if isinstance(cell, Spread) else cell
            yield Figure(table.title, i, column, value)


def tables_of(figures: Iterable[Figure]) -> list[Table]:
    """Put the cells of `figures_of` together again, without the texts."""
    tables: dict[str, Table] = {}
    for figure in figures:
        table = tables.setdefault(figure.table, Table(figure.table, "", [], {}))
        if figure.row > len(table.rows):
            table.rows.append({})
        row = table.rows[figure.row - 1] if figure.row else table.summary
        cell = figure.cell
        row[figure.column] = Spread(**cell) if isinstance(cell, Mapping) else cell
    return list(tables.values())


def rendered(table: Table) -> str:
    """Write a table in Markdown, with its title and text before it and its summary behind it."""
    facts = "".join(f"- {name}: **{text_of(value)}**\n" for name, value in table.summary.items())
    first = table.rows[0]
    rows = [[text_of(row[name]) for name in first] for row in table.rows]
    words = [name for name, cell in first.items() if isinstance(cell, str)]
    figures = markdown_table(list(first), rows, words, padded=True)
    return "\n".join(filter(None, (f"## {table.title}\n", f"{table.text}\n", figures, facts)))


def text_of(value: Cell) -> str:
    if isinstance(value, Spread):
        return f"{text_of(value.median)} ({text_of(value.min)} - {text_of(value.max)})"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:{',.0f' if value >= 100 else '.3f' if value >= 0.01 else '.2g'}}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else value
