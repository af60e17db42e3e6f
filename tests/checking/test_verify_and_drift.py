"""What verify and drift report, against figures computed by hand."""

import copy
import math
import weakref

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import retrofit
from retrofit import RetrofitError
from retrofit.numerics.comparison import Comparison

X = nets.images(40, 3, 16, 16)


def pair(net=nets.Residual):
    model = nets.build(net)
    return model, retrofit.add_batchnorm(model, X.split(8), progress=False)


def test_the_printed_report_of_an_exact_conversion():
    model, converted = pair()
    report = retrofit.verify(model, converted, X.split(10))
    assert report.exact
    assert report.passed()
    assert report.top1 == 1.0
    assert str(report) == (
        "tensor  exact  max abs  relative\n"
        "------  -----  -------  --------\n"
        "stem    yes          0         0\n"
        "body.0  yes          0         0\n"
        "body.2  yes          0         0\n"
        "output  yes          0         0\n"
        "equal bit for bit on 40 images, top-1 agreement 100.00%"
    )


def test_a_difference_is_found_where_it_is_and_measured():
    model, converted = pair()
    with torch.no_grad():
        converted.body[2].bn.bias[3] += 0.5
    report = retrofit.verify(model, converted, X.split(16))
    by_name = {d.name: d for d in (*report.sites, *report.outputs)}
    assert by_name["stem"].exact
    assert by_name["body.0"].exact
    with torch.no_grad():
        stem = F.relu(model.stem(X))
        site = model.body(stem)
        error = (converted(X) - model(X)).abs().max()
    assert by_name["body.2"].max_abs == pytest.approx(0.5, abs=1e-6)
    assert by_name["body.2"].relative == pytest.approx(
        0.5 / float(site.square().mean().sqrt()), rel=1e-5
    )
    assert by_name["output"].max_abs == pytest.approx(float(error), rel=1e-5)
    assert not report.exact
    assert not report.passed(1e-3)
    assert report.passed(100)
    assert "NOT equal" in str(report)


def test_equal_nans_are_equal_and_lone_ones_are_not():
    class Log(nn.Module):
        def forward(self, x):
            return torch.log(x)

    class LogOfAbs(nn.Module):
        def forward(self, x):
            return torch.log(x.abs())

    assert retrofit.verify(Log(), Log(), [X]).exact
    report = retrofit.verify(Log(), LogOfAbs(), [X])
    assert not report.exact
    assert report.outputs[0].max_abs == math.inf


def test_infinities_hide_no_difference():
    class Masked(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, x):
            return torch.cat([x * 0 - math.inf, x * 0 + self.value])

    assert retrofit.verify(Masked(1.0), Masked(1.0), [X]).exact
    report = retrofit.verify(Masked(1.0), Masked(5.0), [X])
    assert not report.passed(1e-2)
    assert report.outputs[0].max_abs == 4


