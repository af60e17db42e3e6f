"""Any convolutional network: a hypothesis strategy, and the features that a network has."""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

CONVS = {False: (nn.Conv1d, nn.Conv2d, nn.Conv3d)}
CONVS[True] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCENORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
KINDS_OF_BLOCKS = ["conv", "conv", "norm", "twice", "side norm", "geometry", "unbatched"]
POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
AVERAGES = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
SIZES = ((17,), (11, 9), (7, 6, 5))
PADDING_MODES = ["zeros", "zeros", "reflect", "replicate", "circular"]


class Drawn(NamedTuple):
    """A network, in train mode where `training`; `shape` is that of one of its samples."""

    model: nn.Module
    shape: tuple[int, ...]
    training: bool


# --- what networks are made of -----------------------------------------------------------------


FUNCTIONS = {
    "relu": F.relu,
    "relu in place": lambda x: F.relu(x, inplace=True),
    "relu_ method": lambda x: x.relu_(),
    "silu": F.silu,
    "tanh method": lambda x: x.tanh(),
    "leaky_relu in place": lambda x: F.leaky_relu_(x, 0.2),
    "gelu": F.gelu,
    "clamp": lambda x: x.clamp(min=0, max=6),
}


class Function(nn.Module):
    """An activation that is no module."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x):
        return FUNCTIONS[self.name](x)


class Called(nn.Module):
    """A Sequential that is called."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)


class Indexed(Called):
    """A Sequential whose children are called by their numbers."""

    def forward(self, x):
        for index in range(len(self.layers)):
            x = self.layers[index](x)
        return x


class Iterated(Called):
    """A Sequential that is gone through."""

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Listed(nn.Module):
    """The same over a ModuleList."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Named(nn.Module):
    """Over a ModuleDict, in its order."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleDict({f"layer{i}": layer for i, layer in enumerate(layers)})

    def forward(self, x):
        for layer in self.layers.values():
            x = layer(x)
        return x


class Join(nn.Module):
    """Branches over one input, joined; `style` says how."""

    def __init__(self, branches, style):
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.style = style

    def forward(self, x):
        found = [branch(x) for branch in self.branches]
        if self.style == "concat":
            return torch.cat(found, 1)
        if self.style == "gate":
            return found[0] * torch.sigmoid(found[1])
        total = found[0]
        for other in found[1:]:
            total = total + other
        return F.relu(total)


class Skip(nn.Module):
    """What the block gives is added to what it gets."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return x + self.block(x)


class Twice(nn.Module):
    """One module called at two places."""

    def __init__(self, shared, between):
        super().__init__()
        self.shared, self.between = shared, between

    def forward(self, x):
        return torch.tanh(self.shared(self.between(self.shared(x))))


class SideNormed(nn.Module):
    """A norm on a side branch; the main path reads the raw values."""

    def __init__(self, conv, norm):
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, x):
        x = self.conv(x)
        return F.silu(x) + self.norm(x)


class Resized(nn.Module):
    """The shape of what the block gives flows on, beside its values."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        x = self.block(x)
        return F.interpolate(F.gelu(x), size=x.shape[2:]) + torch.zeros_like(x)


class ReadsGeometry(nn.Module):
    """Asks its convolution for numbers."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        if self.conv.stride[0] > self.conv.kernel_size[0]:
            x = -x
        return F.relu(self.conv(x))


class TwoNames(nn.Module):
    """One part under two names."""

    def __init__(self, part):
        super().__init__()
        self.part = part
        self.alias = part

    def forward(self, x):
        return F.gelu(self.alias(x))


class OneByOne(nn.Module):
    """Its convolution sees samples without a batch axis."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return torch.stack([F.relu(self.conv(sample)) for sample in x])


class Product(nn.Module):
    """A classifier that is no layer."""

    def __init__(self, channels, kind):
        super().__init__()
        self.w, self.kind = nn.Parameter(torch.randn(channels, 3)), kind

    def forward(self, x):
        return x @ self.w if self.kind == "matmul" else torch.einsum("nc,ck->nk", x, self.w)


class ShiftedBatchNorm1d(nn.BatchNorm1d):
    """A norm that does more than its class says."""

    def forward(self, x):
        return super().forward(x) + 1


class ShiftedBatchNorm2d(nn.BatchNorm2d):
    """The same over pictures."""

    def forward(self, x):
        return super().forward(x) + 1


