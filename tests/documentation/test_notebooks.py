"""The notebooks as they are stored; `make notebooks` runs them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path):
    return json.loads(path.read_text())["cells"]


def outputs(path):
    return [(cell, out) for cell in cells(path) for out in cell.get("outputs", [])]


def printed(output):
    """Everything in an output that is text."""
    texts = [text for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
    return "".join("".join(text) for text in [*texts, output.get("text", "")])


def test_there_are_eight_and_the_readme_links_each_and_first_the_most_common_case():
    links = re.findall(r"\((\S+\.ipynb)\)", (ROOT / "notebooks" / "README.md").read_text())
    assert sorted(links) == [path.name for path in NOTEBOOKS]
    assert [name[0] for name in links] == list("81234567")


@each_notebook
def test_a_notebook_begins_with_its_numbered_title_and_the_import_that_all_share(path):
    title, code = cells(path)[:2]
    assert title["source"][0].startswith(f"# {path.name[0]}. ")
    assert code["source"][0].startswith("from common import QUICK, plt")


@each_notebook
def test_every_cell_was_run_in_order_and_none_failed_or_warned(path):
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = {(out["output_type"], out.get("name")) for _, out in outputs(path)}
    assert kinds <= {("stream", "stdout"), ("display_data", None), ("execute_result", None)}


@each_notebook
def test_what_is_stored_tells_nothing_of_the_machine_and_is_small(path):
    for cell, output in outputs(path):
        assert not re.search(r"(?<![\w.:/])/\w[\w.-]*/\w", printed(output)), cell["source"][0]
        assert "it/s]" not in printed(output)  # a progress bar
    assert not any(cell["metadata"] for cell in cells(path))
    assert path.stat().st_size < 1_500_000


@each_notebook
def test_every_figure_is_followed_by_what_to_see(path):
    written = cells(path)
    figures = [
        i
        for i, cell in enumerate(written)
        if any("image/png" in out.get("data", {}) for out in cell.get("outputs", []))
    ]
    assert figures
    for i in figures:
        text = written[i + 1]
        assert text["cell_type"] == "markdown"
        assert text["source"][0][0] not in "#-|"  # prose


def test_a_kernel_without_matplotlib_is_told_which_extra_to_install():
    code = "import sys; sys.modules['matplotlib'] = None; import common"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=ROOT / "notebooks", capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "need matplotlib" in last
    assert "pip install '.[notebooks]'" in last


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("one / 0\nprint('never')", "(one / 0): ZeroDivisionError: division by zero"),
        ("import os\nos._exit(3)", "(import os): Kernel died"),
    ],
    ids=["raises", "ends"],
)
def test_a_cell_that_fails_is_named_in_one_line(fault, said, tmp_path):
    pytest.importorskip("nbclient", reason="pip install '.[notebooks]'")
    pytest.importorskip("ipykernel", reason="pip install '.[notebooks]'")
    code = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": []}
    sources = ["one = 1", "", fault]
    notebook = {
        "cells": [code | {"id": str(i), "source": source} for i, source in enumerate(sources)],
        "metadata": {},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    path = tmp_path / "broken.ipynb"
    path.write_text(json.dumps(notebook))
    command = [sys.executable, ROOT / "scripts" / "run_notebooks.py", "--in-place", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"{path}, cell 2 {said}"]
    assert json.loads(path.read_text()) == notebook


@each_notebook
def test_what_a_notebook_imports_of_the_package_is_there(path):
    code = ("".join(cell["source"]) for cell in cells(path) if cell["cell_type"] == "code")
    lines = [line for text in code for line in text.splitlines()]
    imports = [line for line in lines if re.match(r"(from retrofit|import retrofit)\b", line)]
    assert imports
    exec("\n".join(imports), {})  # noqa: S102 - a missing name raises ImportError
