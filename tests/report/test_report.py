"""The report: what the page says, that it is true, and how it behaves in a real browser."""

import copy
import html
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import retrofit
from retrofit.cli import main

X = nets.images(40, 3, 16, 16)
HOSTILE = "</title><script>alert(1)</script>\"><img src=x onerror='alert(1)'>"


class Page(HTMLParser):
    """The text of a page, its tables by the id of their section, and its headings."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.headings, self.text, self.section = {}, [], "", ""
        self.figures, self.cell, self.open = [], None, []
        self.feed(text)
        self.text = " ".join(self.text.split())
        for rows in self.tables.values():
            rows[:] = [[" ".join(cell.split()) for cell in row] for row in rows]

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.open.append(tag)
        if tag in ("h1", "h2", "h3"):
            self.section = attributes.get("id", self.section)
            self.headings.append(tag)
        if tag == "tr":
            self.tables.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.tables[self.section][-1].append("")
            self.cell = tag
        if tag != "wbr":
            self.handle_data(" ")
        if tag == "svg":
            self.figures.append(attributes)

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.cell = None

    def handle_data(self, text):
        if self.open and self.open[-1] == "style":
            return
        self.text += text
        if self.cell:
            self.tables[self.section][-1][-1] += text


def network():
    """One channel of the stem is constant."""
    model = nets.build(nets.Residual)
    with torch.no_grad():
        model.stem.weight[3] = 0
    return model


class Conversion(NamedTuple):
    """A network, what was made of it, and the file with everything that was measured."""

    model: nn.Module
    converted: nn.Module
    calibration: retrofit.Calibration
    file: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    model = network()
    prepared = retrofit.prepare(model)
    calibration = retrofit.calibrate(prepared, X.split(8), progress=False)
    converted = retrofit.convert(prepared)
    file = tmp_path_factory.mktemp("made") / "bn.safetensors"
    retrofit.save(
        converted,
        file,
        name="nets:Residual",
        data="forty pictures",
        calibration=calibration,
        verification=retrofit.verify(model, converted, [X]),
        drift=retrofit.drift(model, converted, [X]),
    )
    return Conversion(model, converted, calibration, file)


@pytest.fixture
def file(made, tmp_path):
    """A copy of that file, in the folder of the test."""
    return Path(shutil.copy(made.file, tmp_path))


@pytest.fixture
def report(run, tmp_path):
    """Run `retrofit report` and read the page."""

    def call(*arguments):
        code, out, err = run("report", *arguments, "--output", "r.html", "--overwrite")
        assert (code, out, err) == (0, "written: r.html\n", [])
        return Page((tmp_path / "r.html").read_text("utf-8"))

    return call


def edited(file, change):
    """Rewrite a file's provenance."""
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        told = json.loads(opened.metadata()["retrofit"])
    change(told)
    save_file(tensors, file, {"retrofit": json.dumps(told)})


# --- what it says ------------------------------------------------------------------------------


def shown(value):
    return f"{value:.3g}".replace("-", "\N{MINUS SIGN}")


def test_the_table_of_layers_tells_what_the_activations_are(made, file, report):
    seen, model = {}, copy.deepcopy(made.model)
    for path in ("stem", "body.0", "body.2"):
        keep = lambda _m, _i, y, path=path: seen.update({path: y.double()})  # noqa: E731
        model.get_submodule(path).register_forward_hook(keep)
    model(X)
    head, *rows = report(file).tables["layers"]
    assert head[:4] == ["No.", "Layer", "BatchNorm and reason", "Channels"]
    errors = {sample.site: sample for sample in made.calibration.sites}
    for number, (path, row) in enumerate(zip(seen, rows, strict=True), 1):
        values = seen[path].detach().transpose(0, 1).flatten(1)
        mean, std = values.mean(1), values.std(1)
        assert row == [
            str(number),
            f"{path} Conv2d",
            f"{path}.bn no norm follows",
            "8",
            f"{shown(mean.min())} to {shown(mean.max())}",
            f"{shown(0 if path == 'stem' else std.min())} to {shown(std.max())}",
            "1" if path == "stem" else "0",
            "0",
            f"{errors[path].mean_error:.2%}".replace("%", " %"),
            f"{errors[path].std_error:.2%}".replace("%", " %"),
            "0",
        ]


