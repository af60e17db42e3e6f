"""What the commands print: errors in one line, facts in two columns, tables of BatchNorms."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from torch import Tensor

from retrofit.errors import RetrofitError
from retrofit.numerics.batchnorm_summary import batchnorm_paths, summarised
from retrofit.pictures.sources import Pictures
from retrofit.tables import one_line, table


def fail(message: str, code: int) -> int:
    """Print an error in one line; return the exit code."""
    print(f"retrofit: {one_line(message)}", file=sys.stderr)
    return code


def show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning in one line; stands in for `warnings.showwarning`."""
    print(f"retrofit: warning: {one_line(str(message))}", file=sys.stderr)


def facts_table(facts: Iterable[tuple[str, str]]) -> str:
    """Align facts in two columns."""
    return "\n".join(f"{what:<20}{fact}" for what, fact in facts)


def error_in_words(value: float) -> str:
    """Say what a standard error is of."""
    if math.isinf(value):
        return "not known, from one picture or from equal ones"
    return f"{value:.2%} of sigma (99 % of all channels)"


def list_bad(pictures: Pictures, names: Sequence[str]) -> None:
    """Print what was left out: damaged shards, and pictures that could not be read."""
    for shard in pictures.bad:
        print(one_line(f"used in part or not at all: {shard}"), file=sys.stderr)
    if bad := list(dict.fromkeys(names)):
        text = f"left out {len(bad)} unreadable pictures: {', '.join(bad)}"
        print(one_line(text), file=sys.stderr)


def norm_table(tensors: Mapping[str, Tensor], eps: float, first: Sequence[str] = ()) -> str:
    """Make a table with one row for each BatchNorm in a state dict, those at `first` first."""
    found = batchnorm_paths(tensors)
    paths = [path for path in first if path in found]
    paths += [path for path in found if path not in paths]
    head = ("BatchNorm", "channels", "mean", "std", "constant", "exact identity")
    if not paths:
        return "no BatchNorm"
    return table(head, [_row(tensors, path, eps) for path in paths], right=",".join(head[1:]))


def _row(tensors: Mapping[str, Tensor], path: str, eps: float) -> tuple[str, ...]:
    try:
        norm = summarised(tensors, path, eps)
    except RetrofitError:
        return (path, "-", "not those of a BatchNorm", "-", "-", "-")
    spans = (f"{np.min(x):.3g} to {np.max(x):.3g}" for x in (norm.mean, norm.std))
    constant = str(int(norm.constant.sum()))
    return (path, str(len(norm)), *spans, constant, f"{norm.identity}/{len(norm)}")
