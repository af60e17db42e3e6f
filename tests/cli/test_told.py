"""How a result is told: to people as wide as their terminal, to programs as one JSON object."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from folders import pictures
from safetensors.torch import save_file
from torch import nn

import retrofit
from retrofit.cli import main
from retrofit.demo import trained_vgg

NET = "retrofit.demo:trained_vgg"
DATA = "--data pictures --crop 32 --mean 0.5 --std 0.5 --workers 0"


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """Pictures, and a converted network with what it was converted from."""
    folder = tmp_path_factory.mktemp("kit")
    pictures(folder / "pictures", 40)
    return folder


@pytest.fixture
def told(run, kit, tmp_path):
    """Run a command with --json: its exit code, and the object."""
    (tmp_path / "pictures").symlink_to(kit / "pictures")

    def call(words):
        code, out, err = run(*words.split(), "--json")
        return code, json.loads(out), err

    return call


ALWAYS = {"exit_code", "warnings", "error", "written", "damaged_shards", "unreadable_pictures"}


def documented(command):
    """The keys of a command's object, in the table of the page."""
    page = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text("utf-8")
    rows = re.findall(r"(?m)^\| (\w*) ?\| (`[^|]+) \|", page.partition("Besides these")[2])
    found, current = {}, ""
    for name, keys in rows:
        current = name or current
        found.setdefault(current, set()).update(re.findall(r"`(\w+)`", keys))
    return found[command]


@pytest.fixture
def told_as_documented(told):
    """The same, of an object with the keys that the page lists."""

    def call(words):
        found = told(words)
        assert found[1].keys() - ALWAYS == documented(words.split()[0])
        return found

    return call


def test_every_command_tells_a_program_what_it_tells_people(told_as_documented):
    told = told_as_documented
    code, plan, _ = told(f"plan {NET}")
    assert (code, plan["exit_code"]) == (0, 0)
    sites = plan["plan"]["sites"]
    assert sum(site["decision"] == "insert" for site in sites) == 8

    code, found, err = told(f"convert {NET} {DATA} --output bn.safetensors --report bn.html")
    assert (code, err) == (0, [])
    assert (found["written"], found["report"]) == ("bn.safetensors", "bn.html")
    assert found["calibration"]["images"] == 40
    assert found["verification"]["exact"] is True
    assert found["drift"]["rows"][0]["batch_size"] == 8
    state = retrofit.load("bn.safetensors", trained_vgg()).state_dict()
    row = found["batchnorms"][0]
    mean = state[f"{row['batchnorm']}.running_mean"]
    assert row["mean"] == [float(mean.min()), float(mean.max())]
    assert row["channels"] == len(mean)

    code, found, _ = told("inspect bn.safetensors")
    assert found["provenance"]["images"] == 40
    assert len(found["batchnorms"]) == 8

    code, found, _ = told(f"verify bn.safetensors --model {NET} {DATA}")
    assert (code, found["passed"], found["images"], len(found["sites"])) == (0, True, 16, 8)

    code, found, _ = told(
        f"adapt bn.safetensors --model {NET} {DATA} --images 20 --output a.safetensors"
    )
    assert (found["images"], found["written"]) == (20, "a.safetensors")

    code, found, _ = told(f"fold bn.safetensors --model {NET} --output plain.pth")
    assert (code, found["folded"], found["left"]) == (0, 8, {})
    assert torch.load("plain.pth", weights_only=True).keys() == trained_vgg().state_dict().keys()

    code, found, _ = told("report bn.safetensors --output again.html")
    assert found["written"] == "again.html"


def test_restore_tells_a_program_what_it_restored(told_as_documented, tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def make(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())\n"
    )
    torch.save(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)).state_dict(), tmp_path / "w.pth")
    code, found, _ = told_as_documented(
        f"restore net.py:make --weights w.pth {DATA} --output bn.safetensors"
    )
    assert code == 0
    assert [seat["norm"] for seat in found["restoration"]["seats"]] == ["1"]
    assert found["loading"].startswith("network = make(); network.load_state_dict(")


def test_what_failed_is_in_the_object_and_on_stderr_as_ever(told, tmp_path):
    code, found, err = told("plan nosuchnet")
    assert (code, found["exit_code"]) == (2, 2)
    assert err == [f"retrofit: {found['error']}"]
    assert "nosuchnet" in found["error"]
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef make(): return nn.Sequential(nn.Conv2d(3, 4, 3))\n"
    )
    code, found, err = told(f"convert net.py:make {DATA} --output out.pth")
    assert (code, found["exit_code"]) == (1, 1)
    assert found["plan"]["sites"][0]["decision"] == "skip"
    assert "nothing to convert" in found["error"]


STAYS = """
from torch import nn

def make():
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
"""


def test_warnings_are_in_the_object(told, tmp_path):
    (tmp_path / "net.py").write_text(STAYS)
    made = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    save_file(made.state_dict(), tmp_path / "net.safetensors")
    code, found, err = told("fold net.safetensors --model net.py:make --output folded.safetensors")
    assert (code, found["folded"], list(found["left"])) == (0, 1, ["0"])
    assert len(err) == 1
    assert [f"retrofit: warning: {text}" for text in found["warnings"]] == err


@pytest.mark.filterwarnings("ignore:the statistics are those of one image")
def test_numbers_that_json_lacks_are_words(told, tmp_path):
    code, found, _ = told(
        f"adapt {converted(tmp_path)} --model {NET} {DATA} --images 1 --output a.pth"
    )
    assert (code, found["standard_error"]) == (0, "inf")


def converted(folder):
    file = folder / "bn.safetensors"
    retrofit.save(retrofit.insert(trained_vgg()), file, name=NET)
    return file


