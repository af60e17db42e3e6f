"""New running statistics for BatchNorms, against torch's own and float64 in two passes."""

import copy
import itertools

import nets
import pytest
import torch
import torch.nn.functional as F
from nets import norms
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.data import DataLoader, TensorDataset

import retrofit
from retrofit import NonFiniteError, RetrofitError

pytestmark = pytest.mark.filterwarnings("ignore:the statistics (of|are)")  # of so few images


class Net(nn.Module):
    """Three BatchNorms, with stale statistics, and dropout between them."""

    def __init__(self):
        super().__init__()
        self.conv, self.first = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.deep, self.second = nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.linear, self.third = nn.Linear(8, 5), nn.BatchNorm1d(5)
        nets.make_stale(self)

    def forward(self, x):
        x = F.relu(self.first(self.conv(x)))
        x = F.relu(self.second(self.deep(x)))
        return self.third(self.linear(self.drop(x).mean((2, 3))))


X = nets.images(42, 3, 10, 10) + torch.linspace(-2, 2, 42).view(-1, 1, 1, 1)  # "sorted by class"
ORDER = torch.randperm(42, generator=torch.Generator().manual_seed(0))


def recalibrate(model, data, **options):
    return retrofit.recalibrate(model, data, progress=False, **options)


def statistics(model):
    return {
        path: (n.running_mean.clone(), n.running_var.clone()) for path, n in norms(model).items()
    }


def inputs_of_norms(model, data):
    """What each BatchNorm gets, over all the data: float64 of shape (C, elements)."""
    seen = {path: [] for path in norms(model)}
    handles = [
        norm.register_forward_pre_hook(lambda _m, args, path=path: seen[path].append(args[0]))
        for path, norm in norms(model).items()
    ]
    with torch.no_grad():
        for x in data:
            model(x)
    for handle in handles:
        handle.remove()
    return {
        path: torch.cat([x.double().movedim(1, 0).flatten(1) for x in xs], 1)
        for path, xs in seen.items()
    }


def assert_are_moments_of(found, inputs):
    for path, (mean, var) in found.items():
        sigma = inputs[path].std(1)
        assert ((mean - inputs[path].mean(1)).abs() < 1e-5 * sigma).all(), path
        assert ((var - inputs[path].var(1)).abs() < 1e-5 * sigma**2).all(), path


def furthest_apart(found, expected):
    """The largest difference of means in standard deviations."""
    return max(
        float(((mean - expected[path][0]).abs() / expected[path][1].sqrt()).max())
        for path, (mean, _) in found.items()
    )


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d, (9, 4)),
        (nn.BatchNorm1d, (9, 4, 7)),
        (nn.BatchNorm2d, (9, 4, 5, 6)),
        (nn.BatchNorm3d, (9, 4, 5, 6, 3)),
        (nn.SyncBatchNorm, (9, 4, 5)),
    ],
)
@pytest.mark.parametrize("layerwise", [False, True])
def test_on_a_single_batch_the_statistics_are_those_torch_takes_of_it(norm, shape, layerwise):
    x = nets.images(*shape) * 3 + 1
    ours, theirs = nn.Sequential(norm(4)), norm(4, momentum=1.0).train()
    theirs(x)
    recalibrate(ours, [x], layerwise=layerwise)
    torch.testing.assert_close(ours[0].running_mean, theirs.running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[0].running_var, theirs.running_var, rtol=1e-5, atol=0)
    assert int(ours[0].num_batches_tracked) == 1


def test_by_default_the_moments_under_batch_statistics_are_pooled_over_unequal_batches():
    model = nets.build(Net)
    data = X[ORDER].split((20, 3, 12, 7))
    reference = copy.deepcopy(model)
    for norm in norms(reference).values():
        norm.train()
    inputs = inputs_of_norms(reference, data)
    handle = recalibrate(model, data)
    assert_are_moments_of(statistics(model), inputs)
    assert (handle.images, handle.batches, handle.layers) == (42, 4, ("first", "second", "third"))


