"""What `peers.py` finds of a tool, and the table of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from markdown_table import markdown_table


@dataclass(frozen=True)
class Row:
    """What a tool made of a network.

    Attributes:
        batchnorms: how many it put in.
        off: the largest difference of an output from plain's, over plain's largest.
        accuracy, left: shares of the test pictures; left is without what users have to see to.
        constant: how many channels do not vary, and are not among those of which the errors are.
        mean_worst, mean_most: errors of the means, in standard deviations of their channels: the
            largest, and what 99 % of the channels stay below.
        std_worst, std_most: those of the standard deviations.
        seconds, plain_seconds: of the processor, for the whole tool, and for a plain forward pass
            over the same pictures (the mean of one before and one after).
        loads: the class into which its weights load strictly, with the same outputs.
        error: what stopped it; nothing if all went well.
    """

    network: str
    peer: str
    version: str
    calibration_pictures: int
    test_pictures: int
    batchnorms: int = 0
    off: float = 0.0
    plain_accuracy: float = 0.0
    accuracy: float = 0.0
    left: float = 0.0
    constant: int = 0
    mean_worst: float = 0.0
    mean_most: float = 0.0
    std_worst: float = 0.0
    std_most: float = 0.0
    seconds: float = 0.0
    plain_seconds: float = 0.0
    loads: str = ""
    error: str = ""


def table(rows: Iterable[Row]) -> str:
    """Write the table; of a tool that was tried several times, with its last row."""
    head = (
        "network",
        "tool",
        "BatchNorms",
        "output off by",
        "accuracy, plain",
        "with BatchNorm",
        "as the tool leaves it",
        "mean off by, worst",
        "99 %",
        "std off by, worst",
        "99 %",
        "time / plain",
        "loads strictly into",
    )
    last = {(row.network, row.peer): row for row in rows}
    words = [name for name in head if name in ("network", "tool", "loads strictly into")]
    return markdown_table(head, [cells(row) for row in last.values()], words)


def cells(row: Row) -> list[str]:
    if row.error:
        return [row.network, row.peer, *[""] * 10, row.error]
    return [
        row.network,
        row.peer,
        str(row.batchnorms),
        f"{row.off:.1e}",
        *(f"{100 * share:.1f}" for share in (row.plain_accuracy, row.accuracy, row.left)),
        *(f"{x:.1e}" for x in (row.mean_worst, row.mean_most, row.std_worst, row.std_most)),
        f"{row.seconds / row.plain_seconds:.1f}",
        row.loads,
    ]
