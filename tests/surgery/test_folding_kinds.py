"""What is folded without a plan: BatchNorms of all kinds, layers of all kinds, views between.

The reference is the model itself in float64.
"""

import copy

import nets
import pytest
import torch
import torch.nn.functional as F
from normed_networks import MyBatchNorm, OfTheBatch, trained
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from torch import nn
from torch.nn.utils import parametrizations, weight_norm
from torchvision.ops import FrozenBatchNorm2d

import retrofit
from retrofit.surgery.affine_map import batchnorms


def assert_folded(model, x, *, left=(), example=None):
    """Fold and return it; it computes the same, and `left` are the BatchNorms that stay."""
    assert list(retrofit.unfoldable(model, example=example)) == list(left)
    if left:
        with pytest.warns(UserWarning, match=rf"{len(left)} of \d+ BatchNorms stay"):
            folded = retrofit.fold(model, example=example)
    else:
        folded = retrofit.fold(model, example=example)
    assert list(batchnorms(folded)) == list(left)
    with torch.no_grad():
        model(x)  # the weight under weight_norm can then be copied
        expected = copy.deepcopy(model).double()(x.double())
        error = (folded(x) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5
    return folded


# --- BatchNorms --------------------------------------------------------------------------------


class OwnEps(nn.BatchNorm2d):
    """A subclass whose eps is not the one that it says."""

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=0.1)


class Nothing(nn.BatchNorm2d):
    """A subclass that adds nothing."""


class WithPReLU(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.PReLU(channels, init=0.3)

    def forward(self, x):
        return self.act(super().forward(x))


class Positive(nn.Module):
    def forward(self, weight):
        return weight.abs()


def parametrized(channels):
    norm = nn.BatchNorm2d(channels)
    return nn.utils.parametrize.register_parametrization(norm, "weight", Positive())


KINDS = [
    parametrized,
    nn.SyncBatchNorm,
    Nothing,
    OwnEps,
    MyBatchNorm,
    FrozenBatchNorm2d,
    lambda c: FrozenBatchNorm2d(c, eps=0.1),
    BatchNormAct2d,
    lambda c: BatchNormAct2d(c, act_layer=nn.SiLU, drop_layer=lambda: nn.Dropout(0.5)),
    lambda c: BatchNormAct2d(c, apply_act=False),
    FrozenBatchNormAct2d,
    WithPReLU,
]


@pytest.mark.parametrize("norm", KINDS)
def test_every_kind_of_batchnorm_that_scales_and_shifts_is_folded(norm):
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.Conv2d(4, 2, 1)))
    assert_folded(model, nets.images(2, 3, 7, 7))


def test_the_activation_of_a_batchnorm_keeps_its_name_and_key():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), WithPReLU(4)))
    folded = assert_folded(model, nets.images(2, 3, 7, 7))
    assert list(folded.state_dict()) == ["0.weight", "0.bias", "1.act.weight"]
    plain = trained(nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4, apply_act=False)))
    assert type(retrofit.fold(plain)[1]) is nn.Identity


class ActivatedFirst(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x.relu())


@pytest.mark.parametrize("norm", [OfTheBatch, ActivatedFirst])
def test_a_batchnorm_that_computes_something_else_stays(norm):
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), norm(4)))
    assert_folded(model, nets.images(2, 3, 7, 7), left=["1"])


# --- layers ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("normed", [weight_norm, parametrizations.weight_norm])
@pytest.mark.parametrize(
    ("layer", "options"),
    [
        (lambda: nn.Conv2d(4, 4, 3, groups=2), {}),
        (lambda: nn.Conv2d(4, 4, 3, bias=False), {}),
        (lambda: nn.ConvTranspose2d(4, 4, 3), {"dim": 1}),
    ],
    ids=["grouped", "without bias", "transposed"],
)
def test_under_weight_norm_the_magnitudes_are_scaled(normed, layer, options):
    model = trained(nn.Sequential(normed(layer(), **options), nn.BatchNorm2d(4)))
    folded = assert_folded(model, nets.images(2, 4, 7, 7))
    directions = [k for k in model.state_dict() if k.endswith(("weight_v", "original1"))]
    assert len(directions) == 1
    assert torch.equal(folded.state_dict()[directions[0]], model.state_dict()[directions[0]])


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    "layer",
    [
        lambda: weight_norm(nn.Conv2d(4, 4, 3), dim=1),
        lambda: weight_norm(nn.Conv2d(4, 4, 3), dim=None),
        lambda: parametrizations.weight_norm(nn.ConvTranspose2d(4, 4, 3)),
        lambda: parametrizations.weight_norm(nn.ConvTranspose2d(4, 4, 3, groups=2), dim=1),
        lambda: parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)),
        lambda: nn.utils.spectral_norm(nn.Conv2d(4, 4, 3)),
    ],
)
def test_another_parametrization_cannot_absorb_and_the_others_are_folded(layer):
    more = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model = trained(nn.Sequential(layer(), nn.BatchNorm2d(4), more))
    assert "its layer is parametrized" in retrofit.unfoldable(model)["1"]
    assert_folded(model, nets.images(2, 4, 7, 7), left=["1"])


