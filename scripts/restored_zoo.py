"""Fold every model with BatchNorm of torchvision and timm, and restore it into its class.

    python scripts/restored_zoo.py --folds folds.csv --results zoo.csv --markdown page.md

The first file gets some networks as four folders fold them; the second all models, as
`retrofit.fold` does: the first of each family, then the second, and so on. Each is checked in a
process of its own, and kept as a line of the CSV file, so that a sweep that was interrupted goes on
where it was. The page is written after each, and says how many are missing. Needs timm.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from fnmatch import fnmatchcase
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from fold_checks import FOLDED, blank_fold, check_fold
from fold_tables import FoldedBy
from model_processes import Sweep
from recorded_runs import RecordedRuns
from restored_zoo_checks import blank, check
from restored_zoo_tables import Restored, document
from zoo_models import family, names

MEMORY = 10.0  # GB, of which one model at a time may take what it needs


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--folds", type=Path, required=True, help="CSV file of the four folders, added to")
    add("--results", type=Path, required=True, help="CSV file of all models, added to")
    add("--markdown", type=Path, required=True, help="write the document there")
    add("--only", default="*", metavar="GLOB", help="these models: 'timm:resnet*'")
    add(
        "--most", type=float, default=200, metavar="N", help="leave out more than N million weights"
    )
    add("--retry", action="store_true", help="check again what failed before")
    add("--minutes", type=float, default=math.inf, help="begin no check after that time")
    add("--limit-seconds", type=float, default=900.0, help="for each model")
    return parser.parse_args()


class Study:
    """The results of both tables, those of earlier runs of this script too."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        for file in (arguments.folds, arguments.results, arguments.markdown):
            file.parent.mkdir(parents=True, exist_ok=True)
        self.arguments = arguments
        self.folds = RecordedRuns(arguments.folds, FoldedBy)
        self.models = RecordedRuns(arguments.results, Restored)
        self.missing = 0, 0
        self.end: float = time.monotonic() + 60 * arguments.minutes

    def run(self) -> None:
        """Check what is asked for and has no result already; write the page after each."""
        limits = (1, 1, MEMORY, self.arguments.limit_seconds)
        networks = dict.fromkeys(self._waiting(FOLDED, self.folds), 1.0)
        models = dict.fromkeys(self._family_by_family(), 1.0)
        self.missing = len(networks), len(models)
        self._write(f"{len(networks)} networks and {len(models)} models to go")
        if self._in_time():
            for fold in Sweep(check_fold, blank_fold, *limits).over(networks):
                self.folds.append(fold)
                self.missing = self.missing[0] - 1, self.missing[1]
                self._write(fold)
                if not self._in_time():
                    return
            for model in Sweep(partial(check, most=self.arguments.most * 1e6), blank, *limits).over(
                models
            ):
                self.models.append(model)
                self.missing = self.missing[0], self.missing[1] - 1
                self._write(model)
                if not self._in_time():
                    return

    def _in_time(self) -> bool:
        return time.monotonic() < self.end

    def failures(self) -> int:
        """Count what failed, of everything so far."""
        return sum(result.failed for result in (*last(self.folds), *last(self.models)))

    def _waiting(self, chosen: list[str], record: RecordedRuns[Any]) -> list[str]:
        done = {r.name for r in record.runs if not (self.arguments.retry and r.failed)}
        return [n for n in chosen if n not in done and fnmatchcase(n, self.arguments.only)]

    def _family_by_family(self) -> list[str]:
        """List the models without a result: the first of each family, then the second of each."""
        families: dict[str, list[str]] = {}
        for name in self._waiting(names("*"), self.models):
            families.setdefault(family(name), []).append(name)
        return [name for same in zip_longest(*families.values()) for name in same if name]

    def _write(self, what: object) -> None:
        print(what, flush=True)
        folds = sorted(last(self.folds), key=lambda fold: FOLDED.index(fold.name))
        page = document(folds, last(self.models), self.missing)
        self.arguments.markdown.write_text(page)


def last(record: RecordedRuns[Any]) -> list[Any]:
    """List the last result for each name: those that were retried have several."""
    return [*{result.name: result for result in record.runs}.values()]


def main() -> int:
    study = Study(parsed())
    study.run()
    print(f"{study.failures()} failures")
    return int(study.failures() > 0)


if __name__ == "__main__":
    sys.exit(main())
