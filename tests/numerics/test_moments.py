"""Moments against an independent reference: float64, two passes, all data at once."""

import copy

import nets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import retrofit
from retrofit import MomentObserver


def observer(channels, dims=2):
    return MomentObserver("layer", channels, dims, None).eval()


def reference(x):
    """Two passes over the whole sample in float64."""
    x = x.double().movedim(1, 0).flatten(1)
    mean = x.mean(1)
    return mean, (x - mean[:, None]).square().sum(1) / (x.shape[1] - 1)


def learned(batches, channels, dims=2):
    ours = observer(channels, dims)
    for batch in batches:
        assert ours(batch) is batch
    moments = ours.moments()
    return moments.mean, moments.var


def assert_close(ours, theirs):
    """Mean to 1e-5 sigma plus its float32 rounding, variance to 1e-5 relative."""
    mean, var = theirs
    assert ((ours[0] - mean).abs() <= 1e-5 * var.sqrt() + mean.abs() * 2**-24).all()
    assert ((ours[1] - var).abs() <= 1e-5 * var).all()


@pytest.mark.parametrize("ratio", [0, 1, 10, 100])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [32, 1], ids=["32x32", "1x1"])
def test_moments_equal_the_reference(ratio, batch_size, layout, size):
    scale = torch.logspace(-3, 3, 6).view(1, 6, 1, 1)
    x = (nets.images(150, 6, size, size) + ratio) * scale  # 150: the last batch is short
    batches = [b.contiguous(memory_format=layout) for b in x.split(batch_size)]
    assert_close(learned(batches, 6), reference(x))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_moments_of_large_images_at_a_large_mean(layout):
    x = nets.images(3, 4, 224, 224) + 100
    assert_close(learned([x.contiguous(memory_format=layout)], 4), reference(x))


@pytest.mark.parametrize(("shape", "dims"), [((9, 3, 50), 1), ((5, 3, 6, 7, 8), 3)])
def test_other_numbers_of_axes(shape, dims):
    x = nets.images(*shape) * 3 + 5
    assert_close(learned(x.split(2), 3, dims), reference(x))
    if dims == 3:
        batches = [b.contiguous(memory_format=torch.channels_last_3d) for b in x.split(2)]
        assert_close(learned(batches, 3, dims), reference(x))


@pytest.mark.parametrize("shape", [(50, 6), (20, 7, 6), (9, 5, 4, 6)])
def test_channels_on_the_last_axis(shape):
    x = (nets.images(*shape) + 3) * torch.logspace(-3, 3, 6)
    ours = MomentObserver("layer", 6, 0, None, last_axis=True).eval()
    for batch in x.split(7):
        assert ours(batch) is batch
    moments = ours.moments()
    assert_close((moments.mean, moments.var), reference(x.movedim(-1, 1)))
    assert ours.seen == len(x)


def test_rows_of_features_have_no_spatial_axes():
    x = nets.images(50, 6) + 3
    assert_close(learned(x.split(7), 6, dims=0), reference(x))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_order_and_the_grouping_of_the_data_do_not_matter(layout):
    x = (nets.images(96, 5, 12, 12) + torch.linspace(-20, 20, 96).view(-1, 1, 1, 1)).contiguous(
        memory_format=layout
    )
    order = torch.randperm(96, generator=torch.Generator().manual_seed(3))
    sigma = reference(x)[1].sqrt()
    one = learned(x.split(32), 5)
    for batches in (x[order].split(32), x.split(5), x.flip(0).split(1)):
        other = learned(batches, 5)
        assert ((one[0] - other[0]).abs() <= 1e-6 * sigma).all()
        assert ((one[1].sqrt() - other[1].sqrt()).abs() <= 1e-6 * sigma).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_read_exactly(dtype):
    x = (nets.images(20, 3, 9, 9) + 2).to(dtype)
    assert_close(learned(x.split(6), 3), reference(x))


def test_activations_whose_squares_leave_float32():
    x = nets.images(8, 3, 5, 5) * 1e25
    assert_close(learned([x], 3), reference(x))