class FunctionalConvs(nn.Module):
    """Convolutions as functions over parameters, one of them used twice."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3) * 0.2)
        self.up = nn.Parameter(torch.randn(4, 2, 2, 2) * 0.2)
        self.up_shift = nn.Parameter(torch.randn(4))
        self.twice = nn.Parameter(torch.randn(4, 4, 1, 1) * 0.4)

    def forward(self, x):
        x = F.relu(F.conv2d(x, self.weight, padding=1))
        x = F.relu(F.conv_transpose2d(x, self.up, self.up_shift, groups=2))
        return F.relu(F.conv2d(F.relu(F.conv2d(x, self.twice)), weight=self.twice))


def functional(norms):
    torch.manual_seed(0)
    model = FunctionalConvs().eval()
    x = nets.images(8, 3, 6, 6)
    converted = retrofit.add_batchnorm(model, [x], layout="graph", progress=False)
    for path, norm in batchnorms(converted).items():
        if path in norms:
            norm.weight.data.mul_(-1.5)
            norm.bias.data.add_(0.5)
    return model, converted, x


def test_a_function_absorbs_into_the_parameters_that_it_is_called_with():
    model, converted, x = functional(["conv2d_bn", "conv_transpose2d_bn"])
    folded = retrofit.fold(converted)
    assert folded.state_dict().keys() - model.state_dict().keys() == {"bias"}
    with torch.no_grad():
        expected = copy.deepcopy(converted).double()(x.double())
        torch.testing.assert_close(folded(x).double(), expected, rtol=1e-4, atol=1e-5)
    again = copy.deepcopy(folded)
    again.load_state_dict(folded.state_dict())
    assert torch.equal(again(x), folded(x))


class Normed(nn.Module):
    """`use(self, x)` calls convolutions as functions, and the BatchNorm."""

    def __init__(self, use):
        super().__init__()
        self.kernel, self.norm = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.BatchNorm2d(4)
        self.conv, self.use = nn.Conv2d(3, 4, 3, padding=1), use

    def forward(self, x):
        return self.use(self, x)


def right_after(m, x):
    return m.norm(F.conv2d(x, m.kernel, padding=1))


def without_a_bias_by_place(m, x):
    return m.norm(F.conv2d(x, m.kernel, None, 1, 1))


def beside_a_bias(m, x):
    return m.norm(F.conv2d(x, m.conv.weight, padding=1)) + m.conv.bias.view(-1, 1, 1)


def test_a_graph_that_was_not_converted_absorbs_into_functions_too():
    model, x = trained(Normed(right_after)), nets.images(2, 3, 6, 6)
    assert_folded(model, x, left=["norm"])
    assert "conv2d), whose weight can change in a torch.fx" in retrofit.unfoldable(model)["norm"]
    folded = assert_folded(torch.fx.symbolic_trace(model), x)
    assert list(folded.state_dict()) == ["kernel", "kernel_bias"]


@pytest.mark.parametrize(
    ("use", "keys"),
    [
        (without_a_bias_by_place, {"kernel", "kernel_bias"}),
        (beside_a_bias, {"conv.weight", "conv.bias", "conv.bias_"}),
    ],
)
def test_the_new_bias_of_a_function_takes_the_place_of_none_and_a_name_that_is_free(use, keys):
    graph = torch.fx.symbolic_trace(trained(Normed(use)))
    assert assert_folded(graph, nets.images(2, 3, 6, 6)).state_dict().keys() == keys


def called_twice(m, x):
    return m.norm(F.conv2d(x, m.kernel)) + m.norm(F.conv2d(x, m.kernel))


def used_elsewhere(m, x):
    y = F.conv2d(x, m.kernel)
    return y + m.norm(y)


def through_a_view(m, x):
    return m.norm(F.conv2d(x, m.kernel).flatten(2).unsqueeze(-1))


def computed_bias(m, x):
    return m.norm(F.conv2d(x, m.kernel, m.conv.bias * 2))


def weight_of_a_layer(m, x):
    return m.norm(F.conv2d(x, m.conv.weight, padding=1)) + m.conv(x)


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (called_twice, "can absorb only one that is called once, right after it"),
        (used_elsewhere, "can absorb only one that is called once, right after it"),
        (through_a_view, "can absorb only one that is called once, right after it"),
        (computed_bias, "its bias or groups are computed"),
        (weight_of_a_layer, "its weight is no parameter that serves it alone"),
    ],
)
def test_what_a_function_in_a_graph_cannot_absorb_stays_for_the_right_reason(use, words):
    graph = torch.fx.symbolic_trace(trained(Normed(use)))
    assert words in retrofit.unfoldable(graph)["norm"]
    assert_folded(graph, nets.images(2, 3, 6, 6), left=["norm"])


def test_a_parameter_that_serves_two_functions_absorbs_nothing():
    _, converted, _ = functional(["conv2d_2_bn"])
    assert "conv2d_2_bn" in batchnorms(converted)
    before = copy.deepcopy(converted.state_dict())
    with pytest.raises(retrofit.RetrofitError, match="conv2d@2 is a function: its weight is no"):
        retrofit.fold(converted)
    assert all(torch.equal(value, before[key]) for key, value in converted.state_dict().items())


def test_a_function_that_was_moved_away_from_its_batchnorm_absorbs_nothing():
    _, converted, x = functional(["conv2d_bn"])
    (norm,) = (node for node in converted.graph.nodes if node.target == "conv2d_bn")
    with converted.graph.inserting_before(norm):
        norm.args = (converted.graph.call_function(F.relu, norm.args),)
    converted.recompile()
    expected = converted(x)
    with pytest.raises(retrofit.RetrofitError, match="conv2d is a function: there is no"):
        retrofit.fold(converted)
    assert torch.equal(converted(x), expected)


# --- views between -----------------------------------------------------------------------------


class Between(nn.Module):
    """A layer, a view, and a BatchNorm."""

    def __init__(self, layer, norm, view):
        super().__init__()
        self.layer, self.norm, self.view = layer, norm, view

    def forward(self, x):
        return self.view(self.layer(x), self.norm)


def flattened(y, norm):  # as in LeViT
    return norm(y.flatten(0, 1)).reshape_as(y)


def transposed(y, norm):
    return norm(y.transpose(1, 2)).transpose(1, 2)


def by_size(y, norm):
    return norm(y.reshape(-1, y.shape[-1])).view(y.size())


def shortened(y, norm):  # as causal convolutions are
    return norm(y[:, :, :-2].contiguous())


VIEWS = [
    (nn.Linear(5, 6), nn.BatchNorm1d(6), by_size, (4, 6, 5), True),
    (nn.Linear(5, 6), nn.BatchNorm1d(6), transposed, (4, 6, 5), True),
    (nn.Linear(5, 6), nn.BatchNorm1d(6), flattened, (4, 6, 5), False),
    (nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), shortened, (4, 3, 9), True),
    (nn.Conv2d(3, 6, 3), nn.BatchNorm1d(6), lambda y, n: n(y.flatten(2)), (4, 3, 9, 9), True),
]


@pytest.mark.parametrize(("layer", "norm", "view", "shape", "sure"), VIEWS)
def test_views_are_followed_where_the_channels_stay_those_of_the_layer(
    layer, norm, view, shape, sure
):
    model, x = trained(Between(layer, norm, view)), nets.images(*shape)
    assert_folded(model, x, left=[] if sure else ["norm"])
    assert_folded(model, x, example=x)


@pytest.mark.parametrize(
    ("layer", "norm", "view", "shape"),
    [
        (nn.Linear(5, 6), nn.BatchNorm1d(6), lambda y, n: n(y), (4, 6, 5)),
        (nn.Linear(5, 6), nn.BatchNorm1d(6), flattened, (4, 5, 6, 5)),
        (nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), transposed, (4, 3, 8)),
        (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), lambda y, n: n(y.mT.movedim(2, 1)), (4, 3, 8, 8)),
    ],
)
def test_a_batchnorm_of_another_axis_stays_also_where_the_sizes_are_the_same(
    layer, norm, view, shape
):
    model, x = trained(Between(layer, norm, view)), nets.images(*shape)
    assert_folded(model, x, left=["norm"])
    assert_folded(model, x, left=["norm"], example=x)


class Decorrelated(nn.Module):
    """Takes a covariance, for which all samples alike are not enough."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(5, 3), nn.BatchNorm1d(3)

    def forward(self, x):
        y = self.norm(self.layer(x))
        return torch.linalg.solve(y.mT.cov(), y.mT)


