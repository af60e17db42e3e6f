"""One self-contained HTML page about a conversion: what was done, on what, and how well."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retrofit.atomic_write import write_whole
from retrofit.checking.drift import Drift, drift
from retrofit.errors import RetrofitError
from retrofit.files.checkpoint import check_output
from retrofit.files.provenance import Provenance
from retrofit.report.facts import gather


def check_report(path: Path, *, overwrite: bool) -> None:
    """Raise RetrofitError if `write_report` could not do its work: asked before other work."""
    check_output(path, overwrite=overwrite, suffixes=(".html",))
    if importlib.util.find_spec("matplotlib") is None:
        raise RetrofitError(
            "the report's figures need matplotlib: pip install 'batchnorm-retrofit[report]'"
        )


def measured_drift(
    original: nn.Module,
    converted: nn.Module,
    data: Iterable[Any],
    device: torch.device | str | None = None,
    *,
    progress: bool = True,
) -> tuple[Drift | None, str]:
    """Measure what batch statistics change, or say why that cannot be done.

    The rest of the report does not depend on it, and is worth having when it fails: for pictures
    of several sizes, a model of several inputs, or a memory too small for a batch of 128. What is
    wrong with the data itself is an error, as everywhere.
    """
    watched = _Watched(data)
    try:
        return drift(original, converted, watched, device=device, progress=progress), ""
    except (RetrofitError, RuntimeError) as error:
        if error is watched.error:
            raise
        return None, " ".join(str(error).split())


class _Watched:
    """Batches that keep the error that they end with."""

    error: Exception | None = None

    def __init__(self, data: Iterable[Any]) -> None:
        self.data, self.dataset = data, getattr(data, "dataset", None)

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self.data
        except Exception as error:
            self.error = error
            raise


def write_report(
    path: Path,
    source: str,
    tensors: Mapping[str, Tensor],
    provenance: Provenance,
    *,
    no_drift: str = "",
    overwrite: bool = False,
) -> None:
    """Write the page, whole or not at all.

    Args:
        path: an `.html` file.
        source: the file that the page is about.
        tensors, provenance: what is in it, as `read_weights` returns them.
        no_drift: why the drift could not be measured.
        overwrite: replace an existing file.

    Raises:
        RetrofitError: the path cannot be written; matplotlib is missing; there is no BatchNorm to
            report on; or the file is damaged.
    """
    check_report(path, overwrite=overwrite)
    facts = gather(source, tensors, provenance, no_drift)
    from retrofit.report.page import render  # noqa: PLC0415 - jinja2 and matplotlib, for this alone

    page = render(facts).encode(errors="replace")  # JSON may hold halves of characters
    write_whole(path.resolve(), lambda file: file.write(page))
