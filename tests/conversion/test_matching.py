"""convert(prepared, match=...): channels with moments of other networks."""

import copy

import nets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import retrofit
from retrofit import ChannelMoments, RetrofitError

X = nets.images(24, 3, 12, 12)


def prepared(net, data=X):
    ready = retrofit.prepare(nets.build(net) if isinstance(net, type) else net)
    retrofit.calibrate(ready, data.split(8), progress=False)
    return ready


def plain(seed=0, width=6):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 8, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 8 * 8, 5)).eval()


def outputs_of(model, path, x):
    """float64, (C, elements), of what a module returns for x."""
    seen = []
    handle = model.get_submodule(path).register_forward_hook(lambda *a: seen.append(a[2]))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0].double().movedim(1, 0).flatten(1)


@pytest.mark.parametrize("net", [nets.Residual, nets.Concat, nets.SharedConv, nets.Grouped])
def test_its_own_moments_give_the_identity_bit_for_bit(net):
    ready = prepared(net)
    own = retrofit.convert(ready)
    matched = retrofit.convert(ready, match=retrofit.channel_moments(ready))
    for key, value in own.state_dict().items():
        assert torch.equal(matched.state_dict()[key], value), key
    with torch.no_grad():
        assert torch.equal(matched(X), ready(X))


def test_channel_moments_are_those_of_the_layers_outputs():
    model = plain()
    found = retrofit.channel_moments(prepared(model))
    assert list(found) == ["0", "2"]
    for path, (mean, var) in found.items():
        outputs = outputs_of(model, path, X)
        torch.testing.assert_close(mean, outputs.mean(1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(var, outputs.var(1), rtol=1e-5, atol=1e-6)


def test_settled_channels_have_the_moments_asked_for():
    target = {
        "0": ChannelMoments(torch.linspace(-1, 1, 6), torch.linspace(0.5, 2, 6)),
        "2": ChannelMoments(torch.linspace(3, 4, 8), torch.linspace(1, 9, 8)),
    }
    model = retrofit.convert(prepared(plain()), match=target)
    retrofit.recalibrate(model, X.split(8), layerwise=True, progress=False)
    for path, (mean, var) in target.items():
        found = outputs_of(model, path, X)
        torch.testing.assert_close(found.mean(1), mean.double(), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found.var(1), var.double(), rtol=1e-3, atol=1e-3)


def test_channels_that_were_constant_keep_their_moments():
    model = plain()
    with torch.no_grad():
        model[0].weight[2] = 0
    ready = prepared(model)
    moments = retrofit.channel_moments(ready)["0"]
    changed = retrofit.convert(ready, match={"0": (moments.mean + 1, moments.var + 1)})
    own = retrofit.convert(ready)
    for name in ("weight", "bias"):
        same = getattr(changed[0].bn, name) == getattr(own[0].bn, name)
        assert same.tolist() == [channel == 2 for channel in range(6)]


def test_moments_may_be_lists():
    ready = prepared(plain())
    mean, var = retrofit.channel_moments(ready)["2"]
    listed = retrofit.convert(ready, match={"2": (mean.tolist(), var.tolist())})
    with torch.no_grad():
        assert torch.equal(listed(X), ready(X))


def test_sites_without_an_entry_stay_the_identity():
    ready = prepared(plain())
    moments = retrofit.channel_moments(ready)["2"]
    changed = retrofit.convert(ready, match={"2": (moments.mean + 1, moments.var)})
    own = retrofit.convert(ready)
    for key, value in own.state_dict().items():
        assert torch.equal(changed.state_dict()[key], value) == (key != "2.bn.bias"), key


@settings(deadline=None)
@given(scale=st.floats(0.3, 1e3), shift=st.floats(-100, 100))  # variances far above eps
def test_a_layer_whose_outputs_were_scaled_and_shifted_is_brought_back(scale, shift):
    original, broken = plain(), plain()
    with torch.no_grad():
        broken[2].weight.mul_(scale)
        broken[2].bias.mul_(scale).add_(shift)
    target = retrofit.channel_moments(prepared(original))
    repaired = retrofit.convert(prepared(broken), match=target)
    with torch.no_grad():
        close = {"rtol": 1e-3, "atol": 1e-3 * max(1, abs(shift) / scale)}
        torch.testing.assert_close(repaired(X), original(X), **close)


def test_a_matched_network_folds_into_a_plain_one_that_computes_the_same():
    target = retrofit.channel_moments(prepared(plain(seed=1)))
    matched = retrofit.convert(prepared(plain()), match=target)
    folded = retrofit.fold(matched)
    assert folded.state_dict().keys() == plain().state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(folded(X), matched(X), rtol=1e-4, atol=1e-5)


NARROW = retrofit.channel_moments(prepared(plain(width=4)))


@pytest.mark.parametrize(
    ("match", "message"),
    [
        (NARROW, r"does not fit this network: 0 has 6 channels, its mean and variance \(4,\)"),
        ({"features.0": NARROW["2"]}, "features.0 gets no BatchNorm"),
        ({"2": (torch.zeros(8), -torch.ones(8))}, "2 has a NaN, an Inf or a negative variance"),
        ({"2": (torch.full((8,), torch.nan), torch.ones(8))}, "2 has a NaN, an Inf or a negative"),
        ({"2": (torch.zeros(8), torch.full((8,), torch.inf))}, "2 has a NaN, an Inf or a negative"),
        ({f"x{i}": NARROW["2"] for i in range(5)}, "x2 gets no BatchNorm; and 2 more"),
    ],
)
def test_moments_that_do_not_fit_are_named_and_nothing_is_changed(match, message):
    ready = prepared(plain())
    before = copy.deepcopy(ready.state_dict())
    with pytest.raises(RetrofitError, match=message):
        retrofit.convert(ready, match=match)
    for key, value in before.items():
        assert torch.equal(ready.state_dict()[key], value)