def test_the_summary_says_what_was_reached_and_what_more_would_take(made, file, report):
    text = report(file).text
    assert "3 BatchNorms were inserted, and the outputs are equal to the original" in text
    assert "BatchNorms 3 24 channels; 0 layers left alone" in text
    assert "Calibrated on 40 images" in text
    reached = made.calibration.standard_error
    assert f"Standard error reached {reached * 100:.2f} % of" in text
    five, two, one = (f"{math.ceil(40 * (reached / t) ** 2):,}" for t in (0.05, 0.02, 0.01))
    assert f"Pictures needed {five} for 5 % {two} for 2 %; {one} for 1 %" in text
    assert "1 of 24 channels is constant, and none is near-constant" in text
    assert "All 24 channels of the file hold the exact identity" in text


def test_the_drift_is_that_of_batch_statistics(made, file, report):
    model, converted = made.model, copy.deepcopy(made.converted)
    rows = report(file).tables["drift"][1:]
    assert [row[:2] for row in rows] == [["8", "40"], ["32", "32"]]
    converted.train()  # nothing but BatchNorm has a mode here
    with torch.no_grad():
        for size, row in zip((8, 32), rows, strict=True):
            x = X[: 40 // size * size]
            expected, batchwise = model(x), torch.cat([converted(b) for b in x.split(size)])
            change = (batchwise - expected).square().mean().sqrt() / expected.std(correction=0)
            same = (batchwise.argmax(1) == expected.argmax(1)).float().mean()
            assert row[2:] == [shown(change), f"{float(same) * 100:.2f} %"]


def test_channels_that_hardly_vary_are_counted_and_drawn(report, tmp_path):
    model = network()
    with torch.no_grad():
        model.body[0].weight[:3] *= 1e-3
    retrofit.save(retrofit.add_batchnorm(model, [X], progress=False), tmp_path / "bn.safetensors")
    page = report("bn.safetensors")
    assert "1 of 24 channels is constant, and 3 are near-constant" in page.text
    assert [row[6:8] for row in page.tables["layers"][1:]] == [["1", "0"], ["0", "3"], ["0", "0"]]
    assert "layer 1: 1 constant, 0 near; layer 2: 0 constant, 3 near" in page.text


def test_a_network_all_of_whose_channels_are_dead_has_a_page(report, tmp_path):
    model = network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    prepared = retrofit.prepare(model)
    calibration = retrofit.calibrate(prepared, [X], progress=False)
    converted = retrofit.convert(prepared)
    measured = {"calibration": calibration, "drift": retrofit.drift(model, converted, [X])}
    retrofit.save(converted, tmp_path / "bn.safetensors", **measured)
    assert "24 of 24 channels are constant" in report("bn.safetensors").text


def test_what_the_plan_leaves_alone_is_in_the_table_with_its_reason(report, tmp_path):
    model = network()
    ours = retrofit.add_batchnorm(model, [X], exclude="body.*", progress=False)
    retrofit.save(ours, tmp_path / "bn.safetensors")
    page = report("bn.safetensors")
    assert "8 channels; 2 layers left alone" in page.text
    for row, path in zip(page.tables["layers"][2:], ("body.0", "body.2"), strict=True):
        assert row[1:4] == [f"{path} Conv2d", "none excluded by 'body.*'", "8"]
        assert set(row[4:]) == {"\N{EN DASH}"}


def test_outputs_that_differ_are_called_different(made, report, tmp_path):
    changed = copy.deepcopy(made.converted)
    with torch.no_grad():
        changed.stem.bn.bias[0] += 1
    found = retrofit.verify(made.model, changed, [X])
    retrofit.save(changed, tmp_path / "changed.safetensors", verification=found)
    page = report("changed.safetensors")
    assert "the outputs differ from the original" in page.text
    assert "0 of 3 BatchNorms give what the original gives" in page.text
    assert "23 of 24 channels of the file hold the exact identity" in page.text
    assert page.tables["verification"][1][:2] == ["output", "no"]
    assert page.tables["layers"][1][-1] == "1"  # the stem's bias, moved by 1


def test_a_file_without_a_comparison_says_how_to_get_one(made, report, tmp_path):
    with pytest.warns(UserWarning, match="will build another network"):
        retrofit.save(made.converted, tmp_path / "bn.safetensors", name="vgg16")
    text = report("bn.safetensors").text
    assert "does not say how the outputs compare" in text
    command = "retrofit report bn.safetensors --output report.html --data FOLDER --weights WEIGHTS"
    assert f"{command} compares it with the original" in text


# --- the command -------------------------------------------------------------------------------

SMALL = ("--resize", 24, "--crop", 16, "--workers", 0)


@pytest.fixture
def convertible(tmp_path):
    """A factory and pictures in the folder of the test; the arguments to convert them."""
    (tmp_path / "made.py").write_text(
        "import torch, nets\n\ndef net():\n    return nets.build(nets.Residual)\n"
    )
    (tmp_path / "pictures").mkdir()
    random = np.random.default_rng(0)
    for i in range(40):
        picture = Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        picture.resize((30, 26)).save(tmp_path / "pictures" / f"{i:02}.png")
    return ("convert", "made.py:net", "--data", "pictures", *SMALL, "--mean", 0.5, "--std", 0.5)


def test_convert_writes_the_page_that_report_makes_of_its_file_and_the_drift(
    run, convertible, report, tmp_path
):
    files = ("--output", "bn.safetensors", "--report", "page.html")
    code, out, err = run(*convertible, *files)
    assert (code, err) == (0, [])
    assert out.endswith("written             bn.safetensors\nreport              page.html\n")
    page = Page((tmp_path / "page.html").read_text("utf-8"))
    later = report("bn.safetensors")
    assert page.tables["layers"] == later.tables["layers"]
    assert page.tables["drift"][1:]
    assert "The drift under batch statistics is not in the file." in later.text
    facts = dict(later.tables["provenance"])
    assert facts["calibrated on"] == (
        "40 images of pictures, seed 0, of 16 x 16 pixels, mean 0.5, std 0.5"
    )
    assert facts["torch"] == torch.__version__


def test_a_plain_state_dict_gets_a_whole_page_from_convert_and_a_part_later(
    run, convertible, report, tmp_path
):
    code, _, err = run(*convertible, "--output", "bn.pth", "--report", "page.html")
    assert (code, err) == (0, [])
    page = Page((tmp_path / "page.html").read_text("utf-8"))
    assert "Yes. Both networks ran on" in page.text
    later = report("bn.pth")
    assert "3 BatchNorms, in a file that does not say where they come from" in later.text
    assert [row[4:6] for row in later.tables["layers"]] == [
        row[4:6] for row in page.tables["layers"]
    ]
    for text in ("has no standard errors", "--data FOLDER --weights WEIGHTS", "not in the file"):
        assert text in later.text


def test_too_few_pictures_for_the_drift_is_said_on_the_page(run, convertible, tmp_path):
    files = ("--output", "bn.safetensors", "--report", "page.html", "--images", 6)
    assert run(*convertible, *files)[0] == 0
    text = Page((tmp_path / "page.html").read_text("utf-8")).text
    assert "could not be measured: 1 images are too few for the batch sizes [8, 32, 128]" in text


@pytest.mark.slow
def test_the_drift_is_measured_on_a_part_of_the_sample_or_beyond_it(run, convertible, tmp_path):
    """On the sample itself a batch as large as that would have no drift at all."""
    files = ("--output", "bn.pth", "--report", "page.html", "--overwrite")
    assert run(*convertible, *files)[0] == 0
    page = Page((tmp_path / "page.html").read_text("utf-8"))
    assert [row[:2] for row in page.tables["drift"][1:]] == [["8", "8"]]  # of a quarter of 40
    assert "There were too few images for batches of 32, 128" in page.text
    for i in range(40, 140):
        shutil.copy(tmp_path / "pictures" / f"{i % 40:02}.png", tmp_path / "pictures" / f"{i}.png")
    assert run(*convertible, *files, "--images", 12)[0] == 0
    page = Page((tmp_path / "page.html").read_text("utf-8"))
    sizes = [row[:2] for row in page.tables["drift"][1:]]
    assert sizes == [["8", "128"], ["32", "128"], ["128", "128"]]


@pytest.mark.slow
def test_drift_and_parity_are_measured_anew_on_request(run, convertible, report, tmp_path):
    assert run(*convertible, "--output", "bn.safetensors")[0] == 0
    model = nets.build(nets.Residual)
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    with_data = ("bn.safetensors", "--model", "made.py:net", "--data", "pictures", *SMALL)
    page = report(*with_data)
    assert [row[0] for row in page.tables["drift"][1:]] == ["8", "32"]
    assert "on 16 images" in page.text
    page = report(*with_data, "--weights", "plain.pth")
    assert "on 40 images" in page.text
    facts = dict(page.tables["provenance"])
    assert facts["measured anew"] == (
        "drift and parity, on 40 images of pictures, seed 0, of 16 x 16 pixels, mean 0.5, std 0.5"
    )
    with torch.no_grad():
        model.stem.weight += 0.1
    torch.save(model.state_dict(), tmp_path / "other.pth")
    page = report(*with_data, "--weights", "other.pth")
    assert "the outputs differ from the original" in page.text


class Computed(nn.Module):
    """The second convolution has a weight that `forward` makes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.weight = nn.Parameter(torch.randn(5, 4, 3, 3))

    def forward(self, x):
        return F.conv2d(self.conv(x).relu(), self.weight.tanh()).relu()


def test_of_a_layer_whose_channels_are_not_known_the_page_says_so(tmp_path, report):
    planned_without_a_run = retrofit.insert(nets.build(Computed))
    retrofit.save(planned_without_a_run, tmp_path / "computed.safetensors")
    head, *rows = report("computed.safetensors").tables["layers"]
    assert head[3] == "Channels"
    assert [row[3] for row in rows] == ["4", "\N{EN DASH}"]


def test_of_a_file_that_says_little_the_page_says_what_is_missing(file, report):
    def silent(told):
        del told["calibration"], told["drift"], told["verification"]

    edited(file, silent)
    page = report(file)
    assert "The file does not say." in page.text
    assert "The file has no standard errors" in page.text
    assert "The drift under batch statistics is not in the file." in page.text
    assert "Standard error reached not known" in page.text


def test_what_a_file_says_is_text_and_never_markup(file, report, tmp_path):
    def hostile(told):
        told["model"] = told["data"] = told["class"] = told["torch"] = HOSTILE
        told["torchvision"] = "\ud800"  # half a character, which no encoding can write
        for site in told["plan"]["sites"]:
            site["reason"] = site["kind"] = site["path"] = HOSTILE
        told["verification"]["outputs"][0]["name"] = HOSTILE

    edited(file, hostile)
    page = report(file)
    raw = (tmp_path / "r.html").read_text("utf-8")
    assert "<script" not in raw
    assert "<img" not in raw
    assert raw.count("</title>") == 1 + len(page.figures)
    assert page.tables["verification"][1][0] == HOSTILE
    facts = dict(page.tables["provenance"])
    assert (facts["model"], facts["torchvision"]) == (HOSTILE, "?")
    assert html.escape("<script>") in raw


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("calibration", {"images": 3}),
        ("calibration", "x"),
        ("calibration", ["sites"]),
        ("drift", {"rows": [{"batch_size": -8}], "left_out": []}),
        ("drift", 3),
        ("verification", {"exact": "yes"}),
        ("verification", []),
        ("images", -1),
        ("images", 10**30),
        ("eps", "small"),
        ("eps", True),
        ("model", {"a": 1}),
        ("plan", {"sites": "x"}),
        ("plan", []),
    ],
)
def test_damaged_metadata_is_one_line_and_no_page(run, file, tmp_path, key, value):
    edited(file, lambda told: told.update({key: value}))
    code, out, err = run("report", "bn.safetensors", "--output", "r.html")
    assert (code, out, len(err)) == (2, "", 1)
    assert "bn.safetensors" in err[0]
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    "change",
    [{"standard_error": value} for value in ("nan", -1, 1e300, None, [1])] + [{"sites": 3}],
    ids=str,
)
def test_a_calibration_of_other_values_is_refused(run, file, change):
    edited(file, lambda told: told["calibration"].update(change))
    code, _, err = run("report", "bn.safetensors", "--output", "r.html")
    assert (code, len(err)) == (2, 1)
    assert "metadata is damaged, calibration" in err[0]


def damaged(tensors, kind):
    norm = "stem.bn.running_var"
    if kind == "missing":
        del tensors[norm]
    elif kind == "of another shape":
        tensors[norm] = tensors[norm][:3].clone()
    elif kind == "no BatchNorm":
        for key in [key for key in tensors if ".bn." in key]:
            del tensors[key]
    else:
        tensors[norm][0] = {"nan": math.nan, "negative": -1.0}[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "it has no stem.bn.running_var"),
        ("of another shape", "the tensors of stem.bn are not those of a BatchNorm"),
        ("nan", "the running statistics of stem.bn are not finite, or negative"),
        ("negative", "the running statistics of stem.bn are not finite, or negative"),
        ("no BatchNorm", "it has no BatchNorm"),
    ],
)
def test_tensors_that_do_not_fit_are_named(run, file, kind, message):
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    damaged(tensors, kind)
    save_file(tensors, file, metadata if kind != "no BatchNorm" else None)
    code, _, err = run("report", file.name, "--output", "r.html")
    assert (code, len(err)) == (2, 1)
    assert f"bn.safetensors cannot be reported on: {message}" in err[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing.pth", "--output", "r.html"), "there is no file missing.pth"),
        (("bn.safetensors", "--output", "r.txt"), "r.txt must end in .html"),
        (("bn.safetensors", "--output", "old.html"), "old.html exists"),
        (("bn.safetensors", "--output", "no/r.html"), "the folder no does not exist"),
        (
            ("bn.safetensors", "--output", "r.html", "--weights", "w.pth"),
            "--weights needs --data",
        ),
        (
            ("bn.safetensors", "--output", "r.html", "--data", "."),
            "unless it is typed: --model nets",
        ),
    ],
)
def test_bad_requests_are_one_line_and_leave_the_folder_alone(run, file, arguments, message):
    tmp_path = file.parent
    (tmp_path / "old.html").write_text("precious")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    code, out, err = run("report", *arguments)
    assert (code, out, len(err)) == (2, "", 1)
    assert message in err[0]
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


AGAIN = "retrofit report bn.safetensors --output page.html tries again (--data measures the drift)"


@pytest.mark.parametrize("stage", ["retrofit.report.drift", "retrofit.report.page.render"])
@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (MemoryError("no\nroom"), 1, "{}: MemoryError: no room"),
        (KeyboardInterrupt(), 130, "interrupted: {}"),
    ],
)
def test_what_ends_the_report_leaves_the_converted_file_and_says_so(
    run, convertible, tmp_path, monkeypatch, stage, error, code, said
):
    def failing(*_, **__):
        found = retrofit.load(tmp_path / "bn.safetensors", nets.build(nets.Residual))
        assert sum(isinstance(m, nn.BatchNorm2d) for m in found.modules()) == 3
        raise error

    monkeypatch.setattr(stage, failing)
    files = ("--output", "bn.safetensors", "--report", "page.html")
    found, out, err = run(*convertible, *files)
    assert found == code
    assert out.endswith("written             bn.safetensors\n")
    said = said.format("bn.safetensors is written, but not the report")
    assert err[-1] == f"retrofit: {said}; {AGAIN}"
    assert not (tmp_path / "page.html").exists()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert run("report", "bn.safetensors", "--output", "page.html")[0] == 0


@pytest.mark.parametrize(
    ("path", "message"),
    [("page.txt", "page.txt must end in .html"), ("old.html", "old.html exists")],
)
def test_convert_refuses_a_bad_report_before_any_work(run, convertible, tmp_path, path, message):
    (tmp_path / "old.html").write_text("precious")
    code, out, err = run(*convertible, "--output", "bn.pth", "--report", path)
    assert (code, out, len(err)) == (2, "", 1)
    assert message in err[0]
    assert not (tmp_path / "bn.pth").exists()
    assert (tmp_path / "old.html").read_text() == "precious"


def test_without_matplotlib_convert_says_so_before_any_work(
    run, convertible, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = run(*convertible, "--output", "bn.pth", "--report", "page.html")
    assert (code, out) == (2, "")
    needs = (
        "retrofit: the report's figures need matplotlib: pip install 'batchnorm-retrofit[report]'"
    )
    assert err == [needs]
    assert not (tmp_path / "bn.pth").exists()
    assert run(*convertible, "--output", "bn.pth")[0] == 0  # and without a report it is not needed


@pytest.mark.slow
def test_the_package_and_its_command_load_no_matplotlib():
    code = "import sys, retrofit.cli.commands; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- in a browser ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pages(made, tmp_path_factory):
    """A small network's page with everything, VGG16's, and that of a file with long, hostile
    texts and little else."""
    folder = tmp_path_factory.mktemp("pages")
    for name in ("small", "hostile"):
        shutil.copy(made.file, folder / f"{name}.safetensors")

    def bare(told):
        told.update(
            model=HOSTILE * 3, data="x" * 400, calibration=None, drift=None, verification=None
        )

    edited(folder / "hostile.safetensors", bare)
    vgg = torchvision.models.vgg16(init_weights=False).features.eval()
    with torch.no_grad():
        vgg[5].weight[7] = 0
        vgg[28].weight[:20] *= 1e-4
    prepared = retrofit.prepare(vgg)
    x = nets.images(16, 3, 32, 32)
    calibration = retrofit.calibrate(prepared, [x], progress=False)
    converted = retrofit.convert(prepared)
    found = retrofit.verify(vgg, converted, [x])
    drift = retrofit.drift(vgg, converted, [x])
    measured = {"calibration": calibration, "verification": found, "drift": drift}
    with pytest.warns(UserWarning, match="will build another network"):  # without a classifier
        retrofit.save(converted, folder / "vgg16.safetensors", name="vgg16", **measured)
    for name in ("small", "hostile", "vgg16"):
        file = folder / name
        assert main(["report", f"{file}.safetensors", "--output", f"{file}.html"]) == 0
    return folder


SIZES = """() => [...document.querySelectorAll("svg, svg image")].map(e => {
    const box = e.getBoundingClientRect(); return Math.min(box.width, box.height) })"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small", "hostile", "vgg16"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "no scripts"])
