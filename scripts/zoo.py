"""Convert every model of torchvision, and every convolutional one without BatchNorm of timm.

    python scripts/zoo.py --results zoo.csv --jobs 2

Each is built with random weights, retrofitted, compared with the original bit for bit and folded
back, in a process of its own. Results are kept in a CSV file, a line a model, so that a sweep that
was interrupted goes on where it was; docs/zoo.md is written from them. Needs timm.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from recorded_runs import RecordedRuns
from zoo_checks import check, versions
from zoo_models import family, names, outlook
from zoo_tables import Result, document


@dataclass
class Worker:
    """A process that checks one model."""

    name: str
    process: BaseProcess
    deadline: float


def work(name: str, threads: int, results: Connection) -> None:
    torch.set_num_threads(threads)
    results.send(check(name))


def sweep(
    needs: dict[str, float], jobs: int, threads: int, memory: float, limit: float
) -> Iterator[Result]:
    """Check models, each in a process of its own, `jobs` at a time and the largest first.

    Args:
        needs: name of the model to the memory that its check takes; none starts beside others
            while all of these together take more than `memory`.
        limit: seconds after which a check is given up.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm", "torchvision", "retrofit"])
    waiting = sorted(needs, key=lambda name: needs[name], reverse=True)
    running: dict[Connection, Worker] = {}
    try:
        while waiting or running:
            free = memory - sum(needs[worker.name] for worker in running.values())
            name = next((n for n in waiting if needs[n] <= free or not running), None)
            if name is not None and len(running) < jobs:
                waiting.remove(name)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=work, args=(name, threads, sender), daemon=True)
                process.start()
                sender.close()
                running[receiver] = Worker(name, process, time.monotonic() + limit)
                continue
            ready = wait(list(running), timeout=1)
            for receiver, worker in list(running.items()):
                late = time.monotonic() > worker.deadline
                if receiver in ready or late:
                    yield finished(worker, receiver, late=late and receiver not in ready)
                    del running[receiver]
    finally:
        for worker in running.values():
            worker.process.kill()


def finished(worker: Worker, results: Connection, *, late: bool) -> Result:
    """Return what a process found, or how it ended."""
    result = Result(worker.name, family(worker.name), versions())
    if late:
        worker.process.kill()
        result.error = "not done within the time limit"
    else:
        try:
            result = results.recv()
        except EOFError:
            worker.process.join()
            result.error = f"the process ended with exit code {worker.process.exitcode}"
    worker.process.join()
    results.close()
    return result


# --- the command -------------------------------------------------------------------------------


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--results", type=Path, required=True, help="CSV file of results, added to")
    add("--markdown", type=Path, help="write the document there")
    add("--only", default="*", metavar="GLOB", help="these models: 'timm:nfnet_*'")
    add("--retry", action="store_true", help="check again what failed before")
    add("--jobs", type=int, default=1, help="models at a time")
    add("--threads", type=int, default=1, help="of each")
    add("--memory", type=float, default=10.0, metavar="GB", help="for all jobs")
    add("--limit-seconds", type=float, default=900.0, help="for each model")
    return parser.parse_args()


def study(arguments: argparse.Namespace) -> list[Result]:
    """Check all models that are asked for, except those that have a result already."""
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    record = RecordedRuns(arguments.results, Result)
    chosen = names(arguments.only)
    done = {r.name for r in record.runs if not (arguments.retry and r.failed)}
    needs = {}
    for name in chosen:
        if name in done:
            continue
        skipped, memory = outlook(name)
        if skipped:
            record.append(Result(name, family(name), versions(), skipped))
        else:
            needs[name] = memory
    limits = (arguments.jobs, arguments.threads, arguments.memory, arguments.limit_seconds)
    for result in sweep(needs, *limits):
        record.append(result)
        print(result, flush=True)
    last = {result.name: result for result in record.runs}  # retried models have several
    return [last[name] for name in chosen]


def main() -> int:
    arguments = parsed()
    results = study(arguments)
    if arguments.markdown:
        arguments.markdown.parent.mkdir(parents=True, exist_ok=True)
        arguments.markdown.write_text(document(results))
    failures = sum(result.failed for result in results)
    checked = sum(not result.skipped for result in results)
    print(f"{checked} models, {failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
