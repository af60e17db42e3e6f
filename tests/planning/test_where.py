"""Where a BatchNorm goes: what reads a layer's values, what asks for it, what is impossible."""

import copy

import nets
import pytest
import torch
import torch.nn.functional as F
from decisions import decisions
from torch import nn

import retrofit
from retrofit import RetrofitError

X = nets.images(6, 3, 16, 16)
INSERT, HEAD = ("insert", "no norm follows"), ("skip", "output head")


class Custom(nn.Module):
    """A stem, two convolutions, and a head; `between` says what reads the second's values."""

    def __init__(self, between, **parts):
        super().__init__()
        self.between = between
        self.stem, self.body = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 4, 1)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.between(self, self.body(F.relu(self.stem(x))))


class L2Norm(nn.Module):
    """As in SSD: a norm by name and build."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((8,), 20.0))

    def forward(self, x):
        return self.weight[:, None, None] * F.normalize(x)


def body_of(between, example=None, **parts):
    return decisions(Custom(between, **parts).eval(), example=example)["body"]


# --- norms ------------------------------------------------------------------------------------

SIDE = {
    "beside": lambda m, y: (m.head(m.norm(y)), m.head(y)),
    "behind an activation": lambda m, y: m.head(m.norm(y.relu())) + m.head(y.relu()),
    "of the activated": lambda m, y: m.head(sum(f(y.relu()) for f in (m.norm, torch.tanh))),
    "of a view": lambda m, y: m.head(m.norm(y.contiguous()).relu() + y.relu()),
}
EVERY = {
    "alone": lambda m, y: m.head(m.norm(y).relu()),
    "twice": lambda m, y: m.head(m.norm(y).relu() + m.norm(y.relu())),
    "beside a look at the shape": lambda m, y: m.head(m.norm(y) * y.shape[1]),
}


@pytest.mark.parametrize("norm", [L2Norm(), nn.BatchNorm2d(8), nn.GroupNorm(2, 8)], ids=repr)
@pytest.mark.parametrize("example", [None, X], ids=["traced", "run"])
@pytest.mark.parametrize("between", SIDE.values(), ids=SIDE)
def test_a_norm_on_a_side_branch_keeps_no_batchnorm_off_the_main_path(between, example, norm):
    assert body_of(between, example, norm=norm) == INSERT


@pytest.mark.parametrize("norm", [L2Norm(), nn.BatchNorm2d(8), nn.GroupNorm(2, 8)], ids=repr)
@pytest.mark.parametrize("example", [None, X], ids=["traced", "run"])
@pytest.mark.parametrize("between", EVERY.values(), ids=EVERY)
def test_what_every_reader_normalises_is_normalised_already(between, example, norm):
    assert body_of(between, example, norm=norm) == ("skip", "already normalised by norm")


# --- shapes -----------------------------------------------------------------------------------

SHAPES = {
    "shape": lambda m, y: F.interpolate(m.head(F.max_pool2d(y.relu(), 2)), size=y.shape[-2:]),
    "size": lambda m, y: m.head(y.relu()).reshape(y.size(0), -1),
    "len": lambda m, y: m.head(y.relu()) * y.shape[0] + y.dim(),
    "zeros_like": lambda m, y: m.head(y.relu()) + torch.zeros_like(y)[:, :4],
    "new_ones": lambda m, y: m.head(y.relu()) * y.new_ones(y.shape[-1]),
    "expand_as": lambda m, y: m.head(y.relu()).mean(1, keepdim=True).expand_as(y),
    "type_as": lambda m, y: m.head(y.relu()).type_as(y),
}


@pytest.mark.parametrize("example", [None, X], ids=["traced", "run"])
@pytest.mark.parametrize("between", SHAPES.values(), ids=SHAPES)
def test_a_shape_that_reaches_the_output_makes_no_head(between, example):
    assert body_of(between, example) == INSERT


def test_values_that_reach_the_output_beside_a_shape_still_make_a_head():
    assert body_of(lambda m, y: (m.head(y.relu()), y * y.shape[0])) == HEAD


# --- classifiers that are no layer ------------------------------------------------------------


def pooled(y):
    return F.adaptive_avg_pool2d(y.relu(), 1).flatten(1)


PRODUCTS = {
    "@": lambda m, y: pooled(y) @ m.w,
    "matmul": lambda m, y: torch.matmul(pooled(y), m.w.relu()),
    "from the right": lambda m, y: (m.w.t() @ pooled(y).t()).t(),
    "mm": lambda m, y: pooled(y).mm(m.w),
    "addmm": lambda m, y: torch.addmm(m.b, pooled(y), m.w),
    "einsum": lambda m, y: torch.einsum("nc,ck->nk", pooled(y), m.w),
    "cosine": lambda m, y: F.normalize(pooled(y)) @ F.normalize(m.w, dim=0),
    "cosine_similarity": lambda m, y: F.cosine_similarity(pooled(y)[:, None], m.w.t()[None], -1),
    "a buffer, as of ONNX": lambda m, y: pooled(y) @ m.buffer,
    "as many as images": lambda m, y: torch.bmm(pooled(y)[:, None], m.w.expand(y.shape[0], 8, 5)),
    "of the type of another": lambda m, y: pooled(y) @ m.w.to(y),
    "with what forward makes": lambda m, y: pooled(y) @ (m.w + torch.ones(8, 5)),
}


@pytest.mark.parametrize("example", [None, X], ids=["traced", "run"])
@pytest.mark.parametrize("between", PRODUCTS.values(), ids=PRODUCTS)
def test_a_product_with_a_parameter_is_a_classifier(between, example):
    model = Custom(between, w=nn.Parameter(torch.randn(8, 5)), b=nn.Parameter(torch.randn(5)))
    model.register_buffer("buffer", torch.randn(8, 5))
    assert decisions(model.eval(), example=example)["body"] == INSERT


@pytest.mark.parametrize("example", [None, X], ids=["traced", "run"])
def test_a_product_of_activations_is_none(example):
    assert body_of(lambda m, y: pooled(y) @ pooled(y).t(), example) == HEAD  # noqa: ARG005


# What is written out of a linear layer, of a weight (5, 8): a product, then a sum.
SUMS = {
    "as it is": lambda m, y: (y[:, None] * m.w).sum(-1),
    "from the left": lambda m, y: (m.w * y.unsqueeze(1)).sum(-1),
    "by functions": lambda m, y: torch.mean(torch.mul(y[:, None], m.w), dim=-1),
    "of a view": lambda m, y: (y[:, None] * m.w.unsqueeze(0)).sum((-1,), keepdim=True),
    "of cosines": lambda m, y: (F.normalize(y)[:, None] * F.normalize(m.w)).sum(dim=-1) * 16,
    "in place": lambda m, y: y[:, None].repeat(1, 5, 1).mul_(m.w).sum(-1),
    "to one output": lambda m, y: (y * m.gamma).sum(-1),
    "of everything": lambda m, y: (y * m.gamma).sum(),
}
# Which axis the sum is over, or what the weight spans, only a run tells.
SUMS_FROM_THE_FRONT = {
    "by place": lambda m, y: (y[:, None] * m.w).sum(2),
    "of all axes but one": lambda m, y: (y[:, None] * m.w).mean(dim=(1, 2)),
    "by weights that a mask picks": lambda m, y: (y[:, 1:] * m.gamma[m.grid > -1]).sum(-1),
}
SCALES = {
    "alone": lambda m, y: y * m.gamma,
    "before a sum of other axes": lambda m, y: (y[:, None] * m.gamma).sum(-2),
    "before a mean of images": lambda m, y: (y * m.gamma).mean(0),
    "of a map before it is pooled": lambda m, y: (y[:, :, None, None] * m.scale).mean((-2, -1)),
    "and a sum of something else": lambda m, y: (y * m.gamma + 1).view(-1, 2, 4).sum(-1),
    "by a grid of coordinates": lambda m, y: (y.softmax(1) * m.grid).sum(-1),
    "ended in place": lambda m, y: (y * m.gamma).clamp_(min=-99.0).sum(-1),
}


def decided_of(reads, example, *, branching=False):
    def between(model, y):
        if branching and y.sum() > 1e9:
            return y
        return reads(model, pooled(y))

    parts = {"w": torch.randn(5, 8), "gamma": torch.randn(8), "scale": torch.randn(8, 1, 1)}
    model = Custom(between, **{name: nn.Parameter(value) for name, value in parts.items()})
    model.register_buffer("grid", torch.linspace(-1, 1, 8))
    return decisions(model.eval(), example=example)["body"]


@pytest.mark.parametrize("reads", SUMS.values(), ids=SUMS)
def test_a_sum_of_products_with_a_parameter_is_a_classifier(reads):
    assert decided_of(reads, None) == INSERT
    assert decided_of(reads, X) == INSERT
    assert decided_of(reads, X, branching=True) == INSERT


@pytest.mark.parametrize("reads", SUMS_FROM_THE_FRONT.values(), ids=SUMS_FROM_THE_FRONT)
def test_over_which_axis_a_sum_is_an_example_may_have_to_tell(reads):
    assert decided_of(reads, None) == HEAD
    assert decided_of(reads, X) == INSERT
    assert decided_of(reads, X, branching=True) == INSERT


@pytest.mark.parametrize("reads", SCALES.values(), ids=SCALES)
def test_a_scale_by_a_parameter_is_no_classifier(reads):
    assert decided_of(reads, None) == HEAD
    assert decided_of(reads, X) == HEAD
    assert decided_of(reads, X, branching=True) == HEAD


# --- what include asks for --------------------------------------------------------------------


PIXEL = "its feature map is a single pixel: training would fail on a batch of one"


def test_include_overrides_every_reason_but_impossibility_and_the_plan_says_which():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.normed, self.norm = nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)
            self.pixel, self.head = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = self.norm(self.normed(x)).relu()
            return self.head(x * self.pixel(F.adaptive_avg_pool2d(x, 1)).sigmoid())

    model = nets.build(Several)
    plan = retrofit.plan(model, example=X, include=["normed", "pixel", "head"])
    assert [site.reason for site in plan.sites] == [
        "included, although already normalised by norm",
        f"included, although {PIXEL}",
        "included, although output head: the model returns its values",
    ]
    converted = retrofit.add_batchnorm(model, [X], include="*", progress=False)
    assert retrofit.verify(model, converted, [X]).exact
    assert retrofit.fold(converted).state_dict().keys() == model.state_dict().keys()


def test_the_reason_of_an_output_head_says_how_to_ask_for_it():
    (_, last) = retrofit.plan(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    ).sites
    assert last.reason == "output head: the model returns its values; include='2' asks for it"


@pytest.mark.parametrize("name", ["enc.0", "alias.0", "al*.0"])
@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_module_known_under_two_names_is_found_by_either(name, option):
    class Aliased(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
            self.alias = self.enc

        def forward(self, x):
            return self.enc(x).relu()

    found = {p: d for p, (d, _) in decisions(Aliased().eval(), **{option: name}).items()}
    chosen, other = ("insert", "skip") if option == "include" else ("skip", "insert")
    assert found == {"enc.0": chosen, "enc.2": other}


# --- what the model's own code reads ----------------------------------------------------------


class ReadsGeometry(nn.Module):
    """As Whisper's encoder; `attributes` are read of the first convolution."""

    def __init__(self, *attributes):
        super().__init__()
        self.attributes = attributes
        self.one, self.two = nn.Conv1d(8, 16, 3, padding=1), nn.Conv1d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        for name in self.attributes:
            value = getattr(self.one, name)
            x = x * (1 if value is None or isinstance(value, (tuple, str)) else int(value > 0))
        return self.fc(F.gelu(self.two(F.gelu(self.one(x)))).transpose(1, 2))


