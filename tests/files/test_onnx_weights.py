"""The layers of an ONNX file are those of the network that was exported."""

import sys

import nets
import numpy as np
import onnx
import pytest
import torch
from onnx_files import HOW, dynamo_knows_batchnorm, export, written
from torch import nn

from retrofit.errors import RetrofitError
from retrofit.files.onnx_weights import onnx_layers, onnx_state_dict, run_onnx

OPS = {
    nn.Conv2d: "Conv",
    nn.ConvTranspose2d: "ConvTranspose",
    nn.PReLU: "PRelu",
    nn.InstanceNorm2d: "InstanceNormalization",
    nn.LayerNorm: "LayerNormalization",
}


class EachKind(nn.Module):
    """Layers of each kind in the order of their calls, with numbers of their own."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, bias=False)
        self.slopes = nn.PReLU(6)
        self.grouped = nn.Conv2d(6, 4, 3, groups=2)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.instance = nn.InstanceNorm2d(4, affine=True)
        self.group = nn.GroupNorm(2, 4)  # which is taken apart, and has no node of its own
        self.norm = nn.LayerNorm(4)
        self.last_axis = nn.Linear(4, 5)
        self.flat = nn.Linear(5, 7)
        self.unbiased = nn.Linear(7, 3, bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x):
        x = self.grouped(self.slopes(self.conv(x)))
        x = self.group(self.instance(self.up(x)))
        x = self.last_axis(self.norm(x.permute(0, 2, 3, 1)))
        return self.unbiased(self.flat(x.mean((1, 2))))


@pytest.mark.parametrize("how", HOW)
def test_all_layers_are_found_in_order_with_their_tensors(tmp_path, how):
    model = nets.build(EachKind)
    x = nets.images(2, 3, 12, 12)
    file = export(model, x, tmp_path / "net.onnx", how)
    layers = onnx_layers(file)
    modules = [module for module in model.children() if module is not model.group]
    assert len(layers) == len(modules)
    for layer, module in zip(layers, modules, strict=True):
        assert layer.op in (OPS.get(type(module)), "Gemm", "MatMul")
        assert layer.tensors.keys() == dict(module.named_parameters()).keys()
        for name, parameter in module.named_parameters():
            assert torch.equal(layer.tensors[name], parameter), (layer, name)
    expected = model(x).detach().numpy()
    np.testing.assert_allclose(run_onnx(file, [x.numpy()])[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "how", [pytest.param("dynamo, whole", marks=dynamo_knows_batchnorm), "script, whole"]
)
def test_names_are_those_of_the_network_where_the_exporter_keeps_them(tmp_path, how):
    model = nets.build(nets.AlreadyNormed)
    file = export(model, nets.images(2, 3, 16, 16), tmp_path / "net.onnx", how)
    layers, state = onnx_layers(file), onnx_state_dict(file)
    assert [layer.op for layer in layers][:2] == ["Conv", "BatchNormalization"]
    own = {key: tensor for key, tensor in model.state_dict().items() if "num_batches" not in key}
    named = {name: layer.tensors[role] for layer in layers for role, name in layer.names.items()}
    # Equal ones, such as a fresh BatchNorm's ones, are stored once; names of this kind are kept.
    assert all(torch.equal(tensor, own[name]) for name, tensor in named.items())
    assert all(torch.equal(state[name], own[name]) for name in named)
    assert {"batch.weight", "group.bias", "free.weight"} <= named.keys()


def test_one_tensor_of_several_names_is_under_each_of_them(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)).eval()
    for conv in model:
        nn.init.constant_(conv.bias, 0.5)
    file = export(model, nets.images(1, 3, 5, 5), tmp_path / "net.onnx")
    stored = [tensor.name for tensor in onnx.load(file).graph.initializer]
    assert len(stored) == 4
    assert onnx_state_dict(file).keys() == model.state_dict().keys()
    assert [layer.names["bias"] for layer in onnx_layers(file)] == ["0.bias", "1.bias", "2.bias"]


def test_merged_weights_are_found_under_the_names_that_the_exporter_gave(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).eval()
    file = export(model, nets.images(1, 3, 8, 8), tmp_path / "net.onnx")
    (layer,) = onnx_layers(file)
    assert all(name.startswith("onnx::Conv_") for name in layer.names.values())
    merged = torch.nn.utils.fuse_conv_bn_eval(model[0], model[1])
    torch.testing.assert_close(layer.tensors["weight"], merged.weight.detach())
    state = onnx_state_dict(file)
    assert all(state[layer.names[role]].equal(t) for role, t in layer.tensors.items())


CONSTANTS = """g (float[N, 2] x) => (float[N, 2] y)
<float[2, 2] w = {1, 2, 3, 4}, float[2] b = {5, 6}>
{
   two = Constant <value = float[2, 2] {9, 8, 7, 6}> ()
   three = Identity (w)
   four = Transpose <perm = [1, 0]> (w)
   a = MatMul (x, two)
   c = Gemm <transB = 1> (a, three, b)
   d = MatMul (c, four)
   e = Add (b, d)
   y = Gemm <alpha = 2.0, beta = 3.0> (d, w, b)
}"""


def test_constants_identities_and_products_are_read_as_linear_layers(tmp_path):
    first, second, third, fourth = onnx_layers(written(tmp_path / "net.onnx", CONSTANTS))
    w, b = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([5.0, 6])
    assert first.tensors["weight"].equal(torch.tensor([[9.0, 7], [8, 6]]))
    assert first.names == {"weight": "two"}
    assert second.tensors["weight"].equal(w)
    assert second.names == {"weight": "three", "bias": "b"}
    assert third.tensors.keys() == {"weight"}  # d is read twice: that Add is no bias
    assert third.tensors["weight"].equal(w)
    assert fourth.tensors["weight"].equal(2 * w.T)
    assert fourth.tensors["bias"].equal(3 * b)


NO_LAYERS = """g (float[2, 2] x) => (float[N, 2, 2] y)
<float[2, 2] w = {1, 2, 3, 4}, float[1, 2, 2] batches = {1, 2, 3, 4}>
{
   a = MatMul (x, w)
   b = Add (a, x)
   c = Gemm <transA = 1> (b, w)
   y = MatMul (c, batches)
}"""


def test_products_that_are_no_linear_layers_are_none(tmp_path):
    (only,) = onnx_layers(written(tmp_path / "net.onnx", NO_LAYERS))
    assert only.name == "a"
    assert only.tensors.keys() == {"weight"}  # what is added depends on the input


FUNCTION = """g (float[N, 1, 4, 4] x) => (float[N, 1, 4, 4] y) <float[1, 1, 1, 1] w = {2}>
{ y = own.Block (x, w) }
<domain: "own", opset_import: ["" : 17]>
Block (a, b) => (d) { c = Conv (a, b)  d = Relu (c) }"""


def test_layers_in_the_functions_of_a_file_are_found(tmp_path):
    (layer,) = onnx_layers(written(tmp_path / "net.onnx", FUNCTION, domain="own"))
    assert (layer.op, layer.names) == ("Conv", {"weight": "w"})
    assert layer.tensors["weight"].item() == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_kept(tmp_path, dtype):
    model = nets.build(nets.root_sequential).to(dtype)
    file = export(model, nets.images(1, 3, 16, 16).to(dtype), tmp_path / "net.onnx")
    for layer, conv in zip(onnx_layers(file), (model[0], model[2]), strict=True):
        assert layer.tensors["weight"].dtype == dtype
        assert layer.tensors["weight"].equal(conv.weight)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_fixed_batch_size_is_fed_as_it_asks(tmp_path, count):
    model = nets.build(nets.Residual)
    file = export(model, nets.images(2, 3, 8, 8), tmp_path / "net.onnx")
    x = nets.images(count, 3, 8, 8)
    (found,) = run_onnx(file, [x.numpy()])
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_what_onnxruntime_cannot_run_is_said_with_its_reason(tmp_path):
    mean = "g (float[2, 3] x) => (float y) { y = ReduceMean <keepdims = 0> (x) }"
    file, x = written(tmp_path / "mean.onnx", mean), np.arange(9, dtype=np.float32).reshape(3, 3)
    assert run_onnx(file, [x[:2]]) == [2.5]
    with pytest.raises(RetrofitError, match="a fixed batch size of 2, and an output without that"):
        run_onnx(file, [x])
    fixed = "g (float[N, 3] x) => (float[M, 6] y) <int64[2] to = {1, 6}> { y = Reshape (x, to) }"
    file = written(tmp_path / "fixed.onnx", fixed)
    assert run_onnx(file, [x[:2]])[0].shape == (1, 6)
    with pytest.raises(RetrofitError, match=r"onnxruntime cannot run .*fixed\.onnx: .*reshaped"):
        run_onnx(file, [x])


CONV = "float[N, 1, 4, 4] x) => (float[N, 1, 4, 4] y) <float[1, 1, 1, 1] w = {2}"
SCALES = "uint8 zero = {0}, float scale = {1}"
REFUSED = {
    "QLinearConv y is quantised": f"""g (uint8[N, 1, 4, 4] x) => (uint8[N, 1, 4, 4] y)
        <{SCALES}, uint8[1, 1, 1, 1] w = {{2}}>
        {{ y = QLinearConv (x, scale, zero, w, scale, zero, scale, zero) }}""",
    "ConvInteger y is quantised": """g (uint8[N, 1, 4, 4] x) => (int32[N, 1, 4, 4] y)
        <uint8[1, 1, 1, 1] w = {2}> { y = ConvInteger (x, w) }""",
    "Conv y: its weights are quantised": """g (float[N, 1, 4, 4] x) => (float[N, 1, 4, 4] y)
        <int8[1, 1, 1, 1] q = {2}, float scale = {0.5}>
        { w = DequantizeLinear (q, scale) y = Conv (x, w) }""",
    "FusedConv y was made by onnxruntime's optimiser": f"g ({CONV}> {{ y = ms.FusedConv (x, w) }}",
    "If y has layers in its branches (Conv)": f"""g (bool b, {CONV}>
        {{ y = If (b) <then_branch = t () => (float[N, 1, 4, 4] z) {{ z = Conv (x, w) }},
                       else_branch = e () => (float[N, 1, 4, 4] z) {{ z = Identity (x) }}> }}""",
    "Conv y: its constants cannot be computed (Special v): NotImplementedError": f"""g ({CONV}>
        {{ v = ms.Special (w) y = Conv (x, v) }}""",
    "Conv y takes its weight as an input": """g (float[N, 1, 4, 4] x, float[1, 1, 1, 1] w) =>
        (float[N, 1, 4, 4] y) { y = Conv (x, w) }""",
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_weights_that_are_none_of_torchs_are_refused_with_the_node(tmp_path, message):
    file = written(tmp_path / "net.onnx", REFUSED[message], domain="ms")
    with pytest.raises(RetrofitError) as error:
        onnx_layers(file)
    assert str(error.value).startswith(f"{file}: {message}")


def test_numbers_that_torch_has_no_type_for_are_named(tmp_path):
    four_bits = "g (float[N] x) => (float[N] y) <int4[2] q = {1, 2}> { y = Identity (x) }"
    file = written(tmp_path / "net.onnx", four_bits, opset=21)
    with pytest.raises(RetrofitError, match=r"net\.onnx: q holds int4: take a file of floats"):
        onnx_state_dict(file)


def test_a_file_that_is_no_onnx_file_is_refused(tmp_path):
    whole = export(nets.build(nets.Residual), nets.images(1, 3, 8, 8), tmp_path / "whole.onnx")
    contents = {"empty": b"", "text": b"hello\n", "cut": whole.read_bytes()[:500]}
    for name, content in contents.items():
        file = tmp_path / f"{name}.onnx"
        file.write_bytes(content)
        for read in (onnx_layers, onnx_state_dict):
            with pytest.raises(RetrofitError, match=f"{name}.onnx is no ONNX file, or damaged"):
                read(file)
    with pytest.raises(RetrofitError, match=r"there is no file .*none\.onnx"):
        onnx_layers(tmp_path / "none.onnx")
    with pytest.raises(RetrofitError, match="Is a directory"):
        onnx_layers(tmp_path)
    with pytest.raises(RetrofitError, match=r"onnxruntime cannot load .*text\.onnx"):
        run_onnx(tmp_path / "text.onnx", [])


@pytest.mark.parametrize("fault", ["missing", "cut"])
def test_weights_that_are_kept_elsewhere_have_to_be_there(tmp_path, fault):
    file = export(nets.build(nets.Residual), nets.images(1, 3, 8, 8), tmp_path / "a.onnx", "dynamo")
    data = tmp_path / "a.onnx.data"
    if fault == "missing":
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:50])
    with pytest.raises(RetrofitError, match=r"a\.onnx keeps its weights in a\.onnx\.data, which"):
        onnx_layers(file)


@pytest.mark.parametrize("place", ["../a.onnx.data", "{}/a.onnx.data"])
def test_weights_are_read_from_the_files_own_folder_alone(tmp_path, place):
    (tmp_path / "inner").mkdir()
    file = export(nets.build(nets.Residual), nets.images(1, 3, 8, 8), tmp_path / "a.onnx", "dynamo")
    model = onnx.load(file, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = place.format(tmp_path)
    onnx.save(model, tmp_path / "inner" / "a.onnx")
    for read in (onnx_layers, onnx_state_dict):
        with pytest.raises(
            RetrofitError, match=r"inner/a\.onnx keeps its weights in .*a\.onnx\.data"
        ):
            read(tmp_path / "inner" / "a.onnx")


def test_inputs_that_do_not_fit_are_refused_by_name(tmp_path):
    file = export(nets.build(nets.Residual), nets.images(2, 3, 8, 8), tmp_path / "net.onnx",
                  input_names=["images"])  # fmt: skip
    with pytest.raises(RetrofitError, match=r"takes 1 inputs \(images\), not 0"):
        run_onnx(file, [])
    with pytest.raises(
        RetrofitError, match=r"takes images of shape \(N, .*, not .*give it what has"
    ):
        run_onnx(file, [np.zeros((2, 4, 8, 8), np.float32)])


def test_a_package_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    message = r"^onnx is needed for ONNX files: pip install 'batchnorm-retrofit\[onnx\]'$"
    with pytest.raises(RetrofitError, match=message):
        onnx_layers(tmp_path / "net.onnx")
