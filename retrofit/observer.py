"""The module that learns the moments of what passes through it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Self

from retrofit.errors import RetrofitError
from retrofit.moments import Moments, Spread, merge, pooled, spread, stretches, together
from retrofit.reductions import Samples, finite, reduced

State = Mapping[str, Tensor]


class ChannelMoments(NamedTuple):
    """Of one site: mean and unbiased variance of each channel, float64 (C,) on the CPU."""

    mean: Tensor
    var: Tensor


def channel_moments(prepared: nn.Module) -> dict[str, ChannelMoments]:
    """What the observers of a prepared model have learned, by path of the observed layer.

    Empty for a model without observers.

    Raises:
        RetrofitError: a site saw no data.
    """
    observers = [m for m in prepared.modules() if isinstance(m, MomentObserver)]
    found = {observer.site: observer.moments() for observer in observers}
    return {site: ChannelMoments(moments.mean, moments.var) for site, moments in found.items()}


class MomentObserver(nn.Module):
    """Returns its input, and learns the moments of its channels.

    The sample is kept as up to 16 consecutive stretches, so that its beginning can be compared
    with its end. The moments are float64, and stay so through `.half()` and `.to(dtype)`.

    Args:
        site: module path of the observed layer, for messages.
        channels: C.
        dims: spatial axes of the input: (N, C) + dims axes.
        last_axis: the channels are the last axis instead, after any number of others: (N, ..., C).

    Buffers:
        count: (16,), elements of each channel in a stretch; on the CPU, whatever the device.
        mean, M2: (16, C), mean and sum of squared deviations of a stretch.
        weight, centre, spread: how the samples differ, as in `retrofit.moments.Spread`: a scalar
            on the CPU, (C,) and (5, C).
        images, batches: int64 scalars; the number of samples, and of calls.
    """

    STRETCHES = 16
    checks = True  # look for NaN at once; else it is up to the caller
    count: Tensor
    mean: Tensor
    M2: Tensor
    weight: Tensor
    centre: Tensor
    spread: Tensor
    images: Tensor
    batches: Tensor

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
        shapes = {"mean": (self.STRETCHES, channels), "M2": (self.STRETCHES, channels)}
        for name, shape in {**shapes, "centre": (channels,), "spread": (5, channels)}.items():
            table = torch.zeros(shape, dtype=torch.float64, device=_home(device))
            self.register_buffer(name, table)
        self.register_buffer("count", torch.zeros(self.STRETCHES, dtype=torch.float64))
        self.register_buffer("weight", torch.zeros((), dtype=torch.float64))
        self.register_buffer("images", torch.zeros((), dtype=torch.int64))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def extra_repr(self) -> str:
        return f"{self.channels}, site={self.site!r}, images={int(self.images)}"

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise RetrofitError(
                f"{self.site} returns a {type(x).__name__}, not a tensor: exclude this layer"
            )
        if self.training:
            raise RetrofitError(
                f"the observer of {self.site} ran in training mode: call model.eval() first, "
                "or dropout and existing BatchNorms falsify the moments"
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
        if not (x.is_contiguous() if self.last_axis else _is_dense(x)):
            raise RetrofitError(
                f"{self.site} returns a tensor that is neither contiguous nor channels_last (a "
                "slice, it seems): a BatchNorm after it would not be exact; exclude this layer"
            )
        if x.numel():
            self.learn(x.detach().movedim(-1, 1) if self.last_axis else x.detach())
        return x

    def learn(self, x: Tensor) -> None:
        """Add samples of shape (N, C, ...), of at least one element, to what is known."""
        # The first batch counts as two stretches, so that even a single one has two halves.
        first = 0
        for part in [x] if self.batches else x.chunk(2):
            samples = finite(part, self.site, first, len(x)) if self.checks else reduced(part)
            self._append(together(samples))
            self._compare(samples)
            first += len(part)
        self.batches = self.batches + 1

    # Buffers are replaced, never written to, so that `state()` is a snapshot that costs nothing.

    def state(self) -> dict[str, Tensor]:
        """What was learned so far."""
        return dict(self.named_buffers())

    def restore(self, state: State) -> None:
        """Forget everything but a `state()`."""
        for name, value in state.items():
            setattr(self, name, value)

    def clear(self) -> None:
        """Forget everything."""
        self.restore({name: torch.zeros_like(value) for name, value in self.state().items()})

    def take_together(self, states: Sequence[State]) -> None:
        """What several observers have learned, in their order, instead of what this one has."""
        home = self.mean.device
        seen = [{k: v.to("cpu") for k, v in state.items()} for state in states if state["images"]]
        self.clear()
        if not seen:
            return
        rows = [row for state in seen for row in _rows_of(state)]
        whole, *rest = map(_spread_of, seen)
        for one in rest:
            whole = whole.plus(one)
        self._store(stretches(rows, self.STRETCHES))
        self._keep(whole)
        self.batches = torch.stack([state["batches"] for state in seen]).sum()
        self._move(home)

    def moments(self) -> Moments:
        """The moments of everything seen so far, on the CPU."""
        if not self.count.any():
            raise RetrofitError(
                f"{self.site} saw no data: run calibration data through the prepared model; if "
                "that was done, the model does not call this layer in eval mode, so exclude it"
            )
        return self._merged(slice(None))

    def halves(self) -> tuple[Moments, Moments] | None:
        """The moments of the first and second half of the sample, as nearly as kept, on the CPU.

        None where there are no halves: of a single sample, or none.
        """
        used = int((self.count > 0).sum())
        if used < 2:
            return None
        so_far = self.count[:used].cumsum(0)
        cut = 1 + int((so_far[:-1] - so_far[-1] / 2).abs().argmin())
        return self._merged(slice(0, cut)), self._merged(slice(cut, used))

    def standard_errors(self) -> tuple[Tensor, Tensor] | None:
        """Of mean and standard deviation, (C,) each, on the CPU; None of less than two samples."""
        if self.images < 2:
            return None
        known = {name: tensor.cpu() for name, tensor in self.state().items()}
        return _spread_of(known).standard_errors(self.moments())

    def _merged(self, rows: slice) -> Moments:
        """Of some stretches, on the CPU: a GPU would take longer for each of the small steps."""
        return merge(self.count[rows], self.mean[rows].cpu(), self.M2[rows].cpu())

    def _append(self, new: Moments) -> None:
        """Add to the last stretch while that is shorter than the first, else begin another."""
        counts = self.count.tolist()
        row = sum(count > 0 for count in counts)
        if row and counts[row - 1] < counts[0]:
            row -= 1
            new = pooled(Moments(counts[row], self.mean[row], self.M2[row]), new)
        elif row == self.STRETCHES:
            row //= 2
            self._store(stretches(_rows_of(self.state()), row))
        self.count = _with(self.count, row, torch.tensor(new.count, dtype=torch.float64))
        self.mean = _with(self.mean, row, new.mean)
        self.M2 = _with(self.M2, row, new.M2)

    def _store(self, rows: Sequence[Moments]) -> None:
        free = self.STRETCHES - len(rows)
        none = torch.zeros_like(rows[0].mean)
        self.count = torch.tensor([row.count for row in rows] + [0.0] * free, dtype=torch.float64)
        self.mean = torch.stack([row.mean for row in rows] + [none] * free)
        self.M2 = torch.stack([row.M2 for row in rows] + [none] * free)

    def _compare(self, samples: Samples) -> None:
        if not self.images:
            self._keep(spread(samples))
        else:
            known = _spread_of(self.state())
            self._keep(known.plus(spread(samples, known.centre)))

    def _keep(self, known: Spread) -> None:
        self.images = torch.tensor(known.samples)
        self.weight = torch.tensor(known.weight, dtype=torch.float64)
        self.centre, self.spread = known.centre, known.table

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: ARG002
        """Follow to another device, never to another dtype."""
        device = fn(torch.empty(0)).device
        self._move(_home(device))
        return self

    def _move(self, device: torch.device | None) -> None:
        for name in ("mean", "M2", "centre", "spread"):
            setattr(self, name, getattr(self, name).to(device))


def _rows_of(state: State) -> list[Moments]:
    """The stretches, those in use."""
    rows = zip(state["count"].tolist(), state["mean"], state["M2"], strict=True)
    return [Moments(count, mean, M2) for count, mean, M2 in rows if count]


def _with(table: Tensor, row: int, value: Tensor) -> Tensor:
    """A copy with another row."""
    table = table.clone()
    table[row] = value
    return table


def _spread_of(state: State) -> Spread:
    return Spread(int(state["images"]), float(state["weight"]), state["centre"], state["spread"])


def _is_dense(x: Tensor) -> bool:
    """In a memory format for which torch's CPU kernel computes x * alpha + shift."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    dense = x.is_contiguous()
    return dense or (x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()]))


def _home(device: torch.device | None) -> torch.device | None:
    """Where float64 lives: the CPU for a device that has none."""
    return torch.device("cpu") if device is not None and device.type == "mps" else device
