"""Fold every model with BatchNorm of torchvision and timm, and restore it into its class.

    python scripts/restored_zoo.py --folds folds.csv --results zoo.csv --markdown page.md

The first file gets some networks as four folders fold them; the second all models, as
`retrofit.fold` does, the small ones first. Each is checked in a process of its own, and kept as a
line of the CSV file, so that a sweep that was interrupted goes on where it was. The page is written
after each. Needs timm.
"""

from __future__ import annotations

import argparse
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fold_checks import FOLDED, blank_fold, check_fold
from fold_tables import FoldedBy
from model_processes import Sweep
from recorded_runs import RecordedRuns
from restored_zoo_checks import blank, check, outlook
from restored_zoo_tables import Restored, document
from zoo_models import names

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
        self.missing = 0

    def run(self) -> None:
        """Check what is asked for and has no result already; write the page after each."""
        limits = (1, 1, MEMORY, self.arguments.limit_seconds)
        networks = dict.fromkeys(self._waiting(FOLDED, self.folds), 1.0)
        for fold in Sweep(check_fold, blank_fold, *limits).over(networks):
            self.folds.append(fold)
            self._write(fold)
        models = self._small_first()
        self.missing = len(models)
        self._write("all models")
        for model in Sweep(check, blank, *limits).over(models):
            self.models.append(model)
            self.missing -= 1
            self._write(model)

    def failures(self) -> int:
        """Count what failed, of everything so far."""
        return sum(result.failed for result in (*last(self.folds), *last(self.models)))

    def _waiting(self, chosen: list[str], record: RecordedRuns[Any]) -> list[str]:
        done = {r.name for r in record.runs if not (self.arguments.retry and r.failed)}
        return [n for n in chosen if n not in done and fnmatchcase(n, self.arguments.only)]

    def _small_first(self) -> dict[str, float]:
        """Map the models that are to be restored to GB of memory; note why the others are not."""
        found = [
            outlook(n, self.arguments.most * 1e6) for n in self._waiting(names("*"), self.models)
        ]
        for result in found:
            if result.skipped:
                self.models.append(result)
        found = sorted((r for r in found if not r.skipped), key=lambda r: r.parameters)
        return {result.name: 1.0 for result in found}

    def _write(self, what: object) -> None:
        print(what, flush=True)
        page = document(last(self.folds), last(self.models), self.missing)
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
