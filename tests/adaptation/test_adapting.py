"""`adapting`: statistics that follow a stream, against all that has passed, in float64."""

import copy
import math

import nets
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from nets import norms
from torch import nn

import retrofit
from retrofit import NonFiniteError, RetrofitError

X = nets.images(24, 3, 9, 9) + torch.linspace(-1, 2, 24).view(-1, 1, 1, 1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.first = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.deep, self.second = nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8)
        self.drop, self.last = nn.Dropout(0.5), nn.BatchNorm1d(8)
        nets.make_stale(self)

    def forward(self, x):
        x = F.relu(self.first(self.conv(x)))
        return self.last(self.drop(F.relu(self.second(self.deep(x)))).mean((2, 3)))


class Reference:
    """Blends what has come to each BatchNorm so far with what that had, by the definition."""

    def __init__(self, model, prior, window):
        self.prior, self.window = prior, window
        self.old = {
            p: (n.running_mean.double(), n.running_var.double()) for p, n in norms(model).items()
        }
        self.seen = {path: [] for path in self.old}
        for path, norm in norms(model).items():
            norm.register_forward_pre_hook(lambda n, args, path=path: self.settle(path, n, args[0]))

    def settle(self, path, norm, x):
        self.seen[path].append(x.double())
        parts, later, weights = self.seen[path], 0, []
        for part in reversed(parts):
            weights.insert(0, torch.full((len(part),), math.exp(-later / self.window)))
            later += len(part)
        weights = torch.cat(weights).double()
        values = torch.cat(parts).flatten(2) if x.dim() > 2 else torch.cat(parts).unsqueeze(2)
        size = values.shape[2]
        w = weights.view(-1, 1, 1)
        count = weights.sum() * size
        if count < 2:
            return
        mean = (w * values).sum((0, 2)) / count
        var = (w * (values - mean.view(-1, 1)).square()).sum((0, 2)) / (count - 1)
        new = weights.sum() / (weights.sum() + self.prior)
        for buffer, old, value in zip(
            (norm.running_mean, norm.running_var), self.old[path], (mean, var), strict=True
        ):
            buffer.copy_(old.lerp(value, new))


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=10).filter(lambda sizes: sum(sizes) <= 23),
    st.sampled_from([0, 1, 16, 64]),
    st.sampled_from([None, 1, 8, 100.0]),
)
def test_each_batch_is_answered_with_the_blend_of_the_old_and_all_that_has_passed(
    sizes, prior, window
):
    ours, theirs = nets.build(Net).eval(), nets.build(Net).eval()
    Reference(theirs, prior, window or math.inf)
    with torch.no_grad(), retrofit.adapting(ours, prior=prior, window=window) as stream:
        for x in X.split([*sizes, 24 - sum(sizes)]):
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
        assert stream.images == 24
        for path, norm in norms(theirs).items():
            found = norms(ours)[path]
            torch.testing.assert_close(found.running_mean, norm.running_mean, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found.running_var, norm.running_var, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:the statistics (of|are)")
def test_a_first_batch_is_answered_as_after_recalibrate():
    ours, theirs = nets.build(Net).eval(), nets.build(Net).eval()
    retrofit.recalibrate(theirs, [X], layerwise=True, prior=64, progress=False)
    with torch.no_grad(), retrofit.adapting(ours):
        torch.testing.assert_close(ours(X), theirs(X))


def test_at_the_end_the_model_is_as_it_was_bit_for_bit():
    model = nets.build(Net).train()
    model.second.eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    with torch.no_grad(), retrofit.adapting(model) as stream:
        model(X)
        assert not torch.equal(model.first.running_mean, before["first.running_mean"])
        stream.reset()
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        assert stream.images == 0
        model(X)
        assert repr(stream) == "Adapting(3 BatchNorms, after 24 images)"
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_pre_hooks for m in model.modules())
    stream.remove()  # has nothing left to do
    model.first.running_mean.zero_()
    stream.remove()
    assert not model.first.running_mean.any()


