"""The sections of `benchmark.py` on processes: those that start, and those beside others."""

from __future__ import annotations

import random
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from benchmark_options import Options, batches_of, timed, timing
from benchmark_passes import FLOOR, HOOKS, ON_ALL_THREADS, OURS, PLAIN
from benchmark_tables import Row, Spread, Table

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


# --- a busy machine ----------------------------------------------------------------------------

BUSY = "import torch; x = torch.randn(700, 700)\nwhile True: x = (x @ x).tanh()"


def busy(options: Options) -> Iterator[Table]:
    """Compare `calibrate` with plain passes while other processes compute with torch."""
    with others(2):
        seconds = timed(options, (PLAIN, FLOOR, HOOKS, OURS, ON_ALL_THREADS))
    rows = [timing(name, seconds, PLAIN, "plain") for name in seconds]
    text = f"{batches_of(options)} Two other processes multiply matrices all the time with torch."
    yield Table("On a busy machine", text, rows, {})


@contextmanager
def others(count: int) -> Iterator[None]:
    """Keep so many other processes busy during the block."""
    with ExitStack() as stack:
        for _ in range(count):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", BUSY]))  # noqa: S603
            stack.callback(process.kill)
        yield
