"""How much memory a computation may take."""

from __future__ import annotations

import os
from pathlib import Path

import torch

UNKNOWN = 8 << 30  # where the system does not tell
# Where Linux says what a container may use: version 2 of control groups, and version 1.
LIMITS = "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"


def memory_of(device: torch.device | None) -> int:
    """Return the bytes of memory of a device, for the CPU those that this process may use."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    texts = (Path(path).read_text().strip() for path in LIMITS if Path(path).exists())
    limits = [int(text) for text in texts if text.isdecimal()]  # "max": none
    return min([_physical(), *limits])


def _physical() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return UNKNOWN