def test_a_model_that_writes_to_its_input():
    class Writing(nn.Sequential):
        def forward(self, x):
            return super().forward(x.sub_(0.5))

    model = Writing(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    x = X.clone()
    assert retrofit.verify(model, retrofit.insert(model), [x]).exact
    assert torch.equal(x, X)


def test_the_sign_of_zero_does_not_count():
    class Zero(nn.Module):
        def forward(self, x):
            return x * 0.0

    class Negative(nn.Module):
        def forward(self, x):
            return -(x * 0.0)

    assert retrofit.verify(Zero(), Negative(), [X]).exact


def test_structured_outputs_are_compared_leaf_by_leaf():
    class Many(nn.Module):
        def forward(self, x):
            return {"out": x, "aux": [x * 2, (x + 1, "text")]}

    report = retrofit.verify(Many(), Many(), [X])
    assert [d.name for d in report.outputs] == [
        "output['out']",
        "output['aux'][0]",
        "output['aux'][1][0]",
    ]


def test_verify_leaves_both_models_as_they_were():
    model, converted = pair()
    model.train()
    converted.train()
    before = copy.deepcopy(converted.state_dict())
    assert retrofit.verify(model, converted, [X]).exact
    assert model.training
    assert converted.training
    assert not any(m._forward_hooks for m in (*model.modules(), *converted.modules()))
    assert all(torch.equal(before[k], v) for k, v in converted.state_dict().items())


def test_models_that_cannot_be_compared_are_named():
    model, converted = pair()
    with pytest.raises(RetrofitError, match="no data"):
        retrofit.verify(model, converted, [])
    wider = copy.deepcopy(model)
    wider.head = nn.Linear(8, 6)
    with pytest.raises(RetrofitError, match=r"output has shape \(40, 5\) in the original and"):
        retrofit.verify(model, wider, [X])
    with pytest.raises(RetrofitError, match="data is one tensor"):
        retrofit.verify(model, converted, X)


def test_drift_is_what_train_mode_changes_batch_by_batch():
    model, converted = pair()
    report = retrofit.drift(model, converted, X.split(7), batch_sizes=(4, 16, 64))
    assert [(r.batch_size, r.images) for r in report.rows] == [(4, 40), (16, 32)]
    assert report.left_out == (64,)
    trained = copy.deepcopy(converted).train()
    with torch.no_grad():
        expected = model(X)
        actual = torch.cat([trained(x) for x in X.split(4)])
    error = (actual - expected).double().square().mean().sqrt() / expected.double().std(
        correction=0
    )
    agreement = (actual.argmax(1) == expected.argmax(1)).float().mean()
    assert report.rows[0].error == pytest.approx(float(error), rel=1e-4)
    assert report.rows[0].top1 == pytest.approx(float(agreement))
    assert report.rows[0].error > report.rows[1].error > 0
    assert "too few images for batches of 64" in str(report)


@pytest.mark.parametrize("given", [1, 7, 16, 40])
def test_drift_runs_the_original_once_and_holds_no_more_than_a_batch(given):
    model, converted = pair()
    expected = retrofit.drift(model, converted, [X], batch_sizes=(4, 16))
    seen = {"original": 0, "converted": 0}
    asked, alive = [], []

    def batches():
        for x in X.split(given):
            images = x.clone()
            asked.append(weakref.ref(images))
            alive.append(sum(one() is not None for one in asked))
            yield images
            del images

    for name, network in (("original", model), ("converted", converted)):
        network.register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, seen[name] + len(args[0]))
        )
    found = retrofit.drift(model, converted, batches(), batch_sizes=(4, 16))
    for one, other in zip(found.rows, expected.rows, strict=True):
        assert one.images == other.images
        assert one.error == pytest.approx(other.error, rel=1e-5)
        assert one.top1 == other.top1
    # The first batch once more, whether that is random; one image in channels_last; one or two, for
    # the outputs' axis.
    assert seen["original"] == 40 + given + 1 + (2 if given == 1 else 1)
    assert seen["converted"] == 40 + 32 + 1
    assert max(alive) <= 16 // given + 2


def test_drift_takes_no_more_images_than_asked():
    model, converted = pair()
    expected = retrofit.drift(model, converted, [X[:20]], batch_sizes=(4,))
    found = retrofit.drift(model, converted, iter(X.split(8)), (4,), max_images=20)
    assert found.rows[0].images == 20
    assert found.rows[0].error == pytest.approx(expected.rows[0].error, rel=1e-5)
    with pytest.raises(RetrofitError, match="max_images must be positive and a whole number"):
        retrofit.drift(model, converted, [X], (4,), max_images=0)


def test_drift_of_outputs_that_are_of_the_whole_batch():
    class Pooled(nets.Residual):
        def forward(self, x):
            return super().forward(x).mean(0)

    model, converted = pair(Pooled)
    one, other = (retrofit.drift(model, converted, X.split(n), (8,)).rows[0] for n in (8, 5))
    assert one.error == pytest.approx(other.error, rel=1e-5)


def test_drift_leaves_dropout_off_and_everything_as_it_was():
    class Dropping(nn.Sequential):
        pass

    model = Dropping(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout(0.9), nn.Flatten()).eval()
    converted = retrofit.add_batchnorm(model, [X], include="0", progress=False)
    before = copy.deepcopy(converted.state_dict())
    whole = retrofit.drift(model, converted, [X], batch_sizes=(40,))
    assert whole.rows[0].error < 1e-3  # the calibration batch itself
    assert not any(m.training for m in converted.modules())
    assert all(torch.equal(before[k], v) for k, v in converted.state_dict().items())


def test_drift_without_enough_images_is_refused():
    model, converted = pair()
    with pytest.raises(RetrofitError, match="40 images are too few"):
        retrofit.drift(model, converted, [X], batch_sizes=(64,))


