"""The architecture as it is without the BatchNorms that were folded away."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from retrofit.calibration.observer import MomentObserver
from retrofit.errors import RetrofitError
from retrofit.plans import Plan, Site
from retrofit.running.shared_copy import shared_copy
from retrofit.surgery.affine_map import UnfoldableError, affine_map
from retrofit.surgery.native import replace
from retrofit.surgery.record import Record, attach
from retrofit.tracing.operations import channels

M = TypeVar("M", bound=nn.Module)


def skeleton_of(architecture: M, seats: Mapping[str, str], biases: Collection[str]) -> M:
    """Copy the architecture, with what stays of each folded BatchNorm in its place.

    Args:
        architecture: not changed.
        seats: path of each folded BatchNorm to that of its layer.
        biases: names of the folded network's tensors; a layer whose bias is among them gets one.
    """
    skeleton = copy.deepcopy(shared_copy(architecture))  # whose weights will be others
    for path in dict.fromkeys(seats.values()):
        layer = skeleton.get_submodule(path)
        if layer._parameters.get("bias") is None and f"{path}.bias" in biases:
            like = next(layer.parameters())  # a parametrization's, maybe
            layer.bias = nn.Parameter(
                torch.zeros(channels(layer), dtype=like.dtype, device=like.device)
            )
    norms = {path: skeleton.get_submodule(path) for path in seats}
    replace(skeleton, {norm: _rest(path, norm) for path, norm in norms.items()})
    return skeleton


def _rest(path: str, norm: nn.Module) -> nn.Module:
    """Find what folding leaves of a BatchNorm: nothing, or its activation."""
    try:
        return affine_map(norm).rest.train(norm.training)
    except UnfoldableError as error:
        raise RetrofitError(f"{path} cannot be restored: {error.after('its layer')}") from error


class SeatObserver(MomentObserver):
    """Takes any layout: a BatchNorm that was trained there need not be exact."""

    def _refuse_inexact(self, x: Tensor) -> None:
        pass


def observed(skeleton: M, seats: Mapping[str, str], axes: Mapping[str, int]) -> M:
    """Copy the skeleton, with an observer at each seat, for `calibrate`.

    Args:
        skeleton: not changed.
        seats: path of each BatchNorm to that of its layer.
        axes: path of each to the number of spatial axes of what reaches it.
    """
    prepared = shared_copy(skeleton)
    sites = tuple(_site(skeleton, norm, layer, axes[norm]) for norm, layer in seats.items())
    observers: dict[nn.Module, nn.Module] = {}
    for site in sites:
        rest = prepared.get_submodule(site.seat)
        weight = prepared.get_submodule(site.path).weight
        assert isinstance(weight, torch.Tensor)
        observer = SeatObserver(site.path, site.channels, site.dims, weight.device)
        observers[rest] = (
            observer if isinstance(rest, nn.Identity) else nn.Sequential(observer, rest)
        )
    replace(prepared, observers)
    attach(prepared.eval(), Record(plan_for(skeleton, sites), prepared=True))
    return prepared


def plan_for(model: nn.Module, sites: Iterable[Site]) -> Plan:
    """Make the plan that tells `calibrate` and `verify` where the BatchNorms are."""
    return Plan(type(model).__name__, tuple(sites), renumbered=(), last=None, key_map={})


def _site(skeleton: nn.Module, norm: str, layer: str, axes: int) -> Site:
    module = skeleton.get_submodule(layer)
    return Site(
        path=layer,
        kind=type(module).__name__,
        channels=channels(module),
        dims=axes,  # type: ignore[arg-type]
        calls=1,
        decision="insert",
        reason="its BatchNorm was folded away",
        host=norm,
        layer=layer,
        norm=norm,
        seat=norm,
    )
