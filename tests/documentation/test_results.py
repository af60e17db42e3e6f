"""The numbers of the documentation and of the README are those of the committed CSV files."""

import csv
import re
from pathlib import Path

import benchmark_tables
import corruptions_tables
import finetune_heads
import finetune_tables
import fuzzing
import imagenet_corruptions_tables
import layer_by_layer
import merging
import peers_tables
import pytest
import real_networks_tables
import restored_mobilenet
import restored_onnx
import restored_yolo
import restored_zoo_tables
import sample_size
import versions
import zoo_tables
from recorded_runs import RecordedRuns

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"


def page(name):
    return (ROOT / "docs" / f"{name}.md").read_text("utf-8")


def lines(text):
    """The lines of a page, and what a list's items say, whatever they are wrapped at."""
    rows = {re.sub(r" *\| *", "|", line).strip() for line in text.splitlines() if "|" in line}
    return rows | {
        " ".join(item.split()) for item in re.findall(r"(?ms)^- (.*?)(?=^- |^$|\Z)", text)
    }


def runs(name, kind=finetune_tables.Run):
    return RecordedRuns(RESULTS / f"{name}.csv", kind).runs


def finetuned(study, *tables):
    return "\n".join(table(runs(f"finetune-{study}")) for table in tables)


def heads():
    by_model = {}
    for run in runs("finetune-heads", finetune_heads.HeadRun):
        by_model.setdefault(run.model, []).append(run)
    return finetune_heads.summary(by_model)


def merged():
    with (RESULTS / "merging.csv").open() as file:
        head, *rows = csv.reader(file)
    columns = zip(*([float(cell) for cell in row] for row in rows), strict=True)
    _, *found = columns
    return merging.table(dict(zip(head[1:], map(list, found), strict=True)))


TABLES = {
    "folded": lambda: finetuned("folded", finetune_tables.by_learning_rate, finetune_tables.usable),
    "folded-turned": lambda: finetuned(
        "folded-turned", finetune_tables.by_learning_rate, finetune_tables.usable
    ),
    "rates": lambda: finetuned("rates", finetune_tables.by_learning_rate, finetune_tables.usable),
    "settings": lambda: finetuned("settings", finetune_tables.by_learning_rate),
    "sample": lambda: finetuned("sample", finetune_tables.by_learning_rate),
    "heads": heads,
    "squeezenet": lambda: imagenet_corruptions_tables.summary(
        runs("corruptions-squeezenet1_1", imagenet_corruptions_tables.Row)
    ),
    "mobilenet": lambda: imagenet_corruptions_tables.summary(
        runs("corruptions-mobilenetv2_100-folded", imagenet_corruptions_tables.Row)
    ),
    "corruptions": lambda: corruptions_tables.summary(runs("corruptions", corruptions_tables.Row)),
    "peers": lambda: peers_tables.table(runs("peers", peers_tables.Row)),
    "merging": merged,
}


@pytest.mark.parametrize("study", TABLES)
def test_a_table_is_what_its_file_says(study):
    made = lines(TABLES[study]())
    assert len(made) > 2
    assert made - lines(page("results")) == set()


@pytest.mark.parametrize("file", sorted(RESULTS.glob("benchmarks-*.csv")), ids=lambda f: f.stem)
def test_the_speeds_are_what_a_run_of_the_benchmark_found(file):
    benchmarks = page("benchmarks")
    assert f"--csv docs/results/{file.name}\n" in benchmarks
    tables = benchmark_tables.tables_of(runs(file.stem, benchmark_tables.Figure))
    made = set().union(*(lines(benchmark_tables.rendered(table)) for table in tables))
    assert len(made) > 5
    assert made - lines(benchmarks) == set()


def test_the_readme_quotes_the_speeds_of_that_page():
    tables = benchmark_tables.tables_of(runs("benchmarks-vgg16", benchmark_tables.Figure))
    (calibration,) = (table for table in tables if table.title == "Calibration")
    took = {row["pass"]: row["time / plain"] for row in calibration.rows}
    ours, hooks = took["retrofit.calibrate"], took["hooks with var_mean"]
    theirs = took["torch.optim.swa_utils.update_bn"]
    readme = words((ROOT / "README.md").read_text("utf-8"))
    assert (
        f"{ours.median:.2f} of the plain forward pass (VGG16, {ours.min:.2f} to {ours.max:.2f} in "
        f"three repetitions; the usual hooks take {hooks.median:.2f}, torch's `update_bn` "
        f"{theirs.median:.2f}:"
    ) in readme