class ShiftedBatchNorm3d(nn.BatchNorm3d):
    """The same over volumes."""

    def forward(self, x):
        return super().forward(x) + 1


class LastAxisNorm(nn.Module):
    """LayerNorm over the channels, as in ConvNeXt."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.contiguous = False

    def forward(self, x):
        out = self.norm(x.movedim(1, -1)).movedim(-1, 1)
        return out.contiguous() if self.contiguous else out


class Outputs(nn.Module):
    """Gives more than one tensor."""

    def __init__(self, body, head, kind):
        super().__init__()
        self.body, self.head, self.kind = body, head, kind

    def forward(self, x):
        x = self.body(x)
        y = self.head(x)
        return (y, x) if self.kind == "tuple" else {"out": y, "features": [x]}


class Untraceable(nn.Module):
    """torch.fx cannot follow what looks at its input."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x) if x.sum() < 1e9 else x


SUBCLASSES = (ShiftedBatchNorm1d, ShiftedBatchNorm2d, ShiftedBatchNorm3d)
CONTAINERS = (nn.Sequential, Called, Indexed, Iterated, Listed, Named)
MODULE_ACTIVATIONS = [
    nn.ReLU,
    lambda: nn.ReLU(inplace=True),
    nn.SiLU,
    nn.Sigmoid,
    nn.GELU,
    nn.PReLU,
    nn.Hardswish,
    lambda: nn.LeakyReLU(0.2, inplace=True),
    lambda: nn.ELU(inplace=True),
    nn.Identity,
]


# --- the strategy ------------------------------------------------------------------------------


