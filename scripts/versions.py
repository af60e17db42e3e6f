"""Run the tests with the oldest versions that pyproject.toml allows, and with the newest.

    pip install uv
    python scripts/versions.py --markdown docs/versions.md

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
from pathlib import Path
from typing import NamedTuple

from markdown_table import markdown_table

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "numpy", "pillow", "safetensors", "timm", "matplotlib")


class Versions(NamedTuple):
    """What to resolve to, and for which Python."""

    resolution: str
    python: str


TEXT = [
    "What `python scripts/versions.py --markdown docs/versions.md` found: all tests, with the",
    "oldest versions of the direct dependencies that pyproject.toml allows, and with the newest.",
]
SETS = {
    "oldest": Versions("lowest-direct", "3.10"),
    "newest": Versions("highest", "3.13"),
}


def tested(name: str, folder: Path, arguments: list[str]) -> tuple[bool, dict[str, str]]:
    """Run the tests with a set of versions; return whether they pass, and a row of the table."""
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
    return not done.returncode, {"": name, "Python": wanted.python, **found, "tests": summary}


def run(*command: str) -> str:
    """Return the output of a command; end the script with what it printed where it fails."""
    done = subprocess.run(  # noqa: S603
        command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ), check=False
    )
    if done.returncode:
        sys.exit(f"versions.py: {' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


def document(rows: list[dict[str, str]], earlier: str) -> str:
    """Write the document; a set that did not run now keeps its row of the earlier one."""
    head = list(rows[0])
    lines = [line[2:-2].split(" | ") for line in earlier.splitlines() if line.startswith("| ")]
    found = {cells[0]: cells for cells in lines} | {row[""]: list(row.values()) for row in rows}
    table = markdown_table(head, [found[name] for name in SETS if name in found], words=head)
    return "\n".join(["# Versions", "", *TEXT, "", table])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", choices=SETS, nargs="+", default=list(SETS), help="these sets of versions")
    add("--markdown", type=Path, metavar="FILE", help="write the table there")
    add("tests", nargs="*", help="arguments for pytest; default: all tests")
    arguments = parser.parse_args()
    if not shutil.which("uv"):
        print("versions.py: it needs uv: pip install uv", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        results = [tested(name, Path(folder), arguments.tests) for name in arguments.only]
    file: Path | None = arguments.markdown
    text = document([row for _, row in results], file.read_text() if file and file.exists() else "")
    print(text)
    if file:
        file.write_text(text)
    return 0 if all(passed for passed, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
