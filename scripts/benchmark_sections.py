"""The sections of `benchmark.py`: each measures, and yields tables of plain figures."""

from __future__ import annotations

import copy
import functools
import random
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from benchmark_passes import (
    BFLOAT16,
    CONTENDERS,
    EARLY_EXIT,
    FLOOR,
    FORMATS,
    FVCORE,
    OURS,
    PEERS,
    PLAIN,
    WITHOUT,
    Alone,
    Precision,
    Workload,
    alone,
    forward,
    has_fvcore,
    in_precision,
    interleaved,
    network,
    now,
    pictures,
)
from benchmark_tables import Row, Spread, Table
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import retrofit

PRECISIONS: dict[str, tuple[Precision, ...]] = {
    "cpu": ("float32",),
    "cuda": ("float32", "TF32", "bfloat16"),
}


@dataclass(frozen=True)
class Options:
    """The options of the command, and the precision of the moment."""

    model: str
    device: str
    size: int
    batch_size: int
    batches: int
    repeat: int
    forwards: int
    sizes: Sequence[int]
    convs: Sequence[int]
    threads: int
    precision: Precision = "float32"

    def workload(self, contender: str, images: int, batch_size: int, size: int) -> Workload:
        where = (self.model, self.device, self.precision)
        return Workload(contender, *where, images, batch_size, size, self.threads)


# --- calibration -------------------------------------------------------------------------------


def calibration(options: Options) -> Iterator[Table]:
    """Compare all contenders, and then `calibrate` with and without each of its tricks."""
    yield contenders(options)
    yield tricks(options)


def side_by_side(
    options: Options, names: Iterable[str]
) -> tuple[dict[str, list[float]], dict[str, Alone]]:
    """Measure the seconds of interleaved passes, and what each takes in a process of its own."""
    images = options.batches * options.batch_size
    workloads = {
        name: options.workload(name, images, options.batch_size, options.size) for name in names
    }
    passes = {name: workload.ready() for name, workload in workloads.items()}
    seconds = interleaved(passes, options.repeat, options.device)
    return seconds, {name: alone(workload) for name, workload in workloads.items()}


def contenders(options: Options) -> Table:
    """Compare `calibrate` with plain forward passes, and with its peers."""
    missing = {
        FVCORE: not has_fvcore(),
        BFLOAT16: options.device != "cpu",  # on a GPU there is a table of it
    }
    seconds, apart = side_by_side(options, [name for name in CONTENDERS if not missing.get(name)])
    rows: list[Row] = [
        {
            "pass": name,
            "time / plain": Spread.ratio(seconds[name], seconds[PLAIN]),
            "seconds": Spread.of(seconds[name]),
            "besides convolution": found.besides_convolution,
            "peak memory / plain": found.peak / apart[PLAIN].peak,
            "peak MiB": found.peak,
        }
        for name, found in apart.items()
    ]
    peers = {n: Spread.ratio(seconds[n], seconds[OURS]) for n in PEERS if n in seconds}
    summary: Row = {
        f"{OURS} / {FLOOR}": Spread.ratio(seconds[OURS], seconds[FLOOR]),
        **{f"{name} / {OURS}": spread for name, spread in peers.items()},
        f"fastest peer / {OURS}": min(spread.median for spread in peers.values()),
    }
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
            "pass": name,
            "time / whole": Spread.ratio(seconds[name], seconds[OURS]),
            "seconds": Spread.of(seconds[name]),
            "peak memory / whole": found.peak / apart[OURS].peak,
        }
        for name, found in apart.items()
    ]
    text = (
        f"{batches_of(options)} `calibrate` as a whole, and with one of its tricks switched off: "
        "what a trick brings is how far its line is above 1."
    )
    return Table("Calibration without each of its tricks", text, rows, {})


def batches_of(options: Options) -> str:
    shape = f"{options.batch_size} x 3 x {options.size} x {options.size}"
    return f"{options.batches} batches of {shape}."


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


# --- start-up ----------------------------------------------------------------------------------


def start_up(options: Options) -> Iterator[Table]:
    """Compare processes that import torch or torchvision with the command, and time the import."""
    programs = {code: ["-c", code] for code in ("import torch", "import torchvision")}
    for words in ("plan resnet81", "--help", "plan --help", "--version", "paln"):
        programs[f"retrofit {words}"] = ["-m", "retrofit", *words.split()]
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    added: list[float] = []
    for repetition in range(options.repeat + 1):
        order = random.Random(repetition).sample(list(programs), len(programs))  # noqa: S311
        taken = {name: processor_seconds(programs[name]) for name in order}
        milliseconds = 1e3 * import_seconds()
        if repetition:
            added.append(milliseconds)
            for name in programs:
                seconds[name].append(taken[name])
    rows: list[Row] = [
        {
            "process": name,
            "time / import torch": Spread.ratio(times, seconds["import torch"]),
            "time / import torchvision": Spread.ratio(times, seconds["import torchvision"]),
            "seconds": Spread.of(times),
        }
        for name, times in seconds.items()
    ]
    yield Table(
        "Start-up",
        "Python processes from their start to their end, in seconds of the processor, which other "
        "work on the machine disturbs less. `resnet81` is misspelt, as only torchvision can tell.",
        rows,
        {"import retrofit, after import torch, in ms": Spread.of(added)},
    )


def processor_seconds(words: Sequence[str]) -> float:
    """Measure a Python process, which may find a mistake in what it is asked for."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603
    assert done.returncode in (0, 2), done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def import_seconds() -> float:
    """Measure the import of retrofit in a process that has imported torch."""
    code = (
        "import time, torch; start = time.process_time(); "
        "import retrofit; print(time.process_time() - start)"
    )
    command = [sys.executable, "-c", code]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)  # noqa: S603


SECTIONS: dict[str, Callable[[Options], Iterator[Table]]] = {
    "calibration": calibration,
    "preparation": preparation,
    "scaling": scaling,
    "inference": inference,
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
