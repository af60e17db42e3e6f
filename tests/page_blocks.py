"""The blocks of code on the pages of the documentation, and how they are run."""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torchvision.models import WeightsEnum, get_model, get_model_weights, list_models

from retrofit.cli import arguments, main

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^```(\w*)(?: title=\"(.*?)\")?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NEEDS = "Needs "  # a package, which the title of a block names
NOT_RUN = "Not run by the tests"  # how the title of a block begins, with what it would need


class Block(NamedTuple):
    """A block of code; `printed` is the block of text after it, if that comes at once."""

    line: int
    language: str
    title: str
    code: str
    printed: str | None

    @property
    def runs(self):
        return not self.title.startswith(NOT_RUN)

    @property
    def missing(self):
        """The package that the block needs, if it is not installed; else None."""
        name = self.title.removeprefix(NEEDS)
        return name if name != self.title and find_spec(name) is None else None


def section(page, title):
    """A section of a page, from its heading to the next of the same level."""
    text = (ROOT / page).read_text()
    heading = re.compile(rf"^(#+) {re.escape(title)}\n(.*)", re.DOTALL | re.MULTILINE)
    level, rest = heading.search(text).groups()
    return re.split(rf"^#{{1,{len(level)}}} ", rest, flags=re.MULTILINE)[0]


def blocks_of(text):
    """The fenced blocks of a text."""
    found = list(FENCE.finditer(text))
    blocks = []
    for i, fence in enumerate(found):
        language, title, code = fence.groups()
        after = found[i + 1] if i + 1 < len(found) else None
        at_once = after and after[1] == "text" and not text[fence.end() : after.start()].strip()
        line = text[: fence.start()].count("\n") + 1
        blocks.append(Block(line, language, title or "", code, after[3] if at_once else None))
    return blocks


def blocks(page):
    return blocks_of((ROOT / page).read_text())


def code_of(page):
    return [block for block in blocks(page) if block.language in ("python", "sh")]


def commands(code):
    """The commands of a block for the shell, as lists of words."""
    lines = code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def words_of(command):
    """What `retrofit` is called with, by itself or by torchrun; None for another command."""
    if "retrofit" not in command or command[0] == "pip":
        return None
    return command[command.index("retrofit") + 1 :]


def run_page(page, variables, capsys, extra=(), points=None):
    """Run the blocks of a page from top to bottom, Python's in one namespace.

    What a block prints is compared, but for its numbers, with the block of text after it; of these
    percentages may be that many `points` off, if given. `extra` is added to each command that reads
    pictures. Returns the packages that blocks need and that are not installed.
    """
    missing = set()
    for block in blocks(page):
        if block.missing:
            missing.add(block.missing)
        if block.missing or not block.runs:
            continue
        capsys.readouterr()
        if block.language == "python":
            lines = "\n" * block.line + block.code  # so that errors name the line of the page
            exec(compile(lines, str(ROOT / page), "exec"), variables)  # noqa: S102
        if block.language == "sh":
            for command in commands(block.code):
                words = words_of(command)
                if command[0] == "retrofit":
                    more = known(extra, words[0]) if "--data" in words else ()
                    assert exit_code([*words, *more]) == 0, (page, block.line)
        if block.printed is not None:
            found, where = capsys.readouterr().out, f"{page}:{block.line}"
            assert_same_words(found, block.printed, where)
            if points is not None:
                shown = pytest.approx(percentages(block.printed), abs=points)
                assert percentages(found) == shown
    return missing


def parsers():
    """The parser of each command."""
    (each,) = arguments._parser()._subparsers._group_actions
    return each.choices


def known(options, command):
    """Those of `--option VALUE --option VALUE ...` that a command has."""
    names = parsers()[command]._option_string_actions
    pairs = zip(options[::2], options[1::2], strict=True)
    return [word for pair in pairs if pair[0] in names for word in pair]


def exit_code(words):
    try:
        return main(words)
    except SystemExit as stop:
        return stop.code


def assert_same_words(found, shown, where):
    """Compare two texts but for numbers, rules and spaces; a line of dots stands for any lines."""
    parts = re.split(r"\n?^\.\.\.$\n?", masked(shown), flags=re.MULTILINE)
    pattern = ".*".join(map(re.escape, parts))
    assert re.fullmatch(pattern, masked(found), re.DOTALL), f"{where} prints\n{found}"


def percentages(text):
    return [float(number) for number in re.findall(r"(\d+\.?\d*) ?%", text)]


def masked(text):
    text = re.sub(r"\b\d[\d.,e]*([-+]\d+)?(?=\W|s\b|$)", "#", text)
    text = re.sub(r"-{2,}", "--", text)
    return "\n".join(" ".join(line.split()) for line in text.strip().splitlines())


def without_downloads(monkeypatch):
    """Let the names of weights stand for random ones, of torchvision and of timm."""

    def random_weights(weights, *_, **__):
        (name,) = (n for n in list_models() if get_model_weights(n) is type(weights))
        torch.manual_seed(0)
        return get_model(name).state_dict()

    monkeypatch.setattr(WeightsEnum, "get_state_dict", random_weights)