def test_quiet_prints_warnings_and_errors_only(capsys, kit, monkeypatch):
    monkeypatch.chdir(kit)
    words = f"convert {NET} {DATA} --output quiet.safetensors --quiet --report quiet.html"
    assert main(words.split()) == 0
    assert capsys.readouterr() == ("", "")
    assert main([*words.split()]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert "quiet.safetensors" in err
    assert main(["inspect", "quiet.safetensors", "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["exit_code"] == 0
    assert err == ""


def test_the_name_alone_prints_the_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert not stop.value.code
    out, err = capsys.readouterr()
    assert all(command in out for command in ("convert", "restore", "demo"))
    assert err == ""


@pytest.fixture
def terminal(monkeypatch, capsys):
    """Run a command where stdout is a terminal of a width: the lines that it shows."""

    def shown(words, width):
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        assert main(words.split()) == 0
        return capsys.readouterr().out.splitlines()

    return shown


ALIKE = """
from collections import OrderedDict
from torch import nn

def alike():
    blocks = {
        f"block_{i}": nn.Sequential(OrderedDict(projection_and_more=nn.Sequential(
            nn.Conv2d(3, 3, 3), nn.ReLU())))
        for i in range(3)
    }
    body = nn.Sequential(OrderedDict(blocks))
    return nn.Sequential(OrderedDict(a_backbone_of_some_length=body, head=nn.Conv2d(3, 2, 1)))
"""
NETS = """
from torch import nn

def deep():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    for name in ("query_projection", "attention", "block_17", "stage_3", "backbone"):
        outer = nn.Sequential()
        outer.add_module(name, net)
        net = outer
    return nn.Sequential(net, nn.Conv2d(8, 4, 1))
"""


@pytest.mark.parametrize("width", [60, 80, 120])
def test_tables_are_as_wide_as_the_terminal(terminal, tmp_path, monkeypatch, width):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NETS)
    wide = len("0.backbone.stage_3.block_17.attention.query_projection.0.conv")
    lines = terminal("plan net.py:deep", width)
    assert all(line == line.rstrip() for line in lines)
    assert max(map(len, lines)) <= width
    first = next(line for line in lines if line.startswith("0.backbone"))
    assert ("..." in first) == (width < 2 * wide)
    assert first.split()[0].endswith("ojection.0")  # both ends of the name are there
    converted(tmp_path)
    assert max(map(len, terminal("inspect bn.safetensors", width))) <= width


def test_names_that_differ_in_the_middle_stay_different(terminal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(ALIKE)
    text = "".join(terminal("plan net.py:alike", 60)).replace(" ", "")
    for block in range(3):
        name = f"a_backbone_of_some_length.block_{block}.projection_and_more.0"
        assert name in text or f"block_{block}" in text


def test_without_a_terminal_tables_are_plain_text_of_any_width(run):
    code, out, _ = run("plan", "squeezenet1_1")
    assert out == f"{retrofit.plan(torchvision.models.squeezenet1_1())}\n"


@pytest.mark.parametrize("colour", [True, False])
def test_colours_are_for_those_who_want_them(capsys, monkeypatch, colour):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not colour:
        monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    assert main(["plan", "alexnet"]) == 0
    assert ("\x1b[" in capsys.readouterr().out) is colour


@pytest.mark.parametrize("words", ["convert --json", "--json verify a.pth --data d --imagse 4"])
def test_a_mistake_in_the_arguments_is_in_the_object_too(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["exit_code"] == 2
    assert err == f"retrofit: {found['error']}\n"
    command = next(word for word in words.split() if not word.startswith("-"))
    assert found["error"].endswith(f"(see retrofit {command} --help)")


@pytest.mark.filterwarnings("always:the statistics of")
def test_statistics_of_too_few_pictures_are_called_uncertain(told):
    code, found, err = told(f"convert {NET} {DATA} --images 4 --output out.safetensors")
    assert code == 0
    assert [text for text in found["warnings"] if "uncertain" in text]
    assert any("the statistics of 4 images are uncertain" in line for line in err)
    code, found, _ = told("inspect out.safetensors")
    assert [row["batchnorm"] for row in found["batchnorms"]] == [
        site["norm"] for site in found["provenance"]["plan"]["sites"] if site["norm"]
    ]


def test_a_network_that_is_no_function_is_told_from_one(run, tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\nmodel = nn.Sequential(nn.Conv2d(3, 4, 3))\n"
    )
    (tmp_path / "w.pth").write_bytes(b"weights")
    for spec, hint in (
        ("net.py:model", "name a function that returns it"),
        ("net.py", "as in net.py:make"),
        ("w.pth", "weights are given with --weights"),
    ):
        code, out, err = run("plan", spec)
        assert (code, out, len(err)) == (2, "", 1)
        assert hint in err[0]


def test_a_comparison_with_random_weights_says_so(run, kit, tmp_path):
    (tmp_path / "pictures").symlink_to(kit / "pictures")
    (tmp_path / "net.py").write_text(
        STAYS.replace("nn.BatchNorm2d(3), ", "").replace(", nn.BatchNorm2d(4)", ", nn.ReLU()")
    )
    made = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    save_file(made.state_dict(), tmp_path / "w.safetensors")
    words = f"net.py:make --weights w.safetensors {DATA} --mean 0 --std 1"
    assert run("convert", *words.split(), "--output", "bn.safetensors")[0] == 0
    words = f"verify bn.safetensors --model net.py:make {DATA} --mean 0 --std 1"
    code, _, err = run(*words.split())
    assert code == 1
    assert "without --weights, net.py:make is as built" in err[-1]
