"""The options of `benchmark.py`, and the comparison that most of its sections make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmark_passes import Alone, Precision, Workload, alone, interleaved
from benchmark_tables import Row, Spread

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


def timed(
    options: Options, names: Iterable[str], shape: tuple[int, int, int] | None = None
) -> dict[str, list[float]]:
    """Measure the seconds of interleaved passes.

    Args:
        options, names: of the passes.
        shape: images in all, in a batch, and pixels a side; by default those of the options.
    """
    passes = {name: workload.ready() for name, workload in workloads(options, names, shape).items()}
    return interleaved(passes, options.repeat, options.device)


def side_by_side(
    options: Options, names: Iterable[str], shape: tuple[int, int, int] | None = None
) -> tuple[dict[str, list[float]], dict[str, Alone]]:
    """Measure the seconds of interleaved passes, and what each takes in a process of its own."""
    names = list(names)
    seconds = timed(options, names, shape)
    return seconds, {name: alone(w) for name, w in workloads(options, names, shape).items()}


def timing(name: str, seconds: Mapping[str, list[float]], reference: str, called: str) -> Row:
    """Make the cells that say how long a pass takes, beside that of a reference."""
    return {
        "pass": name,
        f"time / {called}": Spread.ratio(seconds[name], seconds[reference]),
        "seconds": Spread.of(seconds[name]),
    }


def workloads(
    options: Options, names: Iterable[str], shape: tuple[int, int, int] | None
) -> dict[str, Workload]:
    images = options.batches * options.batch_size
    shape = shape or (images, options.batch_size, options.size)
    return {name: options.workload(name, *shape) for name in names}


def batches_of(options: Options) -> str:
    shape = f"{options.batch_size} x 3 x {options.size} x {options.size}"
    return f"{options.batches} batches of {shape}."
