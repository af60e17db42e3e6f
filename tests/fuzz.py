"""Thousands of random networks through everything that is promised; `make fuzz` runs it.

    python tests/fuzz.py --networks 5000

Prints how many networks had each feature, and ends with exit code 1 where a network fails, which
is then printed, as small as hypothesis finds it; or where a feature came up less than 100 times
in 5,000 networks.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from networks import features, networks
from promises import OPTIONS, check

RARE = 100 / 5000


def fuzz(job):
    """(networks, different ones, features, what failed) of one process."""
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
    @given(networks(), st.sampled_from(OPTIONS))
    def once(drawn, options):
        nonlocal last
        counts.update(features(drawn) | {f"options {options}"})
        counts["networks"] += 1
        different.add(hash((str(drawn.model), drawn.training, str(options))))
        check(drawn, options)
        if time.monotonic() - last > 60:
            last = time.monotonic()
            print(f"process {number}: {counts['networks']} networks", flush=True)

    try:
        once()
    except Exception:  # noqa: BLE001 - whatever it is, it is to be seen
        return counts, different, traceback.format_exc()
    return counts, different, ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", type=int, default=5000)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start, processes = time.monotonic(), arguments.processes
    shares = [arguments.networks // processes] * processes
    shares[0] += arguments.networks - sum(shares)
    jobs = [(arguments.seed * processes + i, share) for i, share in enumerate(shares)]
    # Not multiprocessing's pool, which waits for ever for a process that has crashed.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(fuzz, jobs))
    counts = sum((found for found, _, _ in results), Counter())
    total = counts.pop("networks")
    different = len(set().union(*(hashes for _, hashes, _ in results)))
    failures = [failure for _, _, failure in results if failure]
    for feature, count in sorted(counts.items()):
        print(f"{count:6,}  {feature}")
    rare = [feature for feature, count in counts.items() if count < RARE * total]
    print("\n".join(failures))
    print(
        f"torch {torch.__version__}: {total:,} networks ({different:,} different) in "
        f"{(time.monotonic() - start) / 60:.1f} min: {len(failures)} failures; "
        f"features of less than {RARE:.0%} of them: {', '.join(rare) or 'none'}"
    )
    return 1 if failures or rare else 0


if __name__ == "__main__":
    sys.exit(main())
