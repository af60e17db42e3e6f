"""The plan of a converted model, found again by the keys of its state dict."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from retrofit.errors import RetrofitError
from retrofit.files.converted_keys import converted_keys, norm_keys
from retrofit.files.fitting import fits
from retrofit.files.provenance import Provenance
from retrofit.files.weights import WeightsFile
from retrofit.planning.plan import plan, without
from retrofit.plans import Plan
from retrofit.running.shared_copy import shared_copy
from retrofit.surgery.native import take_out
from retrofit.surgery.record import attach

# What else `plan` may have been asked for: the keys tell where the BatchNorms of each of them are.
OTHER_PLANS: tuple[dict[str, Any], ...] = (
    {"include": "*"},
    {"include": "*", "linear": True},
    {"include": "*", "placement": "post_activation"},
    {"include": "*", "placement": "post_activation", "linear": True},
)


def plan_by_keys(model: nn.Module, file: WeightsFile, key: str | None) -> Plan:
    """Find the plan whose BatchNorms are those of a file; the default plan where none is."""
    default = _less(plan(model), model, {}, file, key)
    if places(default, file, key):
        return default
    for options in OTHER_PLANS:
        with suppress(RetrofitError):  # of a model without convolutions, say
            other = _less(plan(model, **options), model, options, file, key)
            if places(other, file, key):
                return other
    return default


def places(made: Plan, file: WeightsFile, key: str | None) -> list[str]:
    """List where a file has the keys that a model has after the plan was carried out."""
    found = fits(file, dict.fromkeys(converted_keys(made)), key)
    return [fit.place for fit in found if fit.exact]


def keys_tell(made: Plan, model: nn.Module, state: Mapping[str, Any]) -> bool:
    """Tell whether `load` will find the plan of a converted model again by its keys alone."""
    if made.layout == "graph":
        return False
    try:
        plain = shared_copy(model)
        take_out(plain, made)
        attach(plain, None)
        file = WeightsFile(Path(), {"": dict(state)}, Provenance())
        found = plan_by_keys(plain, file, None)
    except RetrofitError:  # of a model that cannot be planned without an example, say
        return False
    return _norms(found) == _norms(made)


def _norms(made: Plan) -> dict[str, str]:
    return {site.path: site.batchnorm for site in made.inserted}


def _less(
    made: Plan, model: nn.Module, options: dict[str, Any], file: WeightsFile, key: str | None
) -> Plan:
    """Make the plan anew without what was excluded, or left out for what its data showed."""
    state = fits(file, dict.fromkeys(converted_keys(made)), key)[0].state
    less, absent = made, list[str]()
    while gone := [site.path for site in less.inserted if norm_keys(site)[2] not in state]:
        # In a renumbered Sequential each BatchNorm that is not there moves those after it.
        absent += gone[:1] if made.renumbered else gone
        less = without(model, made, absent)
    return plan(model, **options, exclude=absent) if absent else made
