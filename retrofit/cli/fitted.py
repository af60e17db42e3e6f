"""Tables as wide as the terminal: names are shortened in the middle, sentences go on below."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from retrofit.tables import Facts, Part, Table, one_line, shortened

GAP = 2  # spaces between columns
LEAST = 24  # characters of a name or sentence


def print_fitted(parts: Iterable[Part]) -> None:
    """Print tables and lines as wide as the terminal is."""
    console = Console(highlight=False, markup=False, emoji=False)
    with console.capture() as captured:
        for part in parts:
            if isinstance(part, Table):
                console.print(_table(part, console))
            elif isinstance(part, Facts):
                console.print(_facts(part))
            else:
                console.print(Text(part))
    # Rich fills up the last column with blanks, which would be copied with the text.
    print(
        re.sub(r" +(?=(\x1b\[[\d;]*m)*$)", "", captured.get(), flags=re.MULTILINE),
        end="",
        flush=True,
    )


def _table(table: Table, console: Console) -> RichTable:
    style = "" if console.no_color else "bold"
    fitted = RichTable(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style=style)
    shown = _columns(table, console.width)
    for i in shown:
        name = table.header[i]
        right = name in table.right
        fitted.add_column(
            Text(name),
            overflow="fold",
            justify="right" if right else "left",
            no_wrap=_is_rigid(table, i),
        )
    columns = [_cells(table, i) for i in shown]
    for cells in zip(*columns, strict=True):
        fitted.add_row(*cells)
    return fitted


def _cells(table: Table, column: int) -> list[Text] | list[_Name]:
    texts = [one_line(row[column]) for row in table.rows]
    if table.header[column] not in table.paths:
        return list(map(Text, texts))
    names = _Names(texts)
    return [_Name(text, names) for text in texts]


def _columns(table: Table, width: int) -> list[int]:
    """Choose the columns that say something, and that there is room for."""
    spare = list(table.spare)
    columns = [i for i in range(len(table.header)) if any(row[i] for row in table.rows)]
    left_out: set[str] = set()
    while True:
        shown = [i for i in columns if table.header[i] not in left_out]
        least = sum(_least(table, i) + GAP for i in shown) - GAP
        if least <= width or not spare:
            return shown
        left_out.add(spare.pop(0))


def _least(table: Table, column: int) -> int:
    widest = max(len(row[column]) for row in (table.header, *table.rows))
    return widest if _is_rigid(table, column) else min(widest, LEAST)


def _is_rigid(table: Table, column: int) -> bool:
    """Tell whether a column has to be as wide as its cells: one of numbers or single words."""
    name = table.header[column]
    words = any(" " in row[column] for row in table.rows)
    return name not in table.paths and (name in table.right or not words)


def _facts(facts: Facts) -> RichTable:
    grid = RichTable.grid(padding=(0, GAP, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for what, fact in facts.pairs:
        grid.add_row(Text(what), Text(fact))
    return grid


class _Names:
    """The names of a column, which stay different when they are shortened."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = set(names)
        self.counts: dict[int, Counter[str]] = {}  # by the width

    def tells(self, short: str, width: int) -> bool:
        """Tell whether one name alone is shortened to that."""
        if width not in self.counts:
            self.counts[width] = Counter(shortened(name, width) for name in self.names)
        return self.counts[width][short] == 1


@dataclass(frozen=True)
class _Name:
    """The path of a layer: its ends tell more than its middle, unless others have the same."""

    text: str
    among: _Names

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(len(self.text), LEAST), len(self.text))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        short = shortened(self.text, options.max_width)
        if self.among.tells(short, options.max_width):
            yield Text(short, no_wrap=True)
        else:
            yield Text(self.text, overflow="fold")
