"""What a model draws at random while it is only looked at."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(seed: int = 0, device: torch.device | None = None) -> Iterator[None]:
    """Let the block draw the same each time; the generators are afterwards as they were.

    Those of Python, of numpy (with which some models mask their input in train mode), and torch's
    for the CPU and for `device`; those of other devices are left alone.
    """
    on_gpu = [device] if device is not None and device.type == "cuda" else []
    before = random.getstate(), np.random.get_state()  # noqa: NPY002 - models draw from this one
    with torch.random.fork_rng(on_gpu):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.default_generator.manual_seed(seed)  # torch.manual_seed seeds all devices
        for gpu in on_gpu:
            torch.cuda.default_generators[gpu.index].manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002
