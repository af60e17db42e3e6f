"""Exact streaming moments of every channel.

Within a batch, mean and squared deviations are reduced in float32 over stretches short enough
not to lose digits; everything beyond a stretch is merged in float64 with the formula of Chan,
Golub and LeVeque (1983), "Algorithms for computing the sample variance". So the result depends
neither on the batch size nor, to about 1e-7 sigma, on the order of the data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from typing_extensions import Self

from retrofit.errors import NonFiniteError, RetrofitError

# Elements of a channel reduced in float32 at once: by a kernel that adds up naively, and by
# torch.sum. The rounding errors of many such stretches then average out in float64.
NAIVE, PAIRWISE = 4096, 32
# Elements of a channels-first activation whose deviations are held at once: they fit a cache.
CACHED = 1 << 19


@dataclass(frozen=True)
class Moments:
    """Moments of C channels: `mean` and `M2` (sum of squared deviations), float64 of shape (C,).

    `count` is the number of elements behind each channel: images times pixels.
    """

    count: float
    mean: Tensor
    M2: Tensor

    @property
    def var(self) -> Tensor:
        """Unbiased variance, as torch's running_var has it; 0 for a single element."""
        return self.M2 / max(self.count - 1, 1)


def merge(counts: Tensor, means: Tensor, M2s: Tensor) -> Moments:
    """The moments of R disjoint samples taken together: (R,), (R, C), (R, C) in float64.

    Chan, Golub and LeVeque (1983), for many samples at once: the squared deviations within each
    sample, plus those of the samples' means from the common mean.
    """
    share = (counts / counts.sum()).to(means.device).unsqueeze(1)
    mean = (share * means).sum(0)
    between = counts.to(means.device).unsqueeze(1) * (means - mean).square()
    return Moments(float(counts.sum()), mean, M2s.sum(0) + between.sum(0))


def pooled(one: Moments, other: Moments) -> Moments:
    """The moments of two disjoint samples taken together, where the first are."""
    counts = torch.tensor([one.count, other.count], dtype=torch.float64)
    means = torch.stack([one.mean, other.mean.to(one.mean.device)])
    return merge(counts, means, torch.stack([one.M2, other.M2.to(one.M2.device)]))


def batch_moments(x: Tensor) -> Moments:
    """The moments of one activation (N, C, ...) over all axes but axis 1.

    float16 and bfloat16 are read as float32; float64 is reduced in float64. Both memory formats
    are read as they lie, without a copy of the activation.
    """
    if x.dtype not in (torch.float32, torch.float64):
        x = x.float()
    rows = x.movedim(1, -1)
    if x.dim() == 2 or rows.is_contiguous():
        return _moments_of_rows(rows.contiguous().view(-1, x.shape[1]))
    return _moments_of_planes(x.flatten(2))


def finite_moments(x: Tensor, site: str, first: int = 0) -> Moments:
    """The same, or NonFiniteError that names the site and the sample; x[0] is number `first`."""
    moments = batch_moments(x)
    if bool(moments.M2.isfinite().all()):  # M2 is NaN when the mean is not finite
        return moments
    finite = x.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        raise NonFiniteError(site, first + int((~finite).nonzero()[0]))
    return batch_moments(x.double())  # the squares overflowed float32


def _moments_of_rows(x: Tensor) -> Moments:
    """Moments of (R, C), channels adjacent in memory."""
    counts, centres, M2s = [], [], []
    for part in _folded(x, NAIVE):
        if x.device.type in ("cpu", "cuda"):
            mean, var = torch.batch_norm_update_stats(part, None, None, 0.0)
        else:  # no such kernel
            var, mean = torch.var_mean(part, 0, correction=0)
        centres.append(mean.double().view(-1, x.shape[1]))
        M2s.append(var.double().view(-1, x.shape[1]) * len(part))
        counts.append(torch.full((len(centres[-1]),), float(len(part)), dtype=torch.float64))
    merged = merge(torch.cat(counts), torch.cat(centres), torch.cat(M2s))
    # Those centres are good enough to measure deviations from, but not to report.
    sums = [part.sum(0).double().view(-1, x.shape[1]).sum(0) for part in _folded(x, PAIRWISE)]
    return replace(merged, mean=torch.stack(sums).sum(0) / len(x))


