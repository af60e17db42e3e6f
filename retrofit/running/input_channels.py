"""How many channels the pictures have that a network takes, and of which precision they are."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode

from retrofit.errors import RetrofitError
from retrofit.running.call_arguments import call_model
from retrofit.running.modes import eager, evaluating
from retrofit.running.random_numbers import seeded
from retrofit.running.shared_copy import shared_copy

COLOURS = 3


def input_dtype(model: nn.Module) -> torch.dtype:
    """Find the precision of the network: that of its first parameter, or float32 without one."""
    parameters = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(parameters, torch.float32)


def input_channels(model: nn.Module, size: Sequence[int]) -> int | None:
    """Find how many channels `model` takes; None if that cannot be told.

    Runs a copy of it up to the first convolution or linear layer that reads the picture, which has
    as many channels as fit that layer: 3 if those do, else what its weight asks for, else, where
    forward takes no 3, what one of the convolutions takes. So it does not matter where that layer
    is defined, nor whether forward flattens the picture or folds its pixels into channels before.

    Args:
        model: takes batches (N, C, H, W), or lists of (C, H, W).
        size: height and width of the pictures.
    """
    try:
        copied = shared_copy(model)
    except RetrofitError:  # whatever is done with the model will say so
        return None
    first = _first_layer(copied, COLOURS, size)
    if first is not None and first.fits:
        return COLOURS
    guesses = [m.in_channels for m in model.modules() if isinstance(m, _ConvNd)]
    if first is not None and COLOURS * first.takes % first.gets == 0:
        guesses.insert(0, COLOURS * first.takes // first.gets)
    for guess in dict.fromkeys(guesses):
        layer = _first_layer(copied, guess, size) if guess > 0 else None
        if layer is not None and layer.fits:
            return guess
    return None


class _Layer(NamedTuple):
    """The channels, or features, that a layer gets and those that its weight takes."""

    gets: int
    takes: int

    @property
    def fits(self) -> bool:
        return self.gets == self.takes


class _FoundError(BaseException):  # no Exception, which forward might catch
    def __init__(self, layer: _Layer) -> None:
        self.layer = layer


def _first_layer(model: nn.Module, channels: int, size: Sequence[int]) -> _Layer | None:
    """Run the model up to the first layer that reads pictures of so many channels."""
    # Of NaN, which marks all that is computed from the pictures, and not from weights alone.
    pictures = torch.full((2, channels, *size), torch.nan, dtype=input_dtype(model), device="cpu")
    try:
        with evaluating(model), seeded(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run that counts will warn
            with torch.no_grad(), eager(), _UpToTheFirstLayer():  # type: ignore[no-untyped-call]
                call_model(model, pictures, None)
    except _FoundError as found:
        return found.layer
    except Exception:  # noqa: BLE001 - a model may raise anything for pictures that do not fit it
        return None
    return None


class _UpToTheFirstLayer(TorchDispatchMode):
    """Raises _FoundError where a convolution or a matrix of weights meets what is NaN."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        with self:  # in inference mode operations come as they were called
            parts = func.decompose(*args, **(kwargs or {}))
        if parts is not NotImplemented:
            return parts
        layer = _layer(func.overloadpacket.__name__, args)
        if layer is not None:
            raise _FoundError(layer)
        return func(*args, **(kwargs or {}))


def _layer(name: str, args: tuple[Any, ...]) -> _Layer | None:
    """Read a call of ATen; None if it is no layer, or one that fits any number of channels."""
    if name in ("convolution", "_convolution"):
        x, weight, transposed, groups = args[0], args[1], args[6], args[8]
        layer = _Layer(x.shape[1], weight.shape[0] if transposed else weight.shape[1] * groups)
        if groups > 1 and groups == layer.gets and layer.fits:  # a filter made for this picture?
            return None
    elif name in ("addmm", "mm"):
        x, matrix = args[-2:]
        layer = _Layer(x.shape[1], matrix.shape[0])
    else:
        return None
    return layer if isinstance(x, Tensor) and bool(x.isnan().any()) else None
