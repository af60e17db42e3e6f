"""Whether data comes in random order, so that its first images stand for all of them."""

from __future__ import annotations

from typing import Any

from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

_RANDOM = RandomSampler, SubsetRandomSampler, WeightedRandomSampler


def in_random_order(data: object) -> bool:
    """Tell whether data is known to be: a DataLoader that shuffles, or what says so of itself.

    A list of batches may be in any order, a folder's by class for instance.
    """
    if isinstance(data, DataLoader):
        # A batch sampler of the user's own hides behind a sampler that is not used.
        sampler: Any = getattr(data.batch_sampler, "sampler", None) or data.sampler
        return isinstance(sampler, _RANDOM) or (
            isinstance(sampler, DistributedSampler) and sampler.shuffle
        )
    return getattr(data, "in_random_order", False) is True