def test_a_network_that_does_not_run_on_numbers_of_channels_keeps_what_only_a_run_tells():
    model, x = trained(Decorrelated()), nets.images(64, 5)
    words = "whether it normalises the channels of its layer cannot be tried"
    assert retrofit.unfoldable(model, example=x) == {"norm": words}
    with pytest.warns(UserWarning, match="1 of 1 BatchNorms stay"):
        folded = retrofit.fold(model, example=x)
    assert torch.equal(folded(x), model(x))


def test_views_that_take_sizes_of_the_input_are_followed_in_a_run_alone():
    class Sized(Between):
        def forward(self, x):
            return self.norm(self.layer(x).view(x.shape[0] * x.shape[1], 6))

    model, x = trained(Sized(nn.Linear(5, 6), nn.BatchNorm1d(6), None)), nets.images(4, 6, 5)
    assert_folded(model, x, left=["norm"])
    assert_folded(model, x, example=x)


class Pooled(nn.Module):
    """A Linear layer over what `pool(x)` makes of pictures, of which only (N, F) is sure."""

    def __init__(self, pool):
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 5, 3, padding=1), pool
        self.layer, self.norm = nn.Linear(5, 6), nn.BatchNorm1d(6)

    def forward(self, x):
        return self.norm(self.layer(self.pool(self.conv(x))))


