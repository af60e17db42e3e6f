"""The keys that a converted model's state dict has, by its plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from retrofit.errors import RetrofitError, warn
from retrofit.numerics.tensor_checks import is_dense
from retrofit.plans import Plan, Site
from retrofit.surgery.record import record_of
from retrofit.tables import few

NAMES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def norm_keys(site: Site) -> list[str]:
    """List the keys of the BatchNorm after a site; the last, a count of batches, may be missing."""
    return [f"{site.batchnorm}.{name}" for name in NAMES]


def converted_keys(plan: Plan) -> set[str]:
    """List all keys of a model's state dict after the plan was carried out."""
    return {*plan.key_map.values(), *(key for site in plan.inserted for key in norm_keys(site))}


def refuse_changed_sites(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Raise RetrofitError for a converted model whose `state` would not load into the plain one.

    That is where a BatchNorm has lost its running statistics or became something else, or where a
    layer before one was pruned or parametrized since. Warns of other changes: a file with a new
    head, say, loads into a network that was given one, too.
    """
    record = record_of(model)
    if record is None:
        return
    expected, modules = converted_keys(record.plan), dict(model.named_modules())
    known = {_place(state[key]) for key in expected if key in state}  # some have several names
    changed = {
        key
        for key in expected ^ state.keys()
        if not key.endswith(NAMES[-1]) and (key not in state or _place(state[key]) not in known)
    }
    for site in record.plan.inserted:
        keys = [key for key in changed if key.startswith((f"{site.layer}.", f"{site.norm}."))]
        shapes = {getattr(state.get(key), "shape", None) for key in norm_keys(site)[:-1]}
        if keys or shapes != {(site.channels,)}:
            norm = type(modules.get(site.norm)).__name__
            raise RetrofitError(
                f"{site.path} and its BatchNorm ({site.norm}, {norm}) are no longer as the "
                f"conversion left them{_said(keys, state)}: load could not read such a file; set "
                "them up like that after loading, or use torch.save(model.state_dict(), path)"
            )
    if changed:
        warn(
            f"this {type(model).__name__} was changed after the conversion "
            f"({few(sorted(changed))}): the file loads into a plain network that was changed in "
            "the same way"
        )


def _place(value: object) -> object:
    stored = isinstance(value, Tensor) and is_dense(value) and value.numel()
    return value.data_ptr() if isinstance(value, Tensor) and stored else id(value)


def _said(keys: list[str], state: Mapping[str, Any]) -> str:
    lost = sorted(key for key in keys if key not in state)
    new = sorted(key for key in keys if key in state)
    parts = [f"{few(which)} {verb}" for which, verb in ((lost, "gone"), (new, "new")) if which]
    return f" ({'; '.join(parts)})" if parts else ""
