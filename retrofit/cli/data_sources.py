"""The one door to the data of a command: pictures, or what the user's code gives."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from retrofit.cli.own_sample import OwnData, own_sample
from retrofit.cli.picture_sample import picture_sample
from retrofit.cli.requests import PictureOptions
from retrofit.cli.sample import Sample
from retrofit.errors import RetrofitError
from retrofit.pictures.preparation import Preparation
from retrofit.pictures.sources import Pictures, open_pictures
from retrofit.running.devices import usable

Data = Pictures | OwnData


def check_device(options: PictureOptions) -> None:
    """Raise RetrofitError for a device that nothing can be computed on, before the work is done."""
    if options.device is not None:
        usable(options.device)


def open_data(options: PictureOptions) -> Data:
    """Open the pictures that the options name, or run the code."""
    path = Path(options.data or "")
    if not path.exists() and is_code(str(path)):
        return OwnData(str(path))
    if path.suffix == ".py":
        raise RetrofitError(
            f"{path} is code: name the function in it that gives the data, as in {path}:loader"
        )
    return open_pictures(path, skip_bad=options.skip_bad_images)


def refuse_without_data(options: PictureOptions) -> None:
    """Raise RetrofitError for an option on data where there are none."""
    for name in ("resize", "crop", "mean", "std", "seed", "batch_size", "workers"):
        if options.data is None and name in options.typed:
            raise RetrofitError(f"--{name.replace('_', '-')} needs --data, which it is about")


def is_code(text: str) -> bool:
    """Tell whether this means `file.py:name` or `package.module:name`, rather than a path."""
    source, colon, name = text.rpartition(":")
    is_module = all(part.isidentifier() for part in source.split("."))
    return bool(colon) and name.isidentifier() and (source.endswith(".py") or is_module)


def counted(data: Data) -> tuple[str, int | None]:
    """Count what the data consists of, and name it; None where all has to be read for that."""
    return ("samples", data.count) if isinstance(data, OwnData) else ("pictures", len(data))


def sample_for(
    model: nn.Module,
    spec: str,
    options: PictureOptions,
    weights: str | None = None,
    data: Data | None = None,
    told: Preparation | None = None,
) -> Sample:
    """Open the data, and prepare pictures as the model `spec` with these weights was trained.

    `told` is what a file says of how they were prepared otherwise.
    """
    data = data or open_data(options)
    if isinstance(data, OwnData):
        return own_sample(model, options, data)
    return picture_sample(model, spec, options, weights, data, told)
