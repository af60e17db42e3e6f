"""The command line as a user types it: what it prints, writes, and how it exits."""

import json
import re
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import nets
import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import retrofit
from retrofit.cli import main
from retrofit.files import model_sources
from retrofit.files.model_sources import build

SMALL = ("--resize", "56", "--crop", "48", "--workers", "0")
OWN = (*SMALL, "--mean", "0.5", "--std", "0.5")  # of a network that nothing is known about


def pictures(folder, count, *, seed=0):
    random = np.random.default_rng(seed)
    for i in range(count):
        file = folder / f"{i % 3}" / f"{i:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        low = random.integers(0, 256, (6, 5, 3), dtype=np.uint8)
        Image.fromarray(low).resize((50, 48), Image.Resampling.BILINEAR).save(file)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("pictures"), 40)


@pytest.fixture(scope="module")
def squeezenet(tmp_path_factory):
    """A weights file of a squeezenet1_1."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "squeezenet.pth"
    torch.save(torchvision.models.squeezenet1_1().state_dict(), file)
    return file


@pytest.mark.slow
def test_vgg16_through_the_command_line_loads_in_stock_torchvision(run, folder, tmp_path):
    model = nets.vgg("vgg16")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "vgg16.pth")
    code, out, err = run(
        "convert", "vgg16", "--weights", "vgg16.pth", "--data", folder, "--output",
        "bn.safetensors", "--images", 20, *SMALL,
    )  # fmt: skip
    assert (code, err) == (0, [])
    assert "outputs             equal bit for bit, at every site and at the end" in out
    assert "verified on         16 other images" in out
    assert "features.41       512" in out
    stock = nets.unwritten("vgg16_bn")
    state = {}
    with safe_open(tmp_path / "bn.safetensors", framework="pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    stock.load_state_dict(state, strict=True)
    x = nets.images(2, 3, 64, 64)
    assert torch.equal(stock(x), model(x))


def test_convert_verify_inspect_and_fold(run, folder, squeezenet, tmp_path):
    weights = ("--weights", squeezenet, "--data", folder)
    code, out, err = run("convert", "squeezenet1_1", *weights, "--output", "bn.pth", *SMALL)
    assert (code, err) == (0, [])
    assert "classifier.1   Conv2d  output head" in out
    assert "calibrated on       40 images" in out
    assert "verified on         16 of the same images" in out  # there are no others

    out_file = ("--output", "bn.safetensors", "--images", "24", "--seed", "3")
    code, out, err = run("convert", "squeezenet1_1", *weights, *out_file, *SMALL)
    assert (code, err) == (0, [])

    code, out, err = run("verify", "bn.safetensors", *weights, *SMALL)
    assert (code, err) == (0, [])
    assert out.endswith("equal bit for bit on 16 images, top-1 agreement 100.00%\n")

    code, out, err = run("inspect", "bn.safetensors")
    assert (code, err) == (0, [])
    assert "model               squeezenet1_1" in out
    assert "images              24" in out
    assert "64/64" in out

    code, out, err = run("fold", "bn.safetensors", "--output", "plain.pth")
    assert (code, out) == (0, "25 BatchNorms folded, 0 left; written: plain.pth\n")
    folded = torch.load(tmp_path / "plain.pth", weights_only=True)
    original = torch.load(squeezenet, weights_only=True)
    assert list(folded) == list(original)
    assert all(torch.equal(folded[key], value) for key, value in original.items())


def test_the_same_seed_gives_the_same_file_and_another_another(run, folder, squeezenet, tmp_path):
    arguments = ("convert", "squeezenet1_1", "--weights", squeezenet, "--data", folder, *SMALL)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(*arguments, "--output", f"{name}.pth", "--seed", seed, "--images", 8)
    a, b, c = (torch.load(tmp_path / f"{n}.pth", weights_only=True) for n in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["features.0.bn.running_mean"], c["features.0.bn.running_mean"])


def test_a_factory_in_a_file_and_pictures_in_an_array(run, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def net():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(),"
        " nn.Linear(8464, 2))\n"
    )
    array = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "b.npz", images=array, labels=np.arange(30))
    for spec, data in (("mine.py:net", "a.npy"), ("mine:net", "b.npz")):
        code, out, err = run(
            "convert", spec, "--data", data, "--output", "out.safetensors", "--overwrite", *OWN
        )
        assert (code, err) == (0, []), err
        assert "written             out.safetensors" in out
        # The file names the code, and the user has to.
        assert run("fold", "out.safetensors", "--output", "x.pth")[0] == 2
        code, out, err = run(
            "fold", "out.safetensors", "--model", spec, "--output", "x.pth", "--overwrite"
        )
        assert code == 0


def test_a_timm_model_is_named_and_never_built_from_what_a_file_says(run, folder, tmp_path):
    torch.manual_seed(0)
    state = timm.create_model("test_nfnet").state_dict()
    torch.save(state, tmp_path / "w.pth")
    weights = ("--weights", "w.pth", "--data", folder, "--images", "16")
    code, out, err = run(
        "convert", "timm:test_nfnet", *weights, "--output", "bn.safetensors", *SMALL
    )
    assert (code, err) == (0, [])
    code, out, err = run("verify", "bn.safetensors", *weights, *SMALL)
    assert code == 2
    assert "is not built unless it is typed: --model timm:test_nfnet" in err[0]
    model = ("--model", "timm:test_nfnet")
    code, out, err = run("verify", "bn.safetensors", *model, *weights, *SMALL)
    assert (code, err) == (0, [])
    code, out, err = run("fold", "bn.safetensors", *model, "--output", "plain.pth")
    assert (code, err) == (0, [])
    folded = torch.load(tmp_path / "plain.pth", weights_only=True)
    assert list(folded) == list(state)
    assert all(torch.equal(folded[key], value) for key, value in state.items())


def test_plan_prints_the_table_and_takes_patterns(run):
    code, out, err = run("plan", "alexnet", "--exclude", "features.0", "--exclude", "features.3")
    assert (code, err) == (0, [])
    assert out.endswith("AlexNet: 3 of 5 convolutions get a BatchNorm\n")


def test_an_unreadable_picture_is_named_or_left_out(run, squeezenet, tmp_path):
    folder = pictures(tmp_path / "mixed", 30)
    (folder / "0" / "bad.jpg").write_bytes(b"no picture")
    arguments = ("convert", "squeezenet1_1", "--weights", squeezenet, "--data", folder, *SMALL)
    code, out, err = run(*arguments, "--output", "a.pth")
    assert code == 2
    assert len(err) == 1
    assert "bad.jpg cannot be read" in err[0]
    assert not (tmp_path / "a.pth").exists()
    code, out, err = run(*arguments, "--output", "a.pth", "--skip-bad-images")
    assert code == 0
    assert err == [f"left out 1 unreadable pictures: {folder / '0' / 'bad.jpg'}"]
    assert "calibrated on       30 images" in out


def test_of_a_shard_cut_short_the_whole_pictures_are_used_if_asked(
    run, folder, squeezenet, tmp_path
):
    shard = tmp_path / "train-000.tar"
    with tarfile.open(shard, "w") as tar:
        for file in sorted(folder.rglob("*.png")):
            tar.add(file, file.name)
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    arguments = ("convert", "squeezenet1_1", "--weights", squeezenet, "--data", shard, *SMALL)
    code, _, err = run(*arguments, "--output", "a.pth", "--skip-bad-images")
    assert code == 0
    assert len(err) == 1
    assert err[0].startswith(f"used in part or not at all: {shard} is cut short")


def test_a_file_without_batchnorm_can_be_inspected_too(run, squeezenet):
    code, out, err = run("inspect", squeezenet)
    assert (code, err) == (0, [])
    assert "no BatchNorm" in out


def test_a_picture_that_gives_nan_is_named_with_the_layer(run, folder, squeezenet, tmp_path):
    state = torch.load(squeezenet, weights_only=True)
    state["features.3.squeeze.bias"][2] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    code, out, err = run(
        "convert", "squeezenet1_1", "--weights", "nan.pth", "--data", folder, "--output", "a.pth",
        *SMALL,
    )  # fmt: skip
    assert code == 2
    assert len(err) == 1
    assert "NaN or Inf at features.3.squeeze for" in err[0]
    assert ".png" in err[0]


def test_lost_parity_exits_1_and_writes_nothing(run, folder, squeezenet, tmp_path, monkeypatch):
    convert = retrofit.convert

    def broken(prepared, **options):
        model = convert(prepared, **options)
        model.features[0].bn.bias.data += 1
        return model

    monkeypatch.setattr(retrofit, "convert", broken)
    code, out, err = run(
        "convert", "squeezenet1_1", "--weights", squeezenet, "--data", folder, "--output", "a.pth",
        *SMALL,
    )  # fmt: skip
    assert code == 1
    assert err == [
        "retrofit: the converted model is not equal to the original: nothing was written"
    ]
    assert "features.0             no" in out
    assert list(tmp_path.iterdir()) == []


def test_verify_finds_a_changed_file(run, folder, squeezenet, tmp_path):
    weights = ("--weights", squeezenet, "--data", folder)
    run("convert", "squeezenet1_1", *weights, "--output", "bn.safetensors", *SMALL)
    other = torch.load(squeezenet, weights_only=True)
    other["features.0.bias"][0] += 1e-3
    torch.save(other, tmp_path / "other.pth")
    changed = ("--weights", "other.pth", "--data", folder)
    code, _, err = run("verify", "bn.safetensors", *changed, *SMALL)
    assert code == 1
    assert len(err) == 1
    assert "the models differ" in err[0]
    assert run("verify", "bn.safetensors", *changed, "--tolerance", "10", *SMALL)[0] == 0


GOOD = {"model": "squeezenet1_1", "--weights": "W", "--data": "D", "--output": "out.safetensors"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "vgg61"}, "no model 'vgg61'; nearest: vgg"),
        ({"model": "timm:repvg_a0"}, "timm has no model 'repvg_a0'; nearest: repvgg_a0"),
        ({"model": "timm:vgg11.tv_in2k"}, "timm has no model 'vgg11.tv_in2k'; nearest: vgg11"),
        ({"model": "timm:hf-hub:timm/vgg11"}, "timm has no model 'hf-hub:timm/vgg11'"),
        ({"model": "timm:local-dir:D"}, "timm has no model 'local-dir:D'"),
        ({"model": "timm-reparameterized:test_nfnet"}, "nothing to reparameterise: name it timm:"),
        ({"model": "timm:test_nfnet"}, "do not fit NormFreeNet, by their keys"),
        ({"model": "timm:test_nfnet", "--weights": None}, "without weights is random"),
        ({"model": "timm:test_nfnet", "--weights": "IN1K"}, "timm's weights are DEFAULT, or named"),
        (
            {"model": "timm:efficientnet_b0_gn", "--weights": "DEFAULT"},
            "timm has no weights for efficientnet_b0_gn",
        ),
        ({"model": "torchvision.models:vgg11", "--weights": "DEFAULT"}, "is no model that has"),
        ({"model": "nothing.here:net"}, "nothing.here cannot be imported: ModuleNotFoundError"),
        ({"model": "nothing.py:net"}, "there is no file nothing.py"),
        ({"model": "torchvision.models:vgg"}, "has no factory 'vgg'; nearest: vgg"),
        ({"model": "builtins:dict"}, "builtins:dict returned a dict, not an nn.Module"),
        ({"model": "alexnet"}, "do not fit AlexNet, by their keys"),
        ({"--weights": None}, "squeezenet1_1 without weights is random"),
        ({"--weights": "IMAGENET1K_V7"}, "no file and no weights of squeezenet1_1; those are"),
        ({"--weights": "missing.pth"}, "there is no file missing.pth"),
        ({"--weights": "truncated.pth"}, "truncated.pth cannot be read as a state dict"),
        ({"--data": "nowhere"}, "there is no folder or file nowhere"),
        ({"--data": "empty"}, "empty has no pictures in it"),
        ({"--data": "single"}, "at least 2 pictures: single has 1"),
        ({"--data": "text.txt"}, "neither a folder of pictures nor a .npy"),
        ({"--data": "floats.npy"}, "floats.npy[2] cannot be read: its floats are from 7 to 7"),
        ({"--data": "broken.npz"}, "broken.npz cannot be read as arrays"),
        ({"--output": "out.bin"}, "must end in .safetensors"),
        ({"--output": "missing/out.pth"}, "the folder missing does not exist"),
        ({"--output": "there.pth"}, "there.pth exists"),
        ({"--include": "feature.*"}, "'feature.*' matches none of the 26 convolutions"),
        ({"--exclude": "nope"}, "'nope' matches none"),
        ({"--layout": "tree"}, "argument --layout: invalid choice: 'tree'"),
        ({"--placement": "before"}, "argument --placement: invalid choice: 'before'"),
        ({"--images": "0"}, "0 is not between 1 and"),
        ({"--images": "many"}, "many is not a whole number"),
        ({"--batch-size": "-3"}, "-3 is not between 1 and"),
        ({"--std": ("0", "1", "1")}, "the std must be positive, not 0.0 1.0 1.0"),
        ({"--seed": "9" * 30}, "is not between 0 and"),
        ({"--data": "none.npy"}, "at least 2 pictures: none.npy has 0"),
        ({"--weights": "nan.pth"}, "squeezenet1_1 gives NaN or Inf"),
        ({"model": "torch:ones"}, "torch:ones() failed: TypeError"),
        ({"--device": "meta"}, "device meta cannot be used here"),
        ({"--device": "gpu"}, "device gpu cannot be used here"),
        ({"--device": "cuda"}, "device cuda cannot be used here"),
        ({"--frobnicate": "1"}, "unrecognized arguments"),
    ],
)
def test_a_bad_request_is_one_line_exit_2_and_writes_nothing(
    run, folder, squeezenet, tmp_path, changes, message
):
    if "cuda" in changes.values() and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "empty").mkdir()
    pictures(tmp_path / "single", 1)
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "there.pth").write_text("precious")
    np.save(tmp_path / "floats.npy", np.full((3, 4, 4, 3), 7.0))
    (tmp_path / "broken.npz").write_bytes(b"PK broken")
    (tmp_path / "truncated.pth").write_bytes(squeezenet.read_bytes()[:1000])
    np.save(tmp_path / "none.npy", np.zeros((0, 4, 4, 3), dtype=np.uint8))
    state = torch.load(squeezenet, weights_only=True)
    state["classifier.1.bias"][3] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    before = sorted(tmp_path.rglob("*"))
    options = GOOD | changes
    known = {"W": squeezenet, "D": folder}
    pairs = [(k, known.get(v, v)) for k, v in options.items() if v is not None and k != "model"]
    flat = [a for k, v in pairs for a in (k, *(v if isinstance(v, tuple) else (v,)))]
    code, _, err = run("convert", options["model"], *flat, *SMALL)
    assert code == 2
    assert len(err) == 1, err
    assert message in err[0]
    assert err[0].startswith("retrofit: ")
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "there.pth").read_text() == "precious"


def test_a_folder_that_cannot_be_written_is_found_out_before_the_calibration(
    run, folder, squeezenet, monkeypatch
):
    def full(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    code, _, err = run(
        "convert", "squeezenet1_1", "--weights", squeezenet, "--data", folder, "--output", "a.pth"
    )
    assert (code, err) == (2, ["retrofit: cannot write to .: Read-only file system"])


def write_model(file, layers, forward):
    """A file whose Net has these layers and this forward."""
    file.write_text(
        "import torch\nimport torch.nn.functional as F\nfrom torch import nn\n\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        torch.manual_seed(0)\n"
        + "".join(f"        {line}\n" for line in layers)
        + "    def forward(self, x):\n"
        + "".join(f"        {line}\n" for line in forward)
    )


CONVS = ("self.a = nn.Conv2d(3, 4, 3)", "self.b = nn.Conv2d(4, 4, 3)")


def test_a_model_that_cannot_be_traced_is_planned_from_pictures(run, folder, tmp_path):
    layers = (*CONVS, "self.never = nn.Conv2d(4, 4, 3)")
    forward = (
        "x = self.a(x).relu()", "if x.mean() > 1e9:", "    x = self.never(x)",
        "return self.b(x).relu()",
    )  # fmt: skip
    write_model(tmp_path / "branch.py", layers, forward)
    code, out, err = run("plan", "branch.py:Net")
    assert code == 0
    assert out.endswith("Net: 0 of 3 convolutions get a BatchNorm\n")
    code, out, err = run("plan", "branch.py:Net", "--data", folder)
    assert (code, err) == (0, [])
    assert out.endswith("Net: 2 of 3 convolutions get a BatchNorm\n")
    data = ("--data", folder, "--output", "a.safetensors", *OWN)
    code, out, err = run("convert", "branch.py:Net", *data)
    assert (code, err) == (0, [])
    assert "a.bn" in out
    assert "b.bn" in out
    code, _, err = run("plan", "branch.py:Net", "--layout", "graph")
    assert code == 2
    assert len(err) == 1
    assert 'branch.py:14, in forward: "if x.mean() > 1e9:"' in err[0]
    assert err[0].endswith("leave out layout='graph' (--layout)")


def test_what_cannot_be_traced_is_folded_with_an_example(run, folder, tmp_path):
    layers = (*CONVS, "self.n = nn.BatchNorm2d(4)", "self.c = nn.Conv2d(4, 4, 3)")
    forward = (
        "x = self.n(self.a(x)).relu()", "if x.mean() > 1e9:", "    x = self.c(x)",
        "return self.b(x).relu()",
    )  # fmt: skip
    write_model(tmp_path / "normed.py", layers, forward)
    model = build("normed.py:Net").eval()
    with torch.no_grad():
        model.n.running_mean.normal_()
        model.n.running_var.uniform_(0.5, 2)
    torch.save(model.state_dict(), tmp_path / "trained.pth")
    words = ("fold", "trained.pth", "--model", "normed.py:Net", "--output", "plain.pth")
    code, _, err = run(*words)
    assert (code, len(err)) == (2, 1)
    assert err[0].endswith("pass example (--data)")
    code, _, err = run(*words, "--data", folder, "--crop", "32")
    assert (code, err) == (0, [])
    state = torch.load(tmp_path / "plain.pth", weights_only=True)
    assert not [key for key in state if key.startswith("n.")]
    x = torch.randn(2, 3, 16, 16)
    expected = model.n(model.a(x))
    found = torch.nn.functional.conv2d(x, state["a.weight"], state["a.bias"])
    assert torch.allclose(found, expected, atol=1e-5)


DETECTOR = """
from torch import nn
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD

def net():
    convs = nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU()
    return SSD(nn.Sequential(*convs), DefaultBoxGenerator([[2]]), (64, 64), 3)
"""


def test_a_detector_takes_pictures_in_their_own_sizes(run, tmp_path):
    folder = pictures(tmp_path / "mixed", 16)
    for i, file in enumerate(sorted(folder.rglob("*.png"))):
        Image.open(file).resize((40 + 3 * i, 60)).save(file)
    (tmp_path / "det.py").write_text(DETECTOR)
    torch.manual_seed(0)
    torch.save(model_sources.build("det.py:net").state_dict(), tmp_path / "det.pth")
    weights = ("--weights", "det.pth", "--data", folder, "--workers", "0")
    code, out, err = run("convert", "det.py:net", *weights, "--output", "bn.safetensors")
    assert (code, err) == (0, [])
    assert "calibrated on       16 images" in out
    assert "outputs             equal bit for bit" in out
    assert "backbone.2.bn" in out
    code, out, err = run("verify", "bn.safetensors", "--model", "det.py:net", *weights)
    assert (code, err) == (0, [])
    assert "\nequal bit for bit on" in out


def test_a_layer_that_no_picture_reaches_is_named_or_left_out(run, folder, tmp_path):
    forward = ("x = self.a(x).relu()", "return self.b(x).relu() if len(x) < 3 else x")
    write_model(tmp_path / "rare.py", CONVS, forward)
    arguments = ("convert", "rare.py:Net", "--data", folder, "--output", "a.safetensors", *OWN)
    code, _, err = run(*arguments)
    assert code == 2
    assert len(err) == 1
    assert "--skip-unused" in err[0]
    assert not (tmp_path / "a.safetensors").exists()
    code, out, err = run(*arguments, "--skip-unused")
    assert (code, err) == (0, [])
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        norms = [key for key in file.keys() if key.endswith("running_mean")]  # noqa: SIM118
    assert norms == ["a.bn.running_mean"]


def test_a_model_with_nothing_to_convert_says_so(run, folder, tmp_path):
    forward = ("return self.b(self.a(x)).relu()",)
    write_model(
        tmp_path / "done.py", ("self.a = nn.Conv2d(3, 4, 3)", "self.b = nn.BatchNorm2d(4)"), forward
    )
    arguments = ("convert", "done.py:Net", "--data", folder, "--output", "a.pth", *SMALL)
    code, out, err = run(*arguments)
    assert code == 1
    assert err == ["retrofit: there is nothing to convert, and nothing was written"]
    assert "already normalised by b" in out
    assert not (tmp_path / "a.pth").exists()


def test_linear_layers_alone_are_told_of_their_option(run, folder, tmp_path):
    forward = ("return self.b(self.a(x.mean((2, 3))).relu())",)
    write_model(
        tmp_path / "mlp.py", ("self.a = nn.Linear(3, 4)", "self.b = nn.Linear(4, 2)"), forward
    )
    arguments = ("convert", "mlp.py:Net", "--data", folder, "--output", "a.safetensors", *OWN)
    code, _, err = run(*arguments)
    assert code == 1
    assert err[0].endswith("nothing was written (Linear layers get BatchNorms with --linear)")
    assert run(*arguments, "--linear")[0] == 0
    with pytest.warns(UserWarning, match="no convolutions, and Linear layers get some with linear"):
        retrofit.add_batchnorm(torch.nn.Linear(3, 4), [torch.randn(4, 3)], progress=False)


def test_layout_placement_and_linear_layers_as_asked(run, folder, tmp_path):
    layers = (
        "self.a = nn.Conv2d(3, 4, 3)", "self.act = nn.ReLU()",
        "self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))",
        "self.b = nn.Linear(4, 5)", "self.c = nn.Linear(5, 2)",
    )  # fmt: skip
    forward = (
        "x = F.conv2d(self.act(self.a(x)), self.weight).relu()",
        "return self.c(self.b(x.mean((2, 3))).relu())",
    )
    write_model(tmp_path / "mine.py", layers, forward)

    def norms(*options):
        output = ("--data", folder, "--output", "out.safetensors", "--overwrite", *OWN)
        code, _, err = run("convert", "mine.py:Net", *output, *options)
        assert (code, err) == (0, [])
        weights = ("--model", "mine.py:Net", "--data", folder)
        assert run("verify", "out.safetensors", *weights, *OWN)[0] == 0
        state = load_file(tmp_path / "out.safetensors")
        return [len(tensor) for key, tensor in state.items() if key.endswith("running_mean")]

    assert norms() == [4]
    assert sorted(norms("--linear")) == [4, 5]
    assert norms("--layout", "graph") == [4, 4]
    assert norms("--placement", "post_activation") == [4]
    code, out, err = run("plan", "mine.py:Net", "--placement", "post_activation")
    assert (code, err) == (0, [])
    assert "act.bn" in out


def test_an_error_in_the_users_code_is_one_line_and_exit_1(run, tmp_path, folder):
    forward = ("if len(x) > 2:", "    raise KeyError('too\\nmany')", "return self.a(x).relu()")
    write_model(tmp_path / "odd.py", CONVS, forward)
    arguments = ("convert", "odd.py:Net", "--data", folder, "--output", "a.pth", *SMALL)
    code, _, err = run(*arguments)
    assert code == 1
    assert len(err) == 1
    assert "KeyError" in err[0]
    with pytest.raises(KeyError):
        main(["--debug", *map(str, arguments)])
    assert not (tmp_path / "a.pth").exists()


def test_pictures_that_the_model_does_not_take_are_a_bad_request(run, tmp_path, folder):
    write_model(tmp_path / "odd.py", ("self.a = nn.Conv2d(7, 4, 3)",), ("return self.a(x).relu()",))
    code, _, err = run("convert", "odd.py:Net", "--data", folder, "--output", "a.pth", *SMALL)
    assert code == 2
    assert len(err) == 1
    assert "the network takes 7 channels, and pictures in files have 1, 3, or 4" in err[0]


@pytest.mark.slow
def test_as_a_program_with_workers_and_as_a_script(folder, squeezenet, tmp_path):
    script = Path(__file__).resolve().parents[2] / "scripts" / "convert.py"
    options = [
        "squeezenet1_1", "--weights", squeezenet, "--data", folder, "--images", "8", "--resize",
        "40", "--crop", "32", "--workers", "2",
    ]  # fmt: skip
    for number, program in enumerate((["-m", "retrofit", "convert"], [str(script)])):
        output = tmp_path / f"{number}.safetensors"
        command = [sys.executable, *program, *map(str, options), "--output", str(output)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        with safe_open(output, framework="pt") as file:
            assert json.loads(file.metadata()["retrofit"])["images"] == 8


def test_a_model_with_a_named_input_alone(run, folder, tmp_path):
    (tmp_path / "named.py").write_text(
        "import torch\n"
        "class Named(torch.nn.Sequential):\n"
        "    def forward(self, *, pixels):\n"
        "        return super().forward(pixels)\n"
        "def make():\n"
        "    return Named(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())\n"
    )
    arguments = ("--data", folder, "--output", "named.safetensors", *OWN)
    code, out, err = run("convert", "named.py:make", *arguments)
    assert (code, err) == (0, [])
    assert "equal bit for bit" in out


@pytest.mark.filterwarnings("ignore:the calibration ended")
def test_with_a_tolerance_too_the_pictures_that_were_not_used_verify(run, tmp_path):
    data = pictures(tmp_path / "many", 120)
    for name, options, count in (
        ("early", ["--tolerance", "0.9"], "32 images in"),  # enough at the first look
        ("late", ["--tolerance", "0.001", "--images", "100"], "100 images in"),
    ):
        code, out, _ = run(
            "convert", "retrofit.demo:trained_vgg", "--data", data, "--output",
            f"{name}.safetensors", "--crop", "32", "--workers", "0", *options,
        )  # fmt: skip
        assert code == 0
        assert count in out
        assert "verified on         16 other images" in out


def test_as_many_pictures_are_used_as_asked_although_fewer_are_enough(run, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def net(norm=nn.Identity):\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Flatten(),"
        " nn.Linear(400, 2))\n"
        "def stock():\n    return net(nn.BatchNorm2d)\n"
    )
    values = np.random.default_rng(0).integers(0, 256, (400, 12, 12, 3), dtype=np.uint8)
    np.save(tmp_path / "a.npy", values)
    options = ("--data", "a.npy", "--crop", "12", "--workers", "0", "--mean", "0.5", "--std", "0.2")
    net, bn, weights = ("--model", "mine.py:net"), "bn.safetensors", "weights.safetensors"
    convert = ("convert", "mine.py:net", "--output", bn, "--overwrite", *options)
    code, out, err = run(*convert)
    assert (code, err) == (0, [])
    assert int(re.search(r"calibrated on +(\d+) images", out)[1]) < 300
    for images, counted in ((["--images", "350"], "350"), (["--tolerance", "0"], "400")):
        assert f"calibrated on       {counted} images" in run(*convert, *images)[1]
    for images, counted in (([], "256"), (["--images", "350"], "350")):
        found = run("adapt", bn, *net, "--output", "new.pth", "--overwrite", *options, *images)
        assert f"adapted on          {counted} images" in found[1]
    assert run("fold", bn, *net, "--output", weights)[0] == 0
    restore = ("restore", "mine.py:stock", "--weights", weights, "--output", "r.pth", "--overwrite")
    found = run(*restore, *options, "--images", "350")
    assert "statistics of 350 images" in found[1]


def test_the_command_runs_in_a_thread_too(capsys):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main(["plan", "alexnet"])))
    thread.start()
    thread.join()
    assert codes == [0]
    assert "features.0" in capsys.readouterr().out


def test_a_number_that_is_none_is_a_bad_request(capsys):
    words = "adapt a.pth --output b.pth --data c --prior many"
    with pytest.raises(SystemExit) as stopped:
        main(words.split())
    assert stopped.value.code == 2
    assert "many is not a number from 0 up" in capsys.readouterr().err