GEOMETRY = ["stride", "kernel_size", "padding", "dilation", "groups", "in_channels", "padding_mode"]


@pytest.mark.parametrize("name", GEOMETRY)
def test_where_geometry_is_read_a_batchnorm_can_be_asked_for(name):
    model, x = ReadsGeometry(name).eval(), torch.randn(4, 8, 20)
    (one, two) = retrofit.plan(model).sites
    assert two.decision == "insert"
    assert one.reason == f"the model's own code reads its .{name}; include='one' asks for it"

    before = model.state_dict()
    converted = retrofit.add_batchnorm(model, [x], include=["one", "two"], progress=False)
    assert [type(m) for m in converted.one.children()] == [nn.Conv1d, nn.BatchNorm1d]
    assert getattr(converted.one, name) == getattr(model.one, name)
    assert torch.equal(converted(x), model(x))
    assert torch.equal(copy.deepcopy(converted)(x), model(x))
    folded = retrofit.fold(converted).state_dict()
    assert all(torch.equal(folded[key], value) for key, value in before.items())


def test_where_a_weight_is_read_a_batchnorm_is_impossible():
    model = ReadsGeometry("stride").eval()
    model.fc.register_forward_hook(lambda *_: model.one.weight)
    reads_both = Custom(lambda m, y: m.head(y.relu()) * m.body.weight.sum() * m.body.stride[0])
    found = decisions(reads_both.eval(), include="body")["body"]
    assert found == ("skip", "asked for, but the model's own code reads its .stride, .weight")