def test_the_means_are_those_of_update_bn_where_that_is_exact():
    ours, theirs = nets.build(Net), nets.build(Net)
    theirs.drop.p = 0.0  # update_bn trains dropout too
    data = X[ORDER].split(14)  # all of one size
    recalibrate(ours, data)
    update_bn(data, theirs)
    assert furthest_apart(statistics(ours), statistics(theirs)) < 1e-5


@pytest.mark.parametrize("split", [42, (20, 3, 12, 7), 1])
def test_layer_by_layer_the_statistics_are_the_moments_of_what_each_gets_in_eval_mode(split):
    model = nets.build(Net)
    data = X[:14].split(1) if split == 1 else X.split(split)
    recalibrate(model, data, layerwise=True)
    assert_are_moments_of(statistics(model), inputs_of_norms(model, data))
    once = copy.deepcopy(model.state_dict())
    recalibrate(model, data, layerwise=True)
    assert all(torch.equal(once[key], value) for key, value in model.state_dict().items())


def test_layer_by_layer_data_sorted_by_class_does_as_well_as_shuffled():
    by_class, shuffled, averaged = nets.build(Net), nets.build(Net), nets.build(Net)
    recalibrate(by_class, X.split(7), layerwise=True)
    recalibrate(shuffled, X[ORDER].split(7), layerwise=True)
    assert furthest_apart(statistics(by_class), statistics(shuffled)) < 1e-5
    update_bn(X.split(7), averaged)
    assert furthest_apart(statistics(averaged), statistics(shuffled)) > 0.1


def test_with_a_prior_old_statistics_count_as_that_many_images():
    model, data = Net(), X.split(14)
    old = statistics(model)
    recalibrate(model, data)
    new = statistics(model)
    with torch.no_grad():
        for path, (mean, var) in old.items():
            norms(model)[path].running_mean.copy_(mean)
            norms(model)[path].running_var.copy_(var)
    recalibrate(model, data, prior=14)
    for path, blended in statistics(model).items():
        for was, has, is_ in zip(old[path], new[path], blended, strict=True):
            torch.testing.assert_close(is_, 14 / 56 * was + 42 / 56 * has)


def test_layer_by_layer_each_layer_is_measured_behind_the_blended_ones():
    model, data = Net(), [X]
    old = statistics(model)
    recalibrate(model, data, layerwise=True, prior=42)
    inputs = inputs_of_norms(model.eval(), data)  # of the network as it is now
    for path, (mean, var) in statistics(model).items():
        x = inputs[path]
        torch.testing.assert_close(mean.double(), (old[path][0] + x.mean(1)) / 2)
        torch.testing.assert_close(var.double(), (old[path][1] + x.var(1)) / 2)


def test_a_prior_of_more_and_more_images_keeps_the_old_statistics():
    model = Net()
    old = statistics(model)
    recalibrate(model, [X], prior=1e12)
    for path, (mean, var) in statistics(model).items():
        torch.testing.assert_close(mean, old[path][0])
        torch.testing.assert_close(var, old[path][1])


def test_the_standard_error_is_that_of_the_means_of_images():
    model = nn.Sequential(nn.BatchNorm2d(3)).eval()
    x = nets.images(30, 3, 8, 8) + 3 * nets.images(30, 3, 1, 1)  # pixels of an image are alike
    of_images = x.double().mean((2, 3))
    expected = (of_images.std(0) / 30**0.5 / x.double().movedim(1, 0).flatten(1).std(1)).max()
    for prior, share in ((0, 1), (30, 1 / 2), (90, 1 / 4)):
        with recalibrate(model, x.split(10), prior=prior) as found:
            assert found.standard_error == pytest.approx(float(expected) * share, rel=0.02)


