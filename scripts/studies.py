"""What the studies share: a CSV that an interrupted one goes on with, and their tables."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    R = TypeVar("R", bound=DataclassInstance)

KINDS: Mapping[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": "True".__eq__,
}


def recorded(file: Path, kind: type[R], settings: Mapping[str, Any]) -> list[R]:
    """The runs in a study's CSV, a line each; those of other settings are refused."""
    if not file.exists():
        return []
    text = file.read_text()
    whole = text[: text.rfind("\n") + 1]  # a process killed while it wrote leaves half a line
    if whole != text:
        file.write_text(whole)
    lines = csv.DictReader(whole.splitlines())
    types = {field.name: str(field.type) for field in fields(kind)}
    if lines.fieldnames and list(lines.fieldnames) != list(types):
        raise SystemExit(f"{file} has other columns than a study of today: give another --output")
    runs = [kind(**{name: KINDS[t](line[name]) for name, t in types.items()}) for line in lines]
    for found in runs:
        for setting, value in settings.items():
            if getattr(found, setting) != value:
                raise SystemExit(
                    f"{file} has runs with {setting} = {getattr(found, setting)}, this study has "
                    f"{value}: give the same settings to go on, or another --output"
                )
    return runs


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    rule = ["---", *("---:" for _ in head[1:])]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *lines))
