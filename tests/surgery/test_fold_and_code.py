"""What a model's own code holds, asks or reads of its layers is the same once it is folded."""

import copy
import functools
import types

import nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from normed_networks import trained
from test_folding_kinds import assert_folded
from torch import nn

import retrofit


class Pair(nn.Module):
    """A convolution and its BatchNorm, which `forward` of the subclasses finds in its own way."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.hold()

    def hold(self):
        pass


# --- held elsewhere ------------------------------------------------------------------------------


class InList(Pair):
    def hold(self):
        self.steps = [self.conv, self.bn]

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x


class InDict(Pair):
    def hold(self):
        self.norms = {"a": {"b": self.bn}}

    def forward(self, x):
        return self.norms["a"]["b"](self.conv(x))


class AsPlainAttribute(Pair):
    def hold(self):
        object.__setattr__(self, "other", self.bn)

    def forward(self, x):
        return self.other(self.conv(x))


class InPartial(Pair):
    def hold(self):
        self.norm = functools.partial(lambda norm, x: norm(x), self.bn)

    def forward(self, x):
        return self.norm(self.conv(x))


class InObject(Pair):
    def hold(self):
        self.parts = types.SimpleNamespace(norm=self.bn)

    def forward(self, x):
        return self.parts.norm(self.conv(x))


HOLDING = [InList, InDict, AsPlainAttribute, InPartial, InObject]


@pytest.mark.parametrize("net", HOLDING)
@pytest.mark.parametrize("run", [False, True])
def test_a_batchnorm_that_is_held_elsewhere_too_is_not_applied_twice(net, run):
    x = nets.images(2, 3, 7, 7)
    assert_folded(trained(net()), x, example=x if run else None)


def test_a_container_of_the_conversion_that_is_held_elsewhere_is_gone_after_folding():
    class Held(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head, self.steps = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1), []

        def forward(self, x):
            y = self.steps[0](x) if self.steps else self.conv(x)
            return self.head(y.relu())

    converted = retrofit.insert(Held().eval())
    converted.steps = [converted.conv]
    trained(converted)
    folded, x = retrofit.fold(converted), nets.images(2, 3, 7, 7)
    torch.testing.assert_close(folded(x), converted(x), rtol=1e-4, atol=1e-5)
    assert folded.steps[0] is folded.conv


# --- asked for its type --------------------------------------------------------------------------


class Typed(Pair):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return y * 2 if isinstance(self.bn, nn.BatchNorm2d) else y


class Required(Pair):
    def forward(self, x):
        if not isinstance(self.bn, nn.BatchNorm2d):
            raise TypeError(self.bn)
        return self.bn(self.conv(x))


class Keyed(Pair):
    def forward(self, x):
        name = "normed" if x.sum() < 1e9 and isinstance(self.bn, nn.BatchNorm2d) else "plain"
        return {name: self.bn(self.conv(x))}


class Counted(Pair):
    def hold(self):
        self.more = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x):
        count = sum(isinstance(module, nn.BatchNorm2d) for module in self.modules())
        return self.more(self.bn(self.conv(x))) * (count > 0)


class OneTyped(Counted):
    def forward(self, x):
        x = self.bn(self.conv(x))
        for step in self.more:
            x = step(x) + 1 if isinstance(step, nn.BatchNorm2d) else step(x)
        return x


@pytest.mark.parametrize(
    ("net", "left"), [(Typed, ["bn"]), (OneTyped, ["more.1"]), (Counted, ["bn", "more.1"])]
)
@pytest.mark.parametrize("run", [False, True])
def test_a_batchnorm_whose_type_the_code_asks_for_stays(net, left, run):
    model, x = trained(net()), nets.images(2, 3, 7, 7)
    example = x if run else None
    assert_folded(model, x, left=left, example=example)
    assert "its type" in retrofit.unfoldable(model, example=example)[left[0]]


@pytest.mark.parametrize(("net", "run"), [(Required, False), (Required, True), (Keyed, True)])
def test_a_batchnorm_stays_without_which_the_code_stops_or_returns_another_name(net, run):
    model, x = trained(net()), nets.images(2, 3, 7, 7)
    with pytest.warns(UserWarning, match=r"1 of 1 BatchNorms stay: bn: .* its type"):
        folded = retrofit.fold(model, example=x if run else None)
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=0)


def test_a_network_that_returns_a_sparse_tensor_is_folded():
    class Sparse(Pair):
        def forward(self, x):
            return self.bn(self.conv(x)).to_sparse() if x.sum() < 1e9 else x

    model, x = trained(Sparse()), nets.images(2, 3, 7, 7)
    assert retrofit.unfoldable(model, example=x) == {}
    folded = retrofit.fold(model, example=x)
    torch.testing.assert_close(folded(x).to_dense(), model(x).to_dense(), rtol=1e-4, atol=1e-5)


def test_a_kernel_that_forward_makes_does_not_hinder_the_others():
    class Blurred(Pair):
        def forward(self, x):
            return F.conv2d(self.bn(self.conv(x)).relu(), torch.ones(4, 1, 3, 3), groups=4)

    model, x = trained(Blurred()), nets.images(2, 3, 7, 7)
    assert retrofit.unfoldable(model) == {}
    torch.testing.assert_close(retrofit.fold(model)(x), model(x), rtol=1e-4, atol=1e-4)


def test_code_that_differs_from_run_to_run_is_not_blamed_for_asking():
    class Counting(Pair):
        seen = []  # noqa: RUF012 - of the class, for all copies

        def forward(self, x):
            self.seen.append(0)
            y = self.bn(self.conv(x))
            return y + len(self.seen) if x.sum() < 1e9 else y

    model, x = trained(Counting()), nets.images(2, 3, 7, 7)
    assert retrofit.unfoldable(model, example=x) == {}


# --- read ----------------------------------------------------------------------------------------


READS = {
    "parameters": lambda self: next(self.conv.parameters()),
    "named_parameters": lambda self: dict(self.conv.named_parameters())["weight"],
    "state_dict": lambda self: self.conv.state_dict()["weight"],
    "_parameters": lambda self: self.conv._parameters["weight"],
    "vars": lambda self: vars(self.conv)["_parameters"]["weight"],
    "of all": lambda self: self.state_dict()["conv.weight"],
    "buffers": lambda self: dict(self.named_buffers())["bn.running_mean"],
}  # fmt: skip


class Reading(Pair):
    def __init__(self, read, *, in_branch=False):
        super().__init__()
        self.read, self.in_branch = read, in_branch

    def forward(self, x, more=False):
        y = self.bn(self.conv(x))
        return y * self.read(self).sum() if more or not self.in_branch else y


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("run", [False, True])
def test_a_layer_whose_weight_the_code_computes_with_keeps_its_batchnorm(read, run):
    model, x = trained(Reading(read)), nets.images(2, 3, 7, 7)
    example = x if run else None
    assert_folded(model, x, left=["bn"], example=example)
    assert "the model's own code reads" in retrofit.unfoldable(model, example=example)["bn"]


def test_a_factor_that_is_a_weight_is_seen_in_the_graph():
    class Scaling(Pair):
        def forward(self, x):
            return self.bn(self.conv(x)) * self.conv._parameters["weight"][0, 0, 0, 0]

    assert_folded(trained(Scaling()), nets.images(2, 3, 7, 7), left=["bn"])


def test_what_another_branch_reads_is_seen():
    model, x = trained(Reading(READS["parameters"], in_branch=True)), nets.images(2, 3, 7, 7)
    assert retrofit.unfoldable(model) == {
        "bn": "forward(more=True): the model's own code reads weight of it or of its layer"
    }
    folded = assert_folded(model, x, left=["bn"])
    torch.testing.assert_close(folded(x, more=True), model(x, more=True))


class Asking(Pair):
    """Asks what its parameters are, and uses the one that another module holds too."""

    def hold(self):
        self.kept = self.conv.weight
        self.kept_too = [self.conv.weight]

    def forward(self, x):
        first = next(self.parameters())
        count = sum(p.numel() for p in self.parameters() if p.requires_grad)
        y = self.bn(self.conv(x.to(first.dtype).to(first.device).type_as(first)))
        return y * min(count, 1) * self.kept.sum() * self.kept_too[0].sum()


@pytest.mark.parametrize("run", [False, True])
def test_a_layer_whose_weight_is_asked_for_its_dtype_or_held_elsewhere_is_folded(run):
    x = nets.images(2, 3, 7, 7)
    assert_folded(trained(Asking()), x, example=x if run else None)


# --- changed by forward --------------------------------------------------------------------------


class Changing(Pair):
    def __init__(self, change):
        super().__init__()
        self.other, self.change = nn.Parameter(torch.ones(4, 3, 3, 3)), change

    def forward(self, x):
        self.change(self)
        return self.bn(self.conv(x))


def other_data(model):
    next(model.conv.parameters()).data = model.other.data


CHANGES = {
    "another parameter": lambda m: m.conv._parameters.update(weight=m.other),
    "eps": lambda m: setattr(m.bn, "eps", 1.0),
    "batch statistics": lambda m: m.bn.train(),
    "loaded": lambda m: m.conv.load_state_dict({"weight": m.other}),
    "its data": other_data,
}


TRACED = ("another parameter", "eps", "batch statistics")  # the others torch.fx cannot follow


@pytest.mark.parametrize(
    ("name", "run"), [*((n, True) for n in CHANGES), *((n, False) for n in TRACED)]
)
def test_a_pair_that_forward_changes_stays(name, run):
    model, x = trained(Changing(CHANGES[name])), nets.images(2, 3, 7, 7)
    left = retrofit.unfoldable(model, example=x if run else None)
    assert "the model's own code" in left["bn"]
    with pytest.warns(UserWarning, match="1 of 1 BatchNorms stay"):
        folded = retrofit.fold(model, example=x if run else None)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), copy.deepcopy(model)(x))


def test_a_layer_that_is_called_with_other_weights_keeps_its_batchnorm():
    class Functional(Pair):
        def hold(self):
            self.other = nn.Parameter(torch.ones(4, 3, 3, 3))

        def forward(self, x):
            y = torch.func.functional_call(self.conv, {"weight": self.other}, (x,))
            return self.bn(y)

    x = nets.images(2, 3, 7, 7)
    assert_folded(trained(Functional()), x, left=["bn"], example=x)


# --- read out ------------------------------------------------------------------------------------


READ_OUT = {
    "numpy": lambda y: float(y.numpy().max()),
    "an array": lambda y: float(np.asarray(y).max()),
    "a list": lambda y: max(y.tolist()[0][0][0]),
    "equal": lambda y: 1 + torch.equal(y, y),
}


@pytest.mark.parametrize("read", READ_OUT.values(), ids=READ_OUT)
def test_a_layer_whose_values_the_code_reads_out_keeps_its_batchnorm(read):
    class ReadOut(Pair):
        def forward(self, x):
            y = self.conv(x)
            return self.bn(y) * (read(y) if x.sum() < 1e9 else 1)

    class Asked(Pair):
        def forward(self, x):
            y = self.conv(x)
            if not y.is_contiguous() or y.shape[0] > 1e9:
                raise ValueError(y)
            return self.bn(y) * float(x.sum())

    x = nets.images(2, 3, 7, 7)
    assert_folded(trained(ReadOut()), x, left=["bn"], example=x)
    assert_folded(trained(Asked()), x, example=x)