def test_code_that_looks_for_what_no_layer_has_reads_nothing():
    class Sweeping(nn.Module):
        """As diffusers' models, whose `dtype` looks for hooks on every module."""

        def __init__(self):
            super().__init__()
            self.one, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            if any(hasattr(module, "_hook") for module in self.modules()):
                x = x + 1
            return self.head(F.relu(self.one(x)).mean((2, 3)))

    assert decisions(Sweeping().eval()) == {"one": INSERT}
    assert decisions(Sweeping().eval(), example=X) == {"one": INSERT}


def test_a_layer_whose_weight_a_function_uses_is_said_to_be_read():
    class Borrowing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv2d = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return F.relu(F.conv2d(x, self.conv2d.weight))

    assert decisions(Borrowing().eval()) == {
        "conv2d@function": ("skip", "a function: only layout='graph' has a place after it"),
        "conv2d": ("skip", "not called: the model's own code reads its .weight"),
    }


# --- what was not seen, or cannot be --------------------------------------------------------


def test_what_the_example_does_not_reach_is_not_said_to_be_never_called():
    class Choosing(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x, *, which="one"):
            return F.relu(self.get_submodule(which)(x))

    model = Choosing().eval()
    assert decisions(model)["other"] == ("skip", "not called in eval mode with which='one'")
    found = decisions(model, example={"x": X, "which": "other"})
    assert found == {"other": INSERT, "one": ("skip", "not called on the example")}


