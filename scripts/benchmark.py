"""Measure what retrofit costs, beside the plain network and the import of torch.

    python scripts/benchmark.py --csv docs/results/benchmarks.csv --markdown docs/benchmarks.md

What is compared sees the same images in the same process, one after another in each repetition, so
that ratios hold on a machine whose speed drifts. Peak memory is that of a process of its own.
`benchmark_passes.py` has what is compared, `benchmark_sections.py` and what it imports the
measurements, and `benchmark_tables.py` how they are written. A network that has BatchNorm is folded
first.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime, timezone
from pathlib import Path

import torch
import torchvision
from benchmark_options import PRECISIONS, Options
from benchmark_sections import SECTIONS, measured
from benchmark_tables import Figure, figures_of, rendered
from recorded_runs import record

import retrofit
from retrofit.errors import RetrofitError

BATCHES = {"cpu": (8, 4), "cuda": (64, 4)}  # images in a batch, enough to fill the device; batches

INTRODUCTION = """# Benchmarks

What this command wrote:

    {command}

- {date}
- {machine}
- {versions}

Weights and images are random. The passes of a table were made in one process, in an order drawn
anew for each repetition. Ratios are those of times in the same repetition: the median (min - max)
of {repeat} repetitions, after one that does not count.
"""


def about(options: Options) -> dict[str, str]:
    """Describe what the figures depend on."""
    machine = [f"{processor()}, {os.cpu_count()} cores, {options.threads} threads"]
    machine += [platform.system(), f"load average {os.getloadavg()[0]:.1f} at the start"]
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    versions += [f"torchvision {torchvision.__version__}", f"retrofit {retrofit.__version__}"]
    if options.device == "cuda":
        machine.insert(0, torch.cuda.get_device_name())
        versions += [f"CUDA {torch.version.cuda}", f"cuDNN {torch.backends.cudnn.version()}"]
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": ", ".join(machine),
        "versions": ", ".join(versions),
    }


def processor() -> str:
    """Return the CPU's name where Linux tells it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.processor() or platform.machine())


# --- the command -------------------------------------------------------------------------------


def run(options: Options, sections: Sequence[str], figures: Path | None, page: Path | None) -> None:
    for file in filter(None, (figures, page)):  # before the minutes that it takes
        file.parent.mkdir(parents=True, exist_ok=True)
    facts = about(options)
    texts = [INTRODUCTION.format(**facts, repeat=options.repeat)]
    print(texts[0])
    found: list[Figure] = []
    for section in sections:
        for table in measured(section, options):
            texts.append(rendered(table))
            print(texts[-1], flush=True)
            found += figures_of(table)
    if figures:
        figures.unlink(missing_ok=True)
        record(found, figures)
    if page:
        page.write_text("\n".join(texts))


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="vgg16", help="as for `retrofit plan`")
    add("--device", default="cpu", choices=sorted(PRECISIONS))
    add("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="these sections")
    add("--size", type=positive, default=224, help="pixels a side of the images to calibrate on")
    add("--batch-size", type=positive, help="8; on a GPU 64")
    add("--batches", type=positive, help="4")
    add("--repeat", type=positive, default=5, help="repetitions")
    add("--forwards", type=positive, default=20, help="of inference, in a repetition")
    sizes = "pixels a side, for scaling with resolution; all but calibration takes the first"
    add("--sizes", type=positive, nargs="+", default=[128, 224, 320], help=sizes)
    convs = "convolutions of the chains to prepare"
    add("--convs", type=positive, nargs="+", default=[250, 500, 1000, 2000], help=convs)
    add("--threads", type=positive, default=torch.get_num_threads())
    add("--csv", type=Path, metavar="FILE", help="write all figures there")
    add("--markdown", type=Path, metavar="FILE", help="write the document there")
    arguments = parser.parse_args()
    batch_size, batches = BATCHES[arguments.device]
    arguments.batch_size = arguments.batch_size or batch_size
    arguments.batches = arguments.batches or batches
    return arguments


def main() -> int:
    arguments = parsed()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("benchmark.py: there is no GPU here: leave out --device cuda", file=sys.stderr)
        return 2
    torch.set_num_threads(arguments.threads)
    chosen = vars(arguments)
    options = Options(**{f.name: chosen[f.name] for f in fields(Options) if f.name in chosen})
    try:
        run(options, arguments.only, arguments.csv, arguments.markdown)
    except RetrofitError as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
