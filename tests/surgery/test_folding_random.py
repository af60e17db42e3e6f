"""Any small network with BatchNorms of all kinds: folded, it computes what float64 does.

What must stay is known from how it was drawn.
"""

import copy

import torch
from hypothesis import given
from hypothesis import strategies as st
from test_folding_kinds import MyBatchNorm, OfTheBatch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.utils import parametrizations
from torchvision.ops import FrozenBatchNorm2d

import retrofit
from retrofit.surgery.affine_map import batchnorms
from retrofit.surgery.folding import folded

NORMS = [
    nn.BatchNorm2d,
    lambda c: nn.BatchNorm2d(c, affine=False),
    nn.SyncBatchNorm,
    BatchNormAct2d,
    lambda c: BatchNormAct2d(c, act_layer=nn.Hardswish, drop_layer=nn.Dropout),
    FrozenBatchNorm2d,
    MyBatchNorm,
]
CONVS = [
    lambda c: nn.Conv2d(c, c, 3, padding=1, bias=False),
    lambda c: nn.Conv2d(c, c, 1, groups=c),
    lambda c: nn.ConvTranspose2d(c, c, 3, padding=1, groups=2),
    lambda c: parametrizations.weight_norm(nn.Conv2d(c, c, 1)),
]


class Skip(nn.Module):
    """x + block(x), or the block's norm over the sum."""

    def __init__(self, block, norm):
        super().__init__()
        self.block, self.norm = block, norm

    def forward(self, x):
        return self.norm(x + self.block(x))


@st.composite
def pieces(draw, channels):
    """(module, how many of its BatchNorms must stay)."""
    conv, norm = draw(st.sampled_from(CONVS))(channels), draw(st.sampled_from(NORMS))(channels)
    kind = draw(st.sampled_from(["pair", "pair", "before", "pooled", "batch", "spectral", "skip"]))
    if kind == "pair":
        return nn.Sequential(conv, nn.Identity(), norm, nn.LeakyReLU()), 0
    if kind == "before":
        return nn.Sequential(nn.Tanh(), norm, conv), 1
    if kind == "pooled":
        return nn.Sequential(conv, nn.AvgPool2d(3, 1, 1), norm), 1
    if kind == "batch":
        return nn.Sequential(conv, OfTheBatch(channels)), 1
    if kind == "spectral":
        spectral = parametrizations.spectral_norm(nn.Conv2d(channels, channels, 1))
        return nn.Sequential(spectral, norm), 1
    return Skip(nn.Sequential(conv, nn.BatchNorm2d(channels)), norm), 1


@st.composite
def networks(draw):
    """(network with statistics of its own data, how many of its BatchNorms must stay)."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    channels = draw(st.sampled_from([2, 4, 6]))
    drawn = [draw(pieces(channels)) for _ in range(draw(st.integers(1, 5)))]
    model = nn.Sequential(nn.Conv2d(3, channels, 1), *(piece for piece, _ in drawn))
    for norm in batchnorms(model).values():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.1, 3)
        for tensor in (norm.weight, norm.bias):
            if tensor is not None:
                nn.init.normal_(tensor, mean=0.5)
    with torch.no_grad():  # moves the statistics of those that learn them
        model.train()(torch.randn(8, 3, 6, 6))
    return model.eval(), sum(stay for _, stay in drawn)


@given(networks(), st.booleans())
def test_any_network_computes_the_same_once_folded_and_keeps_what_must_stay(drawn, shown):
    model, stay = drawn
    x = torch.randn(3, 3, 6, 6)
    state = copy.deepcopy(model.state_dict())
    result = folded(model, example=x if shown else None)
    assert len(result.left) == len(batchnorms(result.model)) == stay
    assert retrofit.unfoldable(result.model).keys() == result.left.keys()
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
        error = (result.model(x) - expected).abs().max()
    assert error <= 1e-4 * expected.abs().max() + 1e-6
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
