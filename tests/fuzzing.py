"""What fuzz.py and fuzz_files.py share: thousands of examples in several processes, and counts."""

import argparse
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
from recorded_runs import record


@dataclass(frozen=True)
class Fuzzed:
    """What thousands of examples came to.

    Attributes:
        noun: of what they are.
        different: of the examples, how many are not alike.
        rare: the share below which a feature is `missed`.
    """

    noun: str
    torch: str
    examples: int
    different: int
    minutes: float
    failures: int
    rare: float
    missed: str

    def __str__(self):
        return (
            f"torch {self.torch}: {self.examples:,} {self.noun} ({self.different:,} different) in "
            f"{self.minutes:.1f} min: {self.failures} failures; "
            f"features of less than {self.rare:.0%} of them: {self.missed or 'none'}"
        )


def examples_of(job, strategy, check):
    """(counts, different ones, what failed) of one process.

    `check(example)` gives the features of one, with "examples" among them, and what it is to be
    told from others by.
    """
    number, examples = job
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the two halves of eight random images differ
    counts, different, last = Counter(), set(), time.monotonic()

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def once(example):
        nonlocal last
        features, identity = check(example)
        counts.update({*features, "examples"})
        different.add(hash(identity))
        if time.monotonic() - last > 60:
            last = time.monotonic()
            print(f"process {number}: {counts['examples']} done", flush=True)

    try:
        once()
    except Exception:  # noqa: BLE001 - whatever it is, it is to be seen
        return counts, different, traceback.format_exc()
    return counts, different, ""


def main(fuzz, description, noun, examples, *, rare):
    """Run `fuzz((seed, examples))` in processes, print the counts; returns the exit code.

    That is 1 for a failure, and for a feature that less than the share `rare` of them had.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(f"--{noun}", type=int, default=examples, dest="examples")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="add the last line there")
    arguments = parser.parse_args()
    start, processes = time.monotonic(), arguments.processes
    shares = [arguments.examples // processes] * processes
    shares[0] += arguments.examples - sum(shares)
    jobs = [(arguments.seed * processes + i, share) for i, share in enumerate(shares)]
    # Not multiprocessing's pool, which waits for ever for a process that has crashed.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(fuzz, jobs))
    counts = sum((found for found, _, _ in results), Counter())
    total = counts.pop("examples")
    different = len(set().union(*(hashes for _, hashes, _ in results)))
    failures = [failure for _, _, failure in results if failure]
    for feature, count in sorted(counts.items()):
        print(f"{count:6,}  {feature}")
    missed = [feature for feature, count in counts.items() if count < rare * total]
    print("\n".join(failures))
    minutes = (time.monotonic() - start) / 60
    found = (noun, torch.__version__, total, different, minutes, len(failures), rare)
    fuzzed = Fuzzed(*found, ", ".join(missed))
    print(fuzzed)
    record([fuzzed], arguments.csv)
    return 1 if failures or missed else 0
