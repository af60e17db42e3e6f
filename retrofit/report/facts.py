"""What a file of weights tells of a conversion.

Tensors and provenance come from a file that anybody may have written: no name in it is imported or
followed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from retrofit.calibration.sample_errors import SiteSample
from retrofit.errors import RetrofitError
from retrofit.files.provenance import Provenance
from retrofit.numerics.batchnorm_summary import (
    BatchNormSummary,
    batchnorm_paths,
    keys_of,
    summarised,
)
from retrofit.numerics.comparison import Difference
from retrofit.numerics.tensor_checks import are_statistics
from retrofit.plans import Site

EPS = 1e-5


@dataclass(frozen=True)
class Layer:
    """One layer of the plan, or a BatchNorm of a file that has no plan.

    Attributes:
        number: from 1, in the order of execution; it names the layer in figures.
        path, norm: module paths of the layer in the original, and of its BatchNorm.
        site: the plan's decision; None without a plan.
        channels: None where no BatchNorm was inserted.
        sample, difference: how well its statistics are known, and how its output compares.
    """

    number: int
    path: str
    norm: str
    site: Site | None
    channels: BatchNormSummary | None
    sample: SiteSample | None
    difference: Difference | None


@dataclass(frozen=True)
class Facts:
    """What a page tells.

    Attributes:
        source: name of the file.
        provenance: where it comes from.
        layers: all of them; `inserted` has those with a BatchNorm.
        no_drift: why the drift is not known.
    """

    source: str
    provenance: Provenance
    layers: tuple[Layer, ...]
    no_drift: str

    @property
    def inserted(self) -> list[tuple[int, BatchNormSummary]]:
        """The BatchNorms, with the numbers of their layers."""
        return [(layer.number, layer.channels) for layer in self.layers if layer.channels]


def gather(
    source: str, tensors: Mapping[str, Tensor], provenance: Provenance, no_drift: str = ""
) -> Facts:
    """Gather the facts; RetrofitError for a file that is damaged, or has no BatchNorm."""
    try:
        layers = _layers(tensors, provenance)
    except RetrofitError as error:
        raise RetrofitError(f"{source} cannot be reported on: {error}") from error
    if not any(layer.channels for layer in layers):
        raise RetrofitError(
            f"{source} cannot be reported on: it has no BatchNorm (report takes what convert, or a "
            "training run after it, wrote)"
        )
    return Facts(source, provenance, layers, no_drift)


def _layers(tensors: Mapping[str, Tensor], provenance: Provenance) -> tuple[Layer, ...]:
    plan, eps = provenance.plan, provenance.eps or EPS
    calibration, verification = provenance.calibration, provenance.verification
    samples = {sample.site: sample for sample in calibration.sites} if calibration else {}
    differences = {d.name: d for d in (verification.sites if verification is not None else ())}
    if plan is None:
        return tuple(
            Layer(number, norm, norm, None, _summary(tensors, norm, eps), None, None)
            for number, norm in enumerate(batchnorm_paths(tensors), 1)
        )
    return tuple(
        Layer(
            number,
            site.path,
            site.norm,
            site,
            _summary(tensors, site.batchnorm, eps) if site.norm else None,
            samples.get(site.path),
            differences.get(site.path),
        )
        for number, site in enumerate(plan.sites, 1)
    )


def _summary(tensors: Mapping[str, Tensor], norm: str, eps: float) -> BatchNormSummary:
    found = summarised(tensors, norm, eps)
    mean, var, *_ = (tensors[key] for key in keys_of(norm))
    if not are_statistics(mean, var):
        raise RetrofitError(f"the running statistics of {norm} are not finite, or negative")
    return found
