"""Seats: the nn.Identity that folding leaves where a BatchNorm was, which takes one again."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from retrofit.tracing.calls import Call

# What people call their BatchNorms: bn1, conv_bn, norm, batch_norm, normalization.
NAME = re.compile(r"bn|norm", re.IGNORECASE)


def seat_after(model: nn.Module, calls: Sequence[Call]) -> str:
    """Find the path of the nn.Identity that alone reads each of these calls of one layer.

    fold, torch.ao's fuse_modules and others leave it where they took a BatchNorm. A dropout, an
    activation or a shortcut that is switched off is an nn.Identity too: a seat is named like a
    norm, or comes right after the layer in one nn.Sequential. "" where there is none.
    """
    readers = {call.users for call in calls}
    found = {reader.path for users in readers for reader in users}
    if len(found) != 1 or not all(len(users) == 1 for users in readers):
        return ""
    (seat,) = found
    reader = next(iter(readers))[0]
    free = type(reader.module) is nn.Identity and not _is_hooked(reader.module)
    return seat if free and _stands_for_a_norm(model, calls[0].path, seat) else ""


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _stands_for_a_norm(model: nn.Module, layer: str, seat: str) -> bool:
    around, _, name = seat.rpartition(".")
    if not name.isdecimal():
        return bool(NAME.search(name))
    before = f"{around}.{int(name) - 1}".lstrip(".")
    return isinstance(model.get_submodule(around), nn.Sequential) and layer == before
