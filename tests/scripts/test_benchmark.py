"""scripts/benchmark.py on a tiny network. How long things take decides nothing here."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmark_tables import Figure, Spread, rendered, tables_of
from recorded_runs import RecordedRuns

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
    files = ("--csv", folder / "figures.csv", "--markdown", folder / "page.md")
    (folder / "figures.csv").write_text("of another run\n")
    done = benchmark("--model", f"{folder / 'tiny.py'}:network", *SMALL.split(), *files)
    assert done.returncode == 0, done.stderr
    tables = tables_of(RecordedRuns(files[1], Figure).runs)
    return done, {table.title: table for table in tables}, files[3].read_text()


def test_every_contender_is_timed_against_the_plain_forward_and_its_memory_is_known(done):
    _, tables, _ = done
    found = {row["pass"]: row for row in tables["Calibration"].rows}
    assert {"plain forward, NCHW", "retrofit.calibrate", "hooks with var_mean"} <= found.keys()
    for row in found.values():
        spread = row["time / plain"]
        assert 0 < spread.min <= spread.median <= spread.max
        assert row["peak MiB"] > 50
        assert 0 < row["besides convolution"] < 1
    assert found["plain forward, NCHW"]["time / plain"].median == 1
    summary = tables["Calibration"].summary
    against = [
        spread.median
        for name, spread in summary.items()
        if name.endswith(" / retrofit.calibrate") and isinstance(spread, Spread)
    ]
    assert summary["fastest peer / retrofit.calibrate"] == min(against)


def test_calibration_is_timed_without_each_of_its_tricks(done):
    _, tables, _ = done
    whole, *without = tables["Calibration without each of its tricks"].rows
    assert whole["time / whole"].median == 1
    tricks = ("kept memory", "channels_last", "reductions on one thread", "early exit")
    names = ["retrofit.calibrate", *(f"without {trick}" for trick in tricks)]
    assert [row["pass"] for row in (whole, *without)] == names
    assert all(row["time / whole"].median > 0 for row in without)


def test_bfloat16_is_left_out_of_calibration_for_a_gap_that_was_measured(done):
    _, tables, _ = done
    summary = tables["Calibration"].summary
    gaps = [gap for name, gap in summary.items() if "off under bfloat16" in name]
    assert len(gaps) == 4
    assert all(1e-5 < gap < 0.1 for gap in gaps)


def test_the_other_sections_have_a_row_for_each_size_that_was_asked_for(done):
    _, tables, _ = done
    assert [row["BatchNorms"] for row in tables["Preparation"].rows] == [2, 2, 2, 7, 7]
    assert [row["images"] for row in tables["Scaling with the number of images"].rows] == [
        4,
        8,
        16,
        32,
    ]
    assert [row["pixels a side"] for row in tables["Scaling with resolution"].rows] == [8, 16]
    assert [row["batch size"] for row in tables["Scaling with batch size"].rows] == [1, 2, 4, 8]
    assert len(tables["Inference"].rows) == 8
    assert all(row["equal bit for bit"] for row in tables["Parity"].rows)
    recalibrated = tables["Recalibration"].rows
    assert [row["batch size"] for row in recalibrated[::4]] == [16, 4, 1]
    passes = ["recalibrate, one pass", "recalibrate, layerwise", "adapting"]
    assert [row["pass"] for row in recalibrated[1:4]] == passes
    assert [row["time / plain"].median for row in recalibrated[::4]] == [1, 1, 1]
    assert tables["Drift"].rows[1]["time / plain"].median > 1
    busy = [row["pass"] for row in tables["On a busy machine"].rows]
    assert busy[-2:] == ["retrofit.calibrate", "without reductions on one thread"]
    processes = [row["process"] for row in tables["Start-up"].rows]
    assert processes[:3] == ["import torch", "import torchvision", "retrofit plan resnet81"]


def test_the_document_is_what_was_printed_and_says_how_it_was_made(done):
    run, _, page = done
    assert page.strip() == run.stdout.strip()
    command = re.search("(?m)^    (python .*)$", page)[1]
    assert "--sizes 8 16" in command
    assert f"torch {torch.__version__}" in page


def test_the_file_has_all_that_the_document_shows(done):
    _, tables, page = done
    assert len(tables) == 12
    for table in tables.values():
        title, *lines = rendered(table).splitlines()
        assert f"\n{title}\n" in page
        assert set(lines) <= set(page.splitlines())


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
