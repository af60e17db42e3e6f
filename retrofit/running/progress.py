"""How far something has come: a bar on a terminal or in a notebook, and elsewhere one line."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from torch import nn
from tqdm import TqdmWarning

from retrofit.errors import RetrofitError
from retrofit.running.call_arguments import ForwardFn, images_in

with warnings.catch_warnings():  # in a notebook without ipywidgets: it has bars of text then
    warnings.simplefilter("ignore", TqdmWarning)
    from tqdm.auto import tqdm


class ProgressBar(tqdm):  # type: ignore[type-arg]  # a type to type checkers alone
    """A bar over so many units; a widget in a notebook that can show it."""

    def expect(self, total: float | None) -> None:
        """Expect another total; None where that is not known."""
        self.total = total
        widget = getattr(self, "container", None)
        if widget is not None and total:  # which goes by the first one, and is short without
            widget.children[1].max, widget.children[1].layout.width = total, None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Come to the end, unless an error has ended the block: there were no more units."""
        if kind is None:
            self.expect(self.n)
        super().__exit__(kind, error, trace)


def images_bar(
    stage: str,
    model: nn.Module,
    data: Iterable[Any],
    most: int | None,
    forward_fn: ForwardFn | None,
    *,
    shown: bool,
    done: int = 0,
    at_most: bool = False,
) -> ProgressBar:
    """Make a bar over the images of `data`, as far as their number is known.

    Args:
        stage: what is being done, before the bar.
        model, forward_fn: what is called with the batches, and how, which tells the images in them.
        data: batches; a `bar_unit` of its data set names what there are, instead of images.
        most: no more are used.
        shown: whether it is to be seen.
        done: how many were used before.
        at_most: fewer may be enough.
    """
    known = images_in_all(model, data, forward_fn) if shown else None
    total = most if known is None else known if most is None else min(known, most)
    unit = getattr(getattr(data, "dataset", None), "bar_unit", "image")
    return progress_bar(stage, total, unit, shown=shown, done=done, at_most=at_most)


def progress_bar(
    stage: str,
    total: int | None,
    unit: str,
    *,
    shown: bool,
    done: int = 0,
    at_most: bool = False,
) -> ProgressBar:
    """Make a bar over `total` units; a log, where no bar can move, gets a line at its start."""
    drawn = _draws_bars()
    if shown and not drawn:
        most = "up to " if at_most else ""
        count = "" if total is None else f": {most}{total:,} {unit}s"
        if done:
            count += f", after {done:,} before"
        tqdm.write(f"{stage}{count} ...", file=sys.stderr)
    return ProgressBar(
        desc=stage, total=total, initial=done, unit=unit, disable=not (shown and drawn)
    )


def _draws_bars() -> bool:
    """Tell whether stderr is a terminal, or a notebook (which says that it is none)."""
    if type(sys.stderr).__module__.startswith("ipykernel."):
        return True
    if not (hasattr(sys.stderr, "isatty") and sys.stderr.isatty()):
        return False
    return all(os.get_terminal_size(sys.stderr.fileno()))  # of no size (docker run -t), tqdm hides


def images_in_all(
    model: nn.Module, data: Iterable[Any], forward_fn: ForwardFn | None
) -> int | None:
    """Count what can be counted without reading it: a list of batches, a DataLoader's data set."""
    if isinstance(data, (list, tuple)):
        try:
            counts = [images_in(model, batch, forward_fn) for batch in data]
        except RetrofitError:  # which the batch will raise when its turn comes
            return None
        # With a forward_fn 0 may mean that the batch does not tell.
        return sum(counts) if forward_fn is None or all(counts) else None
    try:
        return len(data.dataset)  # type: ignore[attr-defined]
    except (AttributeError, TypeError, NotImplementedError):
        return None
