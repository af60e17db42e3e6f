"""The sections of `benchmark.py`: each measures, and yields tables of plain figures.

Here are those on calibration; the others have modules of their own.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from benchmark_batchnorms import drift, inference, recalibration
from benchmark_options import PRECISIONS, Options, batches_of, side_by_side, timing
from benchmark_passes import (
    BFLOAT16,
    CONTENDERS,
    CONVOLUTIONS,
    EARLY_EXIT,
    FLOOR,
    FVCORE,
    OURS,
    PEERS,
    PLAIN,
    WITHOUT,
    Precision,
    has_fvcore,
    in_precision,
    interleaved,
    network,
    now,
    pictures,
)
from benchmark_processes import busy, start_up
from benchmark_tables import Row, Spread, Table
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import retrofit

# --- calibration -------------------------------------------------------------------------------


def calibration(options: Options) -> Iterator[Table]:
    """Compare all contenders, and then `calibrate` with and without each of its tricks."""
    yield contenders(options)
    yield tricks(options)


def contenders(options: Options) -> Table:
    """Compare `calibrate` with plain forward passes, and with its peers."""
    missing = {
        FVCORE: not has_fvcore(),
        BFLOAT16: options.device != "cpu",  # on a GPU there is a table of it
    }
    seconds, apart = side_by_side(options, [name for name in CONTENDERS if not missing.get(name)])
    rows: list[Row] = [
        {
            **timing(name, seconds, PLAIN, "plain"),
            "besides convolution": found.besides_convolution,
            "peak memory / plain": found.peak / apart[PLAIN].peak,
            "peak MiB": found.peak,
        }
        for name, found in apart.items()
    ]
    peers = {n: Spread.ratio(seconds[n], seconds[OURS]) for n in PEERS if n in seconds}
    summary: Row = {
        f"{one} / {FLOOR}": Spread.ratio(seconds[one], seconds[FLOOR])
        for one in (OURS, CONVOLUTIONS)
    }
    summary |= {f"{name} / {OURS}": spread for name, spread in peers.items()}
    summary[f"fastest peer / {OURS}"] = min(spread.median for spread in peers.values())
    text = (
        f"{batches_of(options)} **besides convolution** is the share of the time in which "
        "torch.profiler sees no convolution; in the forward passes that is the Linear layers too, "
        "which calibration leaves out."
    )
    if options.device == "cpu":
        summary |= bfloat16_gap(options)
        text += (
            " bfloat16 autocast is not used: means and standard deviations would be off by what "
            "the last lines say, in standard deviations."
        )
    if missing[FVCORE]:
        text += f" fvcore is not installed, so that {FVCORE} is missing."
    return Table("Calibration", text, rows, summary)


def tricks(options: Options) -> Table:
    """Compare `calibrate` with itself, each trick of its forward pass switched off in turn."""
    on_cpu = options.device == "cpu"
    without = [name for name in WITHOUT if on_cpu or name.endswith(EARLY_EXIT)]
    seconds, apart = side_by_side(options, [OURS, *without])
    rows: list[Row] = [
        {
            **timing(name, seconds, OURS, "whole"),
            "peak memory / whole": found.peak / apart[OURS].peak,
        }
        for name, found in apart.items()
    ]
    text = (
        f"{batches_of(options)} `calibrate` as a whole, and with one of its tricks switched off: "
        "what a trick brings is how far its line is above 1."
    )
    return Table("Calibration without each of its tricks", text, rows, {})


def bfloat16_gap(options: Options) -> Row:
    """Measure how far the moments are off under bfloat16 autocast, in sigma."""
    images = options.batches * options.batch_size
    model = network(options.model, options.device)
    batches = pictures(options.device, images, options.batch_size, options.size)

    def moments(precision: Precision) -> tuple[Tensor, Tensor]:
        prepared = retrofit.prepare(model)
        run = functools.partial(retrofit.calibrate, prepared, batches, progress=False)
        in_precision(precision, options.device, run)()
        converted = retrofit.convert(prepared, share_storage=True)
        learnt = [dict(m.named_buffers()) for m in converted.modules() if isinstance(m, _BatchNorm)]
        means = torch.cat([buffers["running_mean"] for buffers in learnt])
        return means, torch.cat([buffers["running_var"] for buffers in learnt]).sqrt()

    mean, std = moments("float32")
    rough_mean, rough_std = moments("bfloat16")
    live = std > 0
    gaps: Row = {}
    for name, difference in (("mean", rough_mean - mean), ("std", rough_std - std)):
        gap = difference[live].abs() / std[live]
        gaps[f"{name} off under bfloat16 autocast, 99 % of channels"] = float(gap.quantile(0.99))
        gaps[f"{name} off under bfloat16 autocast, worst channel"] = float(gap.max())
    return gaps


# --- preparation -------------------------------------------------------------------------------


def preparation(options: Options) -> Iterator[Table]:
    """Measure plan, prepare and convert, without the data pass between them."""
    device = options.device
    networks = {options.model: (network(options.model, device), options.sizes[0])}
    for n in options.convs:
        networks[f"{n:,} convolutions"] = (chain(n).to(device), 8)
        networks[f"{n:,} in one residual trunk"] = (Trunk(n).eval().to(device), 8)
    sites = {name: len(retrofit.plan(model).inserted) for name, (model, _) in networks.items()}
    steps: dict[str, list[tuple[float, float, float]]] = {name: [] for name in networks}
    for repetition in range(options.repeat + 1):
        for name, (model, size) in networks.items():
            taken = steps_of(model, pictures(device, 2, 2, size)[0], device)
            if repetition:
                steps[name].append(taken)
    rows: list[Row] = []
    for name, times in steps.items():
        plan, prepare, convert = map(statistics.median, zip(*times, strict=True))
        together = Spread.of(map(sum, times))
        rows.append(
            {
                "network": name,
                "BatchNorms": sites[name],
                "plan, s": plan,
                "prepare, s": prepare,
                "convert, s": convert,
                "together, s": together,
                "ms / BatchNorm": 1e3 * together.median / max(1, sites[name]),
            }
        )
    yield Table(
        "Preparation",
        "`plan`, `prepare` and `convert(share_storage=True)`, without the data pass between them, "
        "of the model, of plain chains of convolution and ReLU, nested in blocks, and of trunks to "
        "which each convolution adds.",
        rows,
        {},
    )


def steps_of(model: nn.Module, batch: Tensor, device: str) -> tuple[float, float, float]:
    """Measure the seconds of plan, prepare and convert."""
    start = now(device)
    plan = retrofit.plan(model)
    planned = now(device)
    prepared = retrofit.prepare(model, plan)
    ready = now(device)
    with torch.no_grad():
        prepared(batch)
    fed = now(device)
    retrofit.convert(prepared, share_storage=True)
    return planned - start, ready - planned, now(device) - fed


def chain(convs: int) -> nn.Module:
    """Build a plain network of so many convolutions: blocks of five, stages of ten blocks."""
    layers = [
        nn.Sequential(nn.Conv2d(8 if i else 3, 8, 3, padding=1), nn.ReLU()) for i in range(convs)
    ]
    blocks = [nn.Sequential(*layers[i : i + 5]) for i in range(0, convs, 5)]
    stages = [nn.Sequential(*blocks[i : i + 10]) for i in range(0, len(blocks), 10)]
    return nn.Sequential(*stages).eval()


class Trunk(nn.Module):
    """A trunk to which every convolution adds, and which all that follow read."""

    def __init__(self, convs: int) -> None:
        super().__init__()
        sizes = [3] + [8] * (convs - 1)
        self.convs = nn.ModuleList(nn.Conv2d(size, 8, 3, padding=1) for size in sizes)
        self.head = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        trunk = torch.relu(self.convs[0](x))
        for conv in self.convs[1:]:
            trunk = trunk + 0.01 * torch.relu(conv(trunk))
        y: Tensor = self.head(trunk)
        return y


# --- scaling -----------------------------------------------------------------------------------


def scaling(options: Options) -> Iterator[Table]:
    """Measure calibration beside the plain forward: more images, larger ones, larger batches."""
    batch, size = options.batch_size, options.sizes[0]
    yield scaled(
        options,
        "Scaling with the number of images",
        f"In batches of {batch} x 3 x {size} x {size}.",
        "images",
        {count: (count, batch, size) for count in (batch * factor for factor in (1, 2, 4, 8))},
    )
    yield scaled(
        options,
        "Scaling with resolution",
        f"One batch of {batch} images.",
        "pixels a side",
        {side: (batch, batch, side) for side in options.sizes},
    )
    batch_sizes = sorted({max(1, 2 * batch // parts) for parts in (16, 8, 4, 2, 1)})
    yield scaled(
        options,
        "Scaling with batch size",
        f"{2 * batch} images of 3 x {size} x {size}.",
        "batch size",
        {batch_size: (2 * batch, batch_size, size) for batch_size in batch_sizes},
    )


def scaled(
    options: Options, title: str, text: str, axis: str, points: dict[int, tuple[int, int, int]]
) -> Table:
    """Measure some points on an axis: images in all, batch size, pixels a side."""
    rows: list[Row] = []
    for point, shape in points.items():
        passes = {n: options.workload(n, *shape).ready() for n in (PLAIN, FLOOR, OURS)}
        plain, floor, calibrate = interleaved(passes, options.repeat, options.device).values()
        images = shape[0]
        rows.append(
            {
                axis: point,
                "NCHW, ms / image": 1e3 * statistics.median(plain) / images,
                "channels_last, ms / image": 1e3 * statistics.median(floor) / images,
                "calibrate, ms / image": 1e3 * statistics.median(calibrate) / images,
                "calibrate / NCHW": Spread.ratio(calibrate, plain),
                "calibrate / channels_last": Spread.ratio(calibrate, floor),
            }
        )
    return Table(title, text, rows, {})


SECTIONS: dict[str, Callable[[Options], Iterator[Table]]] = {
    "calibration": calibration,
    "preparation": preparation,
    "scaling": scaling,
    "inference": inference,
    "recalibration": recalibration,
    "drift": drift,
    "busy": busy,
    "start-up": start_up,
}


def measured(section: str, options: Options) -> Iterator[Table]:
    """Yield the tables of a section, in every precision of the device where that matters."""
    without = section in ("preparation", "start-up")
    precisions = ("float32",) if without else PRECISIONS[options.device]
    for precision in precisions:
        for table in SECTIONS[section](replace(options, precision=precision)):
            title = f"{table.title}, {precision}" if len(precisions) > 1 else table.title
            yield replace(table, title=title)
