"""Runs in a CSV file, a line each, so that a study that was interrupted goes on where it was."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

R = TypeVar("R", bound="DataclassInstance")

# How a cell is read, by the type of its field. Fields of all other types are written as JSON.
READERS: Mapping[Any, Callable[[str], Any]] = {
    int: int,
    float: float,
    str: str,
    bool: "True".__eq__,
}


class RecordedRuns(Generic[R]):
    """The runs of a study: those that a file has already, and those that are appended to it.

    Args:
        file: a CSV file; it is made by the first run where there is none.
        kind: the dataclass of a run. Its fields are the columns.
        settings: the values that some fields have in all runs of the study.
        study: a field that tells the studies apart which share the file; `settings` has its value.

    Attributes:
        runs: all of the study, in the order in which they were made.

    Raises:
        SystemExit: the file has other columns, or a run of the study has other settings.
    """

    def __init__(
        self,
        file: Path,
        kind: type[R],
        settings: Mapping[str, object] | None = None,
        study: str | None = None,
    ) -> None:
        self.file, self.kind = file, kind
        types = get_type_hints(kind)
        self.types = {field.name: types[field.name] for field in fields(kind)}
        settings = settings or {}
        self.runs = self._read()
        if study is not None:
            self.runs = [run for run in self.runs if getattr(run, study) == settings[study]]
        for setting, value in settings.items():
            for other in {getattr(run, setting) for run in self.runs} - {value}:
                raise SystemExit(
                    f"{file} has runs with {setting} = {other}, this study has {value}: give the "
                    "same settings to go on, or another file"
                )

    def append(self, run: R) -> None:
        """Add a run, and write it to the file at once."""
        self.runs.append(run)
        cells = [
            value if self.types[name] in READERS else json.dumps(value)
            for name, value in asdict(run).items()
        ]
        with self.file.open("a", newline="") as lines:
            writer = csv.writer(lines, lineterminator="\n")
            if lines.tell() == 0:
                writer.writerow(self.types)
            writer.writerow(cells)

    def _read(self) -> list[R]:
        if not self.file.exists():
            return []
        text = self.file.read_text()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # a process killed while it wrote leaves half a line
            self.file.write_text(whole)
        head, *lines = csv.reader(io.StringIO(whole)) if whole else [[*self.types]]
        if head != [*self.types]:
            raise SystemExit(f"{self.file} has other columns than a study of today: give another")
        readers = [READERS.get(kind, json.loads) for kind in self.types.values()]
        return [
            self.kind(*(read(cell) for read, cell in zip(readers, line, strict=True)))
            for line in lines
        ]


def record(runs: Sequence[R], file: Path | None) -> None:
    """Add runs of one kind to a file, where one is given."""
    if file is not None and runs:
        file.parent.mkdir(parents=True, exist_ok=True)
        recorded = RecordedRuns(file, type(runs[0]))
        for run in runs:
            recorded.append(run)
