"""What the documentation names is there, and what is public is documented."""

import inspect
import re
from collections import Counter
from pathlib import Path

import pytest

import retrofit

ROOT = Path(__file__).resolve().parents[2]


def test_every_public_name_is_on_the_page_of_the_api():
    page = (ROOT / "docs" / "api.md").read_text()
    documented = set(re.findall(r"^::: retrofit\.(\w+)$", page, re.MULTILINE))
    assert documented == set(retrofit.__all__) - {"__version__"}


def test_tab_completion_shows_the_public_names_and_nothing_else():
    assert dir(retrofit) == sorted(retrofit.__all__)
    assert all(getattr(retrofit, name).__doc__ for name in set(dir(retrofit)) - {"__version__"})


FUNCTIONS = [name for name in retrofit.__all__ if inspect.isfunction(getattr(retrofit, name))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_help_explains_each_option_in_a_line_of_its_own(name):
    function = getattr(retrofit, name)
    explained = re.findall(r"^    ([a-z_, ]+): (\S.+)", inspect.getdoc(function), re.MULTILINE)
    lines = {option: text for options, text in explained for option in options.split(", ")}
    options = inspect.signature(function).parameters
    assert set(options) - set(lines) == set()
    assert {option for option in options if re.match(r"(see|as for) ", lines[option])} == set()


def test_the_readme_is_short_and_every_page_that_it_names_is_there():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 1500
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    assert len(links) > 20
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_test_that_holds_a_guarantee_exists():
    page = (ROOT / "docs" / "guarantees.md").read_text()
    named = set(re.findall(r"\btest_\w+", page))
    assert len(named) > 20
    files = Counter(path.stem for path in (ROOT / "tests").rglob("test_*.py"))
    assert {name: files[name] for name in named if files[name] != 1} == {}


def test_every_option_of_the_command_in_the_documentation_exists(run):
    commands = ("plan", "convert", "verify", "fold", "adapt", "restore", "inspect", "report")
    known = set(re.findall(r"--[a-z][a-z-]+", "".join(run(one, "--help")[1] for one in commands)))
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    used = {
        option
        for page in pages
        for line in re.findall(r"retrofit [a-z]+ [^`\n]*--[^`\n]*", page.read_text())
        for option in re.findall(r"(?<= )--[a-z][a-z-]+", line)
    }
    assert "--tolerance" in known
    assert used
    assert used - known == set()