@pytest.mark.parametrize("layout", ["native", "graph"])
def test_a_convolution_called_on_single_samples_is_left_alone(layout):
    class OneByOne(nn.Module):
        def __init__(self):
            super().__init__()
            self.each, self.all = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            first = F.relu(self.each(x.squeeze(0)))
            return self.head(F.relu(self.all(first.unsqueeze(0))).mean((2, 3)))

    model, data = OneByOne().eval(), nets.images(4, 3, 16, 16).split(1)
    reason = "called on samples without a batch axis, which BatchNorm does not take"
    assert decisions(model, example=data[0], layout=layout)["each"] == ("skip", reason)
    asked = decisions(model, example=data[0], layout=layout, include="each")["each"]
    assert asked == ("skip", f"asked for, but {reason}")
    converted = retrofit.add_batchnorm(model, data, layout=layout, progress=False)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in converted.modules()) == 1
    assert torch.equal(converted(data[0]), model(data[0]))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*jit:DeprecationWarning")
def test_convolutions_inside_torchscript_are_listed_and_left_alone():
    part = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 8, 3)).eval()

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3)
            self.scripted = torch.jit.script(part)
            self.frozen = torch.jit.freeze(torch.jit.script(part))

        def forward(self, x):
            return self.frozen(self.scripted(F.relu(self.stem(x)))).mean((2, 3))

    model = Mixed().eval()
    for example in (None, X):
        sites = {site.path: site for site in retrofit.plan(model, example=example).sites}
        assert sites["stem"].decision == "insert"
        kinds = {path: site.kind for path, site in sites.items() if "TorchScript" in site.reason}
        assert kinds == {
            "scripted.0": "Conv2d",
            "scripted.2": "ConvTranspose2d",
            "frozen.conv2d": "conv2d",
            "frozen.convtranspose2d@1": "convtranspose2d",
        }
    assert torch.equal(retrofit.add_batchnorm(model, [X], progress=False)(X), model(X))
    with pytest.raises(RetrofitError, match="matches none"):
        retrofit.plan(model, include="frozen.conv3d")


