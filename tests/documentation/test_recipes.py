"""Recipes in docs/recipes.md, as they stand there: a merged network, and data of your own."""

import re
import shlex

import nets
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.utils import reparameterize_model
from torch import nn

import retrofit
from retrofit.cli import main

RECIPE = nets.recipe("Fine-tune a network whose BatchNorm was merged away")
OWN_DATA = nets.recipe("Data of your own")


def blocks(language, recipe=RECIPE):
    return re.findall(rf"^```{language}\n(.*?)^```", recipe, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def original():
    """A RepVGG before merging, each BatchNorm with values of its own."""
    torch.manual_seed(0)
    model = timm.create_model("repvgg_a0")
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.3)
    with torch.no_grad():
        for _ in range(5):
            model(2 * nets.images(8, 3, 64, 64) + 0.5)
    return model.eval()


@pytest.fixture
def released(original, monkeypatch):
    """The same once merged; its unmerged weights are what timm downloads."""
    monkeypatch.setattr(
        "timm.models._builder.load_state_dict_from_hf", lambda *_, **__: original.state_dict()
    )
    return reparameterize_model(original).eval()


@pytest.fixture
def run_command(tmp_path, monkeypatch, capsys):
    """Run a line of a recipe in an empty folder, and return what it prints."""
    monkeypatch.chdir(tmp_path)

    def call(line):
        assert main(shlex.split(line)[1:]) == 0
        return capsys.readouterr().out

    return call


def run(code, variables):
    exec(code, variables)  # noqa: S102 - the documentation's own


@torch.no_grad()
def assert_close(model, other, x):
    expected = other(x)
    assert torch.allclose(model(x), expected, rtol=1e-4, atol=1e-4 * float(expected.std()))


def test_the_recipe_in_python(released, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    images = [nets.images(8, 3, 64, 64) for _ in range(4)]
    x = torch.cat(images[:2])
    variables = {
        "images": images,
        "loader": [(batch, torch.randint(0, 1000, (8,))) for batch in images],
    }
    merge, convert, tune, fold = blocks("python")
    run(merge + convert, variables)
    network = variables["network"]
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert sum(isinstance(module, nn.BatchNorm2d) for module in network.modules()) == 22
    assert torch.equal(network(x), released(x))
    run(tune, variables)
    assert (network(x) - released(x)).abs().max() > 0.1 * released(x).std()
    run(fold, variables)
    state = torch.load("repvgg_a0_tuned.pth", weights_only=True)
    assert list(state) == list(released.state_dict())
    released.load_state_dict(state)
    assert_close(released, network, x)


@pytest.mark.slow
def test_the_recipe_on_the_command_line(released, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    random = np.random.default_rng(0)
    for i in range(18):
        pixels = random.integers(0, 256, (7, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((224, 224)).save(tmp_path / "pictures" / f"{i}.png")
    convert, fold = (shlex.split(block)[1:] for block in blocks("sh"))
    assert main(convert) == 0
    assert "outputs             equal bit for bit" in capsys.readouterr().out
    network = retrofit.load("repvgg_a0_bn.safetensors", released)
    for parameter in network.parameters():  # stands for the training
        parameter.data *= 1.01
    retrofit.save(network, "tuned.safetensors")
    assert main(fold) == 0
    tuned = reparameterize_model(timm.create_model("repvgg_a0")).eval()
    tuned.load_state_dict(load_file("repvgg_a0_tuned.safetensors"), strict=True)
    x = nets.images(2, 3, 64, 64)
    assert_close(tuned, network, x)
    assert not torch.allclose(tuned(x), released(x), rtol=1e-2)


def test_the_recipe_for_data_of_your_own(run_command, tmp_path):
    for name, code in zip(("net.py", "sounds.py"), blocks("python", OWN_DATA), strict=True):
        (tmp_path / name).write_text(code)
    commands, seven = blocks("sh", OWN_DATA)
    plan, convert, verify = (run_command(line) for line in commands.splitlines())
    assert plan.count("Conv1d") == 2
    assert "calibrated on       32 samples" in convert
    assert "verified on         16 other samples" in convert
    assert verify.endswith("equal bit for bit on 16 samples, top-1 agreement 100.00%\n")
    assert "written             seven_bn.safetensors" in run_command(seven)
    assert load_file("seven_bn.safetensors")["8.weight"].shape == (7, 32)