def test_a_slice_is_refused_since_batchnorm_is_not_exact_there():
    x = nets.images(6, 20, 8, 8)[:, ::4, :, 1:7]
    with pytest.raises(retrofit.RetrofitError, match=r"layer returns .* exclude this layer"):
        observer(5)(x)


def test_on_the_last_axis_too_a_slice_or_a_single_row_is_refused():
    ours = MomentObserver("layer", 6, 0, None, last_axis=True).eval()
    with pytest.raises(retrofit.RetrofitError, match=r"layer returns .* exclude this layer"):
        ours(nets.images(6, 5, 4).transpose(0, 2))
    with pytest.raises(retrofit.RetrofitError, match=r"\(6,\): expected a batch with at least 2"):
        ours(nets.images(6))


def test_the_sample_that_is_not_finite_is_named_in_either_half_of_the_first_batch():
    for bad in (1, 6):
        x = nets.images(8, 5, 3)
        x[bad, 2, 0] = float("inf")
        with pytest.raises(retrofit.NonFiniteError, match=f"layer .* item {bad} of the batch"):
            MomentObserver("layer", 3, 0, None, last_axis=True).eval()(x)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=60),
    st.integers(1, 5),
    st.integers(0, 2**31),
)
def test_any_sequence_of_batch_sizes(sizes, channels, seed):
    x = nets.images(sum(sizes), channels, 3, 4, seed=seed) * 2 - 7
    ours = observer(channels)
    for batch in x.split(sizes):
        ours(batch)
    if len(x) > 1:
        first, second = ours.statistics.halves()
        assert (first.count + second.count == len(x) * 12).all()
        half = int(first.count[0]) // 12
        assert_close((first.mean, first.var), reference(x[:half]))
        assert_close((second.mean, second.var), reference(x[half:]))
    moments = ours.moments()
    assert (moments.count == len(x) * 12).all()
    assert_close((moments.mean, moments.var), reference(x))
    assert ours.seen == len(x)
    assert ours.statistics.batches.tolist() == [len(sizes)] * channels


def test_the_two_halves_are_about_equally_long():
    ours = observer(2)
    for batch in nets.images(1000, 2, 2, 2).split(10):
        ours(batch)
    first, second = ours.statistics.halves()
    assert 0.8 < float(first.count[0] / second.count[0]) < 1.25


def test_a_single_sample_has_no_halves_and_two_have():
    ours = observer(2)
    ours(nets.images(1, 2, 3, 3))
    assert [half.count.tolist() for half in ours.statistics.halves()] == [[9, 9], [0, 0]]
    ours(nets.images(1, 2, 3, 3))
    assert [half.count.tolist() for half in ours.statistics.halves()] == [[9, 9], [9, 9]]


def test_a_model_in_training_mode_is_refused_by_name():
    with pytest.raises(retrofit.RetrofitError, match=r"observer of layer .* training mode"):
        observer(3).train()(nets.images(2, 3, 4, 4))


def test_an_unbatched_input_is_refused_by_name():
    with pytest.raises(retrofit.RetrofitError, match=r"layer got .*\(3, 4, 4\).*batch axis"):
        observer(3)(nets.images(3, 4, 4))


def test_observers_keep_float64_and_their_moments_through_casts_and_copies():
    model = nn.Sequential(observer(3))
    model(nets.images(4, 3, 5, 5))
    before = model[0].moments()
    for moved in (copy.deepcopy(model).half(), copy.deepcopy(model).to("cpu", torch.bfloat16)):
        after = moved[0].moments()
        assert after.mean.dtype == torch.float64
        assert torch.equal(after.mean, before.mean)
        assert torch.equal(after.M2, before.M2)
    fresh = nn.Sequential(observer(3))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh[0].moments().M2, before.M2)


def test_observers_keep_no_graph():
    ours = observer(3)
    x = nets.images(4, 3, 5, 5).requires_grad_()
    ours(x * 2)
    assert not ours.mean.requires_grad


def test_a_site_without_data_is_named():
    with pytest.raises(retrofit.RetrofitError, match="layer saw no data"):
        observer(3).moments()