def _folded(x: Tensor, length: int) -> list[Tensor]:
    """(R, C) as (R / k, k * C) with R / k at least `length`, and the rows that are left over.

    So one call reduces k stretches of each channel at once. No copy is made.
    """
    rows, channels = x.shape
    k = max(1, rows // length)
    parts = (x[: rows // k * k].view(-1, k * channels), x[rows // k * k :])
    return [part for part in parts if len(part)]


def _moments_of_planes(x: Tensor) -> Moments:
    """Moments of (N, C, L), pixels adjacent in memory, by the corrected two-pass algorithm."""
    groups = x.split(max(1, CACHED // max(1, x[0].numel())))
    means, M2s = [], []
    for group in groups:
        mean = group.mean(2, keepdim=True)
        deviation = group - mean
        rest = deviation.sum(2).double()  # what the rounding of the mean left over
        M2s.append(deviation.square_().sum(2).double() - rest.square() / x.shape[2])
        means.append(mean.squeeze(2).double() + rest / x.shape[2])
    counts = torch.full((len(x),), float(x.shape[2]), dtype=torch.float64)
    return merge(counts, torch.cat(means), torch.cat(M2s))


class MomentObserver(nn.Module):
    """Returns its input, and learns the moments of its channels.

    The sample is kept as up to 16 consecutive stretches, so that its beginning can be compared
    with its end. All buffers are float64 and stay so through `.half()` and `.to(dtype)`.

    Args:
        site: module path of the observed layer, for messages.
        channels: C.
        dims: spatial axes of the input: (N, C) + dims axes.
        last_axis: the channels are the last axis instead, after any number of others: (N, ..., C).

    Buffers:
        count: (16,), elements of each channel in a stretch; on the CPU, whatever the device.
        mean, M2: (16, C), mean and sum of squared deviations of a stretch.
        images, batches: scalars; the number of samples, and of calls.
    """

    STRETCHES = 16
    count: Tensor
    mean: Tensor
    M2: Tensor
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
        self.register_buffer("count", torch.zeros(self.STRETCHES, dtype=torch.float64))
        table = torch.zeros(self.STRETCHES, channels, dtype=torch.float64, device=_home(device))
        self.register_buffer("mean", table)
        self.register_buffer("M2", table.clone())
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
        if not (x.is_contiguous() if self.last_axis else _is_dense(x)):
            raise RetrofitError(
                f"{self.site} returns a tensor that is neither contiguous nor channels_last (a "
                "slice, it seems): a BatchNorm after it would not be exact; exclude this layer"
            )
        if x.numel():
            self._learn(x.detach().movedim(-1, 1) if self.last_axis else x.detach())
        return x

    def _learn(self, x: Tensor) -> None:
        # The first batch counts as two stretches, so that even a single one has two halves.
        first = 0
        for part in [x] if self.batches else x.chunk(2):
            self._append(finite_moments(part, self.site, first))
            first += len(part)
        self.images += len(x)
        self.batches += 1

    def _append(self, new: Moments) -> None:
        """Add to the last stretch while that is shorter than the first, else begin another."""
        used = int((self.count > 0).sum())
        if used == self.STRETCHES and self.count[-1] >= self.count[0]:
            used //= 2
            pairs = [slice(2 * i, 2 * i + 2) for i in range(used)]
            merged = [merge(self.count[p], self.mean[p], self.M2[p]) for p in pairs]
            for table in (self.count, self.mean, self.M2):
                table.zero_()
            for row, moments in enumerate(merged):
                self._store(row, moments)
        row = used if used == 0 or self.count[used - 1] >= self.count[0] else used - 1
        if self.count[row]:
            new = pooled(Moments(float(self.count[row]), self.mean[row], self.M2[row]), new)
        self._store(row, new)

    def _store(self, row: int, moments: Moments) -> None:
        self.count[row], self.mean[row], self.M2[row] = moments.count, moments.mean, moments.M2

    def moments(self) -> Moments:
        """The moments of everything seen so far."""
        if not self.count.any():
            raise RetrofitError(
                f"{self.site} saw no data: run calibration data through the prepared model; if "
                "that was done, the model does not call this layer in eval mode, so exclude it"
            )
        return merge(self.count, self.mean, self.M2)

    def halves(self) -> tuple[Moments, Moments] | None:
        """The moments of the first and of the second half of the sample, as nearly as kept.

        None where there are no halves: of a single sample, or none.
        """
        used = int((self.count > 0).sum())
        if used < 2:
            return None
        so_far = self.count[:used].cumsum(0)
        cut = 1 + int((so_far[:-1] - so_far[-1] / 2).abs().argmin())
        first, second = slice(0, cut), slice(cut, used)
        return (
            merge(self.count[first], self.mean[first], self.M2[first]),
            merge(self.count[second], self.mean[second], self.M2[second]),
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: ARG002
        """Follow to another device, never to another dtype."""
        device = fn(torch.empty(0)).device
        for name in ("mean", "M2"):
            setattr(self, name, getattr(self, name).to(_home(device)))
        return self


def _is_dense(x: Tensor) -> bool:
    """In a memory format for which torch's CPU kernel computes x * alpha + shift."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    dense = x.is_contiguous()
    return dense or (x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()]))


def _home(device: torch.device | None) -> torch.device | None:
    """Where float64 lives: the CPU for a device that has none."""
    return torch.device("cpu") if device is not None and device.type == "mps" else device