def test_the_page_fits_the_window_and_asks_for_nothing(chromium, pages, name, width, scripts):
    window = {"width": width, "height": 800}
    context = chromium.new_context(viewport=window, java_script_enabled=scripts)
    page, requests, complaints = context.new_page(), [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    address = (pages / f"{name}.html").as_uri()
    page.goto(address)
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(overflow) == 0
    sizes = page.evaluate(SIZES)
    assert len(sizes) >= 2
    assert min(sizes) > 50
    assert requests == [address]
    assert complaints == []
    context.close()


def test_every_figure_has_a_name_and_headings_are_in_order(chromium, pages):
    page = chromium.new_page()
    page.goto((pages / "vgg16.html").as_uri())
    figures = page.locator("figure")
    assert figures.count() == 6
    assert page.get_by_role("img").count() == 6
    for name in (
        "Mean of each channel, by layer",
        "Standard deviation of each channel, by layer",
        "Constant and near-constant channels, by layer",
        "Standard error by number of images",
        "Standard error of mean and standard deviation, by layer",
        "Drift of the outputs under batch statistics, by batch size",
    ):
        assert page.get_by_role("img", name=name).count() == 1
    for i in range(6):
        caption = figures.nth(i).locator("figcaption").inner_text()
        assert re.fullmatch(r"[A-Z][^.]*(\d\.\d[^.]*)*\.", caption)  # one sentence
    levels = [int(tag[1]) for tag in Page((pages / "vgg16.html").read_text("utf-8")).headings]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert page.locator("th:not([scope])").count() == 0
    assert page.locator("table").count() == page.locator("table > caption").count()
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    page.close()


def test_a_wide_table_scrolls_by_itself_and_by_keyboard(chromium, pages):
    page = chromium.new_page(viewport={"width": 390, "height": 800})
    page.goto((pages / "vgg16.html").as_uri())
    table = page.get_by_role("region", name="In the order of execution.")
    assert table.evaluate("e => e.scrollWidth > e.clientWidth")
    table.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("e => e.scrollLeft > 0", arg=table.element_handle())
    page.close()


@pytest.mark.slow
def test_the_page_of_vgg16_stays_small(pages):
    assert (pages / "vgg16.html").stat().st_size < 1_000_000