TWO_AXES = {
    "mean": lambda x: x.mean((2, 3)),
    "mean by name": lambda x: x.mean(dim=(-1, -2)),
    "two means": lambda x: x.mean(3).mean(2),
    "mean that keeps them": lambda x: x.mean((2, 3), keepdim=True).flatten(1),
    "reshape": lambda x: x.mean((2, 3), keepdim=True).reshape((-1, 5)),
}


@pytest.mark.parametrize("pool", TWO_AXES.values(), ids=TWO_AXES)
def test_the_mean_over_axes_of_known_number_has_a_known_rank(pool):
    assert_folded(trained(Pooled(pool)), nets.images(4, 3, 6, 6))


@pytest.mark.parametrize(
    "pool", [lambda x: x.mean(3).transpose(1, 2), lambda x: x[..., 0].mT.reshape((4, 6, 5))]
)
def test_a_batchnorm_of_the_middle_of_three_axes_stays_after_a_mean_or_reshape(pool):
    assert_folded(trained(Pooled(pool)), nets.images(4, 3, 6, 6), left=["norm"])


def test_linear_layers_of_two_inputs_do_not_tell_how_many_axes_these_have():
    class Mixer(nn.Module):
        """Both BatchNorms normalise the axis of time, which a pool makes another."""

        def __init__(self):
            super().__init__()
            self.one = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6))
            self.pool = nn.AdaptiveAvgPool2d((7, 5))
            self.other = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7))

        def forward(self, x):
            return self.one(x).sum(1), self.other(self.pool(x)).sum(1)

    model, x = trained(Mixer()), nets.images(4, 6, 5)
    for example in (None, x):
        assert list(retrofit.unfoldable(model, example=example)) == ["one.1", "other.1"]


def test_a_linear_layer_of_known_rank_needs_no_example():
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    head = nn.Sequential(pooled, nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU())
    assert_folded(trained(head), nets.images(4, 3, 5, 5))
    # (N, T, F) would need a T that is both 6 and 7.
    mlp = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 7))
    mlp.append(nn.BatchNorm1d(7))
    assert_folded(trained(mlp), nets.images(4, 3))
    alone = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6))
    assert "pass example" in retrofit.unfoldable(alone)["1"]
