"""ONNX files on the command line: as the model, and with BatchNorms written into them."""

import shutil
import sys
import warnings

import nets
import numpy as np
import onnx
import page_blocks
import pytest
import torch
from folders import contents, pictures
from onnx import helper
from onnx_files import HOW, dynamo_knows_batchnorm, export, written
from torch import nn

import retrofit
from retrofit.files.model_sources import build
from retrofit.files.onnx_modules import module_from_onnx
from retrofit.files.onnx_weights import onnx_layers, run_onnx

DATA = ("--data", "pictures", "--workers", "0", "--mean", "0.5", "--std", "0.5")
ROLES = ("weight", "bias", "running_mean", "running_var")


class Padded(nn.Module):
    """More padding on one side, which makes two modules of one node; and a grouped convolution."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, stride=2)
        self.second = nn.Conv2d(4, 6, 3, groups=2)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = torch.relu(self.first(nn.functional.pad(x, (0, 1, 0, 1))))
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


@pytest.fixture
def folder(tmp_path):
    pictures(tmp_path / "pictures", 20)
    return tmp_path


def exported(folder, net=nets.Residual, how="script", shape=(1, 3, 16, 16), **options):
    options.setdefault("input_names", ["images"])
    return export(nets.build(net), nets.images(*shape), folder / "net.onnx", how, **options)


def ops(file, op):
    return [node for node in onnx.load(file).graph.node if node.op_type == op]


@pytest.mark.parametrize("how", ["script", pytest.param("dynamo, whole", marks=pytest.mark.slow)])
@pytest.mark.parametrize("net", [nets.Residual, Padded])
def test_batchnorms_are_written_into_the_file_and_nothing_else_changes(run, folder, net, how):
    file = exported(folder, net, how)
    code, out, err = run("convert", file, *DATA, "--output", "bn.onnx")
    assert (code, err) == (0, []), err
    assert "in onnxruntime      equal bit for bit; where it merges BatchNorms, to " in out
    before, after = onnx.load(file), onnx.load(folder / "bn.onnx")
    onnx.checker.check_model(after, full_check=True)
    norms = {node.input[0]: node for node in after.graph.node if node.op_type[:5] == "Batch"}
    convs = ops(file, "Conv")
    assert len(norms) == len(convs)
    kept = [node for node in after.graph.node if node.op_type[:5] != "Batch"]
    for old, new in zip(before.graph.node, kept, strict=True):
        if old.op_type == "Conv":
            norm = norms[new.output[0]]
            assert norm.output[0] == old.output[0]
            assert norm.name == f"{old.name}_bn"
            new.output[0] = old.output[0]
        assert new == old
    tensors = {tensor.name: tensor for tensor in after.graph.initializer}
    assert all(tensors[t.name].raw_data == t.raw_data for t in before.graph.initializer)
    for field in ("input", "output", "value_info"):
        assert list(getattr(after.graph, field)) == list(getattr(before.graph, field))
    assert list(after.metadata_props) == list(before.metadata_props)
    x = nets.images(5, 3, 16, 16).numpy()
    (one,), (other,) = run_onnx(file, [x]), run_onnx(folder / "bn.onnx", [x])
    assert np.array_equal(one, other)


def test_the_tensors_are_those_of_the_converted_module(run, folder):
    file = exported(folder)
    assert run("convert", file, *DATA, "--output", "bn.onnx")[0] == 0
    assert run("convert", file, *DATA, "--output", "bn.safetensors")[0] == 0
    converted = retrofit.load(folder / "bn.safetensors", module_from_onnx(file))
    layers = [one for one in onnx_layers(folder / "bn.onnx") if one.op == "BatchNormalization"]
    sites = retrofit.plan_of(converted).inserted
    for site, layer, node in zip(sites, layers, ops(folder / "bn.onnx", layers[0].op), strict=True):
        norm = converted.get_submodule(site.norm)
        assert all(torch.equal(layer.tensors[role], getattr(norm, role)) for role in ROLES)
        attributes = {a.name: a.f for a in node.attribute}
        assert attributes == pytest.approx({"epsilon": norm.eps, "momentum": 1 - norm.momentum})


@pytest.mark.parametrize("how", HOW)
def test_a_file_is_the_model_of_the_other_commands(run, folder, how):
    file = exported(folder, how=how).name
    code, out, _ = run("plan", file, "--data", "pictures")
    assert (code, "3 of 3 convolutions get a BatchNorm" in out) == (0, True)
    assert run("convert", file, *DATA, "--output", "bn.safetensors")[0] == 0
    code, out, _ = run("verify", "bn.safetensors", "--model", file, *DATA)
    assert (code, "equal bit for bit on 16 images" in out) == (0, True)
    code, out, _ = run("inspect", "bn.safetensors")
    assert (code, file in out) == (0, True)
    adapt = ("adapt", "bn.safetensors", "--model", file, *DATA, "--output", "fog.safetensors")
    assert run(*adapt)[0] == 0
    code, out, _ = run("fold", "bn.safetensors", "--model", file, "--output", "plain.pth")
    assert (code, out[:21]) == (0, "3 BatchNorms folded, ")
    plain = retrofit.load(folder / "plain.pth", build(file))
    x = nets.images(3, 3, 16, 16)
    assert torch.equal(plain(x), build(file)(x))


def test_a_file_that_differs_is_not_taken_for_random(run, folder):
    file = exported(folder).name
    assert run("convert", file, *DATA, "--output", "bn.safetensors")[0] == 0
    export(nets.build(nets.Residual), nets.images(1, 3, 16, 16), folder / "other.onnx", "script")
    model = onnx.load("other.onnx")
    weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
    changed = 2 * onnx.numpy_helper.to_array(weight)
    weight.CopyFrom(onnx.numpy_helper.from_array(changed, weight.name))
    onnx.save(model, "other.onnx")
    code, _, err = run("verify", "bn.safetensors", "--model", "other.onnx", *DATA)
    assert (code, len(err)) == (1, 1)
    assert "the models differ" in err[0]
    assert "random" not in err[0]


def test_the_file_with_batchnorms_verifies_and_folds_as_well(run, folder):
    file = exported(folder)
    assert run("convert", file, *DATA, "--output", "bn.onnx", "--report", "bn.html")[0] == 0
    assert "net.onnx" in (folder / "bn.html").read_text()
    code, out, _ = run("verify", "bn.onnx", "--model", file, *DATA)
    assert (code, "equal bit for bit on 16 images" in out) == (0, True)
    code, out, _ = run("convert", "bn.onnx", *DATA, "--output", "again.onnx")
    assert (code, "already normalised" in out) == (1, True)


@pytest.mark.parametrize(
    ("exporter", "file"),
    [
        pytest.param("dynamo", "kept.onnx", marks=dynamo_knows_batchnorm),
        pytest.param("script", "kept_too.onnx", marks=pytest.mark.slow),
    ],
)
def test_what_the_documentation_says_keeps_batchnorms_in_an_export(
    folder, monkeypatch, exporter, file
):
    monkeypatch.chdir(folder)
    images = [nets.images(4, 3, 16, 16, seed=seed) for seed in (1, 2)]
    network = retrofit.add_batchnorm(nets.build(nets.Residual), images, progress=False)
    section = page_blocks.section("docs/onnx.md", "Export it with its BatchNorms")
    code = page_blocks.blocks_of(section)[1 if exporter == "dynamo" else 2].code
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one exporter is the older one
        exec(code, {"torch": torch, "network": network, "images": images})  # noqa: S102
    assert len(ops(file, "BatchNormalization")) == 3
    expected = network(images[1]).detach()
    (found,) = run_onnx(file, [images[1].numpy()])
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
    default = export(network, images[0], "default.onnx", exporter)
    assert not ops(default, "BatchNormalization")  # without these arguments there are none


def test_the_documentations_code_in_python(run, folder):
    file = exported(folder)
    assert run("convert", file, *DATA, "--output", "net_bn.safetensors")[0] == 0
    images = [nets.images(4, 3, 16, 16, seed=seed) for seed in (1, 2)]
    blocks = page_blocks.blocks_of(page_blocks.section("docs/onnx.md", "Into PyTorch"))
    loading, _ = (block.code for block in blocks if block.language == "python")
    variables = {}
    exec(loading, variables)  # noqa: S102
    module, network, x = variables["module"], variables["network"], images[0]
    with torch.no_grad():
        assert torch.equal(network(x), module(x))
    network.train()(x).square().mean().backward()
    grads = [parameter.grad for parameter in network.parameters()]
    assert len(grads) == len(list(module.parameters())) + 6
    assert all(grad is not None and grad.isfinite().all() for grad in grads)


def test_weights_that_were_trained_come_back_through_the_file(run, folder):
    file = exported(folder)
    assert run("convert", file, *DATA, "--output", "bn.safetensors")[0] == 0
    network = retrofit.load("bn.safetensors", module_from_onnx(file))
    for parameter in network.parameters():  # stands for the training
        parameter.data *= 1.1
    retrofit.save(retrofit.fold(network), "tuned.pth")
    more = ("--weights", "tuned.pth", "--output", "tuned.safetensors")
    assert run("convert", file, *DATA, *more)[0] == 0
    again = retrofit.load("tuned.safetensors", module_from_onnx(file))
    x = nets.images(2, 3, 16, 16)
    torch.testing.assert_close(again(x), network(x), rtol=1e-4, atol=1e-4)


def test_a_file_with_batchnorms_is_the_class_that_restore_fills(run, folder):
    file = exported(folder, nets.AlreadyNormed, "script, whole")
    folded = retrofit.fold(retrofit.module_from_onnx(file))
    torch.save(folded.state_dict(), folder / "folded.pth")
    code, out, _ = run("restore", "net.onnx", "--weights", "folded.pth", *DATA, "--output", "o.pth")
    assert code == 0
    line = next(line for line in out.splitlines() if "to load: " in line).partition(": ")[2]
    assert line.startswith("network = retrofit.module_from_onnx('net.onnx'); network.load_state")
    scope = {"retrofit": retrofit, "torch": torch}
    exec(line, scope)  # noqa: S102
    x = nets.images(2, 3, 16, 16)
    torch.testing.assert_close(scope["network"].eval()(x), folded(x), rtol=1e-4, atol=1e-5)


def test_linear_layers_activations_and_the_graph_layout_have_nodes_too(run, folder):
    file = exported(folder, nets.Concat)
    more = "--placement post_activation --layout graph --output bn.onnx"
    assert run("convert", file, *DATA, *more.split())[0] == 0
    norms = [node.output[0] for node in ops("bn.onnx", "BatchNormalization")]
    relus = [node.output[0] for node in ops(file, "Relu")]
    assert norms == [relus[0], relus[-1]]  # one is after both of the convolutions between these
    file = exported(folder)
    more = "--include *Gemm* --linear --output linear.onnx"
    assert run("convert", file, *DATA, *more.split())[0] == 0
    (norm,) = ops("linear.onnx", "BatchNormalization")
    assert norm.output[0] == ops(file, "Gemm")[0].output[0]


def grey():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 10 * 18, 2))


def test_size_and_channels_are_those_of_the_input(run, folder):
    file = exported(folder, grey, shape=(1, 1, 12, 20))
    random = np.random.default_rng(0)
    np.save(folder / "grey.npy", random.integers(0, 256, (9, 40, 30), dtype=np.uint8))
    data = "--data grey.npy --workers 0 --mean 0.5 --std 0.2 --output bn.onnx"
    code, out, _ = run("convert", file, *data.split())
    assert (code, "9 grey images" in out) == (0, True), out
    dynamic = exported(folder, dynamic_axes={"images": {0: "n", 2: "h", 3: "w"}})
    assert run("convert", dynamic, *DATA, "--crop", "24", "--output", "open.onnx")[0] == 0


@pytest.mark.parametrize("version", [3, 4])
def test_old_files_that_list_weights_among_the_inputs_stay_so(run, folder, version):
    file = exported(folder, opset_version=11)
    model = onnx.load(file)
    model.ir_version = version
    for tensor in model.graph.initializer:
        value = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        model.graph.input.append(value)
    onnx.save(model, file)
    code, _, err = run("convert", file, *DATA, "--output", "bn.onnx")
    assert (code, err) == (0, [])
    changed = onnx.load("bn.onnx")
    onnx.checker.check_model(changed)
    assert len(changed.graph.input) - len(model.graph.input) == (12 if version == 3 else 0)


def test_a_name_that_is_taken_is_not_used(run, folder):
    file = exported(folder)
    model = onnx.load(file)
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    last = model.graph.node[-1]
    last.name = f"{first.name}_bn"
    onnx.save(model, file)
    assert run("convert", file, *DATA, "--output", "bn.onnx")[0] == 0
    names = [node.name for node in onnx.load("bn.onnx").graph.node]
    assert len(set(names)) == len(names)


def test_a_file_that_differs_in_onnxruntime_is_not_written(run, folder, monkeypatch):
    file = exported(folder)

    def changed(path, _converted):
        model = onnx.load(path)
        next(n for n in model.graph.node if n.op_type == "Relu").op_type = "Tanh"
        return model.SerializeToString()

    monkeypatch.setattr("retrofit.cli.convert.with_batchnorms", changed)
    before = contents(folder)
    code, _, err = run("convert", file, *DATA, "--output", "bn.onnx")
    assert code == 1
    assert err[-1].startswith("retrofit: in onnxruntime an output differs by ")
    assert err[-1].endswith(" of its root mean square: nothing was written")
    assert contents(folder) == before


WEIGHT = "<float[2, 3, 1, 1] w = {1, 2, 3, 4, 5, 6}>"
CONV = f"g (float[N, 3, 16, 16] x) => (float[N, 2, 16, 16] y) {WEIGHT} {{ y = Conv (x, w) }}"
FILES = {
    "old": (CONV, {"opset": 6}),
    "two": ("""g (float[N, 3, 16, 16] x, float[N, 3, 16, 16] z) => (float[N, 3, 16, 16] y)
        { y = Add (x, z) }""", {}),
    "half": (CONV.replace("float[", "float16["), {}),
    "last": (f"""g (float[N, 16, 16, 3] x) => (float[N, 2, 16, 16] y) {WEIGHT}
        {{ t = Transpose <perm = [0, 3, 1, 2]> (x) y = Conv (t, w) }}""", {}),
    "function": (f"""g (float[N, 3, 16, 16] x) => (float[N, 2, 16, 16] y) {WEIGHT}
        {{ y = own.Block (x, w) }} <domain: "own", opset_import: ["" : 17]>
        Block (a, b) => (d) {{ c = Conv (a, b) d = Relu (c) }}""", {"domain": "own"}),
    "quantised": ("""g (float[N, 3, 16, 16] x) => (float[N, 1, 16, 16] y)
        <int8[1, 3, 1, 1] q = {2, 3, 4}, float scale = {0.5}>
        { w = DequantizeLinear (q, scale) y = Conv (x, w) }""", {}),
    "unknown": (CONV.replace("Conv (x, w)", "ms.Special (x)"), {"domain": "ms"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """Files that are no model for the command line, and one that is."""
    folder = tmp_path_factory.mktemp("kit")
    pictures(folder / "pictures", 20)
    for name, (text, options) in FILES.items():
        written(folder / f"{name}.onnx", text, **options)
    (folder / "text.onnx").write_text("hello\n")
    exported(folder)
    export(nets.build(nets.Residual), nets.images(1, 3, 16, 16), folder / "apart.onnx", "dynamo")
    (folder / "apart.onnx.data").unlink()
    (folder / "there.onnx").write_text("precious")
    return folder


INTO = "--data pictures --workers 0 --output out.onnx"
ALL = "--include *"
CASES = [
    ("plan none.onnx", "there is no file none.onnx"),
    ("plan text.onnx", "text.onnx is no ONNX file, or damaged"),
    ("plan apart.onnx", "apart.onnx keeps its weights in apart.onnx.data, which is not beside it"),
    ("plan quantised.onnx", "quantised.onnx: its weights are quantised: take the file from before"),
    ("plan unknown.onnx", "it has no Special; convert the network that was exported instead, or"),
    (f"convert old.onnx {ALL} {INTO}",
     "old.onnx is of opset 6, and BatchNorms are written from 7 on: pass it through onnx.version"),
    (f"convert function.onnx {ALL} {INTO}", "of function.onnx lies in a function, and ONNX has no"),
    (f"convert two.onnx {INTO}", "takes x ('?', 3, 16, 16), z ('?', 3, 16, 16), and pictures"),
    (f"convert half.onnx {INTO}", "pictures are one input of float32 (N, C, H"),
    (f"convert last.onnx {INTO}", "last.onnx takes x ('?', 16, 16, 3), and pictures are"),
    (f"convert net.onnx {INTO} --weights w.pth", "out.onnx would have the weights of net.onnx, no"),
    (f"convert net.onnx {INTO} --output out.pth --weights DEFAULT", "net.onnx has its own weights"),
    (f"convert net.onnx {INTO} --output out.pth --weights net.onnx", "is an ONNX file, and no fil"),
    (f"convert net.onnx {INTO} --output there.onnx", "there.onnx exists: choose another name, or"),
    (f"convert net.onnx {INTO} --output out.pb", "must end in .safetensors, .pth, .pt or .onnx"),
    (f"convert net.onnx {INTO} --crop 9", "not (8, 3, 9, 9): give it what has that size, on"),
    (f"convert alexnet --weights DEFAULT {INTO}",
     ".pt: for ONNX, load that in Python and torch.onnx.export(model, images, path, dynamo=True,"),
    ("fold net.onnx --output out.pth", "net.onnx is an ONNX file, and no file of weights"),
    ("inspect net.onnx", "it can be the MODEL of plan and convert, or --model of the other comman"),
    ("verify net.onnx --data pictures", "net.onnx does not say what model it is: give --model"),
    ("fold bn.safetensors --output out.onnx", ".pt: for ONNX, load that in Python and torch.onnx"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), CASES, ids=[words for words, _ in CASES])
def test_a_bad_request_is_one_line_and_writes_nothing(
    run, kit, tmp_path, monkeypatch, words, message
):
    folder = shutil.copytree(kit, tmp_path / "kit")
    monkeypatch.chdir(folder)
    before = contents(folder)
    code, _, err = run(*words.split())
    assert (code, len(err)) == (2, 1), err
    assert err[0].startswith("retrofit: ")
    assert message in err[0]
    assert contents(folder) == before


def test_a_missing_package_is_named_with_its_extra(run, kit, monkeypatch):
    for name in ("onnx2torch", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
        code, _, err = run("plan", kit / "net.onnx")
        needed = f"{name} is needed for ONNX files: pip install 'batchnorm-retrofit[onnx]'"
        assert (code, err) == (2, [f"retrofit: {needed}"])
        monkeypatch.undo()
