"""Where a file of weights comes from: what `save` writes beside the tensors, checked when read."""

from __future__ import annotations

import datetime
import functools
import math
from dataclasses import dataclass, replace
from typing import Any, get_type_hints

import torch
import torchvision
from torch import nn

from retrofit.calibration.sample_errors import Calibration
from retrofit.checking.drift import Drift
from retrofit.checking.verify import Verification
from retrofit.errors import RetrofitError
from retrofit.files.batchnorm_settings import current_record
from retrofit.files.model_args import ModelArgs, check_model_args, in_words
from retrofit.json_values import from_plain, to_plain
from retrofit.pictures.preparation import Preparation
from retrofit.plans import Plan
from retrofit.surgery.record import Record
from retrofit.version import __version__

Argument = bool | int | float | str | tuple[bool | int | float | str, ...] | None
# Names in files that differ from those of the attributes.
KEYS = {"model_class": "class"}


@dataclass(frozen=True)
class Provenance:
    """Where weights come from. None is what a file does not say; a plain state dict says nothing.

    Attributes:
        retrofit, torch, torchvision: versions that wrote the file.
        date: when, in ISO 8601 and UTC.
        model: what the model is, as for `save(name=...)`.
        model_args: what the function that builds it is called with, by name.
        weights: the name of torchvision's weights that the model was built for, if it was.
        model_class: its class.
        eps, momentum: of the inserted BatchNorms.
        images: how many are behind their statistics.
        data: what the statistics are of, in words.
        preparation: how pictures were prepared, where that is not as the model was trained.
        measured: what `retrofit report` has measured anew, in words.
        calibration, verification, drift: what these functions found.
        plan: where the BatchNorms are.
    """

    retrofit: str | None = None
    torch: str | None = None
    torchvision: str | None = None
    date: str | None = None
    model: str | None = None
    model_args: dict[str, Argument] | None = None
    weights: str | None = None
    model_class: str | None = None
    eps: float | None = None
    momentum: float | None = None
    images: int | None = None
    data: str | None = None
    preparation: Preparation | None = None
    measured: str | None = None
    calibration: Calibration | None = None
    verification: Verification | None = None
    drift: Drift | None = None
    plan: Plan | None = None

    @property
    def call(self) -> str | None:
        """The model with its arguments, to be read."""
        arguments = f"({in_words(self.model_args)})" if self.model_args else ""
        return None if self.model is None else self.model + arguments

    @property
    def record(self) -> Record | None:
        """What a model that is loaded from the file carries; None without a plan."""
        if self.plan is None or self.eps is None:
            return None
        return Record(self.plan, self.eps, self.momentum, self.images or 0)

    def to_json(self) -> dict[str, Any]:
        """Turn it into plain values, for `from_json`."""
        return {KEYS.get(key, key): value for key, value in to_plain(self).items()}

    @classmethod
    def from_json(cls, values: object) -> Provenance:
        """Read what `to_json` made, and what earlier versions wrote.

        Raises RetrofitError for a value of another type, with its key; other keys are passed over.
        """
        if not isinstance(values, dict):
            raise RetrofitError(f"its metadata is damaged: a {type(values).__name__}, no object")
        values = _today(values)
        read: dict[str, Any] = {}
        for name, kind in _types().items():
            key = KEYS.get(name, name)
            try:
                read[name] = from_plain(kind, values.get(key))
            except (RetrofitError, RecursionError) as error:
                raise RetrofitError(f"its metadata is damaged, {key}: {error}") from error
        found = cls(**read)
        if found.plan is not None and not (found.eps is not None and 0 < found.eps < math.inf):
            raise RetrofitError(f"its metadata is damaged, eps: {found.eps} of a converted model")
        return found


def provenance_of(
    model: nn.Module,
    *,
    name: str | None = None,
    model_args: ModelArgs | None = None,
    weights: str | None = None,
    data: str | None = None,
    preparation: Preparation | None = None,
    calibration: Calibration | None = None,
    verification: Verification | None = None,
    drift: Drift | None = None,
) -> Provenance:
    """Say where a model comes from; the arguments are those of `save`.

    Raises RetrofitError for an argument of another type, which `from_json` would refuse; or for
    BatchNorms of several eps.
    """
    found = Provenance(
        retrofit=__version__,
        torch=torch.__version__,
        torchvision=torchvision.__version__,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        model=name,
        model_args=check_model_args(model_args) or None,
        weights=weights,
        model_class=type(model).__name__,
        data=data,
        preparation=preparation,
        calibration=calibration,
        verification=verification,
        drift=drift,
    )
    if (record := current_record(model)) is not None:
        kept = {name: getattr(record, name) for name in ("eps", "momentum", "images", "plan")}
        found = replace(found, **kept)
    for key, kind in _types().items():
        argument = "name" if key == "model" else key
        try:
            from_plain(kind, to_plain(getattr(found, key)))
        except RetrofitError as error:
            raise RetrofitError(f"{argument}= cannot be stored: {error}") from error
    return found


@functools.cache
def _types() -> dict[str, Any]:
    return get_type_hints(Provenance)


def _today(values: dict[str, Any]) -> dict[str, Any]:
    """Rename what the version before 0.1.0 called otherwise."""
    parity = values.get("parity")
    if "verification" in values or not isinstance(parity, dict) or "outputs" not in parity:
        return values
    tensors = {key: parity.get(key) for key in ("images", "outputs", "sites")}
    return {**values, "verification": {**tensors, "top1": parity.get("top1_agreement")}}
