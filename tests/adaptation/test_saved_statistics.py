"""Handles of `recalibrate` and `adapting` upon each other, removed in any order."""

import copy
import gc
import pickle

import nets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import retrofit

pytestmark = pytest.mark.filterwarnings("ignore:the statistics (of|are)", "ignore:the data never")


class Net(nn.Module):
    """Reaches its second BatchNorm with large batches alone."""

    def __init__(self):
        super().__init__()
        self.conv, self.first = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.second = nn.BatchNorm2d(6)
        nets.make_stale(self)

    def forward(self, x):
        x = self.first(self.conv(x))
        return self.second(x) if len(x) > 4 else x


def recalibrated(images):
    return lambda model, seed: retrofit.recalibrate(
        model, [nets.images(images, 3, 8, 8, seed=seed)], progress=False
    )


def streaming(model, seed):
    handle = retrofit.adapting(model)
    model(nets.images(6, 3, 8, 8, seed=seed))
    return handle


WAYS = [recalibrated(4), recalibrated(8), streaming]


def statistics(model):
    return {name: t.clone() for name, t in model.state_dict().items() if "running" in name}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@given(st.permutations(WAYS), st.permutations(range(3)), st.sets(st.integers(0, 2)))
def test_when_all_are_removed_the_model_is_as_it_was_whatever_the_order(ways, order, twice):
    model = nets.build(Net).eval()
    before = copy.deepcopy(model.state_dict())
    ways.sort(key=lambda way: way is streaming)  # it lets none come after it
    handles = [way(model, seed) for seed, way in enumerate(ways)]
    for index in order:
        handles[index].remove()
        if index in twice:
            handles[index].remove()
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize("later", [recalibrated(8), streaming])
def test_an_earlier_one_takes_the_model_back_to_before_it(later):
    model = nets.build(Net).eval()
    before = statistics(model)
    with recalibrated(8)(model, 0):
        forgotten = later(model, 1)
        assert not same(before, statistics(model))
    assert same(before, statistics(model))
    forgotten.remove()
    assert same(before, statistics(model))


def test_a_later_one_is_then_removed_too():
    model = nets.build(Net).eval()
    earlier, later = recalibrated(8)(model, 0), recalibrated(8)(model, 1)
    earlier.remove()
    assert "removed" in repr(later)
    with pytest.raises(retrofit.RetrofitError, match="this handle was removed"), later:
        pass
    model.first.running_mean.fill_(3)  # of a training in between
    later.remove()
    assert (model.first.running_mean == 3).all()


def pickled(both):
    return pickle.loads(pickle.dumps(both))  # noqa: S301


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_handles_are_copied_with_their_model(copied):
    model = nets.build(Net).eval()
    before = statistics(model)
    handles = [recalibrated(8)(model, 0), recalibrated(8)(model, 1)]
    new = statistics(model)
    other, others = copied((model, handles))
    others[0].remove()
    others[1].remove()
    assert same(before, statistics(other))
    assert same(new, statistics(model))
    handles[1].remove()
    handles[0].remove()
    assert same(before, statistics(model))


def test_a_stream_whose_statistics_cannot_be_restored_ends_all_the_same():
    model = nets.build(Net).eval()
    handle = streaming(model, 0)
    model.first.running_mean = None
    with pytest.raises(AttributeError):
        handle.remove()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_stream_goes_on_from_what_was_there_before_the_one_that_is_removed():
    model, alone = nets.build(Net).eval(), nets.build(Net).eval()
    earlier = recalibrated(8)(model, 0)
    x = nets.images(6, 3, 8, 8)
    with retrofit.adapting(model) as stream, retrofit.adapting(alone):
        earlier.remove()
        assert torch.equal(model(x), alone(x))
        stream.reset()
        assert same(statistics(model), statistics(nets.build(Net)))


@pytest.mark.parametrize("layerwise", [False, True])
def test_nothing_is_recalibrated_that_follows_a_stream(layerwise):
    model = nets.build(Net).eval()
    with retrofit.adapting(model):
        before = statistics(model)
        with pytest.raises(retrofit.RetrofitError, match=r"first follows a stream .*: remove\(\)"):
            retrofit.recalibrate(model, [nets.images(8, 3, 8, 8)], layerwise=layerwise)
        assert same(before, statistics(model))
    retrofit.recalibrate(model, [nets.images(8, 3, 8, 8)], layerwise=layerwise, progress=False)


def test_a_handle_that_nobody_holds_is_no_longer_in_the_way():
    model = nets.build(Net).eval()
    recalibrated(8)(model, 0)  # for good
    gc.collect()
    kept = statistics(model)
    with recalibrated(8)(model, 1):
        pass
    assert same(kept, statistics(model))
