"""The rows of the study on ImageNet's pictures, and the tables and the figure made of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from corruption_dots import draw_dots
from markdown_table import markdown_table
from numpy.typing import NDArray

Cell = tuple[str, int]  # a corruption and its severity
CLEAN: Cell = ("none", 0)
PLAIN = "plain"
FEW, MANY, PRIOR = 16, 500, 64
ADAPTED = f"adapted to {MANY}"
ON_FEW = f"to {FEW}, prior {PRIOR}"
STREAMING = f"streaming, prior {PRIOR}"
WAYS = PLAIN, ADAPTED, ON_FEW, STREAMING


@dataclass(frozen=True)
class Row:
    """One line of the CSV: the answers of a network to corrupted pictures.

    right: a bit for each picture, as hexadecimal digits; the first picture is the highest bit.
    """

    network: str
    test_pictures: int
    corruption: str
    severity: int
    adapted: str
    accuracy: float
    right: str

    @property
    def key(self) -> tuple[str, int, str]:
        return self.corruption, self.severity, self.adapted


def as_hexadecimal(right: Sequence[bool]) -> str:
    """Write bits as hexadecimal digits."""
    return np.packbits(np.array(right, dtype=bool)).tobytes().hex()


class Results:
    """The right answers to the same pictures under each corruption, adapted in each way."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = {row.key: row for row in rows}
        self.network, self.pictures = rows[0].network, rows[0].test_pictures
        cells = dict.fromkeys((row.corruption, row.severity) for row in rows)
        self.cells = [cell for cell in cells if cell != CLEAN]
        self.corruptions = list(dict.fromkeys(name for name, _ in self.cells))
        self.severities = sorted({severity for _, severity in self.cells})

    def right(self, cells: Iterable[Cell], way: str) -> NDArray[np.float64]:
        """Return, for each picture, the share of the cells in which the answer is right."""
        shares = []
        for cell in cells:
            digits = bytes.fromhex(self.rows[(*cell, way)].right)
            shares.append(np.unpackbits(np.frombuffer(digits, np.uint8), count=self.pictures))
        mean: NDArray[np.float64] = np.mean(shares, axis=0, dtype=np.float64)
        return mean

    def accuracy(self, cells: Iterable[Cell], way: str) -> float:
        """Compute the share of right answers, in per cent."""
        return 100 * float(self.right(cells, way).mean())

    def gain(self, cells: Sequence[Cell], way: str) -> tuple[float, float]:
        """Compute the points gained over the plain network, and their standard error.

        Paired: both answer the same pictures.
        """
        gained = self.right(cells, way) - self.right(cells, PLAIN)
        return 100 * gained.mean(), 100 * gained.std(ddof=1) / len(gained) ** 0.5

    def won_back(self, cells: Sequence[Cell], way: str) -> tuple[float, float]:
        """Compute the share, in per cent, of what corruption cost, and its standard error.

        Of a ratio of means over pictures, by linearisation (Cochran, 1977, section 6.3).
        """
        plain = self.right(cells, PLAIN)
        gained, lost = self.right(cells, way) - plain, self.right([CLEAN], PLAIN) - plain
        share = gained.mean() / lost.mean()
        error = (gained - share * lost).std(ddof=1) / lost.mean() / len(lost) ** 0.5
        return 100 * share, 100 * error


def summary(rows: Sequence[Row]) -> str:
    """Write the conclusions and the table, in Markdown."""
    results = Results(rows)
    clean, plain = (results.accuracy(cells, PLAIN) for cells in ([CLEAN], results.cells))
    about = (
        f"{results.network}: accuracy in per cent on {results.pictures} pictures, and points "
        "gained over the plain network, ± their standard error (paired: the same pictures).\n"
    )
    lines = [about, f"- uncorrupted {clean:.1f} %, corrupted {plain:.1f} %"]
    for way in WAYS[1:]:
        won = ""
        if plain < clean:
            share, error = results.won_back(results.cells, way)
            won = f", {share:.0f} ± {error:.0f} % of what was lost"
        lines.append(
            f"- {way}: {results.accuracy(results.cells, way):.1f} %{won}; uncorrupted "
            f"{signed(results.gain([CLEAN], way))} points; it costs accuracy under "
            f"{costly(results, way)}"
        )
    return "\n".join(lines) + "\n\n" + by_corruption(results)


def costly(results: Results, way: str) -> str:
    """Name the corruptions under which adapting loses more answers than it wins."""
    found = []
    for name, severity in results.cells:
        gain = results.gain([(name, severity)], way)
        if gain[0] < 0:
            found.append(f"{name} {severity} ({signed(gain)})")
    return ", ".join(found) or "none"


def signed(gain: tuple[float, float]) -> str:
    return f"{gain[0]:+.1f} ± {gain[1]:.1f}"


def by_corruption(results: Results) -> str:
    columns = [(severity, way) for severity in results.severities for way in WAYS]
    head = ["corruption, severity", *(f"{severity}: {way}" for severity, way in columns)]
    lines = [
        [name, *(cell(results, [(name, s)], way) for s, way in columns)]
        for name in results.corruptions
    ]
    total = [cell(results, [(name, s) for name in results.corruptions], way) for s, way in columns]
    return markdown_table(head, [*lines, ["**mean**", *(f"**{one}**" for one in total)]])


def cell(results: Results, cells: list[Cell], way: str) -> str:
    if way == PLAIN:
        return f"{results.accuracy(cells, way):.1f}"
    return signed(results.gain(cells, way))


def draw(rows: Sequence[Row], file: Path) -> None:
    """Draw, as dots, what each corruption costs and what adapting gives back."""
    results = Results(rows)
    draw_dots(
        lambda name, severity, way: results.accuracy([(name, severity)], way),
        results.corruptions,
        results.severities,
        WAYS,
        results.accuracy([CLEAN], PLAIN),
        f"{results.network}: what does adapting give back?",
        file,
    )
