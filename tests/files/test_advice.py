"""Weights that do not fit: whose they seem to be, and what to do with those."""

import sys
import types

import pytest
import torch
from torch import nn
from torch.fx.experimental.optimization import fuse
from torchvision import models

import retrofit
from retrofit import RetrofitError
from retrofit.files.model_sources import trained

RESTORE = "with its BatchNorms folded away, which restore (retrofit restore, retrofit.restore)"
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


def test_folded_weights_of_other_classes_are_told_both(tmp_path):
    ten = fuse(models.resnet18(num_classes=10).eval()).state_dict()
    said = refusal(tmp_path, "resnet18", ten)
    assert RESTORE in said
    assert "build it with num_classes=10" in said


@pytest.mark.parametrize("renumber", [True, False])
def test_a_network_that_has_batchnorms_already_is_not_taken_for_another(renumber, tmp_path):
    """What `convert` wrote, given to it again; and a stock network with BatchNorm."""
    model = models.vgg11_bn() if renumber else retrofit.insert(models.alexnet())
    name = "vgg11" if renumber else "alexnet"
    said = refusal(tmp_path, name, model.state_dict())
    assert "BatchNorms that it lacks, like the files that convert writes" in said
    assert "retrofit.load" in said
    assert OTHER in refusal(tmp_path, "resnet18", models.squeezenet1_1().state_dict())


def test_batchnorms_that_lack_their_statistics_were_not_folded(tmp_path):
    state = models.resnet18().state_dict()
    bare = {key: tensor for key, tensor in state.items() if "running" not in key}
    assert RESTORE not in refusal(tmp_path, "resnet18", bare)
    groups = models.resnet18(norm_layer=lambda channels: nn.GroupNorm(8, channels))
    assert RESTORE not in refusal(tmp_path, "resnet18", groups.state_dict())


def test_a_number_of_classes_is_that_of_a_head(tmp_path):
    detector = models.get_model(
        "retinanet_resnet50_fpn", weights=None, weights_backbone=None, num_classes=5
    )
    said = refusal(tmp_path, "retinanet_resnet50_fpn", detector.state_dict())
    assert "num_classes" not in said  # 45 are nine anchors for each of the five
    torch.save(nn.Sequential(nn.Embedding(20, 8)).state_dict(), tmp_path / "e.pth")
    with pytest.raises(RetrofitError) as caught:
        retrofit.load(tmp_path / "e.pth", nn.Sequential(nn.Embedding(10, 8)))
    assert "num_classes" not in str(caught.value)
    lraspp = models.get_model("lraspp_mobilenet_v3_large", weights_backbone=None, num_classes=3)
    said = refusal(tmp_path, "lraspp_mobilenet_v3_large", lraspp.state_dict())
    assert "build it with num_classes=3" in said


def test_a_file_of_another_network_says_of_which_it_is(tmp_path):
    model = retrofit.insert(models.squeezenet1_1(num_classes=10))
    path = tmp_path / "a.safetensors"
    retrofit.save(model, path, name="squeezenet1_1", model_args={"num_classes": 10})
    with pytest.raises(RetrofitError, match=r"is of squeezenet1_1\(num_classes=10\), and does not"):
        retrofit.load(path, models.squeezenet1_0())


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
