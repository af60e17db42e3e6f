"""Run the tests with the oldest versions that pyproject.toml allows, and with the newest.

    pip install uv
    python scripts/versions.py --results docs/results/versions.csv --markdown docs/versions.md

Each set of versions gets an environment of its own: uv resolves the direct dependencies to their
lowest allowed versions, or to the highest. Exits with 1 where a test fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import NamedTuple

from markdown_table import markdown_table
from recorded_runs import RecordedRuns

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "numpy", "pillow", "safetensors", "timm", "matplotlib")


@dataclass(frozen=True)
class Tested:
    """What the tests said of a set of versions.

    Attributes:
        versions: name of the set.
        python: version, as those of packages that follow.
        tests: the last line of pytest, with the seconds.
    """

    versions: str
    python: str
    torch: str
    torchvision: str
    numpy: str
    pillow: str
    safetensors: str
    timm: str
    matplotlib: str
    tests: str

    @property
    def passed(self) -> bool:
        return "passed" in self.tests and not any(w in self.tests for w in ("failed", "error"))


class Versions(NamedTuple):
    """What to resolve to, and for which Python."""

    resolution: str
    python: str


TEXT = [
    "What the tests said with the oldest versions of the direct dependencies that pyproject.toml",
    "allows, and with the newest:",
    "",
    "    python scripts/versions.py --results docs/results/versions.csv \\",
    "        --markdown docs/versions.md",
]
SETS = {
    "oldest": Versions("lowest-direct", "3.10"),
    "newest": Versions("highest", "3.13"),
}


def tested(name: str, folder: Path, arguments: list[str]) -> Tested:
    """Run the tests with a set of versions."""
    wanted, environment = SETS[name], folder / name
    python = environment / "bin" / "python"
    run("uv", "venv", "--seed", "--quiet", "--python", wanted.python, str(environment))
    install = ["uv", "pip", "install", "--quiet", "--python", str(python)]
    run(*install, "--resolution", wanted.resolution, "--editable", ".[dev]")
    listed = run("uv", "pip", "list", "--python", str(python), "--format", "json")
    versions = {one["name"]: one["version"] for one in json.loads(listed)}
    report = folder / f"{name}.txt"
    with report.open("w") as file:
        command = [str(python), "-m", "pytest", "-n", "2", "--dist", "worksteal", *arguments]
        done = subprocess.run(command, cwd=ROOT, stdout=file, check=False)  # noqa: S603
    summary = report.read_text().strip().rpartition("\n")[2]
    if done.returncode:
        print(report.read_text())
    found = {package: versions.get(package, "-") for package in PACKAGES}
    return Tested(versions=name, python=wanted.python, tests=summary, **found)


def run(*command: str) -> str:
    """Return the output of a command; end the script with what it printed where it fails."""
    done = subprocess.run(  # noqa: S603
        command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ), check=False
    )
    if done.returncode:
        sys.exit(f"versions.py: {' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


def document(runs: Sequence[Tested]) -> str:
    """Write the page, of the last run with each set."""
    latest = {run.versions: run for run in runs}
    head = ["", *(field.name for field in fields(Tested)[1:])]
    table = markdown_table(head, [astuple(latest[name]) for name in SETS if name in latest], head)
    return "\n".join(["# Versions", "", *TEXT, "", table])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", choices=SETS, nargs="+", default=list(SETS), help="these sets of versions")
    add("--results", type=Path, required=True, help="CSV file of results, added to")
    add("--markdown", type=Path, metavar="FILE", help="write the page there")
    add("tests", nargs="*", help="arguments for pytest; default: all tests")
    arguments = parser.parse_args()
    if not shutil.which("uv"):
        print("versions.py: it needs uv: pip install uv", file=sys.stderr)
        return 2
    record = RecordedRuns(arguments.results, Tested)
    passed = True
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            record.append(tested(name, Path(folder), arguments.tests))
        passed &= record.runs[-1].passed
    page = document(record.runs)
    print(page)
    if arguments.markdown:
        arguments.markdown.write_text(page)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
