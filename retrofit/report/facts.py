"""What a file of weights tells of a conversion.

Tensors and provenance come from a file that anybody may have written: everything is checked, and
no name in it is imported or followed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retrofit.comparison import Difference
from retrofit.drifting import DriftReport
from retrofit.errors import RetrofitError
from retrofit.identity import scale_and_shift
from retrofit.layers import are_channels, are_statistics
from retrofit.moments import CONSTANT
from retrofit.parity import ParityReport
from retrofit.plain import from_plain
from retrofit.plans import Plan, Site
from retrofit.sampling import Calibration, SiteSample

T = TypeVar("T")
NEAR_CONSTANT = 0.01  # of the median sigma of the layer
EPS = 1e-5
TEXTS = ("model", "class", "data", "measured", "date", "retrofit", "torch", "torchvision")


@dataclass(frozen=True)
class Channels:
    """What a BatchNorm holds for each of its C channels.

    Attributes:
        mean, std: the running statistics, float64.
        constant: the channel does not vary, by more than float32 rounds a constant.
        near: it varies, but by less than a hundredth of what is usual in its layer.
        identity: how many channels come out as they go in, bit for bit.
    """

    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    constant: NDArray[np.bool_]
    near: NDArray[np.bool_]
    identity: int

    def __len__(self) -> int:
        return len(self.mean)


@dataclass(frozen=True)
class Layer:
    """One layer of the plan, or a BatchNorm of a file that has no plan.

    Attributes:
        number: from 1, in the order of execution; it names the layer in figures.
        path, norm: module paths of the layer in the original, and of its BatchNorm.
        site: the plan's decision; None without a plan.
        channels: None where no BatchNorm was inserted.
        sample, parity: how well its statistics are known, and how its output compares.
    """

    number: int
    path: str
    norm: str
    site: Site | None
    channels: Channels | None
    sample: SiteSample | None
    parity: Difference | None


@dataclass(frozen=True)
class Parity:
    """A `ParityReport`; in files of older versions, its summary alone.

    Attributes:
        exact, images, top1: as there.
        worst: the largest of the relative differences.
        outputs, sites: as there, perhaps empty.
    """

    exact: bool
    images: int
    top1: float | None
    worst: float
    outputs: tuple[Difference, ...] = ()
    sites: tuple[Difference, ...] = ()


@dataclass(frozen=True)
class Facts:
    """Attributes:
    source: name of the file.
    texts: those of `TEXTS` that the file has.
    eps, momentum, images: of the conversion; None where the file does not say.
    plan: None in a plain state dict.
    layers: all of them; `inserted` has those with a BatchNorm.
    """

    source: str
    texts: dict[str, str]
    eps: float | None
    momentum: float | None
    images: int | None
    plan: Plan | None
    layers: tuple[Layer, ...]
    calibration: Calibration | None
    parity: Parity | None
    drift: DriftReport | None
    no_drift: str

    @property
    def inserted(self) -> list[tuple[int, Channels]]:
        return [(layer.number, layer.channels) for layer in self.layers if layer.channels]


def gather(
    source: str, tensors: Mapping[str, Tensor], provenance: Mapping[str, Any], no_drift: str = ""
) -> Facts:
    """Read and check; RetrofitError for a file that is damaged, or has no BatchNorm."""
    try:
        return _gather(source, tensors, provenance, no_drift)
    except RetrofitError as error:
        raise RetrofitError(f"{source} cannot be reported on: {error}") from error


def _gather(
    source: str, tensors: Mapping[str, Tensor], provenance: Mapping[str, Any], no_drift: str
) -> Facts:
    known = {key: value for key, value in provenance.items() if value is not None}
    texts = {key: _of(str, known[key], key) for key in TEXTS if key in known}
    eps, momentum = (
        _of(float, known[key], key) if key in known else None for key in ("eps", "momentum")
    )
    calibration = _report(Calibration, known, "calibration")
    parity = _parity(known["parity"]) if "parity" in known else None
    plan = Plan.from_json(json.dumps(known["plan"])) if "plan" in known else None
    layers = _layers(tensors, plan, eps or EPS, calibration, parity)
    if not any(layer.channels for layer in layers):
        raise RetrofitError(
            "it has no BatchNorm (report takes what convert, or a training run after it, wrote)"
        )
    return Facts(
        source=source,
        texts=texts,
        eps=eps,
        momentum=momentum,
        images=_of(int, known["images"], "images") if "images" in known else None,
        plan=plan,
        layers=layers,
        calibration=calibration,
        parity=parity,
        drift=_report(DriftReport, known, "drift"),
        no_drift=no_drift,
    )


def _of(kind: type[T], value: Any, key: str) -> T:
    try:
        return from_plain(kind, value)
    except RetrofitError as error:
        raise RetrofitError(f"its metadata is damaged, {key}: {error}") from error


def _report(kind: type[T], known: Mapping[str, Any], key: str) -> T | None:
    return _of(kind, known[key], key) if key in known else None


def _parity(raw: Any) -> Parity:
    raw = _of(dict, raw, "parity")
    top1 = raw.get("top1_agreement")
    parity = Parity(
        exact=_of(bool, raw.get("exact"), "parity"),
        images=_of(int, raw.get("images"), "parity"),
        top1=None if top1 is None else _of(float, top1, "parity"),
        worst=_of(float, raw.get("worst_relative"), "parity"),
    )
    if "outputs" not in raw:
        return parity
    values = {
        "images": parity.images,
        "top1": parity.top1,
        "outputs": raw["outputs"],
        "sites": raw.get("sites"),
    }
    full = _of(ParityReport, values, "parity")
    return Parity(full.exact, full.images, full.top1, parity.worst, full.outputs, full.sites)


def _layers(
    tensors: Mapping[str, Tensor],
    plan: Plan | None,
    eps: float,
    calibration: Calibration | None,
    parity: Parity | None,
) -> tuple[Layer, ...]:
    samples = {sample.site: sample for sample in calibration.sites} if calibration else {}
    differences = {difference.name: difference for difference in parity.sites} if parity else {}
    if plan is None:
        found = [
            key.removesuffix(".running_var") for key in tensors if key.endswith(".running_var")
        ]
        norms = [norm for norm in found if all(key in tensors for key in _keys(norm))]
        return tuple(
            Layer(number, norm, norm, None, _channels(tensors, norm, eps), None, None)
            for number, norm in enumerate(norms, 1)
        )
    return tuple(
        Layer(
            number,
            site.path,
            site.norm,
            site,
            _channels(tensors, site.norm, eps) if site.norm else None,
            samples.get(site.path),
            differences.get(site.path),
        )
        for number, site in enumerate(plan.sites, 1)
    )


def _channels(tensors: Mapping[str, Tensor], norm: str, eps: float) -> Channels:
    missing = [key for key in _keys(norm) if key not in tensors]
    if missing:
        raise RetrofitError(f"it has no {missing[0]}")
    own = [tensors[key] for key in _keys(norm)]
    if not are_channels(own):
        raise RetrofitError(f"the tensors of {norm} are not those of a BatchNorm")
    own = [tensor.detach().cpu() for tensor in own]
    # Of a BatchNorm in half precision torch computes in float32.
    wide = torch.float64 if own[0].dtype == torch.float64 else torch.float32
    own = [tensor.to(wide) for tensor in own]
    if not are_statistics(own[0], own[1]):
        raise RetrofitError(f"the running statistics of {norm} are not finite, or negative")
    mean, var, weight, bias = (tensor.numpy() for tensor in own)
    with np.errstate(all="ignore"):  # of gamma and beta a file may say anything
        alpha, shift = scale_and_shift(mean, var, weight, bias, eps)
    mean, std = mean.astype(np.float64), np.sqrt(var.astype(np.float64))
    constant = std <= CONSTANT * np.abs(mean)
    usual = np.median(std[~constant]) if not constant.all() else 0.0
    near = ~constant & (std < NEAR_CONSTANT * usual)
    return Channels(mean, std, constant, near, int(((alpha == 1) & (shift == 0)).sum()))


def _keys(norm: str) -> list[str]:
    return [f"{norm}.{name}" for name in ("running_mean", "running_var", "weight", "bias")]