# --- what is said -------------------------------------------------------------------------------


def test_nothing_added_is_said_with_the_reasons():
    head = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)
    ).eval()
    expected = (
        "no BatchNorm is added to Sequential: 2 layers are skipped: already normalised (1), output "
        "head: the model returns its values (1); print the plan to see each"
    )
    for act in (
        lambda: retrofit.add_batchnorm(head, [X], progress=False),
        lambda: retrofit.insert(head),
    ):
        with pytest.warns(UserWarning, match="no BatchNorm is added") as seen:
            act()
        assert [str(warning.message) for warning in seen] == [expected]
        assert seen[0].filename == __file__
    with pytest.warns(UserWarning, match="no BatchNorm is added to Linear: it has no convolutions"):
        retrofit.insert(nn.Linear(3, 4))


@pytest.mark.parametrize("frozen", ["all", "stem"])
def test_batchnorms_that_cannot_learn_are_said_to_be_frozen(frozen):
    model = nets.build(nets.Residual)
    part = model if frozen == "all" else model.stem
    part.requires_grad_(False)
    plan = retrofit.plan(model)
    count = 3 if frozen == "all" else 1
    assert f"; {count} of these follow frozen layers and do not learn" in str(plan)
    with pytest.warns(UserWarning, match=rf"{count} of 3 BatchNorms follow frozen layers \(stem"):
        converted = retrofit.insert(model, plan)
    norms = [m for m in converted.modules() if isinstance(m, nn.BatchNorm2d)]
    assert sum(not norm.weight.requires_grad for norm in norms) == count


# --- what would do something else ----------------------------------------------------------------


class Changing(nn.Module):
    """What `do` makes of it depends on what stands in the place of its layers."""

    def __init__(self, do, *, always):
        super().__init__()
        self.one, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        self.do, self.always = do, always

    def forward(self, x):
        y = self.head(F.relu(self.one(x)).mean((2, 3)))
        return y * self.do(self) if self.always or self.training else y


CHANGES = {
    "number of parameters": lambda m: len(list(m.parameters())),
    "number of modules": lambda m: len(list(m.modules())),
    "type": lambda m: 2 if isinstance(m.one, nn.Conv2d) else 1,
}
USES = {
    "sum of parameters": lambda m: sum(p.sum() for p in m.parameters()),
    "its own parameters": lambda m: next(m.one.parameters()).sum(),
    "a key": lambda m: m.one.state_dict()["weight"].sum(),
    "a key of all": lambda m: m.state_dict()["one.weight"].sum(),
}


@pytest.mark.parametrize("always", [True, False], ids=["in both modes", "in train mode"])
@pytest.mark.parametrize("example", [None, X], ids=["traced", "run"])
@pytest.mark.parametrize("do", CHANGES.values(), ids=CHANGES)
def test_a_model_that_would_do_something_else_is_refused(do, example, always):
    model = Changing(do, always=always).eval()
    with pytest.raises(RetrofitError, match="does something else"):
        retrofit.plan(model, example=example)


@pytest.mark.parametrize("always", [True, False], ids=["in both modes", "in train mode"])
@pytest.mark.parametrize("example", [None, X], ids=["traced", "run"])
@pytest.mark.parametrize("do", USES.values(), ids=USES)
def test_a_convolution_whose_tensors_the_code_computes_with_is_skipped(do, example, always):
    model = Changing(do, always=always).eval()
    action, reason = decisions(model, example=example)["one"]
    assert action == "skip"
    assert "the model's own code reads its " in reason
    assert ".weight" in reason