class Repeated(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.times = 2

    def forward(self, x):
        for _ in range(self.times):
            x = F.relu(self.conv(x))
        return x


@pytest.mark.parametrize(
    ("times", "message"),
    [(1, "of conv 1 times, not 2"), (3, "of conv more often than the original")],
)
def test_a_layer_that_is_called_another_number_of_times_is_named(times, message):
    model, converted = pair(Repeated)
    converted.times = times
    with pytest.raises(RetrofitError, match=message):
        retrofit.verify(model, converted, [X])


def test_a_forward_fn_of_ones_own_verifies_and_counts_pictures_beside_targets():
    model, converted = pair(nets.root_sequential)
    batch = (list(X[:3]), ["cat", "dog", "cow"])

    def forward(model, batch):
        return model(torch.stack(batch[0]))

    assert retrofit.verify(model, converted, [batch], forward_fn=forward).exact
    prepared = retrofit.prepare(model)
    found = retrofit.calibrate(prepared, [batch, batch], forward_fn=forward, progress=False)
    assert found.images == 6


def test_outputs_of_another_structure_or_of_a_new_one_each_time_are_not_compared():
    model, converted = pair(nets.root_sequential)

    def named(m, x):
        return m(x) if m is model else {"logits": m(x)}

    with pytest.raises(RetrofitError, match="the outputs differ in structure"):
        retrofit.verify(model, converted, [X], forward_fn=named)

    calls = []

    def growing(m, x):
        calls.append(m)
        return [m(x)] * len(calls)

    with pytest.raises(RetrofitError, match="is random in eval mode, or keeps state"):
        retrofit.verify(model, converted, [X], forward_fn=growing)


def test_complex_outputs_are_compared_in_both_their_parts():
    model, converted = pair(nets.root_sequential)

    def spectrum(m, x):
        y = torch.view_as_complex(m(x).flatten(1).unflatten(1, (-1, 2)).contiguous())
        return y if m is model else y + 0.5j

    report = retrofit.verify(model, converted, [X], forward_fn=spectrum)
    assert not report.passed(1e-3)
    assert report.outputs[0].max_abs == pytest.approx(0.5, abs=1e-5)
    assert report.top1 is None


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 3000.0), (1e-3, 50.0), (1.0, -1e6)])
def test_drift_is_right_for_outputs_far_from_zero(scale, offset):
    class Far(nets.Residual):
        def forward(self, x):
            return scale * super().forward(x).double() + offset

    model, converted = pair(Far)
    row = retrofit.drift(model, converted, X.split(10), [8]).rows[0]
    trained = copy.deepcopy(converted).train()
    images = X.contiguous(memory_format=torch.channels_last)  # as drift has them: other roundings
    with torch.no_grad():
        expected = model(images)
        actual = torch.cat([trained(x) for x in images.split(8)])
    error = (actual - expected).square().mean().sqrt() / expected.std(correction=0)
    assert row.error == pytest.approx(float(error), rel=1e-6)


def test_drift_runs_a_model_that_cannot_in_channels_last_as_its_images_came():
    class Viewing(nets.Residual):
        def forward(self, x):
            return super().forward(x) + 0 * x.view(len(x), -1).sum()

    def look(_, args):
        fast.append(args[0].is_contiguous(memory_format=torch.channels_last))

    found = {}
    for net in (nets.Residual, Viewing):
        fast: list[bool] = []
        model, converted = pair(net)
        converted.register_forward_pre_hook(look)
        found[net] = retrofit.drift(model, converted, X.split(10), [8]).rows[0].error, fast
    assert found[Viewing][0] == pytest.approx(found[nets.Residual][0], rel=1e-5)
    assert not any(found[Viewing][1])
    assert all(found[nets.Residual][1])


def test_drift_runs_a_model_that_takes_batches_of_one_size_in_that_size():
    class Fixed(nets.Residual):
        def forward(self, x):
            return super().forward(x.view(8, 3, 16, 16))

    one, fixed = (
        retrofit.drift(*pair(net), X.split(8), [8]).rows[0] for net in (nets.Residual, Fixed)
    )
    assert fixed.images == 40
    assert fixed.error == pytest.approx(one.error, rel=1e-5)


def test_in_drift_each_of_several_outputs_varies_about_its_own_mean():
    class Two(nets.Residual):
        def forward(self, x):
            y = super().forward(x)
            return {"near": y, "far": [y.double() + 1e4]}

    one, two = (
        retrofit.drift(*pair(net), X.split(10), [8]).rows[0] for net in (nets.Residual, Two)
    )
    assert two.error == pytest.approx(one.error, rel=1e-5)


def test_drift_of_outputs_of_another_structure_is_refused_by_name():
    model, converted = pair()
    converted.head = nn.LSTM(8, 5)
    with pytest.raises(RetrofitError, match=r"differ in structure: output against output\[0\], "):
        retrofit.drift(model, converted, [X], [8])


def test_the_root_mean_square_of_many_numbers_is_not_lost_to_float32():
    ones, few = torch.ones(1, 1).expand(1 << 14, 20_000), torch.ones(2, 2)
    compared = Comparison()
    compared.add(ones, ones, "output")  # float32 counts no further than to 134 million
    compared.add(few, few + 0.5, "output")
    assert compared.difference("output").relative == pytest.approx(0.5, rel=1e-6)


