"""A progress bar over images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def images_bar(
    stage: str, data: Iterable[Any], most: int | None, *, shown: bool, done: int = 0
) -> tqdm[Any]:
    """Make a bar over the images of `data`, as far as their number is known.

    Args:
        stage: what is being done, before the bar.
        data: batches; a DataLoader's data set has a length.
        most: no more are used.
        shown: whether it is to be seen.
        done: how many were used before.
    """
    total = most
    try:
        known = len(data.dataset)  # type: ignore[attr-defined]
        total = known if total is None else min(known, total)
    except (AttributeError, TypeError, NotImplementedError):
        pass
    return tqdm(desc=stage, total=total, initial=done, unit="img", disable=not shown)
