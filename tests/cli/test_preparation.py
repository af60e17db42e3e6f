"""How pictures are prepared: as typed, as a file says, or, with a warning, as usual."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torchvision import models

import retrofit
from retrofit.cli import main
from retrofit.pictures.preparation import Preparation

FACTORY = """
import torch
from torch import nn
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD

def net():
    torch.manual_seed(0)
    convs = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU()
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten())

def detector():
    torch.manual_seed(0)
    convs = nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU()
    return SSD(nn.Sequential(*convs), DefaultBoxGenerator([[2]]), (64, 64), 3)

def batches():
    return [net_input() for _ in range(3)]

def net_input():
    return torch.rand(8, 3, 12, 12)
"""
DATA = ("--data", "a.npy", "--workers", "0")
AS_TRAINED = ("--crop", "20", "--mean", "0.2", "0.3", "0.4", "--std", "0.7")
STATISTICS = ("0.bn.running_mean", "0.bn.running_var")


@pytest.fixture(autouse=True)
def folder(tmp_path):
    (tmp_path / "mine.py").write_text(FACTORY)
    random = np.random.default_rng(0)
    brightness = random.integers(0, 128, (40, 1, 1, 3))
    pixels = brightness + random.integers(0, 128, (40, 24, 30, 3))
    np.save(tmp_path / "a.npy", pixels.astype(np.uint8))
    return tmp_path


def statistics(file):
    tensors = load_file(file)
    return [tensors[name] for name in STATISTICS]


def are_equal(first, second):
    return all(map(torch.equal, statistics(first), statistics(second)))


def expected_input(folder):
    """What AS_TRAINED makes of the pictures, by torch alone."""
    pixels = torch.from_numpy(np.load(folder / "a.npy")).permute(0, 3, 1, 2)
    small = torch.nn.functional.interpolate(
        pixels.float(), (20, 25), mode="bilinear", antialias=True, align_corners=False
    )
    cut = small[..., 2:22].round() / 255
    return (cut - torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)) / 0.7


@pytest.fixture
def converted(run, folder):
    code, _, err = run("convert", "mine.py:net", *DATA, *AS_TRAINED, "--output", "bn.safetensors")
    assert (code, err) == (0, [])
    first = torch.nn.Conv2d(3, 8, 3)
    torch.manual_seed(0)
    first.reset_parameters()
    with torch.no_grad():
        y = first(expected_input(folder))
    sigma = y.std((0, 2, 3))
    found = statistics(folder / "bn.safetensors")
    assert ((found[0] - y.mean((0, 2, 3))).abs() / sigma).max() < 0.05
    return "bn.safetensors"


@pytest.mark.usefixtures("converted")
def test_pictures_are_prepared_as_the_file_says(run):
    adapt = ("adapt", "bn.safetensors", "--model", "mine.py:net", *DATA)
    code, out, err = run(*adapt, "--output", "told.safetensors")
    assert (code, err) == (0, [])
    assert run(*adapt, *AS_TRAINED, "--output", "typed.safetensors")[0] == 0
    assert run(*adapt, *AS_TRAINED, "--mean", "0.5", "--output", "other.safetensors")[0] == 0
    assert are_equal("told.safetensors", "typed.safetensors")
    assert not are_equal("told.safetensors", "other.safetensors")
    # It is said again, by what was adapted and by what was typed.
    code, _, err = run(
        "adapt", "other.safetensors", "--model", "mine.py:net", *DATA, "--output", "2.safetensors"
    )
    assert (code, err) == (0, [])
    assert are_equal("2.safetensors", "other.safetensors")
    code, out, _ = run("inspect", "told.safetensors")
    assert "preparation" in out
    assert "crop 20, mean 0.2 0.3 0.4, std 0.7\n" in out


@pytest.mark.usefixtures("converted")
@pytest.mark.parametrize("words", ["verify", "report --output r.html"])
def test_they_are_in_every_command_that_reads_some(words, capsys):
    file = ("bn.safetensors", "--model", "mine.py:net", *DATA)
    assert main([*words.split(), *file]) == 0
    assert "images of 20 x 20 pixels, mean 0.2 0.3 0.4, std 0.7, on cpu" in capsys.readouterr().err


@pytest.mark.usefixtures("converted")
def test_what_was_folded_says_it_too(run):
    fold = ("fold", "bn.safetensors", "--model", "mine.py:net", "--output", "plain.safetensors")
    assert run(*fold)[0] == 0
    assert "crop 20, mean 0.2 0.3 0.4, std 0.7\n" in run("inspect", "plain.safetensors")[1]


@pytest.mark.usefixtures("converted")
def test_data_of_ones_own_are_as_they_are(run):
    words = ("--model", "mine.py:net", "--data", "mine.py:batches", "--output", "own.safetensors")
    code, _, err = run("adapt", "bn.safetensors", *words)
    assert (code, err) == (0, [])


SIZES = [
    ({"crop": 32}, {"resize": 256, "crop": 224}, {"crop": 32}),
    ({"resize": 32}, {"crop": 224, "std": (1,)}, {"resize": 32, "std": (1,)}),
    ({"mean": (0.5,)}, {"crop": 32, "mean": (0.1,)}, {"crop": 32, "mean": (0.5,)}),
    ({}, {"crop": 32}, {"crop": 32}),
    ({"std": (1,)}, None, {"std": (1,)}),
]


@pytest.mark.parametrize(("typed", "told", "taken"), SIZES)
def test_a_size_that_is_typed_is_not_mixed_with_that_of_a_file(typed, told, taken):
    """--crop alone means a resize to as much: the resize of a file belongs to its own crop."""
    told = told and Preparation(**told)
    assert Preparation(**typed).over(told) == Preparation(**taken)


GUESSES = [
    ("mine.py:net", (), "--crop, --mean and --std"),
    ("mine.py:net", ("--resize", "300"), "--crop, --mean and --std"),
    ("mine.py:net", ("--crop", "20"), "--mean and --std"),
    ("mine.py:net", ("--mean", "0", "--std", "1"), "--crop"),
    ("mine.py:net", ("--crop", "20", "--std", "1"), "--mean"),
    ("mine.py:net", AS_TRAINED, None),
    ("mine.py:detector", (), None),
]


@pytest.mark.parametrize(("spec", "options", "named"), GUESSES)
def test_a_preparation_that_nothing_tells_is_a_warning(spec, options, named, run):
    words = (*DATA, "--images", "4", "--batch-size", "2", *options, "--output", "a.safetensors")
    code, _, err = run("convert", spec, *words, "--quiet")
    assert code == 0
    expected = f"nothing tells how {spec} was trained: without {named} the images were prepared"
    assert [expected in line for line in err] == [True] * bool(named)


@pytest.mark.parametrize("options", ["--resize 20", "--resize 20 --crop 24 --mean 0.5 --std 0.5"])
def test_a_crop_beyond_the_picture_is_refused(options, run, folder):
    code, _, err = run("convert", "mine.py:net", *DATA, *options.split(), "--output", "a.pth")
    assert (code, len(err)) == (2, 1)
    assert "the crop is larger than the resized pictures, which would get black edges" in err[0]
    assert not (folder / "a.pth").exists()


@pytest.mark.usefixtures("converted")
def test_weights_of_a_file_that_says_it_are_prepared_so(run):
    fold = ("fold", "bn.safetensors", "--model", "mine.py:net", "--output", "plain.safetensors")
    assert run(*fold)[0] == 0
    words = ("convert", "mine.py:net", "--weights", "plain.safetensors", *DATA)
    code, _, err = run(*words, "--output", "again.safetensors")
    assert (code, err) == (0, [])
    assert are_equal("bn.safetensors", "again.safetensors")


@pytest.mark.parametrize("words", ["plan vgg11", "report bn.safetensors --output r.html"])
def test_options_on_pictures_need_some(words, run, folder):
    retrofit.save(retrofit.insert(models.vgg11(init_weights=False)), folder / "bn.safetensors")
    for option in ("--crop 32", "--mean 0.5", "--seed 1"):
        code, _, err = run(*words.split(), *option.split())
        assert (code, len(err)) == (2, 1)
        assert f"{option.split()[0]} needs --data, which it is about" in err[0]
    code, _, err = run(*words.split(), "--mean", "300")
    assert (code, len(err)) == (2, 1)
    assert "--mean 300.0 cannot be of pixels in 0 to 1" in err[0]


WRONG = [
    {"crop": "3"}, {"crop": 1.5}, {"resize": True}, {"crop": 0}, {"mean": 0.5}, {"mean": ()},
    {"std": (0.0,)}, {"std": (-1,)}, {"mean": (120,)}, {"mean": ("1",)}, {"std": (float("nan"),)},
]  # fmt: skip


@pytest.mark.parametrize("steps", WRONG, ids=str)
def test_steps_that_no_picture_can_have_are_refused(steps):
    with pytest.raises(retrofit.RetrofitError):
        Preparation(**steps)


def test_torchvision_says_how_its_models_were_trained(run, folder):
    torch.manual_seed(0)
    torch.save(models.squeezenet1_1().state_dict(), folder / "w.pth")
    words = (*DATA, "--images", "4", "--crop", "64", "--output", "a.safetensors")
    code, _, err = run("convert", "squeezenet1_1", "--weights", "w.pth", *words)
    assert (code, err) == (0, [])


def test_a_restored_network_says_it(run, folder):
    architecture = (
        "import torch\nfrom torch import nn\ndef net():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())\n"
    )
    (folder / "normed.py").write_text(architecture)
    torch.manual_seed(0)
    torch.save(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)).state_dict(), folder / "w.pth")
    words = ("restore", "normed.py:net", "--weights", "w.pth", *DATA)
    code, _, err = run(*words, "--output", "a.safetensors")
    assert code == 0
    assert any("normed.py:net was trained: without --crop, --mean and --std" in e for e in err)
    code, _, err = run(*words, *AS_TRAINED, "--output", "b.safetensors")
    assert (code, err) == (0, [])
    assert "crop 20, mean 0.2 0.3 0.4, std 0.7" in run("inspect", "b.safetensors")[1]


def test_a_file_in_python_keeps_a_preparation(folder):
    model = retrofit.insert(models.squeezenet1_1(num_classes=2))
    told = Preparation(mean=(-0.5,), std=(1,))
    retrofit.save(model, folder / "a.safetensors", preparation=told)
    with safe_open(folder / "a.safetensors", framework="pt") as file:
        kept = json.loads(file.metadata()["retrofit"])["preparation"]
    assert kept == {"resize": None, "crop": None, "mean": [-0.5], "std": [1]}
    with pytest.raises(retrofit.RetrofitError, match="preparation= cannot be stored"):
        retrofit.save(model, folder / "b.safetensors", preparation={"crop": 1.5})
    assert not (folder / "b.safetensors").exists()
