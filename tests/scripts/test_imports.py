"""The scripts import each other in one direction."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "scripts"


def imported(file):
    """All modules that a file imports, wherever it does, also for type checkers alone."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_no_script_imports_one_that_imports_it():
    files = {file.stem: file for file in SCRIPTS.glob("*.py")}
    graph = {name: set(imported(file)) & files.keys() for name, file in files.items()}
    order = list(TopologicalSorter(graph).static_order())  # CycleError names a circle
    assert order.index("recorded_runs") < order.index("zoo")
