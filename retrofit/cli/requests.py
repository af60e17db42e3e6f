"""What a command is asked to do: one dataclass for each."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrofit.pictures.preparation import Preparation
from retrofit.plans import LayoutName, Placement
from retrofit.sample_sizes import default_tolerance

DRIFT_IMAGES = 128  # one batch of the largest size that a report shows
TEST_IMAGES = 16
BATCH_SIZE = 8


@dataclass(frozen=True)
class Telling:
    """How the result of a command is told.

    Attributes:
        json: as one object.
        quiet: not at all, but for warnings and errors.
        debug: errors with a traceback.
    """

    json: bool
    quiet: bool
    debug: bool


@dataclass(frozen=True)
class PictureOptions:
    """Which pictures or samples, in which order, and how they become the input of a model.

    Attributes:
        data: where they are; None if the command goes without.
        images: use at most so many; None for the command's own choice.
        seed: of the shuffle; None and 0 are the same.
        batch_size, workers: samples in a batch, and processes that read them; None for the default.
        preparation: how pictures are prepared otherwise than the model, or a file, says.
        skip_bad_images: leave out what cannot be read.
        device: where the model runs, as torch names it.
    """

    data: Path | None
    seed: int | None
    preparation: Preparation
    skip_bad_images: bool
    batch_size: int | None = None
    images: int | None = None
    workers: int | None = None
    device: str | None = None

    @property
    def typed(self) -> dict[str, Any]:
        """The options that were typed, or have a default of the command's, by name."""
        values = {**vars(self), **self.preparation.given}
        given = (item for item in values.items() if item[1] is not None and item[1] is not False)
        return dict(given)


@dataclass(frozen=True)
class PlanOptions:
    """Where BatchNorms go; see `retrofit.plan`."""

    include: list[str] | None
    exclude: list[str] | None
    layout: LayoutName
    placement: Placement
    linear: bool


@dataclass(frozen=True)
class PlanRequest:
    """Show what happens to every convolution of a model, and why."""

    model: str
    model_args: dict[str, Any]
    plan: PlanOptions
    pictures: PictureOptions


@dataclass(frozen=True)
class ConvertRequest:
    """Insert calibrated BatchNorms, verify, save."""

    model: str
    model_args: dict[str, Any]
    weights: str | None
    weights_key: str | None
    plan: PlanOptions
    pictures: PictureOptions
    output: Path
    overwrite: bool
    tolerance: float | None
    state: Path | None
    skip_unused: bool
    report: Path | None


@dataclass(frozen=True)
class VerifyRequest:
    """Compare a converted file with the original weights."""

    file: Path
    model: str | None
    model_args: dict[str, Any]
    weights: str | None
    weights_key: str | None
    tolerance: float
    pictures: PictureOptions


@dataclass(frozen=True)
class FoldRequest:
    """Absorb the BatchNorms of a file into its convolutions."""

    file: Path
    model: str | None
    model_args: dict[str, Any]
    weights_key: str | None
    output: Path
    overwrite: bool
    pictures: PictureOptions


@dataclass(frozen=True)
class AdaptRequest:
    """Re-estimate the BatchNorm statistics of a file on unlabelled pictures."""

    file: Path
    model: str | None
    model_args: dict[str, Any]
    weights_key: str | None
    output: Path
    overwrite: bool
    prior: float
    pictures: PictureOptions


@dataclass(frozen=True)
class RestoreRequest:
    """Bring folded weights back into their own class, whose BatchNorms learn again."""

    model: str
    model_args: dict[str, Any]
    weights: str
    weights_key: str | None
    output: Path
    overwrite: bool
    tolerance: float | None
    pictures: PictureOptions


def default_workers() -> int:
    """Choose how many processes read."""
    return min(4, os.cpu_count() or 1)


def tolerance_of(request: ConvertRequest | RestoreRequest) -> float:
    """Choose the tolerance at which the calibration ends; 0 for one that uses all pictures."""
    asked = request.tolerance
    return default_tolerance(request.pictures.images) if asked is None else asked


def may_end_early(request: ConvertRequest | RestoreRequest) -> bool:
    """Tell whether the calibration may end before the last picture."""
    return tolerance_of(request) > 0


@dataclass(frozen=True)
class InspectRequest:
    """Show where a file comes from and what its BatchNorms hold."""

    file: Path
    weights_key: str | None


@dataclass(frozen=True)
class ReportRequest:
    """Write a page about a file that convert wrote."""

    file: Path
    model: str | None
    model_args: dict[str, Any]
    weights: str | None
    weights_key: str | None
    output: Path
    overwrite: bool
    pictures: PictureOptions


@dataclass(frozen=True)
class DemoRequest:
    """Run the whole pipeline on a small VGG and pictures of CIFAR-10."""

    output: Path


def reading(request: Request) -> str:
    """Name what a command has to read before it can begin."""
    named = [getattr(request, name, None) for name in ("file", "model", "weights")]
    named.append(getattr(getattr(request, "pictures", None), "data", None))
    return ", ".join(str(name) for name in named if name is not None) or "the demo"


Request = (
    PlanRequest
    | ConvertRequest
    | VerifyRequest
    | FoldRequest
    | AdaptRequest
    | RestoreRequest
    | InspectRequest
    | ReportRequest
    | DemoRequest
)
