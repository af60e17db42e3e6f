"""What torch.export made: its convolutions are aten's functions, which the graph layout follows."""

import nets
import pytest
import torch
import torch.nn.functional as F
from normed_networks import trained
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

import retrofit
from retrofit import RetrofitError

X = nets.images(4, 3, 12, 12)


class Exported(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.ReLU())
        self.up, self.head = nn.ConvTranspose2d(8, 6, 2, groups=2), nn.Linear(6, 3)

    def forward(self, x):
        x = self.body(F.relu(self.norm(self.stem(x))))
        return self.head(F.relu(self.up(x)).mean((2, 3)))


def exported(*, decomposed, dynamic):
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},) if dynamic else None
    program = torch.export.export(nets.build(Exported), (X,), dynamic_shapes=shapes)
    return (program.run_decompositions() if decomposed else program).module()


@pytest.mark.parametrize("decomposed", [False, True], ids=["aten", "core aten"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["one batch size", "any batch size"])
def test_an_exported_program_is_converted_as_a_graph(decomposed, dynamic, tmp_path):
    model = exported(decomposed=decomposed, dynamic=dynamic)
    plan = retrofit.plan(model, layout="graph", example=X)
    assert [(s.kind, s.channels, s.decision, s.reason) for s in plan.sites] == [
        ("conv2d", 8, "skip", "already normalised by batchnorm"),
        ("conv2d", 8, "insert", "no norm follows"),
        ("convtranspose2d", 6, "insert", "no norm follows"),
    ]
    converted = retrofit.add_batchnorm(model, [X], layout="graph", progress=False)
    assert torch.equal(converted(X), model(X))
    assert retrofit.verify(model, converted, [X]).exact
    folded = retrofit.fold(converted).state_dict()
    assert all(torch.equal(folded[key], value) for key, value in model.state_dict().items())
    retrofit.save(converted, tmp_path / "exported.safetensors")
    assert torch.equal(retrofit.load(tmp_path / "exported.safetensors", model)(X), model(X))

    for norm in (m for m in converted.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.train()
    converted(X).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in converted.parameters())


@pytest.mark.parametrize("decomposed", [False, True], ids=["aten", "core aten"])
def test_a_trained_exported_program_is_folded(decomposed):
    model = exported(decomposed=decomposed, dynamic=False)
    converted = trained(retrofit.add_batchnorm(model, [X], layout="graph", progress=False))
    folded = retrofit.fold(converted)
    with torch.no_grad():
        assert not torch.allclose(converted(X), model(X), atol=1e-3)
        torch.testing.assert_close(folded(X), converted(X), rtol=1e-4, atol=1e-5)
    weight, bias = (converted.get_parameter(f"body.0.{name}") for name in ("weight", "bias"))
    norm = converted.get_submodule(retrofit.plan_of(converted).inserted[0].norm)
    statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    expected = fuse_conv_bn_weights(weight, bias, *statistics)
    for name, tensor in zip(("weight", "bias"), expected, strict=True):
        torch.testing.assert_close(folded.get_parameter(f"body.0.{name}"), tensor)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs, self.head = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Linear(4, 2)

    def forward(self, pixels, scale):
        return self.head((self.convs(pixels) * scale[:, None, None, None]).mean((2, 3)))


class OfOneDict(Scaled):
    def forward(self, batch):
        return super().forward(batch["pixels"], batch["scale"])


PAIR = {"pixels": X, "scale": torch.ones(4)}
WAYS = {
    "by place": (Scaled, tuple(PAIR.values()), {}),
    "by name": (Scaled, (), PAIR),
    "either way": (Scaled, (X,), {"scale": PAIR["scale"]}),
    "one dict": (OfOneDict, (PAIR,), {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_exported_program_gets_its_inputs_as_the_export_had_them(way):
    net, args, kwargs = WAYS[way]
    model = torch.export.export(nets.build(net), args, kwargs).module()
    batches = [PAIR] if net is OfOneDict else [PAIR, tuple(PAIR.values())]
    for batch in batches:
        converted = retrofit.add_batchnorm(model, [batch], layout="graph", progress=False)
        assert torch.equal(converted(*args, **kwargs), model(*args, **kwargs))
        assert any(isinstance(m, nn.BatchNorm2d) for m in converted.modules())


def test_in_the_native_layout_an_exported_program_is_told_the_way_out():
    model = exported(decomposed=False, dynamic=True)
    reasons = {site.reason for site in retrofit.plan(model).sites[1:]}
    assert reasons == {"a function: only layout='graph' has a place after it"}
    with pytest.warns(UserWarning, match=r"no BatchNorm is added .* only layout='graph'"):
        retrofit.insert(model)


def test_a_program_that_is_no_module_is_told_so():
    program = torch.export.export(nets.build(Exported), (X,))
    with pytest.raises(RetrofitError, match=r"not a ExportedProgram .* pass the module inside"):
        retrofit.plan(program)