@pytest.mark.filterwarnings("default:the statistics (of|are)")
def test_too_few_images_are_told_with_how_uncertain_they_are():
    model = Net()
    with pytest.warns(UserWarning, match=r"of 7 images are uncertain.*error of more than 0\.\d\d"):
        recalibrate(model, [X[::6]])
    with pytest.warns(UserWarning, match="those of one image, or of some that do not differ"):
        recalibrate(nn.Sequential(nn.BatchNorm2d(3)), [X[:1]])


def test_by_default_the_order_of_the_batches_does_not_matter():
    one, other = nets.build(Net), nets.build(Net)
    recalibrate(one, X.split(7))
    recalibrate(other, X.split(7)[::-1])
    assert furthest_apart(statistics(one), statistics(other)) < 1e-6


@pytest.mark.parametrize("layerwise", [False, True])
def test_nothing_but_the_statistics_changes(layerwise):
    model = nets.build(Net).train()
    model.second.eval()
    model.conv.weight.requires_grad_(False)
    before, buffers = copy.deepcopy(model.state_dict()), dict(model.named_buffers())
    modes = [m.training for m in model.modules()]
    data = X.split(16)
    kept = [x.clone() for x in data]
    recalibrate(model, data, layerwise=layerwise)
    changed = {
        key for key, value in model.state_dict().items() if not torch.equal(before[key], value)
    }
    assert changed == {key for key in before if "running" in key or "num_batches" in key}
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [False] + 11 * [True]
    assert all(map(torch.equal, data, kept))
    assert torch.is_grad_enabled()


def test_a_model_that_writes_to_its_input_gets_the_same_each_time():
    model = nn.Sequential(nn.Threshold(-1, 5, inplace=True), nn.BatchNorm2d(3))
    data = [X.clone()]
    recalibrate(model, data, layerwise=True)
    assert torch.equal(data[0], X)


@pytest.mark.parametrize("layerwise", [False, True])
def test_the_handle_brings_the_old_statistics_back_bit_for_bit(layerwise):
    model = nets.build(Net)
    before = copy.deepcopy(model.state_dict())
    handle = recalibrate(model, X.split(16), layerwise=layerwise)
    assert not torch.equal(model.first.running_mean, before["first.running_mean"])
    handle.remove()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    model.first.running_mean.zero_()
    handle.remove()  # has nothing left to bring back
    assert not model.first.running_mean.any()
    before = copy.deepcopy(model.state_dict())
    with recalibrate(model, X.split(16), layerwise=layerwise) as inside:
        assert model.first.running_mean.any()
        assert inside.images == 42
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("layerwise", [False, True])
def test_when_a_batch_fails_the_model_is_as_it_was(layerwise):
    model = nets.build(Net).train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RetrofitError, match=r"conv takes \(N, 3, H, W\)"):
        recalibrate(model, [X, torch.zeros(4, 2, 10, 10)], layerwise=layerwise)
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("layerwise", [False, True])
def test_an_image_that_gives_nan_is_named_with_the_batchnorm_it_reached(layerwise):
    model = nets.build(Net)
    before = copy.deepcopy(model.state_dict())
    x = X.clone()
    x[25, 0, 4, 4] = float("inf")
    with pytest.raises(NonFiniteError, match="NaN or Inf at first for image 25 of the data"):
        recalibrate(model, x.split(16), layerwise=layerwise)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_frozen_batchnorms_are_recalibrated_and_stay_frozen():
    frozen, free = nets.build(Net), nets.build(Net)
    retrofit.freeze_statistics(frozen)
    recalibrate(frozen, X.split(16))
    recalibrate(free, X.split(16))
    assert furthest_apart(statistics(frozen), statistics(free)) == 0
    assert not any(norm.training for norm in norms(frozen.train()).values())


