"""What inserted BatchNorms compute with beside their tensors: eps and momentum, as they are now."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from torch import nn

from retrofit.errors import RetrofitError, warn
from retrofit.surgery.record import Record, record_of
from retrofit.tables import few


class Settings(NamedTuple):
    """Of one BatchNorm; by default what torch gives it, and `load` where a file does not say."""

    eps: float = 1e-5
    momentum: float | None = 0.1


def current_record(model: nn.Module) -> Record | None:
    """Read the model's record, with what its BatchNorms have now in place of what they were given.

    Warns of several momenta, of which the record keeps the first. Raises RetrofitError for several
    eps: load would set one, and the model compute something else.
    """
    record = record_of(model)
    if record is None or not record.plan.inserted:
        return record
    settings = _settings(model, record)
    first = next(iter(settings.values()))
    if others := [path for path, own in settings.items() if own.eps != first.eps]:
        raise RetrofitError(
            f"the BatchNorms have several eps ({settings[others[0]].eps} at {few(others)}, "
            f"{first.eps} before), and a file says one of all: set them alike, or use "
            "torch.save(model.state_dict(), path)"
        )
    if others := [path for path, own in settings.items() if own != first]:
        warn(
            f"the BatchNorms have several momenta ({settings[others[0]].momentum} at "
            f"{few(others)}, {first.momentum} before), and a file says one of all: load gives each "
            f"{first.momentum}"
        )
    return replace(record, eps=first.eps, momentum=first.momentum)


def warn_of_unusual(model: nn.Module, file: str) -> None:
    """Warn where `load` will set up the BatchNorms of a plain state dict, in `file`, otherwise."""
    record = record_of(model)
    settings = _settings(model, record) if record else {}
    usual = Settings()
    if others := [path for path, own in settings.items() if own != usual]:
        own = settings[others[0]]
        other = ", and the model will compute something else" if own.eps != usual.eps else ""
        warn(
            f"{file} does not hold eps and momentum of its BatchNorms ({own.eps} and "
            f"{own.momentum} at {few(others)}): load gives them {usual.eps} and {usual.momentum}"
            f"{other}; save it as .safetensors, or set them again after loading"
        )


def _settings(model: nn.Module, record: Record) -> dict[str, Settings]:
    paths = [site.batchnorm for site in record.plan.inserted]
    norms = {path: model.get_submodule(path) for path in paths}
    return {
        path: Settings(getattr(norm, "eps", record.eps), getattr(norm, "momentum", record.momentum))
        for path, norm in norms.items()
    }
