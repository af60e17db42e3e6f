"""The tables of `benchmark.py`: plain figures, and how they are written."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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