def test_a_shared_batchnorm_pools_all_its_calls():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return [self.norm(x), self.norm(2 * x[: len(x) // 5])]

    expected = torch.cat([X, 2 * X[:4], 2 * X[20:24]]).double().movedim(1, 0).flatten(1)
    for layerwise in (False, True):
        model = Shared()
        recalibrate(model, X.split((20, 22)), layerwise=layerwise)
        assert_are_moments_of(statistics(model), {"norm": expected})
        assert int(model.norm.num_batches_tracked) == 2


def test_layer_by_layer_a_batchnorm_may_be_called_more_often_for_some_batches():
    class Varying(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.last = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            parts = x.split(20)  # one or two
            return [self.last(y) for y in [self.norm(part) for part in parts]]

    model = Varying()
    data = X.split((12, 30))
    recalibrate(model, data, layerwise=True)
    assert_are_moments_of(statistics(model), inputs_of_norms(model.eval(), data))


def test_a_batchnorm_that_the_data_never_reaches_keeps_its_statistics_and_is_named():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.used(x)

    model = Half()
    before = copy.deepcopy(model.idle.state_dict())
    with pytest.warns(UserWarning, match="never reached idle: these BatchNorms keep"):
        handle = recalibrate(model, [X])
    assert handle.layers == ("used",)
    assert all(torch.equal(before[k], v) for k, v in model.idle.state_dict().items())


def test_a_batchnorm_that_gets_an_empty_tensor_learns_nothing_from_it():
    class Boxes(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(x[x.mean((1, 2, 3)) > 0])

    kept = X[X.mean((1, 2, 3)) > 0].double().movedim(1, 0).flatten(1)
    for layerwise in (False, True):
        model = Boxes()
        recalibrate(model, [X[:10], X[10:]], layerwise=layerwise)
        assert_are_moments_of(statistics(model), {"norm": kept})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_statistics_are_rounded_once_to_the_precision_of_the_model(dtype):
    x = (nets.images(50, 4) * 2 + 10).to(dtype)
    model = nn.Sequential(nn.BatchNorm1d(4, momentum=None)).to(dtype)
    recalibrate(model, x.split(8))
    exact = 1e-14 if dtype == torch.float64 else 0
    expected = {"running_mean": x.double().mean(0), "running_var": x.double().var(0)}
    for name, value in expected.items():
        ours = model[0].get_buffer(name)
        torch.testing.assert_close(ours, value.to(dtype), rtol=exact, atol=0)
    assert int(model[0].num_batches_tracked) == 7


def compiled(model):
    torch.compiler.reset()  # after several compilations of one class it gives up
    return torch.compile(model, backend="eager")


@pytest.mark.usefixtures("without_gpus")
@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("wrap", [nn.DataParallel, AveragedModel, compiled])
def test_inside_a_wrapper_too(wrap, layerwise):
    alone, wrapped = nets.build(Net), wrap(nets.build(Net)).eval()
    with torch.no_grad():
        wrapped(X[:16])  # compiled now, so it will not see hooks
    recalibrate(alone, X.split(16), layerwise=layerwise)
    handle = recalibrate(wrapped, X.split(16), layerwise=layerwise)
    assert [
        torch.equal(a, b)
        for a, b in zip(
            itertools.chain(*statistics(alone).values()),
            itertools.chain(*statistics(wrapped).values()),
            strict=True,
        )
    ] == 6 * [True]
    assert len(handle.layers) == 3
    torch.testing.assert_close(wrapped(X), alone(X))


def test_batchnorms_without_running_statistics_are_left_alone():
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3))
    assert recalibrate(model, [X]).layers == ("1",)
    with pytest.raises(RetrofitError, match=r"0 keep no running statistics \(track_running_stats"):
        recalibrate(model[:1], [X])


def test_batches_without_images_are_no_data():
    with pytest.raises(RetrofitError, match="there is no data to recalibrate on"):
        recalibrate(nets.build(Net), [X[:0]])


def test_forward_fn_and_max_images_are_those_of_calibrate():
    model, half = nets.build(Net), nets.build(Net)
    data = [{"picture": x} for x in X.split(16)]
    for layerwise in (False, True):
        recalibrate(
            model, data, layerwise=layerwise, forward_fn=lambda m, batch: m(batch["picture"] * 0.5)
        )
        recalibrate(half, (X * 0.5).split(16), layerwise=layerwise)
        assert furthest_apart(statistics(model), statistics(half)) == 0
    assert recalibrate(model, X.split(16), max_images=20).images == 20


@pytest.mark.parametrize("layerwise", [False, True])
def test_of_a_loader_that_shuffles_256_images_are_enough(layerwise):
    model = nets.build(Net)
    data = TensorDataset(torch.cat([X] * 10))
    for shuffle, images in ((True, 256), (False, len(data))):
        loader = DataLoader(data, batch_size=50, shuffle=shuffle)
        assert recalibrate(model, loader, layerwise=layerwise).images == images
    loader = DataLoader(data, batch_size=50, shuffle=True)
    assert recalibrate(model, loader, layerwise=layerwise, max_images=len(data)).images == len(data)


class OnceOnly:
    """Not an iterator, but what it iterates over is used up."""

    def __init__(self, batches):
        self.batches = iter(batches)

    def __iter__(self):
        return self.batches


@pytest.mark.parametrize(
    ("model", "data", "options", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3)), [X], {}, "this Sequential has no BatchNorm"),
        (nn.Sequential(nn.LazyBatchNorm2d()), [X], {}, "0 is a lazy LazyBatchNorm2d"),
        (Net(), [], {}, "no data to recalibrate on"),
        (Net(), X, {}, r"data is one tensor of shape \(42, 3, 10, 10\)"),
        (
            Net(),
            (x for x in [X]),
            {"layerwise": True},
            "data is a generator.*a list or a DataLoader",
        ),
        (
            Net(),
            OnceOnly(X.split(21)),
            {"layerwise": True, "max_memory": 0},
            "42 images in 2 batches at first and 0 in 0",
        ),
        (Net(), X.split(41), {}, r"third got a single value for each channel.*drop_last"),
        (Net(), [X[:1]], {"layerwise": True}, "third got a single value .* in all the data"),
        (Net().half(), [X.half() * 1e4], {"layerwise": True}, r"of first reaches .* torch.float16"),
        (Net(), [X], {"prior": -1}, "prior must be a number of images from 0 up, not -1"),
        (Net(), [X], {"max_images": 0}, "max_images must be positive"),
        (Net(), [X], {"max_memory": -1}, "max_memory must be a number of bytes from 0 up, not -1"),
        (Net(), [X], {"device": "meta"}, "device meta cannot be used here"),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_what_cannot_be_recalibrated_is_named(model, data, options, message):
    before = None if "lazy" in message else copy.deepcopy(model.state_dict())
    with pytest.raises(RetrofitError, match=message):
        recalibrate(model, data, **options)
    for key, value in (before or {}).items():
        assert torch.equal(value, model.state_dict()[key])


def test_an_undo_and_an_observer_say_what_they_are():
    undo = recalibrate(nets.build(Net), [X])
    assert str(undo) == "Recalibration(3 BatchNorms on 42 images in 1 batches)"
    prepared = retrofit.prepare(nets.build(nets.root_sequential))
    retrofit.calibrate(prepared, [X], progress=False)
    assert "site='0', samples=42" in repr(prepared)


class Unreached(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize("layerwise", [False, True])
def test_data_that_reaches_no_batchnorm_is_told_and_changes_nothing(layerwise):
    model = Unreached()
    with pytest.warns(UserWarning, match="the data never reached bn"):
        handle = recalibrate(model, [X], layerwise=layerwise)
    assert handle.layers == ()
    assert torch.equal(model.bn.running_mean, torch.zeros(4))
