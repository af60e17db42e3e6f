"""How far the moments can be trusted: standard errors over images, and `tolerance`."""

import functools
import math
import re
import warnings

import nets
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
)
from tqdm import tqdm

import retrofit
from retrofit import MomentObserver, RetrofitError
from retrofit.calibration.sample_errors import site_samples
from retrofit.numerics.channel_statistics import ChannelStatistics
from retrofit.running.progress import images_bar


def observer(channels):
    return MomentObserver("layer", channels, 2, None).eval()


def errors_over_images(x):
    """Of mean and std of (N, C, ...): all data at once in float64, two numbers for each image."""
    x = x.double().flatten(2)
    mean, sigma = x.mean((0, 2)), x.std((0, 2), correction=0)
    of_mean = x.mean(2).std(0) / math.sqrt(len(x))
    of_var = (x - mean[:, None]).square().mean(2).std(0) / math.sqrt(len(x))
    return of_mean, of_var / (2 * sigma)


def errors_over_unequal_images(images):
    """The same of a list of (C, ...) that differ in size: residual sums, as of any ratio."""
    images = [image.double().flatten(1) for image in images]
    every = torch.cat(images, 1)
    mean, var = every.mean(1, keepdim=True), every.var(1, correction=0, keepdim=True)
    scale = math.sqrt(len(images) / (len(images) - 1)) / every.shape[1]
    of_mean = torch.stack([(x - mean).sum(1) for x in images]).norm(dim=0) * scale
    of_var = torch.stack([((x - mean).square() - var).sum(1) for x in images]).norm(dim=0) * scale
    return of_mean, of_var / (2 * var.squeeze(1).sqrt())


def assert_errors(ours, expected, sigma):
    for one, other in zip(ours, expected, strict=True):
        assert ((one - other).abs() <= 1e-5 * other + 1e-7 * sigma).all()


def photos(n, channels, height, width, seed=1):
    """Bright ones and dark ones, flat ones and some rich in contrast."""
    level, contrast = nets.images(2, n, channels, 1, 1, seed=seed)
    return level + (0.3 + contrast.abs()) * nets.images(n, channels, height, width, seed=seed + 1)


def grey(n, seed=1):
    """Pictures of one colour each: a single independent number for each channel."""
    return nets.images(n, 3, 1, 1, seed=seed).expand(n, 3, 8, 8).contiguous()


def prepared(net=nets.root_sequential):
    return retrofit.prepare(nets.build(net))


def calibrated(data, **options):
    return retrofit.calibrate(prepared(), data, progress=False, **options)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3)), min_size=2, max_size=25),
    st.lists(st.floats(-1e4, 1e4), min_size=3, max_size=3),
    st.sampled_from([torch.contiguous_format, torch.channels_last]),
    st.integers(0, 2**31),
)
def test_standard_errors_are_those_over_images_however_the_data_comes(
    batches, offsets, layout, seed
):
    sizes, ranks = zip(*batches, strict=True)
    scale, offset = torch.tensor([[1e-3, 1, 1e3], offsets])[:, :, None, None]
    x = (photos(sum(sizes), 3, 5, 2, seed) + offset) * scale
    alone, each = observer(3), [observer(3) for _ in range(4)]
    for batch, rank in zip(x.split(sizes), ranks, strict=True):
        for one in (alone, each[rank]):
            one(batch.contiguous(memory_format=layout))
    merged = functools.reduce(ChannelStatistics.merge, (one.statistics for one in each))
    sigma = x.double().std((0, 2, 3))
    for one in (alone.statistics, merged):
        assert one.samples.tolist() == [len(x)] * 3
        assert one.batches.tolist() == [len(sizes)] * 3
        assert_errors(one.standard_errors(), errors_over_images(x), sigma)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=2, max_size=30),
    st.integers(0, 30),
    st.floats(-1e4, 1e4),
    st.integers(0, 2**31),
)
def test_standard_errors_of_images_of_different_sizes(shapes, cut, offset, seed):
    images = [offset + photos(1, 3, *shape, seed + i) for i, shape in enumerate(shapes)]
    first, second = observer(3), observer(3)
    for i, image in enumerate(images):
        (first if i < cut else second)(image)
    merged = first.statistics.merge(second.statistics)
    images = [image[0] for image in images]
    sigma = torch.cat([image.double().flatten(1) for image in images], 1).std(1)
    assert_errors(merged.standard_errors(), errors_over_unequal_images(images), sigma)


