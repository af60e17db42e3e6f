"""The sections of `benchmark.py` on networks that have BatchNorm."""

from __future__ import annotations

import copy
import functools
import random
import statistics
from collections.abc import Iterator, Mapping

import torch
from benchmark_options import Options, side_by_side, timing
from benchmark_passes import (
    ADAPTING,
    AT_ONCE,
    DRIFT,
    DRIFT_SIZES,
    FORMATS,
    LAYERWISE,
    PLAIN,
    TRAIN_MODE,
    forward,
    in_precision,
    interleaved,
    network,
    pictures,
)
from benchmark_tables import Row, Spread, Table
from torch import Tensor, nn

import retrofit

# --- inference ---------------------------------------------------------------------------------


def inference(options: Options) -> Iterator[Table]:
    """Compare the network as it was, with BatchNorm, and folded again."""
    device, size = options.device, options.sizes[0]
    batch_size = 1 if device == "cpu" else options.batch_size
    plain = network(options.model, device)
    images = pictures(device, 2 * batch_size, batch_size, size)
    retrofitted = retrofit.add_batchnorm(plain, images, progress=False)
    networks = {
        "plain": plain,
        "plain once more": plain,
        "retrofitted": retrofitted,
        "folded": retrofit.fold(retrofitted),
    }
    speed: list[Row] = []
    parity: list[Row] = []
    for memory_format, layout in FORMATS.items():
        inputs = [x.contiguous(memory_format=layout) for x in images]
        times = forward_times(options, networks, layout, inputs[0])
        for table, rows in ((speed, times), (parity, parities(options, networks, layout, inputs))):
            table += [{"memory format": memory_format, **row} for row in rows]
    yield Table(
        "Inference",
        f"One batch of {batch_size} x 3 x {size} x {size}. Each repetition takes new copies of the "
        "networks, since it matters where in memory they lie, and the median of "
        f"{options.forwards} interleaved forward passes. The second plain network shows what the "
        "measurement itself is worth.",
        speed,
        {},
    )
    yield Table(
        "Parity",
        "`retrofit.verify` of the same networks: the largest difference at an output; and, relative"
        " to the root mean square, at an output or a BatchNorm.",
        parity,
        {},
    )


def forward_times(
    options: Options, networks: Mapping[str, nn.Module], layout: torch.memory_format, batch: Tensor
) -> Iterator[Row]:
    ratios: dict[str, list[float]] = {name: [] for name in networks}
    milliseconds: dict[str, list[float]] = {name: [] for name in networks}
    for repetition in range(options.repeat):
        order = random.Random(repetition).sample(list(networks), len(networks))  # noqa: S311
        passes = {}
        for name in order:
            model = copy.deepcopy(networks[name]).to(memory_format=layout)
            run = forward(model, [batch])
            passes[name] = in_precision(options.precision, options.device, run)
        seconds = interleaved(passes, options.forwards, options.device)
        for name, taken in seconds.items():
            ratios[name].append(Spread.ratio(taken, seconds["plain"]).median)
            milliseconds[name].append(1e3 * statistics.median(taken))
    for name in networks:
        ms = statistics.median(milliseconds[name])
        yield {"network": name, "time / plain": Spread.of(ratios[name]), "ms": ms}


def parities(
    options: Options,
    networks: Mapping[str, nn.Module],
    layout: torch.memory_format,
    images: list[Tensor],
) -> Iterator[Row]:
    models = {n: copy.deepcopy(m).to(memory_format=layout) for n, m in networks.items()}
    for name in ("retrofitted", "folded"):
        compare = functools.partial(retrofit.verify, models["plain"], models[name], images)
        report = in_precision(options.precision, options.device, compare)().summary()
        yield {
            "network": name,
            "images": report["images"],
            "equal bit for bit": report["exact"],
            "largest difference": report["max_abs"],
            "relative": report["worst_relative"],
            "same top-1": report["top1_agreement"],
        }


# --- recalibration and drift -------------------------------------------------------------------


def recalibration(options: Options) -> Iterator[Table]:
    """Compare `recalibrate` in both ways, and `adapting`, with plain forward passes."""
    images = options.batches * options.batch_size
    rows: list[Row] = []
    for batch_size in sorted({images, options.batch_size, 1}, reverse=True):
        shape = (images, batch_size, options.size)
        seconds, apart = side_by_side(options, (PLAIN, AT_ONCE, LAYERWISE, ADAPTING), shape)
        rows += [
            {
                "batch size": batch_size,
                **timing(name, seconds, PLAIN, "plain"),
                "MiB above plain": found.peak - apart[PLAIN].peak,
            }
            for name, found in apart.items()
        ]
    yield Table(
        "Recalibration",
        f"The same {images} images of 3 x {options.size} x {options.size} in batches of several "
        "sizes, through the network with a BatchNorm after each convolution; *plain* is that "
        "without. The memory is for activations that wait, and for the parameters of BatchNorms.",
        rows,
        {},
    )


def drift(options: Options) -> Iterator[Table]:
    """Compare `drift` with plain forward passes, and with those in train mode."""
    images, size = 256, options.sizes[0]
    names = (PLAIN, TRAIN_MODE, DRIFT)
    seconds, apart = side_by_side(options, names, (images, options.batch_size, size))
    rows: list[Row] = [
        {
            **timing(name, seconds, PLAIN, "plain"),
            "MiB above plain": found.peak - apart[PLAIN].peak,
        }
        for name, found in apart.items()
    ]
    text = (
        f"{images} images of 3 x {size} x {size}, in batches of {options.batch_size}. *Train mode* "
        "are the passes that `drift` is about, with BatchNorm and in batches of "
        f"{', '.join(map(str, DRIFT_SIZES))}."
    )
    yield Table("Drift", text, rows, {})