def test_after_a_reset_another_stream_begins():
    model = nets.build(Net)
    with torch.no_grad(), retrofit.adapting(model) as stream:
        first = model(X)
        assert not torch.equal(model(X), first)
        stream.reset()
        assert torch.equal(model(X), first)


def test_one_value_for_each_channel_has_no_variance_and_two_have():
    model = nn.Sequential(nn.BatchNorm1d(3))
    x = nets.images(3, 3)
    with torch.no_grad(), retrofit.adapting(model, prior=0):
        assert torch.equal(model(x[:1]), F.batch_norm(x[:1], torch.zeros(3), torch.ones(3)))
        model(x[1:])
        torch.testing.assert_close(model[0].running_var, x.var(0))


def test_a_batch_without_images_changes_nothing():
    model = nets.build(Net).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad(), retrofit.adapting(model) as stream:
        assert model(X[:0]).shape == (0, 8)
        assert stream.images == 0
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_an_image_that_gives_nan_is_named_and_not_learned_from():
    model = nets.build(Net)
    bad = X[:2].clone()
    bad[1, 0, 3, 3] = float("nan")
    with torch.no_grad(), retrofit.adapting(model) as stream:
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(NonFiniteError, match="NaN or Inf at first for item 1 of the batch"):
            model(bad)
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        assert stream.images == 0
        assert model(X).isfinite().all()


def test_gradients_flow_as_for_tent():
    model = nets.build(Net)
    with retrofit.adapting(model):
        model(X).square().mean().backward()
    assert all(norm.weight.grad.isfinite().all() for norm in norms(model).values())


def test_a_copy_made_meanwhile_follows_nothing():
    model = nets.build(Net)
    with torch.no_grad(), retrofit.adapting(model) as stream:
        twin = copy.deepcopy(model)
        twin(X)
        assert stream.images == 0
        assert torch.equal(twin.first.running_mean, model.first.running_mean)


def test_what_has_passed_is_known_after_the_end():
    model = nets.build(Net)
    with torch.no_grad(), retrofit.adapting(model) as stream:
        model(X)
        model(X[:5])
    model(X)
    assert stream.images == len(X) + 5
    assert repr(stream).endswith("removed after 29 images)")
    stream.remove()
    assert stream.images == len(X) + 5
    with pytest.raises(RetrofitError, match="was removed, and adapts no more"), stream:
        pass
    with pytest.raises(RetrofitError, match="was removed, and adapts no more"):
        stream.reset()


def test_what_data_parallel_holds_is_followed():
    model = nets.build(Net)
    with torch.no_grad(), retrofit.adapting(nn.DataParallel(model)) as stream:
        model(X)
        assert stream.layers == ("first", "second", "last")
        assert stream.images == 24


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3)), {}, "this Sequential has no BatchNorm"),
        (Net(), {"prior": -1}, "prior must be a number of images from 0 up, not -1"),
        (Net(), {"prior": math.inf}, "prior must be"),
        (Net(), {"window": 0.5}, "window must be a number of images from 1 up, not 0.5"),
        ("vgg16", {}, "adapting"),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)
def test_what_cannot_be_adapted_is_named(model, options, message):
    with pytest.raises(RetrofitError, match=message):
        retrofit.adapting(model, **options)


def test_training_and_a_second_stream_are_refused():
    model = nets.build(Net)
    with retrofit.adapting(model):
        with pytest.raises(RetrofitError, match=r"first follows a stream already .*: remove\(\)"):
            retrofit.adapting(model)
        model.train()
        with pytest.raises(RetrofitError, match="first is in training mode"):
            model(X)
    retrofit.adapting(model).remove()
    model.first.running_var.fill_(float("nan"))
    with pytest.raises(RetrofitError, match="running statistics of first hold a NaN"):
        retrofit.adapting(model)
    assert not any(m._forward_pre_hooks for m in model.modules())
