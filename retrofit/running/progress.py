"""How far something has come: a bar on a terminal or in a notebook, and elsewhere one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from tqdm import tqdm


def images_bar(
    stage: str, data: Iterable[Any], most: int | None, *, shown: bool, done: int = 0
) -> tqdm[Any]:
    """Make a bar over the images of `data`, as far as their number is known.

    Args:
        stage: what is being done, before the bar.
        data: batches; a `bar_unit` of its data set names what there are, instead of images.
        most: no more are used.
        shown: whether it is to be seen.
        done: how many were used before.
    """
    known = _images_in_all(data)
    total = most if known is None else known if most is None else min(known, most)
    unit = getattr(getattr(data, "dataset", None), "bar_unit", "image")
    return progress_bar(stage, total, unit, shown=shown, done=done)


def progress_bar(
    stage: str, total: int | None, unit: str, *, shown: bool, done: int = 0
) -> tqdm[Any]:
    """Make a bar over `total` units; a log, where no bar can move, gets a line at its start."""
    drawn = _draws_bars()
    if shown and not drawn:
        count = "" if total is None else f": {total:,} {unit}s"
        tqdm.write(f"{stage}{count} ...", file=sys.stderr)
    return tqdm(desc=stage, total=total, initial=done, unit=unit, disable=not (shown and drawn))


def _draws_bars() -> bool:
    """Tell whether stderr is a terminal, or a notebook (which says that it is none)."""
    if type(sys.stderr).__module__.startswith("ipykernel."):
        return True
    if not (hasattr(sys.stderr, "isatty") and sys.stderr.isatty()):
        return False
    return all(os.get_terminal_size(sys.stderr.fileno()))  # of no size (docker run -t), tqdm hides


def _images_in_all(data: Iterable[Any]) -> int | None:
    """Count what can be counted without reading it: a list of tensors, a DataLoader's data set."""
    if isinstance(data, (list, tuple)) and all(isinstance(b, Tensor) and b.dim() for b in data):
        return sum(map(len, data))
    try:
        return len(data.dataset)  # type: ignore[attr-defined]
    except (AttributeError, TypeError, NotImplementedError):
        return None