def sampled(tolerance):
    found = runs("sample-size", sample_size.Sample)
    return sample_size.text([one for one in found if one.tolerance == tolerance])


OTHER_PAGES = {
    "calibration": lambda: sampled(0.02),
    "guarantees": lambda: layer_by_layer.table(runs("layer-by-layer", layer_by_layer.Compared)),
    "folded": lambda: str(runs("restored-mobilenet", restored_mobilenet.Answers)[0]),
    "onnx": lambda: restored_onnx.table(runs("restored-onnx", restored_onnx.Restored)[:12]),
    "yolo": lambda: restored_yolo.table(runs("restored-yolo", restored_yolo.Outcome)),
}


@pytest.mark.parametrize("name", OTHER_PAGES)
def test_what_another_page_quotes_is_what_its_file_says(name):
    found, made = words(page(name)), OTHER_PAGES[name]().splitlines()
    assert len(made) > 1
    assert all(words(line) in found for line in made)


def test_the_page_of_guarantees_quotes_the_last_fuzzing():
    found = {run.noun: run for run in runs("fuzz", fuzzing.Fuzzed)}
    assert found.keys() == {"networks", "files"}
    assert all(words(str(run)) in words(page("guarantees")) for run in found.values())


def test_the_page_of_versions_is_what_its_file_says():
    found = runs("versions", versions.Tested)
    assert {run.versions for run in found} == versions.SETS.keys()
    assert versions.document(found).strip() == page("versions").strip()


def latest(name, kind):
    """The last run of each: what failed was tried again."""
    return [*{(getattr(r, "package", ""), r.name): r for r in runs(name, kind)}.values()]


def test_the_pages_on_many_networks_are_their_files():
    found = latest("real-networks", real_networks_tables.Result)
    assert lines(real_networks_tables.document(found)) - lines(page("real-networks")) == set()
    tables = restored_zoo_tables
    folds = runs("restored-zoo-folds", tables.FoldedBy)
    models = latest("restored-zoo", tables.Restored)
    assert lines(tables.document(folds, models, (0, 0))) - lines(page("restored-zoo")) == set()
    assert min(len(found), len(models)) > 25
    assert zoo_tables.document(runs("zoo", zoo_tables.Result)) == page("zoo")


def words(text):
    """A text without what Markdown puts around it, and wherever its lines are broken."""
    return " ".join(re.sub(r'[>"]', " ", text).split())


def test_the_file_of_a_detector_of_its_own_and_the_smaller_tolerance():
    (far,) = (one.difference for one in runs("restored-onnx", restored_onnx.Restored)[12:])
    assert f"`nc: 18`, {far:.1e}." in words(page("onnx"))
    for line in sampled(0.01).splitlines()[4:9]:
        assert "| 10,624 | 21.2% |" in line
        assert "| 100.00% |" in line


def test_what_it_says_of_notebook_7_is_what_that_found():
    (row,) = (line for line in lines(page("results")) if "a quarter of its MACs" in line)
    found = {name: cells for name, *cells in notebook_7("slimming")}
    plain, pruned = (f"{number}%" for number in re.findall(r"([\d.]+) %", row))
    assert plain in found["plain, by magnitude"][3:]
    assert pruned in found["add_batchnorm, by gamma"][3:]
    means = {way: float(cells[-1]) for way, *cells in notebook_7("entropy")[1:]}
    statistics_alone = max(means["recalibrate, first 500"], means["adapting"])
    assert max(means["Tent"], means["EATA"]) <= statistics_alone


def notebook_7(table):
    return list(csv.reader((RESULTS / f"notebook-7-{table}.csv").read_text("utf-8").splitlines()))


def test_every_number_of_the_readme_is_on_that_page():
    results = page("results")
    readme = (ROOT / "README.md").read_text("utf-8").partition("## What was measured")[2]
    table = [line for line in readme.partition("\n\nFor a small")[0].splitlines() if "|" in line]
    numbers = re.findall(r"\d+\.\d+ %", "\n".join(table))
    assert len(numbers) > 10
    assert [number for number in numbers if number not in results] == []
