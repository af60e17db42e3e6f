"""What the commands print about the BatchNorms of a network or file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from retrofit.errors import RetrofitError
from retrofit.numerics.batchnorm_summary import batchnorm_paths, summarised
from retrofit.tables import table


def norm_table(tensors: Mapping[str, Tensor], eps: float, first: Sequence[str] = ()) -> str:
    """Make a table with one row for each BatchNorm in a state dict, those at `first` first.

    The others follow by name, 2 before 10: a safetensors file has its tensors by their size.
    """
    found = batchnorm_paths(tensors)
    paths = [path for path in first if path in found]
    paths += sorted((path for path in found if path not in paths), key=_natural)
    head = ("BatchNorm", "channels", "mean", "std", "constant", "exact identity")
    if not paths:
        return "no BatchNorm"
    return table(head, [_row(tensors, path, eps) for path in paths], right=",".join(head[1:]))


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(part) if part.isdigit() else -1, part) for part in path.split(".")]


def _row(tensors: Mapping[str, Tensor], path: str, eps: float) -> tuple[str, ...]:
    try:
        norm = summarised(tensors, path, eps)
    except RetrofitError:
        return (path, "-", "not those of a BatchNorm", "-", "-", "-")
    spans = (f"{np.min(x):.3g} to {np.max(x):.3g}" for x in (norm.mean, norm.std))
    constant = str(int(norm.constant.sum()))
    return (path, str(len(norm)), *spans, constant, f"{norm.identity}/{len(norm)}")
