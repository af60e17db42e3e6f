"""`retrofit adapt`: a file whose BatchNorms are given the statistics of unlabelled pictures."""

import json

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

import retrofit
from retrofit import demo

DEMO = "retrofit.demo:trained_vgg"
SIZE = (
    "--resize", "32", "--crop", "32", "--workers", "0", "--batch-size", "64",
    "--mean", *map(str, demo.MEAN), "--std", *map(str, demo.STD),
)  # fmt: skip


def foggy(source, target, count):
    """Pictures in thick fog, without a word on what they show."""
    target.mkdir()
    for number, file in enumerate(sorted(source.rglob("*.jpg"))[::3][:count]):
        fog = Image.open(file).point(lambda value: value * 0.4 + 150)
        fog.save(target / f"{number}.png")
    return target


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Pictures, those in fog, and the demo's network as a retrofitted file."""
    folder = tmp_path_factory.mktemp("demo")
    demo.unpack(folder)
    foggy(folder / "calibration", folder / "fog", 300)
    foggy(folder / "calibration", folder / "few", 100)
    plain = demo.trained_vgg()
    images, _ = demo.labelled(folder / "calibration")
    converted = retrofit.add_batchnorm(plain, images[:512].split(128), progress=False)
    retrofit.save(converted, folder / "bn.safetensors", name=DEMO, data="CIFAR-10")
    return folder


def accuracy_in_fog(model, here):
    images, labels = demo.labelled(here / "test")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (demo.MEAN, demo.STD))
    pixels = (images[:600] * std + mean) * 255
    return demo.accuracy(model, ((pixels * 0.4 + 150) / 255 - mean) / std, labels[:600])


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.slow
def test_a_network_finds_its_way_in_fog_without_labels(run, here, tmp_path):
    code, out, err = run(
        "adapt", here / "bn.safetensors", "--model", DEMO, "--data", here / "fog", "--output",
        "fog.safetensors", *SIZE,
    )  # fmt: skip
    assert (code, err) == (0, [])
    assert "adapted on          256 images" in out
    assert "BatchNorms          8 of them" in out
    before = retrofit.load(here / "bn.safetensors", demo.trained_vgg())
    after = retrofit.load(tmp_path / "fog.safetensors", demo.trained_vgg())
    assert accuracy_in_fog(before, here) + 0.2 < accuracy_in_fog(after, here)
    for old, new in zip(norms(before), norms(after), strict=True):
        assert torch.equal(old.weight, new.weight)
        assert torch.equal(old.bias, new.bias)
        assert not torch.equal(old.running_mean, new.running_mean)


def test_with_a_prior_statistics_are_the_blend_of_old_and_new(run, here, tmp_path):
    common = ("--model", DEMO, "--data", here / "few", *SIZE)
    assert run("adapt", here / "bn.safetensors", *common, "--output", "0.safetensors")[0] == 0
    code, out, _ = run(
        "adapt", here / "bn.safetensors", *common, "--output", "b.safetensors", "--prior", "300"
    )
    assert code == 0
    assert "100 images" in out
    assert "the old statistics counting as 300" in out
    files = (here / "bn.safetensors", tmp_path / "0.safetensors", tmp_path / "b.safetensors")
    # The first BatchNorm gets the same whatever the others do.
    old, new, blend = (norms(retrofit.load(file, demo.trained_vgg()))[0] for file in files)
    for name in ("running_mean", "running_var"):
        expected = 0.75 * old.get_buffer(name) + 0.25 * new.get_buffer(name)
        torch.testing.assert_close(blend.get_buffer(name), expected)


def test_the_file_says_what_it_was_adapted_on(run, here, tmp_path):
    data = ("--data", here / "few", *SIZE)
    run("adapt", here / "bn.safetensors", "--model", DEMO, *data, "--output", "new.safetensors",
        "--images", "90", "--prior", "16")  # fmt: skip
    with safe_open(tmp_path / "new.safetensors", framework="pt") as file:
        provenance = json.loads(file.metadata()["retrofit"])
    assert provenance["data"] == (
        f"CIFAR-10; adapted on 90 images of {here / 'few'}, seed 0, of 32 x 32 pixels, "
        "mean 0.4914 0.4822 0.4465, std 0.247 0.2435 0.2616, the old statistics counting as 16"
    )
    assert provenance["verification"] is None  # it is no longer the original


@pytest.mark.filterwarnings("default:the statistics of")
def test_of_a_small_folder_the_uncertainty_is_told(run, here, tmp_path):
    foggy(here / "calibration", tmp_path / "tiny", 6)
    code, _, err = run(
        "adapt", here / "bn.safetensors", "--model", DEMO, "--data", "tiny", "--output",
        "new.safetensors", *SIZE,
    )  # fmt: skip
    assert code == 0
    assert len(err) == 1
    assert "warning: the statistics of 6 images are uncertain" in err[0]


@pytest.mark.filterwarnings("default:the statistics are those of one")
def test_of_one_picture_the_uncertainty_is_not_known(run, here, tmp_path):
    foggy(here / "calibration", tmp_path / "one", 1)
    code, out, err = run(
        "adapt", here / "bn.safetensors", "--model", DEMO, "--data", "one", "--output",
        "new.safetensors", *SIZE,
    )  # fmt: skip
    assert (code, len(err)) == (0, 1)
    assert "cannot tell how uncertain they are" in err[0]
    assert "standard error      not known, from one picture or from equal ones" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plain.safetensors",), "plain.safetensors has no BatchNorm to adapt: convert it first"),
        (("bn.safetensors", "--prior", "-1"), "-1 is not a number from 0 up"),
        (("missing.safetensors",), "missing.safetensors"),
        (("bn.safetensors", "--output", "new.txt"), "new.txt must end in"),
        (("bn.safetensors", "--data", "nowhere"), "nowhere"),
    ],
)
def test_what_cannot_be_adapted_is_one_line_and_nothing_is_written(
    run, here, tmp_path, arguments, message
):
    retrofit.save(demo.trained_vgg(), tmp_path / "plain.safetensors", name=DEMO)
    (tmp_path / "bn.safetensors").write_bytes((here / "bn.safetensors").read_bytes())
    before = sorted(tmp_path.iterdir())
    file, *rest = arguments
    standard = ("--model", DEMO, "--data", here / "few", "--output", "new.safetensors", *SIZE)
    code, out, err = run("adapt", file, *standard, *rest)
    assert (code, out, len(err)) == (2, "", 1)
    assert message in err[0]
    assert sorted(tmp_path.iterdir()) == before
