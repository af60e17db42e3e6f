"""What moments depend on, and what two calibrations differ in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from retrofit.observer import MomentObserver
from retrofit.plans import Plan


def fingerprint(prepared: nn.Module, plan: Plan) -> dict[str, Any]:
    """Of a prepared model: its class, its plan, and a digest of each of its tensors."""
    mine = {id(t) for m in prepared.modules() if isinstance(m, MomentObserver) for t in m.buffers()}
    state = prepared.state_dict(keep_vars=True)
    tensors = {k: t for k, t in state.items() if isinstance(t, Tensor) and id(t) not in mine}
    return {
        "class": type(prepared).__name__,
        "plan": {site.path: f"{site.norm}, {site.calls}" for site in plan.inserted},
        "weights": {name: digest(tensor) for name, tensor in tensors.items()},
    }


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What `other` differs in, in a few words; "" if in nothing."""
    for name, value in one.items():
        found = other.get(name)
        if value == found:
            continue
        if isinstance(value, dict) and isinstance(found, dict):
            keys = [key for key in {**value, **found} if value.get(key) != found.get(key)]
            more = f" and {len(keys) - 1} more" if keys[1:] else ""
            return f"different {name} at {keys[0]}{more}"
        return f"a different {name} ({found}, not {value})"
    return ""


def digest(tensor: Tensor | None) -> str:
    """Of the bits of a tensor."""
    if tensor is None or tensor.is_meta:
        return "-"
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    found.update(plain.data)
    return found.hexdigest()[:32]
