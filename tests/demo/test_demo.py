"""The demo that comes with the package."""

import json
import re
import tarfile

import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file

from retrofit import demo
from retrofit.cli import main


@pytest.mark.slow
def test_the_demo_shows_what_it_claims(tmp_path, capsys):
    assert main(["demo", "--output", str(tmp_path / "demo")]) == 0
    out, _ = capsys.readouterr()
    plain, retrofitted, folded, batchwise, uncalibrated = (
        float(number) for number in re.findall(r"([\d.]+)%\n", out)[:5]
    )
    assert plain == retrofitted == folded > 80
    assert plain - 3 < batchwise
    assert uncalibrated < batchwise - 5
    before, *_, folded_after = shares("folded", out)
    start, *_, restored_after = shares("restored", out)
    assert start == pytest.approx(before, abs=0.2)
    assert folded_after < before
    assert restored_after > before + 10
    assert re.search(
        "21 BatchNorms restored; .* (are equal bit for bit|by [1-9].[0-9]e-0[6-9])", out
    )
    assert "equal bit for bit on 512 pictures, at 8 sites and the output" in out
    assert "the same top-1 on 100.00%" in out
    written = tmp_path / "demo" / "vgg-cifar10-bn.safetensors"
    with safe_open(written, framework="pt") as file:
        assert len(list(file.keys())) == 8 * 7 + 2
    with safe_open(tmp_path / "demo" / "resnet-cifar10.safetensors", framework="pt") as file:
        stock = demo.resnet_cifar10()
        stock.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


@pytest.mark.slow
def test_a_program_gets_the_numbers(tmp_path, capsys):
    assert main(["demo", "--output", str(tmp_path / "demo"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    converted, restored = found["demo"]["converted"], found["demo"]["restored"]
    plain, retrofitted, folded, *_ = (one["accuracy"] for one in converted["accuracies"])
    assert plain == retrofitted == folded > 0.8
    assert found["verification"]["exact"]
    assert converted["calibration"]["images"] == 1024
    assert restored["accuracies"].keys() == {"folded", "restored"}
    assert restored["accuracies"]["restored"][-1] > restored["accuracies"]["folded"][-1]
    assert (tmp_path / "demo" / "resnet-cifar10.safetensors").samefile(restored["written"])


def shares(network, out):
    """Read a line of accuracies, in per cent."""
    line = next(line for line in out.splitlines() if line.startswith(f"{network} "))
    return [float(number) for number in re.findall(r"([\d.]+)%", line)]


def test_the_resnet_is_folded_and_what_it_was_before_answers_alike():
    folded = demo.folded_resnet()
    assert type(folded) is torchvision.models.ResNet
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    assert not folded.training
    before = demo.resnet_cifar10().eval()
    before.load_state_dict(
        load_file(demo.FOLDED.parents[2] / "notebooks/resnet-cifar10.safetensors")
    )
    x = torch.rand(64, 3, 32, 32)
    with torch.no_grad():
        expected, actual = before(x), folded(x)
    assert (actual - expected).abs().max() < 0.01 * expected.abs().max()  # weights in float16


def test_the_network_is_torchvisions_vgg_without_batchnorm():
    model = demo.trained_vgg()
    assert type(model) is torchvision.models.VGG
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    assert not model.training
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_what_the_package_carries_is_small_and_says_how_good_it_is():
    assert demo.WEIGHTS.stat().st_size < 3_000_000
    assert demo.FOLDED.stat().st_size < 1_000_000
    assert demo.PICTURES.stat().st_size < 1_000_000
    for weights in (demo.WEIGHTS, demo.FOLDED):
        with safe_open(weights, framework="pt") as file:
            assert float(file.metadata()["test_accuracy"]) >= 0.85
    with tarfile.open(demo.PICTURES) as tar:
        names = tar.getnames()
    assert sum(name.startswith("test/") for name in names) == 2000
    assert sum(name.startswith("calibration/") for name in names) == 1024
