"""The module that learns the moments of what passes through it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from typing_extensions import Self

from retrofit.errors import RetrofitError
from retrofit.numerics.batch_table import BatchTable
from retrofit.numerics.channel_statistics import ChannelStatistics
from retrofit.numerics.moments import ChannelMoments, Moments
from retrofit.numerics.reductions import finite
from retrofit.option_checks import check_models
from retrofit.surgery.record import Record, record_of


class MomentObserver(nn.Module):
    """Returns its input, and learns the moments of its channels.

    Its buffers are the fields of a `ChannelStatistics`, so that it saves, moves and loads as any
    module does. They are float64, and stay so through `.half()` and `.to(dtype)`.

    Args:
        site: module path of the observed layer, for messages.
        channels: C.
        dims: spatial axes of the input: (N, C) + dims axes.
        device: where the statistics are kept, or the CPU if that has no float64.
        last_axis: the channels are the last axis instead, after any number of others: (N, ..., C).

    Attributes:
        statistics: what it has learned.
        receive: takes the activations, (N, C, ...), instead of the observer itself: `calibrate`
            adds those of all observers up at once.
    """

    receive: Callable[[str, Tensor], None] | None = None

    def __init__(
        self,
        site: str,
        channels: int,
        dims: int,
        device: torch.device | None,
        last_axis: bool = False,
    ) -> None:
        super().__init__()
        self.site, self.channels, self.dims, self.last_axis = site, channels, dims, last_axis
        empty = ChannelStatistics.empty(channels, _float64_device(device) or "cpu")
        for name, tensor in empty.tensors().items():
            self.register_buffer(name, tensor)

    @property
    def statistics(self) -> ChannelStatistics:
        return ChannelStatistics(**dict(self.named_buffers()))

    @statistics.setter
    def statistics(self, new: ChannelStatistics) -> None:
        # Buffers are replaced, never written to: what was read before stays as it was.
        for name, tensor in new.to(self.get_buffer("mean").device).tensors().items():
            self._buffers[name] = tensor

    @property
    def seen(self) -> int:
        """How many samples it has learned from."""
        return int(self.get_buffer("samples")[0])

    def extra_repr(self) -> str:
        return f"{self.channels}, site={self.site!r}, samples={self.seen}"

    def forward(self, x: Tensor) -> Tensor:
        """Learn from x, (N, C, ...) or for a Linear layer (N, ..., C), and return it.

        Raises RetrofitError for what a BatchNorm here could not take, and in training mode.
        """
        self._refuse_unfit(x)
        if x.numel():
            values = x.detach() if x.requires_grad else x
            channels_second = values.movedim(-1, 1) if self.last_axis else values
            if self.receive is None:
                self.learn(channels_second)
            else:
                self.receive(self.site, channels_second)
        return x

    def learn(self, x: Tensor) -> None:
        """Add samples of shape (N, C, ...), of at least one element, to what is known.

        Raises NonFiniteError for a NaN or Inf.
        """
        self.statistics = self.statistics.add(BatchTable.of([[finite(x, self.site)]]))

    def moments(self) -> Moments:
        """Compute the moments of everything seen so far, on the CPU.

        Raises RetrofitError where nothing was.
        """
        if not self.seen:
            raise RetrofitError(
                f"{self.site} saw no data: run calibration data through the prepared model; if "
                "that was done, the model does not call this layer in eval mode, so exclude it"
            )
        return self.statistics.moments()

    def _refuse_unfit(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise RetrofitError(
                f"{self.site} returns a {type(x).__name__}, not a tensor: exclude this layer"
            )
        if self.training:
            raise RetrofitError(
                f"the observer of {self.site} ran in training mode: call model.eval() first, "
                "or dropout and existing BatchNorms bias the moments"
            )
        if x.dim() < 2 if self.last_axis else x.dim() != self.dims + 2:
            axes = "at least 2" if self.last_axis else str(self.dims + 2)
            raise RetrofitError(
                f"{self.site} got a tensor of shape {tuple(x.shape)}: expected a batch with "
                f"{axes} axes; add the batch axis with x.unsqueeze(0)"
            )
        channels = x.shape[-1 if self.last_axis else 1]
        if channels != self.channels:
            raise RetrofitError(
                f"{self.site} returns {channels} channels, not the {self.channels} that it says it "
                "has: exclude this layer"
            )
        self._refuse_inexact(x)

    def _refuse_inexact(self, x: Tensor) -> None:
        if not (x.is_contiguous() if self.last_axis else _has_exact_kernel(x)):
            raise RetrofitError(
                f"{self.site} returns a tensor that is neither contiguous nor channels_last (a "
                "slice, it seems): a BatchNorm after it would not be exact; exclude this layer"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: ARG002
        """Follow to another device, never to another dtype."""
        device = _float64_device(fn(torch.empty(0, device=self.statistics.mean.device)).device)
        for name, tensor in self.statistics.to(device).tensors().items():
            self._buffers[name] = tensor
        return self


def observers_of(model: nn.Module) -> list[MomentObserver]:
    """List the observers in a model, in its order."""
    return [module for module in model.modules() if isinstance(module, MomentObserver)]


def prepared_record(model: nn.Module, function: str) -> Record:
    """Read the record of a prepared model; RetrofitError for any other one."""
    check_models(function, model)
    record = record_of(model)
    if record is None:
        raise RetrofitError(
            f"{function} takes a model made by prepare, and this {type(model).__name__} is not "
            "prepared: call prepared = retrofit.prepare(model) first"
        )
    if not record.prepared:
        raise RetrofitError(
            f"{function} takes a model made by prepare, and this {type(model).__name__} is "
            "converted already: recalibrate measures its BatchNorms anew"
        )
    return record


def channel_moments(prepared: nn.Module) -> dict[str, ChannelMoments]:
    """Return what the observers of a prepared model have learned, by path of the observed layer.

    Args:
        prepared: made by `prepare`, after calibration; empty for a model without observers.

    Returns:
        For each site mean and unbiased variance of its channels, float64 (C,) on the CPU.

    Raises:
        RetrofitError: a site saw no data.
    """
    check_models("channel_moments", prepared)
    found = {observer.site: observer.moments() for observer in observers_of(prepared)}
    return {site: ChannelMoments(moments.mean, moments.var) for site, moments in found.items()}


def _has_exact_kernel(x: Tensor) -> bool:
    """Tell whether torch's CPU kernel computes x * alpha + shift for this memory format."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    dense = x.is_contiguous()
    return dense or (x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()]))


def _float64_device(device: torch.device | None) -> torch.device | None:
    """Say where float64 lives: on the CPU for a device that has none."""
    return torch.device("cpu") if device is not None and device.type == "mps" else device
