"""The demo that comes with the package."""

import json
import tarfile

import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file

from retrofit import demo
from retrofit.cli import main


@pytest.mark.slow
def test_the_demo_shows_what_it_claims_in_numbers_for_programs(tmp_path, capsys):
    """As --json has them; what it prints is compared with docs/quick-start.md."""
    folder = tmp_path / "demo"
    assert main(["demo", "--output", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    converted, restored = found["demo"]["converted"], found["demo"]["restored"]
    plain, retrofitted, folded, batchwise, uncalibrated = (
        one["accuracy"] for one in converted["accuracies"]
    )
    assert plain == retrofitted == folded > 0.8
    assert plain - 0.03 < batchwise
    assert uncalibrated < batchwise - 0.05
    assert converted["calibration"]["images"] == 1024
    assert found["verification"]["exact"]
    assert found["verification"]["top1_agreement"] == 1
    before, *_, folded_after = restored["accuracies"]["folded"]
    start, *_, restored_after = restored["accuracies"]["restored"]
    assert start == pytest.approx(before, abs=0.002)
    assert folded_after < before
    assert restored_after > before + 0.1
    with safe_open(folder / "vgg-cifar10-bn.safetensors", framework="pt") as file:
        assert len(list(file.keys())) == 8 * 7 + 2
    assert (folder / "resnet-cifar10.safetensors").samefile(restored["written"])
    with safe_open(folder / "resnet-cifar10.safetensors", framework="pt") as file:
        stock = demo.resnet_cifar10()
        stock.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


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
