"""The recipes for folded networks in docs/recipes.md, as they stand there.

What needs ultralytics is run by scripts/restored_yolo.py, by hand.
"""

import re
import shlex

import nets
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from folders import pictures
from torch import nn

import retrofit
from retrofit.cli import main

RECIPE = nets.recipe("Bring a folded network back into its own class")
SECTIONS = {section.split("\n")[0]: section for section in RECIPE.split("\n### ")}

pytestmark = pytest.mark.filterwarnings("ignore:the statistics of", "ignore::DeprecationWarning")


def blocks(title, language):
    return re.findall(rf"^```{language}\n(.*?)^```", SECTIONS[title], re.DOTALL | re.MULTILINE)


def run(code, variables):
    exec(code, variables)  # noqa: S102 - the documentation's own


@torch.no_grad()
def assert_close(model, other, x):
    expected = other.eval()(x)
    assert (model.eval()(x) - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def trained(model):
    """In eval mode, with BatchNorms as after training: the statistics are of what reaches them."""
    torch.manual_seed(0)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.3)
            norm.momentum = 0.5
    for _ in range(4):
        model.train()(nets.images(4, 3, 64, 64))
    return model.eval()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "pictures", 8)
    return tmp_path


@pytest.mark.parametrize("dynamo", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.usefixtures("folder")
def test_a_resnet_from_an_onnx_file(dynamo):
    original = trained(torchvision.models.resnet18())
    images = [nets.images(4, 3, 64, 64) for _ in range(2)]
    files = {
        "resnet18.onnx": original,
        "resnet18_softmax.onnx": nn.Sequential(original, nn.Softmax(1)),
    }
    for name, network in files.items():
        torch.onnx.export(network.eval(), (images[0],), name, dynamo=dynamo)
    variables = {"images": images}
    restoring, loading, with_softmax = blocks("A ResNet from an ONNX file", "python")
    run(restoring + loading, variables)
    assert_close(variables["network"], original, images[0])
    run(with_softmax, variables)
    torchvision.models.resnet18().load_state_dict(variables["restored"].state_dict())
    assert_close(variables["restored"], original, images[0])


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_a_mobilenet_from_weights_on_the_command_line(capsys):
    folded = retrofit.fold(trained(timm.create_model("mobilenetv2_100")))
    assert "conv_stem.bias" in folded.state_dict()
    assert "bn1.weight" not in folded.state_dict()
    safetensors.torch.save_file(folded.state_dict(), "mobilenetv2_edge.safetensors")
    title = "A MobileNet from the weights of an edge model"
    lines = (block.replace("\\\n", " ") for block in blocks(title, "sh"))
    restoring, folding = (shlex.split(line)[1:] for line in lines)
    creating, saving = blocks(title, "python")
    assert main([*restoring, "--workers", "0", "--crop", "64"]) == 0
    loading = capsys.readouterr().out.splitlines()[-1].removeprefix("to load: ")
    run(loading, {"timm": timm, "safetensors": safetensors})
    variables = {}
    run(creating, variables)
    network = variables["network"]
    assert network.classifier.out_features == 10
    network.classifier = folded.classifier  # stands for the training
    x = nets.images(2, 3, 64, 64)
    assert_close(network, folded, x)
    run(saving, variables)
    assert main(folding) == 0
    state = safetensors.torch.load_file("mobilenetv2_edge_tuned.safetensors")
    assert set(state) == set(folded.state_dict())
    tuned = retrofit.fold(timm.create_model("mobilenetv2_100").eval())
    tuned.load_state_dict(state)
    assert_close(tuned, folded, x)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0", "repvit_m0_9", "fastvit_t8"])
def test_merged_branches_do_not_come_back(name):
    assert name.split("_")[0] in SECTIONS["What cannot come back"].lower()
    merged = timm.utils.reparameterize_model(timm.create_model(name)).eval()
    images = [nets.images(2, 3, 64, 64)]
    for folded in (merged, merged.state_dict()):
        with pytest.raises(retrofit.RetrofitError, match=r"where the architecture has|has no"):
            retrofit.restore(timm.create_model(name), folded, images, progress=False)