def assert_honest(estimates, errors):
    """The standard errors of many data sets are how far their estimates lie apart."""
    assert errors.square().mean().sqrt() / estimates.std() == pytest.approx(1, abs=0.15)


def test_estimates_from_many_data_sets_lie_as_far_apart_as_said():
    ours = observer(2000)  # each channel is a data set of its own, of 60 images
    for batch in (photos(60, 2000, 5, 5) + 3).split(16):
        ours(batch)
    of_mean, of_std = ours.statistics.standard_errors()
    assert_honest(ours.moments().mean, of_mean)
    assert_honest(ours.moments().var.sqrt(), of_std)


def test_they_do_so_where_large_images_show_something_else_than_small_ones():
    estimates, errors = [], []
    for seed in range(0, 2000, 5):
        ours = observer(4)
        large = int((nets.images(60, seed=seed) > 0.5).sum())
        ours(photos(60 - large, 4, 2, 2, seed + 1))
        ours(2 * photos(large, 4, 4, 4, seed + 3) + 1)
        estimates.append(torch.stack([ours.moments().mean, ours.moments().var.sqrt()]))
        errors.append(torch.stack(ours.statistics.standard_errors()))
    for of_one, said in zip(torch.stack(estimates, 1), torch.stack(errors, 1), strict=True):
        assert_honest(of_one, said)


def activations(net, site, x):
    """What a layer of the plain network returns, call after call: (calls, N, C, H, W), float64."""
    plain, seen = nets.build(net).double(), []
    plain.get_submodule(site).register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        plain(x.double())
    return torch.cat(seen).unflatten(0, (-1, len(x)))


def in_sigma(x):
    """The standard errors of (N, C, ...), as the report has them."""
    sigma = x.movedim(1, 0).flatten(1).std(1)
    return [error / sigma for error in errors_over_images(x)]


def test_the_report_has_the_99th_percentile_over_the_channels():
    x = photos(50, 3, 9, 9)
    model = prepared(nets.Residual)
    report = retrofit.calibrate(model, x.split(7), progress=False)
    every = []
    for sample in report.sites:
        errors = in_sigma(activations(nets.Residual, sample.site, x)[0])
        assert sample.mean_error == pytest.approx(float(errors[0].quantile(0.99)), rel=1e-4)
        assert sample.std_error == pytest.approx(float(errors[1].quantile(0.99)), rel=1e-4)
        every.append(torch.maximum(*errors))
    assert report.standard_error == pytest.approx(float(torch.cat(every).quantile(0.99)), rel=1e-4)


