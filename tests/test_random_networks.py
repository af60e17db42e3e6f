"""Any network: drawn at random, converted, compared, folded."""

import copy
from itertools import pairwise

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import retrofit

ACTIVATIONS = [
    nn.ReLU,
    lambda: nn.ReLU(inplace=True),
    nn.SiLU,
    nn.Sigmoid,
    lambda: nn.LeakyReLU(0.2, inplace=True),
    nn.Identity,
]


class Block(nn.Module):
    """Two branches over one input, joined; `style` says how."""

    def __init__(self, left, right, style):
        super().__init__()
        self.left, self.right, self.style = left, right, style

    def forward(self, x):
        left, right = self.left(x), self.right(x)
        if self.style == "sum":
            return F.relu(left + right)
        if self.style == "gate":
            return left * torch.sigmoid(right)
        return torch.cat([left, right], 1)


class Indexed(nn.Module):
    """A Sequential called child by child."""

    def __init__(self, *children):
        super().__init__()
        self.layers = nn.ModuleList(children)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@st.composite
def convolution(draw, dims, inputs, outputs):
    """A convolution that keeps the size of its input."""
    common = [g for g in range(1, inputs + 1) if inputs % g == 0 and outputs % g == 0]
    groups = draw(st.sampled_from(common))
    bias = draw(st.booleans())
    kernel = draw(st.sampled_from([1, 3]))
    dilation = draw(st.sampled_from([1, 2]))
    padding = dilation * (kernel // 2)
    if draw(st.booleans()):
        mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        mode = mode if dims < 3 or mode != "reflect" else "zeros"
        return kind(
            inputs, outputs, kernel, padding=padding, dilation=dilation, groups=groups, bias=bias,
            padding_mode=mode,
        )  # fmt: skip
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    return kind(
        inputs, outputs, kernel, padding=padding, dilation=dilation, groups=groups, bias=bias
    )


@st.composite
def layers(draw, dims, inputs, outputs, depth):
    kinds = ["conv", "norm", "chain", "shared"]
    kinds += ["sum", "gate"] + (["cat"] if outputs > 1 else []) if depth else []
    kind = draw(st.sampled_from(kinds))
    activation = draw(st.sampled_from(ACTIVATIONS))()
    if kind in ("sum", "gate", "cat"):
        split = outputs // 2 if kind == "cat" else outputs
        rest = outputs - split if kind == "cat" else outputs
        left = draw(layers(dims, inputs, split, depth - 1))
        return Block(left, draw(layers(dims, inputs, rest, depth - 1)), kind)
    if kind == "shared":
        conv = draw(convolution(dims, outputs, outputs))
        first = draw(convolution(dims, inputs, outputs))
        return nn.Sequential(first, activation, conv, nn.ReLU(), conv, nn.Tanh())
    conv = draw(convolution(dims, inputs, outputs))
    if kind == "norm":
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](outputs)
        return nn.Sequential(conv, norm, activation)
    container = draw(st.sampled_from([nn.Sequential, Indexed]))
    return container(conv, activation)


@st.composite
def networks(draw):
    """(network in eval mode, shape of one input)."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dims = draw(st.integers(1, 3))
    widths = [draw(st.integers(1, 6)) for _ in range(draw(st.integers(2, 5)))]
    body = [draw(layers(dims, a, b, depth=2)) for a, b in pairwise(widths)]
    if draw(st.booleans()):
        body += [nn.Flatten(), nn.LazyLinear(3)]
    else:
        body += [nn.ReLU()]
    model = nn.Sequential(*body)
    shape = (widths[0], *([7, 6, 5][:dims]))
    model(torch.randn(2, *shape))  # shapes for the lazy layer
    return model.eval(), shape


class Looking(nn.Sequential):
    """torch.fx cannot follow what looks at its input."""

    def forward(self, x):
        return super().forward(x) if x.sum() < 1e9 else x


OPTIONS = [
    {"renumber": None},
    {"renumber": ""},
    {"linear": True},
    {"placement": "post_activation"},
    {"layout": "graph"},
    {"layout": "graph", "placement": "post_activation", "linear": True},
]


@settings(max_examples=90, deadline=None, suppress_health_check=list(HealthCheck))
@given(networks(), st.sampled_from(OPTIONS), st.booleans(), st.booleans())
def test_any_network_converts_exactly_and_back(drawn, options, training, traceable):
    model, shape = drawn
    native = "layout" not in options
    if not traceable and native and options.get("renumber") is None:
        model = Looking(*model)
    model.train(training)
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    torch.manual_seed(1)
    data = [torch.randn(5, *shape), torch.randn(3, *shape)]

    plan = retrofit.plan(model, example_inputs=data[0], **options)
    assert len({site.path for site in plan.sites}) == len(plan.sites)
    # A graph knows a shared layer by one of its names.
    assert plan.key_map.keys() == before.keys() if native else plan.key_map.keys() <= before.keys()
    prepared = retrofit.prepare(model, plan)
    retrofit.calibrate(prepared, data, progress=False)
    converted = retrofit.convert(prepared)

    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert converted.training == training
    state = converted.state_dict()
    assert all(torch.equal(before[old], state[new]) for old, new in plan.key_map.items())

    assert retrofit.verify(model, converted, [*data, torch.randn(1, *shape)]).exact
    folded = retrofit.fold(converted)
    assert set(folded.state_dict()) == set(plan.key_map)
    assert list(folded.state_dict()) == list(before) or not native
    assert all(torch.equal(before[key], value) for key, value in folded.state_dict().items())
    assert retrofit.plan(converted, example_inputs=data[0], **options).inserted == ()

    converted.train()
    converted(data[0]).square().mean().backward()
    for name, parameter in converted.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