def test_nobody_takes_a_report_for_a_yes():
    model, converted = pair()
    report = retrofit.verify(model, converted, [X])
    for result, message in (
        (report, r"^a Verification is neither true nor false: ask for report.exact \(bit .*passed"),
        (report.outputs[0], "^a Difference is neither true nor false: ask for its exact, max_abs"),
    ):
        with pytest.raises(RetrofitError, match=message):
            bool(result)


class Ending(nn.Sequential):
    """Ends in what a test is about."""

    def __init__(self, end):
        super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.end = end

    def forward(self, x):
        return self.end(super().forward(x))


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (lambda y: F.dropout(y, 0.5), "this Ending is random in eval mode"),
        (lambda y: y * math.nan, "the outputs of this Ending hold NaN or Inf: check its weights"),
        (lambda y: y[:, :1] / (y[:, :1] - y[:1, :1]), "hold NaN or Inf"),
        (lambda y: y.tolist(), "no tensor in what this Ending returns"),
        (lambda y: y[:0], "all tensors that this Ending returns are empty"),
    ],
)
def test_drift_of_what_has_no_size_is_refused(end, words):
    model = nets.build(lambda: Ending(end))
    with pytest.raises(RetrofitError, match=words):
        retrofit.drift(model, retrofit.insert(model, retrofit.plan(model, include="0")), [X], [8])


def test_a_batch_too_small_to_train_on_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4)).eval()
    with pytest.raises(RetrofitError, match="cannot train on a batch of 1: Expected more than 1 v"):
        retrofit.drift(model, model, [X], [1, 8])
    assert not model.training
    other = nn.Sequential(nn.Conv2d(4, 4, 3), *list(model)[1:]).eval()
    with pytest.raises(RetrofitError, match=r"^Sequential does not run on a batch: 0 takes \(N, 4"):
        retrofit.drift(model, other, [X], [8])


def test_that_there_is_no_batchnorm_is_said_at_once():
    def batches():
        yield X[:8]
        raise KeyError

    model = nets.build(nets.Residual)
    with pytest.warns(UserWarning, match="has no BatchNorm"), pytest.raises(KeyError):
        retrofit.drift(model, model, batches(), [8])


def test_drift_of_a_model_without_batchnorm_says_so():
    model = nets.build(nets.Residual)
    with pytest.warns(UserWarning, match="this Residual has no BatchNorm: batch statistics change"):
        found = retrofit.drift(model, model, X.split(8), [8])
    assert found.rows[0].error == 0


class Blended(nn.Module):
    """Of two pictures and a weight for each pair."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x, y, weight):
        return F.relu(self.conv(x + weight[:, None, None, None] * y)).mean((2, 3))


def blended_batches(size):
    return [
        {"pair": (x, y), "weight": weight}
        for x, y, weight in zip(
            X.split(size), X.flip(0).split(size), torch.arange(40.0).split(size), strict=True
        )
    ]


def blend(model, batch):
    return model(*batch["pair"], batch["weight"])


@pytest.mark.parametrize("size", [5, 16, 40])
def test_drift_calls_a_forward_fn_with_regrouped_batches(size):
    torch.manual_seed(0)
    model = Blended().eval()
    options = {"forward_fn": blend, "include": "conv", "progress": False}
    converted = retrofit.add_batchnorm(model, blended_batches(8), **options)
    found = retrofit.drift(model, converted, blended_batches(size), [20], forward_fn=blend)
    trained = copy.deepcopy(converted).train()
    with torch.no_grad():
        expected = torch.cat([blend(model, batch) for batch in blended_batches(20)])
        actual = torch.cat([blend(trained, batch) for batch in blended_batches(20)])
    error = (actual - expected).square().mean().sqrt() / expected.std(correction=0)
    assert found.rows[0].images == 40
    assert found.rows[0].error == pytest.approx(float(error), rel=1e-5)


def test_in_drift_a_forward_fn_may_write_to_its_batch():
    model, converted = pair(nets.root_sequential)

    def writing(m, batch):
        return m(batch.sub_(0.5))

    x = X.clone()
    found = retrofit.drift(model, converted, [x], [8, 20], forward_fn=writing)
    assert found == retrofit.drift(model, converted, [X - 0.5], [8, 20])
    assert torch.equal(x, X)


@pytest.mark.parametrize(
    "batch", [(X, ["cat"] * 40), (X, X[:3]), {"x": X, "scale": torch.tensor(2.0)}, []]
)
def test_drift_refuses_batches_that_it_cannot_regroup(batch):
    model, converted = pair(nets.root_sequential)
    with pytest.raises(RetrofitError, match="one entry for each image; it got"):
        retrofit.drift(model, converted, [batch], forward_fn=lambda m, _: m(X))


def test_drift_refuses_a_device_that_is_none():
    with pytest.raises(RetrofitError, match='torch calls its devices "cpu", "cuda"'):
        retrofit.drift(*pair(), [X], device="gpu")
