"""What the commands print about the BatchNorms of a network or file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from retrofit.errors import RetrofitError
from retrofit.numerics.batchnorm_summary import batchnorm_paths, summarised
from retrofit.tables import Part, Table


@dataclass(frozen=True)
class NormRow:
    """What is told of a BatchNorm; None for one whose tensors are not those of a BatchNorm.

    Attributes:
        batchnorm: its path.
        channels: how many.
        mean, std: the least and the largest running mean and standard deviation.
        constant: how many channels do not vary.
        identity: how many come out as they go in, bit for bit.
    """

    batchnorm: str
    channels: int | None = None
    mean: tuple[float, float] | None = None
    std: tuple[float, float] | None = None
    constant: int | None = None
    identity: int | None = None


def norm_rows(
    tensors: Mapping[str, Tensor], eps: float, first: Sequence[str] = ()
) -> list[NormRow]:
    """List the BatchNorms in a state dict, those at `first` first.

    The others follow by name, 2 before 10: a safetensors file has its tensors by their size.
    """
    found = batchnorm_paths(tensors)
    paths = [path for path in first if path in found]
    paths += sorted((path for path in found if path not in paths), key=_natural)
    return [_row(tensors, path, eps) for path in paths]


def norm_table(rows: Sequence[NormRow]) -> Part:
    """Make a table with one row for each BatchNorm."""
    head = ("BatchNorm", "channels", "mean", "std", "constant", "exact identity")
    if not rows:
        return "no BatchNorm"
    cells = [_cells(row) for row in rows]
    return Table(
        head,
        cells,
        right=head[1:],
        paths=head[:1],
        spare=("constant", "exact identity", "channels"),
    )


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(part) if part.isdigit() else -1, part) for part in path.split(".")]


def _row(tensors: Mapping[str, Tensor], path: str, eps: float) -> NormRow:
    try:
        norm = summarised(tensors, path, eps)
    except RetrofitError:
        return NormRow(path)
    mean, std = ((float(np.min(x)), float(np.max(x))) for x in (norm.mean, norm.std))
    return NormRow(path, len(norm), mean, std, int(norm.constant.sum()), norm.identity)


def _cells(row: NormRow) -> tuple[str, ...]:
    if row.mean is None or row.std is None:
        return (row.batchnorm, "-", "not those of a BatchNorm", "-", "-", "-")
    spans = (f"{least:.3g} to {largest:.3g}" for least, largest in (row.mean, row.std))
    identity = f"{row.identity}/{row.channels}"
    return (row.batchnorm, str(row.channels), *spans, str(row.constant), identity)
