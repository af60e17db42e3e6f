"""Bias, moments and ReLU in one pass over the output of a convolution: a kernel in Triton.

Imported only by what uses it: Triton is not wherever torch is. A tile, some rows of one sample in
some channels, is read once into registers, so that its moments take two passes there; the tiles of
a sample are merged in float64 (Chan et al., 1983), in a fixed order and without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from retrofit.numerics.reductions import Samples

ROWS, CHANNELS = 256, 32  # of a tile
TILES = 64  # merged at once
LARGEST = 1 << 31  # elements of a sample from which 32 bits do not count its rows


def takes(y: Tensor) -> bool:
    """Tell whether `add_bias` can work on y."""
    dense = y.is_contiguous() or y.is_contiguous(memory_format=torch.channels_last)
    floats = (torch.float32, torch.float16, torch.bfloat16)
    return dense and y.dtype in floats and y.numel() > 0 and y[0].numel() < LARGEST


def add_bias(y: Tensor, bias: Tensor, *, relu: bool = False) -> Samples:
    """Add a bias to y, in place, and reduce what comes out: one read and one write.

    Args:
        y: (N, C, H, W) that `takes` allows, without gradients.
        bias: (C), of the same dtype and on the same device.
        relu: leave ReLU of the sum in y.

    Returns:
        Mean and variance in float64, of the sum as y's dtype holds it, before the ReLU. Those of a
        sample depend on that sample alone.
    """
    samples, channels, height, width = y.shape
    length, last = height * width, not y.is_contiguous()
    tiles, blocks = triton.cdiv(length, ROWS), triton.cdiv(channels, CHANNELS)
    partial = y.new_empty((samples, tiles, 3, channels), dtype=torch.float32)
    mean, var = y.new_empty((2, samples, channels), dtype=torch.float64)
    sizes, block = (length, channels, tiles), (ROWS, CHANNELS)
    with torch.cuda.device_of(y):  # where Triton launches; nothing on a CPU
        add_and_reduce = _add_and_reduce[(samples * tiles, blocks)]
        add_and_reduce(y, bias.contiguous(), partial, *sizes, last, relu, *block, num_warps=8)
        _merge[(samples, blocks)](partial, mean, var, *sizes, *block, TILES, num_warps=4)
    return Samples(length, mean, var)


@triton.jit  # type: ignore[untyped-decorator]
def _add_and_reduce(  # type: ignore[no-untyped-def]
    y,
    bias,
    partial,
    length,
    channels,
    tiles,
    last: tl.constexpr,
    relu: tl.constexpr,
    rows: tl.constexpr,
    width: tl.constexpr,
):
    sample = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    row = (tile * rows + tl.arange(0, rows))[:, None].to(tl.int64)
    channel = (tl.program_id(1) * width + tl.arange(0, width))[None, :]
    inside = (row < length) & (channel < channels)
    place = row * channels + channel if last else row + channel.to(tl.int64) * length
    at = y + sample.to(tl.int64) * length * channels + place
    raw = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    addend = tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)
    rounded = (raw + addend).to(y.dtype.element_ty)
    x = rounded.to(tl.float32)
    if relu:  # NaN stays NaN
        tl.store(at, tl.where(x <= 0.0, 0.0, x).to(y.dtype.element_ty), mask=inside)
    else:
        tl.store(at, rounded, mask=inside)
    count = tl.minimum(length - tile * rows, rows)
    centre = tl.sum(tl.where(inside, x, 0.0), 0, keep_dims=True) / count
    deviation = tl.where(inside, x - centre, 0.0)
    rest = tl.sum(deviation, 0, keep_dims=True)  # what the rounding of the centre left over
    squares = tl.sum(deviation * deviation, 0, keep_dims=True)
    to = partial + tl.program_id(0).to(tl.int64) * 3 * channels + channel
    tl.store(to, centre, mask=channel < channels)
    tl.store(to + channels, rest, mask=channel < channels)
    tl.store(to + 2 * channels, squares, mask=channel < channels)


@triton.jit  # type: ignore[untyped-decorator]
def _partial_moments(first, tile, channels, inside):  # type: ignore[no-untyped-def]
    at = first + tile.to(tl.int64) * 3 * channels
    centre = tl.load(at, mask=inside, other=0.0).to(tl.float64)
    rest = tl.load(at + channels, mask=inside, other=0.0).to(tl.float64)
    squares = tl.load(at + 2 * channels, mask=inside, other=0.0).to(tl.float64)
    return centre, rest, squares


@triton.jit  # type: ignore[untyped-decorator]
def _merge(  # type: ignore[no-untyped-def]
    partial,
    mean,
    var,
    length,
    channels,
    tiles,
    rows: tl.constexpr,
    width: tl.constexpr,
    many: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    channel = (tl.program_id(1) * width + tl.arange(0, width))[None, :]
    known = channel < channels
    first = partial + sample * tiles * 3 * channels + channel
    total = tl.zeros((1, width), tl.float64)
    for start in range(0, tiles, many):
        tile = start + tl.arange(0, many)[:, None]
        inside = (tile < tiles) & known
        count = tl.minimum(length - tile * rows, rows).to(tl.float64)
        centre, rest, _ = _partial_moments(first, tile, channels, inside)
        total += tl.sum(tl.where(inside, centre * count + rest, 0.0), 0, keep_dims=True)
    middle = total / length
    total = tl.zeros((1, width), tl.float64)
    for start in range(0, tiles, many):
        tile = start + tl.arange(0, many)[:, None]
        inside = (tile < tiles) & known
        count = tl.minimum(length - tile * rows, rows).to(tl.float64)
        centre, rest, squares = _partial_moments(first, tile, channels, inside)
        off = centre - middle
        # About the middle: the deviations from the centre, each moved by `off`.
        about = squares + 2.0 * off * rest + count * off * off
        total += tl.sum(tl.where(inside, about, 0.0), 0, keep_dims=True)
    spread = tl.where(total < 0.0, 0.0, total / length)  # NaN stays NaN
    to = sample * channels + channel
    tl.store(mean + to, middle, mask=known)
    tl.store(var + to, spread, mask=known)
