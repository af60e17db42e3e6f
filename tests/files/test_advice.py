"""Weights that do not fit: whose they seem to be, and what to do with those."""

import sys
import types

import pytest
import torch
from torch import nn
from torch.fx.experimental.optimization import fuse
from torchvision import models

from retrofit import RetrofitError
from retrofit.files.model_sources import trained

RESTORE = "its BatchNorms were folded away: restore (retrofit restore, retrofit.restore)"
OTHER = "are they of another architecture?"
ARGUMENTS = "does its factory need the arguments that it was trained with (--model-args)?"


def refusal(tmp_path, name, state):
    torch.save(dict(state), tmp_path / "w.pth")
    with pytest.raises(RetrofitError) as caught:
        trained(name, str(tmp_path / "w.pth"))
    return str(caught.value)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "vgg11_bn", "densenet121"])
def test_folded_weights_are_sent_to_restore(name, tmp_path):
    model = models.get_model(name).eval()
    said = refusal(tmp_path, name, fuse(model).state_dict())
    if name == "densenet121":  # its BatchNorms come before the convolutions: most cannot be folded
        assert "missing" in said
    else:
        assert RESTORE in said


def test_half_of_the_batchnorms_folded_is_folded_too(tmp_path):
    model = models.resnet18()
    state = model.state_dict()
    state["conv1.bias"] = torch.zeros(64)
    kept = {key: tensor for key, tensor in state.items() if not key.startswith("bn1.")}
    assert RESTORE in refusal(tmp_path, "resnet18", kept)


def test_other_weights_are_not(tmp_path):
    plain = models.vgg11(init_weights=False).state_dict()
    assert OTHER in refusal(tmp_path, "resnet18", plain)
    assert OTHER in refusal(tmp_path, "squeezenet1_0", models.resnet18().state_dict())
    headless = {key: t for key, t in models.resnet18().state_dict().items() if "fc" not in key}
    said = refusal(tmp_path, "resnet18", headless)
    assert said.endswith("2 missing (fc.weight, fc.bias)")


def test_other_shapes_ask_for_the_arguments(tmp_path):
    wide = models.mobilenet_v2(width_mult=0.5).state_dict()
    assert said_of_shapes(refusal(tmp_path, "mobilenet_v2", wide))
    ten = models.resnet18(num_classes=10).state_dict()
    assert "build it with num_classes=10" in refusal(tmp_path, "resnet18", ten)


def said_of_shapes(said):
    return said.endswith(ARGUMENTS) and "of another shape" in said


def test_a_model_pickled_by_ultralytics_is_read_by_it(tmp_path, monkeypatch):
    for name in ("ultralytics", "ultralytics.nn", "ultralytics.nn.tasks"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    kind = type("DetectionModel", (nn.Sequential,), {"__module__": "ultralytics.nn.tasks"})
    sys.modules["ultralytics.nn.tasks"].DetectionModel = kind
    path = tmp_path / "fused.pt"
    torch.save({"model": kind(nn.Conv2d(3, 4, 3))}, path)
    with pytest.raises(RetrofitError) as caught:
        trained("resnet18", str(path))
    assert f"model = ultralytics.YOLO('{path}').model; torch.save(model.state_dict()" in str(
        caught.value
    )
