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


def test_a_graph_that_was_not_converted_absorbs_into_functions_too():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel, self.norm = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(F.conv2d(x, self.kernel, padding=1))

    model, x = trained(Normed()), nets.images(2, 3, 6, 6)
    assert_folded(model, x, left=["norm"])
    assert "conv2d), whose weight can change in a torch.fx" in retrofit.unfoldable(model)["norm"]
    folded = assert_folded(torch.fx.symbolic_trace(model), x)
    assert list(folded.state_dict()) == ["kernel", "kernel_bias"]


def test_a_parameter_that_serves_two_functions_absorbs_nothing():
    _, converted, _ = functional(["conv2d_2_bn"])
    assert "conv2d_2_bn" in batchnorms(converted)
    before = copy.deepcopy(converted.state_dict())
    with pytest.raises(retrofit.RetrofitError, match="conv2d@2 is a function: its weight is no"):
        retrofit.fold(converted)
    assert all(torch.equal(value, before[key]) for key, value in converted.state_dict().items())


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
