"""What is fed to BatchNorms, measured in a pass over the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from retrofit.adaptation.running_statistics import Norms
from retrofit.calibration.feeding import Fed, Feed
from retrofit.calibration.processes import Processes
from retrofit.calibration.site_samples import SiteSamples
from retrofit.errors import RetrofitError
from retrofit.numerics.channel_statistics import ChannelStatistics
from retrofit.running.nested import first_tensor

Measured = dict[str, ChannelStatistics]  # by path of the BatchNorm


class Estimate(NamedTuple):
    """The statistics of what BatchNorms got, and what it took to measure them.

    Attributes:
        fed: how much data there was, in all processes.
        measured: in the order of first calls.
        passes: how often the data was gone through.
        held: the most bytes of memory that waiting batches took.
    """

    fed: Fed
    measured: Measured
    passes: int = 1
    held: int = 0


def measured(
    model: nn.Module, norms: Norms, paths: Collection[str], feed: Feed
) -> tuple[Fed, Measured]:
    """Run the data; measure what is fed to the BatchNorms at `paths`, over all their calls.

    Those that were never called are left out; the others are in the order of their first calls.
    """
    samples = SiteSamples({path: norms[path].num_features for path in paths})
    statistics = ChannelStatistics.empty(sum(samples.channels.values()))
    called: dict[str, None] = {}

    def measure(path: str, norm: _BatchNorm, x: Tensor) -> None:
        samples.length = samples.length or len(x)
        if not x.numel() or path not in paths:
            return
        if norm.training and x.numel() == norm.num_features:
            raise RetrofitError(
                f"{path} got a single value for each channel, and one value has no variance: make "
                "all batches larger (drop_last=True), or pass layerwise=True"
            )
        called[path] = None
        samples.take(path, x.detach())

    def learn(_: Fed) -> float:
        nonlocal statistics
        statistics = samples.added_to(statistics)
        return math.inf

    with hooked(norms, measure):
        fed = feed.run(model, samples, needed=learn)
    by_path = samples.split(statistics)
    return fed, {path: by_path[path] for path in called}


@contextmanager
def hooked(norms: Norms, look: Callable[[str, _BatchNorm, Tensor], None]) -> Iterator[None]:
    """Call `look(path, norm, x)` before each call of a BatchNorm with something that it takes."""
    handles = []
    try:
        for path, norm in norms.items():

            def hook(norm: Any, args: Any, kwargs: Any, path: str = path) -> None:
                x = first_tensor(args[0] if args else kwargs)
                if x is not None and x.dim() > 1 and x.shape[1] == norm.num_features:
                    look(path, norm, x)

            handles.append(norm.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def other_data(first: Fed, then: Fed, unless: str = "") -> RetrofitError:
    """Say that a later pass over the data got something else than the first."""
    return RetrofitError(
        f"data gave {first.images} images in {first.batches} batches at first and {then.images} in "
        f"{then.batches} then, or others: layerwise=True needs the same each time{unless}"
    )


def fed_by_all(processes: Processes, fed: Fed) -> Fed:
    """Count what all processes were fed."""
    feds = processes.gather(fed)
    images, batches = sum(one.images for one in feds), sum(one.batches for one in feds)
    return Fed(images, batches, max(one.waited for one in feds))


def measured_by_all(processes: Processes, measured: Measured) -> Measured:
    """Merge what all processes have measured: once, in the first, since processors round apart."""
    if processes.size == 1:
        return measured
    cpu = torch.device("cpu")
    everything = processes.gather({path: one.to(cpu) for path, one in measured.items()})
    merged: Measured = {}
    for found in everything if processes.rank == 0 else ():
        for path, one in found.items():
            merged[path] = merged[path].merge(one) if path in merged else one
    return processes.from_first(merged)
