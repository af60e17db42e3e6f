"""scripts/benchmark.py on a tiny network. How long things take decides nothing here."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark.py"
SMALL = "--size 16 --batch-size 4 --sizes 8 16 --convs 2 7 --repeat 1 --forwards 2 --threads 1"
NETWORK = """
from torch import nn

def network():
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
"""


def benchmark(*options):
    command = [sys.executable, SCRIPT, *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "tiny.py").write_text(NETWORK)
    files = ("--json", folder / "figures.json", "--markdown", folder / "page.md")
    done = benchmark("--model", f"{folder / 'tiny.py'}:network", *SMALL.split(), *files)
    assert done.returncode == 0, done.stderr
    return done, json.loads(files[1].read_text()), files[3].read_text()


def rows(figures, section, table=0):
    return figures["sections"][section][table]["rows"]


def test_every_contender_is_timed_against_the_plain_forward_and_its_memory_is_known(done):
    _, figures, _ = done
    found = {row["pass"]: row for row in rows(figures, "calibration")}
    assert {"plain forward, NCHW", "retrofit.calibrate", "hooks with var_mean"} <= found.keys()
    for row in found.values():
        spread = row["time / plain"]
        assert 0 < spread["min"] <= spread["median"] <= spread["max"]
        assert row["peak MiB"] > 50
        assert 0 < row["besides convolution"] < 1
    assert found["plain forward, NCHW"]["time / plain"]["median"] == 1
    summary = figures["sections"]["calibration"][0]["summary"]
    against = [
        spread["median"]
        for name, spread in summary.items()
        if name.endswith(" / retrofit.calibrate") and isinstance(spread, dict)
    ]
    assert summary["fastest peer / retrofit.calibrate"] == min(against)


def test_calibration_is_timed_without_each_of_its_tricks(done):
    _, figures, _ = done
    whole, *without = rows(figures, "calibration", 1)
    assert whole["time / whole"]["median"] == 1
    tricks = ("kept memory", "channels_last", "reductions on one thread", "early exit")
    names = ["retrofit.calibrate", *(f"without {trick}" for trick in tricks)]
    assert [row["pass"] for row in (whole, *without)] == names
    assert all(row["time / whole"]["median"] > 0 for row in without)


def test_bfloat16_is_left_out_of_calibration_for_a_gap_that_was_measured(done):
    _, figures, _ = done
    summary = figures["sections"]["calibration"][0]["summary"]
    gaps = [gap for name, gap in summary.items() if "off under bfloat16" in name]
    assert len(gaps) == 4
    assert all(1e-5 < gap < 0.1 for gap in gaps)


def test_the_other_sections_have_a_row_for_each_size_that_was_asked_for(done):
    _, figures, _ = done
    assert [row["BatchNorms"] for row in rows(figures, "preparation")] == [2, 2, 2, 7, 7]
    assert [row["images"] for row in rows(figures, "scaling", 0)] == [4, 8, 16, 32]
    assert [row["pixels a side"] for row in rows(figures, "scaling", 1)] == [8, 16]
    assert [row["batch size"] for row in rows(figures, "scaling", 2)] == [1, 2, 4, 8]
    assert len(rows(figures, "inference", 0)) == 8
    assert all(row["equal bit for bit"] for row in rows(figures, "inference", 1))
    recalibrated = rows(figures, "recalibration")
    assert [row["batch size"] for row in recalibrated[::4]] == [16, 4, 1]
    passes = ["recalibrate, one pass", "recalibrate, layerwise", "adapting"]
    assert [row["pass"] for row in recalibrated[1:4]] == passes
    assert [row["time / plain"]["median"] for row in recalibrated[::4]] == [1, 1, 1]
    assert rows(figures, "drift")[1]["time / plain"]["median"] > 1
    assert rows(figures, "busy")[-1]["pass"] == "retrofit.calibrate"  # noqa: S105
    processes = [row["process"] for row in rows(figures, "start-up")]
    assert processes[:3] == ["import torch", "import torchvision", "retrofit plan resnet81"]


def test_the_document_is_what_was_printed_and_says_how_it_was_made(done):
    run, figures, page = done
    assert page.strip() == run.stdout.strip()
    assert f"    {figures['command']}\n" in page
    assert "--sizes 8 16" in figures["command"]
    assert all(f"- {figures[key]}\n" in page for key in ("date", "machine", "versions"))
    assert torch.__version__ in figures["versions"]
    for tables in figures["sections"].values():
        assert all(f"## {table['title']}\n" in page for table in tables)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line_and_status_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--device", "cuda", "--only", "inference"])
    monkeypatch.syspath_prepend(SCRIPT.parent)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stopped.value.code == 2
    assert capsys.readouterr() == (
        "",
        "benchmark.py: there is no GPU here: leave out --device cuda\n",
    )
