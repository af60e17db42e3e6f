"""Convert every model of torchvision, and every convolutional one without BatchNorm of timm.

    python scripts/zoo.py --results docs/results/zoo.csv --jobs 2

Each is built with random weights, retrofitted, compared with the original bit for bit and folded
back, in a process of its own. Results are kept in a CSV file, a line a model, so that a sweep that
was interrupted goes on where it was; docs/zoo.md is written from them. Needs timm.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from model_processes import Sweep
from recorded_runs import RecordedRuns
from zoo_checks import check, versions
from zoo_models import family, names, outlook
from zoo_tables import Result, document


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


def blank(name: str) -> Result:
    return Result(name, family(name), versions())


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
            result = blank(name)
            result.skipped = skipped
            record.append(result)
        else:
            needs[name] = memory
    limits = (arguments.jobs, arguments.threads, arguments.memory, arguments.limit_seconds)
    largest_first = dict(sorted(needs.items(), key=lambda need: need[1], reverse=True))
    for result in Sweep(check, blank, *limits).over(largest_first):
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
