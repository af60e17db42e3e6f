"""What becomes of an ONNX file in torch computes what onnxruntime does; BatchNorms go back in."""

import nets
import onnx
import pytest
import torch
from onnx_files import HOW, export, written
from torch import nn

import retrofit
from retrofit.errors import RetrofitError
from retrofit.files.onnx_batchnorms import agreement, with_batchnorms
from retrofit.files.onnx_modules import module_from_onnx
from retrofit.files.onnx_weights import run_onnx

MORE = [nets.Residual, nets.Concat, nets.Grouped, nets.transposed, nets.subclassed]


class Shuffled(nn.Module):
    """Channels shuffled by two reshapes, which an export with a fixed batch size writes down."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3)
        self.second = nn.Conv2d(6, 4, 1, groups=2)
        self.head = nn.Linear(4 * 36, 3)

    def forward(self, x):
        x = torch.relu(self.first(x))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(torch.relu(self.second(x)).view(n, -1))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    "net", [Shuffled, *(pytest.param(n, marks=pytest.mark.slow) for n in MORE)]
)
def test_the_module_computes_what_was_exported_at_any_batch_size(tmp_path, net, how):
    model = nets.build(net)
    file = export(model, nets.images(1, 3, 8, 8), tmp_path / "net.onnx", how)
    module = module_from_onnx(file)
    assert not module.training
    for count in (1, 5):
        x = nets.images(count, 3, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(module(x), model(x), rtol=1e-4, atol=1e-4)
    sites = [site for site in retrofit.plan(model).sites for _ in range(site.calls)]
    assert len(retrofit.plan(module, example=x).sites) == len(sites)


@pytest.mark.parametrize(("net", "shape"), [(nets.Audio, (3, 40)), (nets.Volume, (2, 9, 9, 9))])
@pytest.mark.parametrize("how", ["dynamo", "script"])
def test_batchnorms_of_one_and_three_axes_become_nodes(tmp_path, net, shape, how):
    model = nets.build(net)
    file = export(model, nets.images(2, *shape), tmp_path / "net.onnx", how)
    images = [nets.images(4, *shape, seed=seed) for seed in (1, 2)]
    converted = retrofit.add_batchnorm(module_from_onnx(file), images, progress=False)
    content = with_batchnorms(file, converted)
    ops = [node.op_type for node in onnx.load_from_string(content).graph.node]
    assert ops.count("BatchNormalization") == 2
    found = agreement(file, content, [(batch,) for batch in images])
    assert (found.exact, found.relative) == (True, 0)
    assert found.optimised < 1e-5
    (new,), (old,) = (run_onnx(source, [images[0].numpy()]) for source in (content, file))
    assert (new == old).all()


def test_a_changed_batchnorm_is_found_in_onnxruntime(tmp_path):
    file = export(nets.build(nets.Residual), nets.images(1, 3, 8, 8), tmp_path / "net.onnx")
    images = [nets.images(4, 3, 8, 8)]
    converted = retrofit.add_batchnorm(module_from_onnx(file), images, progress=False)
    norm = converted.get_submodule(retrofit.plan_of(converted).inserted[0].norm)
    norm.bias.data += 0.1
    found = agreement(file, with_batchnorms(file, converted), [(batch,) for batch in images])
    assert not found.exact
    assert found.relative > 1e-3
    assert found.optimised > 1e-3


class Tokens(nn.Module):
    """A token beside the pixels, as in a vision transformer: one for each picture of the batch."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.token = nn.Parameter(torch.randn(1, 4, 1))

    def forward(self, x):
        x = torch.relu(self.conv(x)).flatten(2)
        return torch.cat([self.token.expand(len(x), -1, -1), x], 2)


class Compared(nn.Module):
    """Pictures less the mean of the batch."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return torch.relu(self.conv(x - x.mean(0)))


@pytest.mark.parametrize("net", [Tokens, Compared])
def test_a_batch_size_that_cannot_be_another_is_refused(tmp_path, net):
    file = export(nets.build(net), nets.images(2, 3, 8, 8), tmp_path / "net.onnx")
    message = r"net\.onnx does not compute what onnxruntime does: .* batch size is fixed at 2"
    with pytest.raises(RetrofitError, match=message):
        module_from_onnx(file)


class BestOf(nn.Module):
    """The largest values, of a node that gives their places as well."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return torch.relu(self.conv(x)).flatten(1).topk(5)[0]


def test_other_outputs_than_those_of_the_file_are_refused_whatever_the_batch_size(tmp_path):
    file = export(nets.build(BestOf), nets.images(1, 3, 8, 8), tmp_path / "net.onnx")
    message = r"does: outputs of \(3, 5\), \(3, 5\) in place of \(3, 5\)$"
    with pytest.raises(RetrofitError, match=message):
        module_from_onnx(file)


UNREADABLE = {
    "it has no GridSample": """g (float[N, 1, 4, 4] x, float[N, 4, 4, 2] grid) =>
        (float[N, 1, 4, 4] y) { y = GridSample (x, grid) }""",
    "it has no RandomNormal": """g (float[N, 1, 4, 4] x) => (float[N, 1, 4, 4] y)
        { w = RandomNormal <shape = [1, 1, 1, 1]> () y = Conv (x, w) }""",
    "its weights are quantised": """g (float[N, 1, 4, 4] x) => (float[N, 1, 4, 4] y)
        <int8[1, 1, 1, 1] q = {2}, float scale = {0.5}>
        { w = DequantizeLinear (q, scale) y = Conv (x, w) }""",
}


@pytest.mark.parametrize("message", UNREADABLE)
def test_what_cannot_be_a_module_is_refused_with_the_reason(tmp_path, message):
    file = written(tmp_path / "net.onnx", UNREADABLE[message])
    with pytest.raises(RetrofitError, match=message):
        module_from_onnx(file)