@st.composite
def convolutions(draw, sizes, inputs, outputs, keep):
    """(convolution, sizes of its output). `keep`: those of its input."""
    dims = len(sizes)
    common = [g for g in range(1, inputs + 1) if inputs % g == 0 and outputs % g == 0]
    options = {"groups": draw(st.sampled_from(common)), "bias": draw(st.booleans())}
    transposed = draw(st.integers(0, 3)) == 0
    odd, dilation = draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 1, 2]))
    if keep:
        options |= {"dilation": dilation, "padding": dilation * (odd // 2)}
        kernel, after = odd, sizes
        if not transposed and draw(st.integers(0, 4)) == 0:
            options["padding"] = "same"
    elif transposed:
        kernel = stride = 2 if max(sizes) < 12 else 1
        options |= {"stride": stride}
        after = tuple(size * stride for size in sizes)
    else:
        # torch 2.14.1 corrupts memory in the backward pass of a strided 1x1 convolution of what is
        # channels_last, as what a LayerNorm over the channels gives: see docs/guarantees.md.
        pairs = [(2, 2), (3, 2), (3, 1), (2, 1), *([(1, 2)] if dims == 3 else [])]
        kernel, stride = draw(st.sampled_from(pairs))
        padding = draw(st.integers(0, kernel // 2))
        options |= {"stride": stride, "padding": padding}
        after = tuple((size + 2 * padding - kernel) // stride + 1 for size in sizes)
        if min(after) < 3:  # what follows pads by up to 2 and is 3 wide
            options |= {"stride": 1, "padding": kernel // 2, "dilation": 1}
            after = tuple(size + 2 * (kernel // 2) - kernel + 1 for size in sizes)
    if not transposed:
        mode = draw(st.sampled_from(PADDING_MODES))
        options["padding_mode"] = "zeros" if mode == "reflect" and dims == 3 else mode
    return CONVS[transposed][dims - 1](inputs, outputs, kernel, **options), after


@st.composite
def activations(draw):
    if draw(st.booleans()):
        return Function(draw(st.sampled_from(list(FUNCTIONS))))
    return draw(st.sampled_from(MODULE_ACTIVATIONS))()


@st.composite
def norms(draw, dims, channels):
    """With statistics and parameters as after training."""
    kind = draw(st.sampled_from(["batch", "group", "instance", "layer", "subclass"]))
    if kind == "group":
        divisors = [g for g in range(1, channels + 1) if channels % g == 0]
        return nn.GroupNorm(draw(st.sampled_from(divisors)), channels)
    if kind == "instance":
        return INSTANCENORMS[dims - 1](channels, affine=draw(st.booleans()))
    if kind == "layer":
        return LastAxisNorm(channels)
    norm = (SUBCLASSES if kind == "subclass" else BATCHNORMS)[dims - 1](channels)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    nn.init.uniform_(norm.weight, 0.5, 2)
    return norm


@st.composite
def blocks(draw, sizes, inputs, outputs, depth, keep=False):
    """(block, sizes of its output)."""
    kinds = list(KINDS_OF_BLOCKS)
    if depth:
        kinds += ["sum", "gate", "nested", "shape", "two names"]
        kinds += ["concat"] if outputs > 1 else []
        kinds += ["skip"] if inputs == outputs else []
    kind = draw(st.sampled_from(kinds))
    container = draw(st.sampled_from(CONTAINERS))
    if kind in ("sum", "gate", "concat"):
        count = 2 if kind == "gate" else draw(st.integers(2, 3))
        widths = [outputs] * count
        if kind == "concat":
            count = min(count, outputs)
            widths = [outputs // count] * (count - 1) + [outputs - outputs // count * (count - 1)]
        branches = [draw(blocks(sizes, inputs, w, depth - 1, keep=True))[0] for w in widths]
        return Join(branches, kind), sizes
    if kind == "skip":
        return Skip(draw(blocks(sizes, inputs, outputs, depth - 1, keep=True))[0]), sizes
    if kind in ("shape", "two names"):
        inner, after = draw(blocks(sizes, inputs, outputs, depth - 1, keep))
        return (Resized if kind == "shape" else TwoNames)(inner), after
    if kind == "unbatched":
        conv = CONVS[False][len(sizes) - 1](inputs, outputs, 3, padding=1)
        return OneByOne(conv), sizes
    if kind == "nested":
        inner, after = draw(blocks(sizes, inputs, outputs, depth - 1, keep))
        # What an activation gave may be needed for its gradient: none in place follows.
        last = draw(st.sampled_from([nn.Tanh(), nn.ReLU(), Function("gelu")]))
        return container(container(inner, last), nn.Sequential()), after
    conv, after = draw(convolutions(sizes, inputs, outputs, keep))
    if kind == "geometry":
        return ReadsGeometry(conv), after
    if kind == "side norm":
        return SideNormed(conv, draw(norms(len(sizes), outputs))), after
    parts = [conv]
    if kind == "norm":
        parts.append(draw(norms(len(sizes), outputs)))
    parts.append(draw(activations()))
    if kind == "twice":
        shared, _ = draw(convolutions(after, outputs, outputs, keep=True))
        parts.append(Twice(shared, draw(activations())))
    if draw(st.integers(0, 5)) == 0:
        parts.append(nn.Dropout(0.3))
    return container(*parts), after


@st.composite
def heads(draw, dims, channels):
    """What follows the last activation; None for a backbone."""
    pooled = [AVERAGES[dims - 1](1), nn.Flatten()]
    kinds = ["none", "linear", "conv", "conv pooled", "mlp", "matmul", "einsum"]
    kind = draw(st.sampled_from(kinds))
    one = CONVS[False][dims - 1](channels, 3, 1)
    return {
        "none": None,
        "linear": nn.Sequential(*pooled, nn.Linear(channels, 3)),
        "matmul": nn.Sequential(*pooled, Product(channels, "matmul")),
        "einsum": nn.Sequential(*pooled, Product(channels, "einsum")),
        "conv": one,
        "conv pooled": nn.Sequential(one, nn.ReLU(), *pooled),
        "mlp": nn.Sequential(
            *pooled, nn.Linear(channels, 5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 3)
        ),
    }[kind]


@st.composite
def networks(draw):
    """Of `Drawn`."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    sizes = SIZES[draw(st.integers(0, 2))]
    dims, after = len(sizes), sizes
    widths = [draw(st.integers(1, 6)) for _ in range(draw(st.integers(2, 5)))]
    body = []
    for inputs, outputs in pairwise(widths):
        block, after = draw(blocks(after, inputs, outputs, depth=2))
        body.append(block)
        if min(after) > 5 and draw(st.integers(0, 3)) == 0:
            body.append(POOLS[dims - 1](2))
            after = tuple(size // 2 for size in after)
    head = draw(heads(dims, widths[-1]))
    model = draw(st.sampled_from(CONTAINERS))(*body)
    if head is not None:
        outputs = draw(st.sampled_from(["one", "one", "tuple", "dict"]))
        model = nn.Sequential(model, head) if outputs == "one" else Outputs(model, head, outputs)
    if draw(st.integers(0, 3)) == 0:
        model = Untraceable(model)
    if draw(st.integers(0, 4)) == 0:  # as for fine-tuning the rest
        for parameter in list(model.parameters())[:3]:
            parameter.requires_grad_(False)
    if draw(st.integers(0, 5)) == 0:
        model.double()
    # A single channel is not exact in channels_last: docs/guarantees.md.
    several = all(m.out_channels > 1 for m in model.modules() if is_convolution(m))
    if not several:
        for norm in (m for m in model.modules() if isinstance(m, LastAxisNorm)):
            norm.contiguous = True
    elif dims == 2 and draw(st.booleans()):
        model.to(memory_format=torch.channels_last)
    if draw(st.integers(0, 3)) == 0:
        next(m for m in model.modules() if is_convolution(m)).register_forward_hook(looks_on)
    training = draw(st.booleans())
    return Drawn(model.train(training), (widths[0], *sizes), training)


def looks_on(_module, _inputs, _output):
    """A hook of the user's."""


def is_convolution(module):
    return isinstance(module, CONVS[False] + CONVS[True])


# --- features ----------------------------------------------------------------------------------


def features(drawn):
    """What a network has, as words; read off its modules, not off what was drawn."""
    modules = list(drawn.model.modules())
    found = {"train mode" if drawn.training else "eval mode", f"{len(drawn.shape) - 1}d"}
    for module in modules:
        found |= features_of(module)
    parents = [m for m in modules if isinstance(m, CONTAINERS) and not isinstance(m, nn.Sequential)]
    if any(
        isinstance(child, CONTAINERS) for m in parents for child in m.modules() if child is not m
    ):
        found.add("nested containers")
    parameters = list(drawn.model.parameters())
    if not all(p.requires_grad for p in parameters):
        found.add("frozen parameters")
    if parameters[0].dtype == torch.float64:
        found.add("float64")
    convs = sum(map(is_convolution, modules))
    return found | {f"{min(8, 1 << int(math.log2(convs)))} convolutions or more"}


def features_of(module):
    if is_convolution(module):
        return set(features_of_convolution(module))
    if isinstance(module, Join):
        return {f"branches joined by {module.style}"}
    if isinstance(module, Function):
        return {"activation in place" if "_" in module.name or "place" in module.name else
                "activation as a function"}  # fmt: skip
    if isinstance(module, Product):
        return {f"{module.kind} head"}
    if isinstance(module, Outputs):
        return {f"output a {module.kind}"}
    if isinstance(module, nn.Sequential):
        return {"Sequential that is the model's own"} if len(module) else {"empty Sequential"}
    if getattr(module, "inplace", False):
        return {"activation in place"}
    names = {
        Called: "Sequential called",
        Indexed: "Sequential indexed",
        Iterated: "Sequential iterated",
        Listed: "ModuleList",
        Named: "ModuleDict",
        Skip: "skip connection",
        Twice: "shared module",
        Untraceable: "untraceable",
        SideNormed: "norm on a side branch",
        Resized: "a shape that flows",
        ReadsGeometry: "geometry is read",
        TwoNames: "several names",
        OneByOne: "convolution without a batch axis",
        nn.Linear: "Linear head",
        nn.Dropout: "Dropout",
        nn.GroupNorm: "GroupNorm there",
        nn.LayerNorm: "LayerNorm there",
        **dict.fromkeys(BATCHNORMS, "BatchNorm there"),
        **dict.fromkeys(SUBCLASSES, "norm that is a subclass"),
        **dict.fromkeys(INSTANCENORMS, "InstanceNorm there"),
        **dict.fromkeys(POOLS, "max pool"),
    }
    activation = type(module).__module__ == "torch.nn.modules.activation"
    name = names.get(type(module), "activation as a module" if activation else None)
    return {name} if name else set()


def features_of_convolution(conv):
    yield "transposed convolution" if conv.transposed else "convolution"
    yield "bias" if conv.bias is not None else "no bias"
    yield f"kernel of {conv.kernel_size[0]}"
    if conv.padding == "same":
        yield "padding='same'"
    if conv.stride[0] > 1:
        yield "stride"
    if conv.dilation[0] > 1:
        yield "dilation"
    if conv.groups > 1:
        yield "depthwise" if conv.groups == conv.in_channels else "groups"
    if any(conv.padding) and conv.padding_mode != "zeros":
        yield f"padding mode {conv.padding_mode}"
    if conv._forward_hooks:
        yield "a hook of the user's"
    if conv.weight.dim() == 4 and not conv.weight.is_contiguous():
        yield "channels_last"