class Windows(nn.Module):
    """Cuts every image into four windows, one batch of which goes through `inner`."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.inner = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        y = F.relu(self.stem(x))
        return F.relu(self.inner(torch.cat([y[:, :, i : i + 2] for i in (0, 2, 4, 6)])))


@pytest.mark.parametrize(
    ("net", "site", "times"), [(nets.SharedConv, "shared", 2), (Windows, "inner", 4)]
)
def test_several_samples_of_one_image_are_not_taken_for_independent_ones(net, site, times):
    x = photos(60, 3, 10, 10) + 3 * nets.images(60, 1, 1, 1, seed=5)
    report = retrofit.calibrate(prepared(net), x.split(16), progress=False)
    sample = next(sample for sample in report.sites if sample.site == site)
    whole = activations(net, site, x).movedim(0, -1)  # an image with all that it gave
    for ours, errors in zip((sample.mean_error, sample.std_error), in_sigma(whole), strict=True):
        expected = float(errors.quantile(0.99))
        assert 0.99 * expected <= ours <= times * expected


def test_with_a_tolerance_the_data_is_used_until_it_is_enough():
    x, taken = nets.images(2000, 3, 8, 8), []
    batches = (taken.append(batch) or batch for batch in x.split(10))
    model = prepared()
    report = retrofit.calibrate(model, batches, tolerance=0.05, progress=False)
    assert report.standard_error <= 0.05
    assert report.images == len(torch.cat(taken)) < 200
    assert (model[0].bn.moments().count == report.images * 36).all()
    assert report.images_needed(0.05) <= report.images


def test_too_little_data_is_all_used_and_the_warning_says_how_much_would_do():
    x = grey(3000)
    with pytest.warns(
        UserWarning, match=r"calibration ended after 200 images at .* 5\.00%"
    ) as caught:
        report = calibrated(x[:200].split(16), tolerance=0.05)
    message = next(str(w.message) for w in caught if "calibration ended" in str(w.message))
    needed = int(re.search(r"needs about ([\d,]+)$", message)[1].replace(",", ""))
    assert needed == report.images_needed(0.05) > 200
    assert f"at a standard error of {report.standard_error:.2%}" in message
    longer = calibrated(x[:needed].split(16))
    assert longer.standard_error == pytest.approx(0.05, rel=0.2)


def test_a_tolerance_is_met_with_about_the_images_that_another_run_has_foretold():
    x = grey(3000)
    foretold = calibrated(x[:100].split(20)).images_needed(0.07)
    used = calibrated(x.split(20), tolerance=0.07).images
    assert 0.7 * foretold < used < 1.5 * foretold


def test_half_the_tolerance_needs_four_times_the_images():
    report = calibrated(grey(50).split(10))
    assert report.images_needed(report.standard_error) == 50
    for tolerance in (0.1, 0.05, 0.02):
        needed = report.images_needed(tolerance)
        assert report.images_needed(tolerance / 2) == pytest.approx(4 * needed, abs=4)
        assert needed == pytest.approx(50 * (report.standard_error / tolerance) ** 2, abs=1)


def test_how_many_images_are_used_hardly_depends_on_the_batch_size():
    x = grey(1000)
    one_by_one = calibrated(x.split(1), tolerance=0.1).images
    assert 50 < one_by_one < 500
    for size in (3, 10, 32, 64):
        used = calibrated(x.split(size), tolerance=0.1).images
        assert 0.8 * one_by_one - 1 <= used < 1.25 * one_by_one + size


@pytest.mark.parametrize("batch_size", [7, 20, 33])
@pytest.mark.parametrize("constant", [0, 0.1, -1.7])
def test_a_constant_channel_is_no_obstacle(constant, batch_size):
    model = prepared()
    with torch.no_grad():  # as after pruning
        model[0].conv.weight[0], model[0].conv.bias[0] = 0, constant
    x = nets.images(1000, 3, 12, 12)
    report = retrofit.calibrate(model, x.split(batch_size), tolerance=0.03, progress=False)
    assert report.images < 100
    assert report.disagreement < 0.3


@pytest.mark.parametrize("tolerance", [1, -0.02, 2, math.nan])
def test_a_tolerance_that_is_none_is_refused_before_any_data_is_read(tolerance):
    with pytest.raises(RetrofitError, match=f"between 0 and 1 .*, not {tolerance}"):
        calibrated((pytest.fail("read") for _ in range(1)), tolerance=tolerance)


def loader(x, **options):
    return DataLoader(TensorDataset(x), batch_size=10, **options)


def in_order(x):
    return BatchSampler(SequentialSampler(x), 10, drop_last=False)


@pytest.mark.parametrize(
    ("order", "fewer"),
    [
        (lambda x: loader(x, shuffle=True), True),
        (lambda x: loader(x, sampler=SubsetRandomSampler(range(len(x)))), True),
        (lambda x: loader(x, sampler=DistributedSampler(x, 1, 0)), True),
        (lambda x: loader(x, sampler=DistributedSampler(x, 1, 0, shuffle=False)), False),
        (loader, False),
        (lambda x: DataLoader(TensorDataset(x), batch_sampler=in_order(x)), False),
        (lambda x: x.split(10), False),
        (lambda x: iter(x.split(10)), False),
    ],
)
def test_by_default_images_in_random_order_are_used_until_it_is_enough_others_all(order, fewer):
    x = nets.images(400, 3, 8, 8)
    report = retrofit.calibrate(prepared(), order(x), progress=False)
    assert report.images < 200 if fewer else report.images == 400
    assert report.standard_error <= 0.05
    assert retrofit.calibrate(prepared(), order(x), tolerance=0, progress=False).images == 400
    assert retrofit.calibrate(prepared(), order(x), max_images=300, progress=False).images == 300


def test_a_loader_that_draws_more_than_its_data_set_holds_is_used_to_its_end():
    x = nets.images(50, 3, 8, 8)
    often = DataLoader(TensorDataset(x), 10, sampler=RandomSampler(x, True, 120))
    assert retrofit.calibrate(prepared(), often, tolerance=0, progress=False).images == 120


def test_add_batchnorm_looks_into_a_loader_and_still_knows_that_it_shuffles():
    x, seen = nets.images(400, 3, 8, 8), []
    net = nets.Residual()
    net.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    retrofit.add_batchnorm(net, loader(x, shuffle=True), progress=False)
    assert 20 < sum(seen) < 300


def test_too_few_images_in_random_order_need_no_warning_if_no_tolerance_was_asked_for():
    report = retrofit.calibrate(prepared(), loader(nets.images(20, 3, 8, 8), shuffle=True))
    assert report.images == 20
    assert report.standard_error > 0.05


def test_the_bar_expects_as_many_images_as_it_will_take(monkeypatch):
    bars, expected = [], []

    def kept(*args, **kwargs):
        bars.append(images_bar(*args, **kwargs))
        bars[0].update = lambda n: (expected.append(bars[0].total), tqdm.update(bars[0], n))
        return bars[0]

    monkeypatch.setattr("retrofit.calibration.feeding.images_bar", kept)
    monkeypatch.setattr("retrofit.running.progress._draws_bars", lambda: True)
    x = grey(1000)
    report = retrofit.calibrate(prepared(), x.split(10), tolerance=0.1)
    assert bars[0].n == bars[0].total == report.images < 900
    assert expected[0] == 1000  # nothing is known yet
    assert report.images / 2 < expected[len(expected) // 2] < report.images * 2


def test_a_single_image_is_too_little_for_any_tolerance():
    with pytest.raises(RetrofitError, match="got 1 of the at least 2 images"):
        calibrated([grey(1)], tolerance=0.5)


def test_more_data_that_is_enough_is_not_said_to_have_ended():
    model = prepared()
    retrofit.calibrate(model, (30 * grey(100)).split(20), progress=False)
    x = nets.images(2000, 3, 8, 8)
    report = retrofit.calibrate(model, x.split(20), tolerance=0.05, progress=False)
    assert report.images < 2000


def test_the_report_of_a_second_call_is_of_its_own_images():
    model, x = prepared(), photos(60, 3, 8, 8)
    retrofit.calibrate(model, (30 * grey(100)).split(20), progress=False)
    second, alone = retrofit.calibrate(model, [x], progress=False), calibrated([x])
    assert (second.images, second.standard_error) == (60, alone.standard_error)
    assert second.sites == alone.sites


def test_the_report_says_in_print_what_was_reached_and_what_more_would_need():
    report = calibrated(photos(60, 3, 8, 8).split(16))
    one, two, five = (f"{report.images_needed(t):,}" for t in (0.01, 0.02, 0.05))
    assert "\n60 images in " in str(report)
    assert f"at most {report.standard_error:.2%} of sigma" in str(report)
    assert str(report).endswith(f"images needed for 1%: {one}, 2%: {two}, 5%: {five}")


def test_where_nothing_is_known_no_number_of_images_is_enough():
    model = nets.build(nets.AlreadyNormed)
    with pytest.warns(UserWarning, match="no BatchNorm is added"):
        nothing = retrofit.prepare(model, retrofit.plan(model, exclude="free"))
    assert retrofit.calibrate(nothing, [], progress=False).images_needed(0.01) == math.inf


def tailed(n, seed, channels=3):
    """Pictures of one colour each, few of them very bright."""
    return nets.images(n, channels, 1, 1, seed=seed).pow(3).expand(n, channels, 4, 4).contiguous()


def report_of(x, batch_size=8):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 32, 1), nn.ReLU()).eval()
    return retrofit.calibrate(retrofit.prepare(net), x.split(batch_size), progress=False)


def judged(x):
    ours = observer(x.shape[1])
    for batch in x.split(20):
        ours(batch)
    (sample,) = site_samples({"layer": x.shape[1]}, ours.statistics, len(x))
    return retrofit.Calibration(len(x), 1, 1.0, 0.0, sample.mean_error, (sample,))


@pytest.mark.parametrize("pictures", [grey, tailed])
@pytest.mark.parametrize("n", [8, 24, 60])
def test_of_small_samples_in_random_order_one_in_a_hundred_is_blamed_at_most(n, pictures):
    mix = nets.images(40, 3, seed=7)  # 40 channels that depend on each other, as a layer's do
    reports = [
        judged(torch.einsum("oc,nchw->nohw", mix, pictures(n, seed)).contiguous())
        for seed in range(60)
    ]
    assert sum(report.disagreement > 0.3 for report in reports) > 20  # by chance
    assert sum(report.disordered is not None for report in reports) <= 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [64, 256])
@pytest.mark.parametrize("differ", ["in mean", "in contrast"])
def test_samples_sorted_by_class_are_found_whatever_the_classes_differ_in(n, differ, seed):
    x, first = photos(n, 3, 4, 4, seed), torch.arange(n).view(-1, 1, 1, 1) < n // 2
    x = x + 3.0 * first if differ == "in mean" else x * (1 + 3.0 * first)
    report = report_of(x)
    assert report.disordered in report.sites
    assert max(report.disordered.mean, report.disordered.std) == report.disagreement
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert report_of(x[order]).disordered is None


def test_the_halves_differ_by_as_many_standard_errors_as_the_report_says():
    x = photos(40, 3, 5, 5) + torch.arange(40).view(-1, 1, 1, 1) / 40
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU()).eval()
    report = retrofit.calibrate(retrofit.prepare(model), x.split(4), progress=False)
    with torch.no_grad():
        y = model[0](x).double()
    ours = []
    for figure in (y, (y - y.mean((0, 2, 3), keepdim=True)).square()):  # means, variances
        images = figure.mean((2, 3))
        halves = images[:20].mean(0) - images[20:].mean(0)
        ours.append(halves.abs() / (images.std(0) * math.sqrt(1 / 20 + 1 / 20)))
    assert report.sites[0].largest_z == pytest.approx(float(torch.stack(ours).max()), rel=0.02)


@pytest.mark.parametrize("kind", ["one picture", "dead"])
def test_images_that_do_not_differ_are_warned_of_with_no_standard_error(kind):
    x, model = nets.images(1, 3, 8, 8).expand(20, 3, 8, 8).contiguous(), prepared()
    if kind == "dead":
        x = nets.images(20, 3, 8, 8)
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
    channels = sum(m.channels for m in model.modules() if isinstance(m, MomentObserver))
    constant = channels if kind == "dead" else r"\d+"
    message = rf"nothing differs between the 20 .* {constant} of {channels} channels are constant"
    with pytest.warns(UserWarning, match=message):
        report = retrofit.calibrate(model, x.split(7), tolerance=0.05, progress=False)
    assert report.standard_error == math.inf
    assert report.images_needed(0.05) == math.inf
    assert report.images == 20


def test_a_site_that_is_dead_as_a_whole_is_named():
    model = prepared()
    nn.init.zeros_(model[2].conv.weight)
    with pytest.warns(UserWarning, match=r"all channels of 2 are constant on the 40 .* dead there"):
        retrofit.calibrate(model, nets.images(40, 3, 12, 12).split(9), progress=False)


def test_warnings_point_to_the_line_that_called():
    x = nets.images(80, 3, 8, 8) + torch.arange(80).view(-1, 1, 1, 1)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    ready = retrofit.prepare(net)
    retrofit.calibrate(ready, [nets.images(40, 3, 8, 8)], progress=False)
    norms = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    for call in (
        lambda: retrofit.add_batchnorm(net, x.split(8), progress=False),
        lambda: retrofit.calibrate(retrofit.prepare(net), x.split(8), progress=False),
        lambda: retrofit.convert(ready, eps=1e-3),
        lambda: retrofit.recalibrate(norms, [grey(2)], progress=False),
    ):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            call()
        assert {w.filename for w in seen} == {__file__}
