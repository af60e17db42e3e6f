"""restore: a file of ONNX, whatever exporter wrote it, comes back in its own class."""

import nets
import pytest
import torch
import torchvision
from normed_networks import trained
from torch import nn

import retrofit
from retrofit import RetrofitError

X = nets.images(4, 3, 64, 64)
pytestmark = [
    pytest.mark.filterwarnings("ignore:the statistics of:UserWarning"),
    pytest.mark.filterwarnings("ignore:You are using the legacy:DeprecationWarning"),
]


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_onnx_files_of_both_exporters(dynamo, named, tmp_path):
    make = torchvision.models.mobilenet_v3_small
    torch.manual_seed(0)
    model = trained(make())
    source = retrofit.fold(model) if named else model  # which the exporter folds and renames
    path = tmp_path / "folded.onnx"
    options = {"dynamo": True} if dynamo else {"dynamo": False, "input_names": ["x"]}
    torch.onnx.export(source, (X,), path, verbose=False, **options)
    result = retrofit.restore(make().eval(), path, [X], progress=False)
    make().load_state_dict(result.state_dict(), strict=True)
    with torch.no_grad():
        expected = model(X)
        assert (result(X) - expected).abs().max() < 5e-6 * expected.abs().max()
    with pytest.raises(RetrofitError, match="neither by names nor layer by layer"):
        retrofit.restore(torchvision.models.resnet18().eval(), path, [X], progress=False)


@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_file_of_16_bits_is_restored_in_32(dynamo, tmp_path):
    def make():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Hardswish(), nn.Conv2d(6, 4, 3),
            nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 25, 5),
        ).eval()  # fmt: skip

    x = nets.images(32, 3, 9, 9)
    folded = retrofit.fold(trained(make())).half()
    named = {} if dynamo else {"dynamic_axes": {"x": {0: "n"}}, "input_names": ["x"]}
    file = tmp_path / "half.onnx"
    torch.onnx.export(folded, (x[:2].half(),), file, dynamo=dynamo, verbose=False, **named)
    result = retrofit.restore(make(), file, [x], progress=False)
    with torch.no_grad():
        expected = folded.float()(x)
        assert (result(x) - expected).abs().max() < 5e-6 * expected.abs().max()