def test_what_train_mode_reads_before_it_stops_the_tracing_is_seen():
    class Stopping(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            if self.training and self.one.weight.dtype == x.dtype:
                x = x + 0.1
            return self.head(F.relu(self.one(x)).mean((2, 3)))

    for example in (None, X):
        found = decisions(Stopping().eval(), example=example)["one"]
        assert found == ("skip", "the model's own code reads its .weight")


@pytest.mark.parametrize("end", ["numpy", "cpu numpy", "softmax numpy", "tolist"])
def test_values_that_leave_torch_may_be_those_of_a_head(end):
    class Leaving(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            y = self.head(F.relu(self.one(x)))
            for name in end.split():
                y = y.softmax(1) if name == "softmax" else getattr(y, name)()
            return torch.tensor(y)

    found = decisions(Leaving().eval(), example=X)
    assert found["one"] == INSERT
    assert found["head"] == ("skip", "its values go where they cannot be followed")


@pytest.mark.parametrize("patterns", [iter(()), 3, b"one"], ids=["used up", "number", "bytes"])
def test_what_names_nothing_is_refused(patterns):
    with pytest.raises(RetrofitError, match=r"names nothing|is no module path"):
        retrofit.plan(nets.build(nets.Residual), include=patterns)


def test_what_was_asked_for_and_is_impossible_is_said_beside_what_is_done():
    model = Custom(lambda m, y: m.head(y.relu()) * m.body.weight.sum()).eval()
    expected = r"no BatchNorm is possible where it was asked for: body: the model's own code reads"
    with pytest.warns(UserWarning, match=expected):
        converted = retrofit.add_batchnorm(model, [X], include=["stem", "body"], progress=False)
    assert torch.equal(converted(X), model(X))


def test_an_attribute_called_as_a_child_of_the_sequential_is_not_forwarded():
    class Own(nn.Conv2d):
        bn = 1

    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.head = Own(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(F.relu(self.one(x) * self.one.bn).mean((2, 3)))

    found = decisions(Asking().eval(), include="one")["one"]
    assert found == ("skip", "asked for, but the model's own code reads its .bn")


# --- the graph layout ---------------------------------------------------------------------------


def test_in_a_graph_a_batchnorm_comes_after_the_activation_whatever_else_reads_the_shape():
    model = Custom(lambda m, y: m.head(y.relu() + torch.zeros_like(y)[:, :, :1])).eval()
    options = {"layout": "graph", "placement": "post_activation"}
    converted = retrofit.add_batchnorm(model, [X], progress=False, **options)
    code = converted.code.replace(" ", "")
    assert "self.body_bn(relu" in code
    assert torch.equal(converted(X), model(X))


@pytest.mark.parametrize("way", ["+=", "add_", "out"])
def test_a_tensor_that_forward_makes_and_writes_to_has_no_graph(way):
    class Adding(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            y, total = self.head(F.relu(self.one(x)).mean((2, 3))).sum(0), torch.zeros(2)
            if way == "out":
                return torch.add(total, y, out=total)
            if way == "add_":
                return total.add_(y)
            total += y
            return total

    with pytest.raises(RetrofitError, match="makes a tensor and writes to it"):
        retrofit.plan(Adding().eval(), layout="graph")


def test_in_a_graph_patterns_mean_modules_by_all_their_names_and_calls():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1))
            self.alias = self.part

        def forward(self, x):
            return F.relu(self.part(F.relu(self.part(x))))

    def chosen(**options):
        return len(retrofit.plan(Several().eval(), layout="graph", **options).inserted)

    assert chosen() == chosen(include="part.0") == chosen(include="alias.0") == 2
    assert chosen(include="part.0@1") == 1
    with pytest.warns(UserWarning, match="no BatchNorm is added"):
        retrofit.insert(
            Several().eval(), retrofit.plan(Several().eval(), layout="graph", exclude="alias.*")
        )


def test_what_forward_counts_is_not_counted_while_a_graph_is_checked():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count.add_(x.square().mean())  # of its input, or it were no part of the graph
            return self.head(F.relu(self.one(x)).mean((2, 3)))

    model = Counting().eval()
    retrofit.add_batchnorm(model, [X], layout="graph", progress=False)
    assert model.count == 0
