"""scripts/finetune.py on a tiny network and ten folders of tiny pictures."""

import csv
import importlib
import math
import sys

import pytest
from folders import labelled_pictures

pytestmark = pytest.mark.slow

NETWORK = """
import torch
from torch import nn

def network():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
"""
VARIANTS = ["plain", "naive", "retrofitted", "frozen first"]


@pytest.fixture
def finetune():
    return importlib.import_module("finetune")


@pytest.fixture
def command(tmp_path, finetune, monkeypatch):
    """Runs the script on the tiny task; later options win. Returns the rows of its CSV."""
    labelled_pictures(tmp_path / "data", train=4, test=2)
    (tmp_path / "tiny.py").write_text(NETWORK)

    def run(*options, output="output"):
        usual = f"--data {tmp_path / 'data'} --output {tmp_path / output} --batch-size 8 --steps 4 "
        usual += (
            f"--images 32 --seeds 2 --learning-rates 0.01 0.1 --model {tmp_path}/tiny.py:network"
        )
        monkeypatch.setattr(sys, "argv", ["finetune.py", *usual.split(), *map(str, options)])
        finetune.main()
        with (tmp_path / output / "finetune-rates.csv").open() as lines:
            return list(csv.DictReader(lines))

    return run


def without_seconds(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_there_is_a_row_for_each_run_a_table_and_a_figure(command, tmp_path, capsys):
    rows = command()
    wanted = {(name, lr, seed) for name in VARIANTS for lr in ("0.01", "0.1") for seed in "01"}
    assert {(r["variant"], r["learning_rate"], r["seed"]) for r in rows} == wanted
    assert len(rows) == len(wanted)
    assert all(0 <= float(r["accuracy"]) <= 1 and r["diverged"] == "False" for r in rows)
    tables = (tmp_path / "output" / "finetune-rates.md").read_text()
    for table in tables.split("\n\n"):
        assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == VARIANTS
    assert tables in capsys.readouterr().out
    assert "retrofitted" in (tmp_path / "output" / "finetune-rates.svg").read_text()


def test_an_interrupted_study_goes_on_where_it_was(command, finetune, monkeypatch, tmp_path):
    expected = command(output="whole")
    once = finetune.run
    left = iter(range(5))

    def killed(*args):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return once(*args)

    monkeypatch.setattr(finetune, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        command()
    file = tmp_path / "output" / "finetune-rates.csv"
    before = file.read_text()
    assert before.count("\n") == 1 + 5
    file.write_text(before + "tiny.py:network,32,2")  # killed while it wrote
    monkeypatch.setattr(finetune, "run", once)
    assert without_seconds(command()) == without_seconds(expected)
    assert file.read_text().startswith(before)


def test_runs_made_with_other_settings_are_refused_by_name(command, tmp_path):
    command("--seeds", 1)
    before = (tmp_path / "output" / "finetune-rates.csv").read_bytes()
    with pytest.raises(SystemExit, match=r"rates\.csv has runs with steps = 4, this study"):
        command("--steps", 5)
    assert (tmp_path / "output" / "finetune-rates.csv").read_bytes() == before


def test_a_run_that_diverges_ends_at_once_and_is_called_so(command, monkeypatch):
    steps = []
    training = importlib.import_module("finetune_training")
    monkeypatch.setattr(training, "augment", lambda x: steps.append(len(x)) or x)
    rows = command("--seeds", 1, "--learning-rates", "1e30", "--steps", 1000)
    plain = rows[0]
    assert plain["variant"] == "plain"
    assert plain["diverged"] == "True"
    assert not math.isfinite(float(plain["loss"]))
    assert 0 <= float(plain["accuracy"]) <= 1
    assert len(steps) < 1000


def test_a_folder_of_something_else_is_named(command, tmp_path):
    with pytest.raises(SystemExit, match=r"tiny\.py has no folder train"):
        command("--data", tmp_path / "tiny.py")
    with pytest.raises(SystemExit, match="--images 7 is less than --batch-size 8"):
        command("--images", 7)
    with pytest.raises(SystemExit, match=r"train has 40 pictures: too few for --images 41"):
        command("--images", 41)
    (tmp_path / "data" / "train" / "cat").rename(tmp_path / "data" / "train" / "zebra")
    with pytest.raises(SystemExit, match="train: expected the class folders airplane"):
        command()


def test_the_highest_usable_rate_is_within_10_points_of_the_best_mean(finetune):
    tables = importlib.import_module("finetune_tables")
    accuracies = {0.01: [0.70, 0.72], 0.1: [0.80, 0.60], 0.3: [0.61, 0.63], 1.0: [0.90, 0.10]}
    assert tables.highest_usable(accuracies) == 0.3
    assert finetune.STUDIES["rates"].variants.keys() == set(VARIANTS)
