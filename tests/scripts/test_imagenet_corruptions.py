"""scripts/imagenet_corruptions.py: its figures against numpy's, and a study of a tiny network."""

import csv
import importlib
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import retrofit

CELLS = [("fog", 3), ("snow", 3), ("fog", 5), ("snow", 5)]


@pytest.fixture
def script():
    return importlib.import_module("imagenet_corruptions")


@pytest.fixture
def tables():
    return importlib.import_module("imagenet_corruptions_tables")


@pytest.fixture
def answers(tables):
    """Draw answers to 301 pictures, (cell, way) to bools, and the same as results."""
    rng = np.random.default_rng(0)
    hard = rng.random(301)
    found = {
        (cell, way): hard + 0.2 * rng.standard_normal(301) < 0.9 - 0.3 * cell[1] / 5 + 0.1 * i
        for cell in [tables.CLEAN, *CELLS]
        for i, way in enumerate(tables.WAYS)
    }
    rows = [
        tables.Row("net", 301, *cell, way, float(right.mean()), tables.as_hexadecimal(right))
        for (cell, way), right in found.items()
    ]
    return found, tables.Results(rows), rows


def test_accuracies_and_gains_are_those_of_the_same_pictures(tables, answers):
    found, results, _ = answers
    plain, way = tables.PLAIN, tables.STREAMING
    assert results.accuracy(CELLS[:1], plain) == pytest.approx(100 * found[CELLS[0], plain].mean())
    differences = np.mean([1.0 * found[c, way] - found[c, plain] for c in CELLS], axis=0)
    gain, error = results.gain(CELLS, way)
    assert gain == pytest.approx(100 * differences.mean())
    assert error == pytest.approx(100 * differences.std(ddof=1) / np.sqrt(301))


def test_the_share_won_back_has_the_standard_error_of_the_jackknife(tables, answers):
    found, results, _ = answers

    def share(chosen):
        means = {key: right[chosen].mean() for key, right in found.items()}
        plain = np.mean([means[c, tables.PLAIN] for c in CELLS])
        adapted = np.mean([means[c, tables.ADAPTED] for c in CELLS])
        return (adapted - plain) / (means[tables.CLEAN, tables.PLAIN] - plain)

    every = np.arange(301)
    without = np.array([share(np.delete(every, i)) for i in every])
    jackknife = np.sqrt(300 / 301 * np.square(without - without.mean()).sum())
    found_share, error = results.won_back(CELLS, tables.ADAPTED)
    assert found_share == pytest.approx(100 * share(every))
    assert error == pytest.approx(100 * jackknife, rel=0.05)


def test_what_costs_accuracy_is_named(tables, answers):
    _, results, rows = answers
    assert "it costs accuracy under none" in tables.summary(rows)
    worse = [
        tables.Row("net", 301, *row.key, 0.0, tables.as_hexadecimal([False] * 301))
        if row.key == ("snow", 5, tables.ADAPTED)
        else row
        for row in rows
    ]
    assert f"- {tables.ADAPTED}:" in tables.summary(worse)
    assert "it costs accuracy under snow 5 (-" in tables.summary(worse)


@pytest.mark.filterwarnings("ignore:the (statistics|two halves)")
def test_a_study_answers_each_picture_in_each_way_and_goes_on_where_it_was(
    script, monkeypatch, tmp_path, capsys
):
    def corrupt(x, severity, corruption_name):
        shift = np.random.normal() + len(corruption_name)  # noqa: NPY002 - as the program draws
        return (x * (1 - severity / 10) + shift).clip(0, 255).astype(np.uint8)

    def plain(_):
        """Tell the class by the brightness."""
        brightness = torch.arange(40) * 6 / 127.5 - 1
        mean, nearest = nn.Conv2d(3, 1, 1), nn.Linear(1, 40)
        with torch.no_grad():
            mean.weight.fill_(1 / 3), mean.bias.zero_()
            nearest.weight[:, 0], nearest.bias[:] = 2 * brightness, -brightness.square()
        return nn.Sequential(mean, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nearest).eval()

    def batchnorm(model, batches):
        return retrofit.add_batchnorm(model, batches, progress=False)

    networks = importlib.import_module("imagenet_networks")
    tiny = networks.Network(plain, batchnorm, (0.5,) * 3, (0.5,) * 3)
    monkeypatch.setitem(networks.NETWORKS, "tiny", tiny)
    program = types.SimpleNamespace(corrupt=corrupt)
    monkeypatch.setitem(sys.modules, "imagecorruptions", program)
    monkeypatch.setattr(script, "CORRUPTIONS", ("fog", "snow"))
    (tmp_path / "pictures").mkdir()
    for i in range(40):
        Image.new("RGB", (230, 240), (6 * i,) * 3).save(tmp_path / "pictures" / f"{i:02}.png")
    words = f"x --network tiny --weights none --data {tmp_path}/pictures --output {tmp_path}/out"
    monkeypatch.setattr(sys, "argv", words.split())
    script.main()
    file = tmp_path / "out" / "corruptions-tiny.csv"
    lines = file.read_text().splitlines()
    assert len(lines) == 1 + 5 * 4
    assert capsys.readouterr().out.startswith("tiny: accuracy in per cent on 20 pictures")
    assert file.with_suffix(".md").exists()
    assert file.with_suffix(".svg").exists()
    right = {tuple(row[2:5]): row[-1] for row in csv.reader(lines)}
    assert right["none", "0", "plain"] == "fffff0"  # of 20
    assert right["snow", "5", "plain"].count("0") > 2
    file.write_text("\n".join(lines[:9]) + "\n")
    script.main()
    assert file.read_text().splitlines() == lines
