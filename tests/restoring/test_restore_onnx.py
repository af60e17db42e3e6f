"""restore: a file of ONNX, whatever exporter wrote it, comes back in its own class."""

import nets
import pytest
import torch
import torchvision
from normed_networks import trained

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
