"""Same data, same moments: whatever the batches, formats, precision and memory; and all or none."""

from itertools import pairwise

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import retrofit
from retrofit import MomentObserver, NonFiniteError, RetrofitError


class Mobile(nn.Module):
    """Strided, depthwise and pointwise convolutions, both poolings, a residual, a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.pointwise = nn.Conv2d(16, 24, 1)
        self.body = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 1))
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2, 1)
        x = F.relu6(self.pointwise(F.relu6(self.depthwise(x))))
        return self.head(F.adaptive_avg_pool2d(F.relu(x + self.body(x)), 1).flatten(1))


# Images that differ, far from zero.
X = nets.images(60, 3, 30, 26) + 2 * nets.images(60, 3, 1, 1, seed=2) + 5


def prepared(net=Mobile):
    return retrofit.prepare(nets.build(net))


def observers(model):
    return {m.site: m for m in model.modules() if isinstance(m, MomentObserver)}


def moments(model):
    """Mean and standard deviation at every site."""
    found = {site: observer.moments() for site, observer in observers(model).items()}
    return {site: (m.mean, m.var.sqrt()) for site, m in found.items()}


def calibrated(data, model=None, **options):
    model = model or prepared()
    retrofit.calibrate(model, data, progress=False, **options)
    return moments(model)


def assert_close(ours, expected, sigmas):
    assert ours.keys() == expected.keys()
    for site, (mean, sigma) in expected.items():
        assert ((ours[site][0] - mean).abs() <= sigmas * sigma).all(), site
        assert ((ours[site][1] - sigma).abs() <= sigmas * sigma).all(), site


@pytest.fixture(scope="module")
def truth():
    """From the plain network's own activations, in float64, two passes over all data at once."""
    plain, found = nets.build(Mobile).double(), {}
    for site in [s.path for s in retrofit.plan(plain).inserted]:

        def keep(_layer, _args, output, site=site):
            flat = output.movedim(1, 0).flatten(1)
            found[site] = flat.mean(1), flat.std(1)

        plain.get_submodule(site).register_forward_hook(keep)
    with torch.no_grad():
        plain(X.double())
    assert len(found) == 5
    return found


ORDER = torch.randperm(60, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of Python 3.12, for workers
@pytest.mark.parametrize(
    "data",
    [
        X.split(1),
        X.split(7),
        [X],
        [X[:1], X[1:4], X[4:59], X[59:]],
        X.flip(0).split(16),
        X[ORDER].split(13),
        DataLoader(TensorDataset(X), batch_size=9, num_workers=2),
    ],
    ids=["ones", "sevens", "at once", "uneven", "backwards", "shuffled", "workers"],
)
def test_batch_sizes_workers_and_order_do_not_matter(data, truth):
    ours = calibrated(data)
    assert_close(ours, calibrated(X.split(16)), 1e-6)
    assert_close(ours, truth, 1e-5)


LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("weights", LAYOUTS)
@pytest.mark.parametrize("pictures", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_formats_and_precision_do_not_matter(weights, pictures, dtype, truth):
    model = prepared().to(dtype=dtype, memory_format=weights)
    x = X.to(dtype).contiguous(memory_format=pictures)
    assert_close(calibrated(x.split(16), model), truth, 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_loop_of_ones_own_and_a_forward_fn_see_the_same(layout, truth):
    model = prepared()
    batches = X.contiguous(memory_format=layout).split(16)
    with torch.no_grad():
        for x in batches:
            model(x)
    assert_close(moments(model), truth, 1e-5)
    assert_close(calibrated(batches, forward_fn=lambda m, x: m(x)), truth, 1e-5)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # torch's own, of setting any flag
def test_other_kernels_give_the_same(truth):
    with torch.backends.mkldnn.flags(enabled=False):
        assert_close(calibrated(X.split(16)), truth, 1e-5)


def test_activations_whose_squares_leave_float32_are_measured_all_the_same():
    model, plain = (nets.build(nets.root_sequential) for _ in range(2))
    for one in (model, plain.double()):
        with torch.no_grad():
            one[0].weight.mul_(1e25)
            one[2].weight.mul_(1e-25)
    ours = calibrated(X.split(16), retrofit.prepare(model))
    with torch.no_grad():
        for site in (0, 2):
            flat = plain[: site + 1](X.double()).movedim(1, 0).flatten(1)
            assert_close({"": ours[str(site)]}, {"": (flat.mean(1), flat.std(1))}, 1e-5)


@pytest.mark.parametrize("replaced", [False, True])
def test_weights_that_change_between_batches_are_those_that_count(replaced):
    def batches(model):
        for factor, batch in enumerate(X.split(16), 1):
            yield batch
            weight = model.stem.conv.weight
            with torch.no_grad():
                changed = weight.mul(-factor) if replaced else weight.mul_(-factor)
            model.stem.conv.weight = nn.Parameter(changed) if replaced else weight

    ours, by_hand = prepared(), prepared()
    calibrated(batches(ours), ours)
    with torch.no_grad():
        for x in batches(by_hand):
            by_hand(x)
    assert_close(moments(ours), moments(by_hand), 1e-5)


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_identical(one, other):
    assert one.keys() == other.keys()
    assert [name for name, value in one.items() if not torch.equal(value, other[name])] == []


def test_the_same_run_again_is_the_same_bit_for_bit():
    runs = [prepared(), prepared()]
    for model in runs:
        retrofit.calibrate(model, X.split(16), progress=False)
    assert_identical(*map(snapshot, runs))


class Raising(nn.Conv2d):
    """Fails at inputs above 1,000."""

    def forward(self, x):
        if bool((x > 1000).any()):
            raise ZeroDivisionError
        return super().forward(x)


def failing(how):
    """Three batches; the last one does not go through."""
    last = X[32:48].clone()
    if how == "NaN":
        last[7, 1, 3, 3] = float("nan")
    elif how == "the model":
        last[7] = 1e6
    elif how == "shape":
        last = last[:, :2]
    yield from X[:32].split(16)
    if how == "interrupted":
        raise KeyboardInterrupt
    if how == "the data":
        raise OSError
    yield last


ERRORS = {
    "NaN": NonFiniteError,
    "the model": ZeroDivisionError,
    "shape": RetrofitError,
    "the data": OSError,
    "interrupted": KeyboardInterrupt,
}


def with_raising():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Raising(4, 4, 3), nn.ReLU())


@pytest.mark.parametrize("known", [0, 20], ids=["new", "with data"])
@pytest.mark.parametrize("how", list(ERRORS))
def test_after_an_error_the_observers_know_what_they_knew_bit_for_bit(how, known):
    model, undisturbed = prepared(with_raising), prepared(with_raising)
    for one in (model, undisturbed):
        if known:
            calibrated(X[:known].split(8), one)
    before = snapshot(model)
    with pytest.raises(ERRORS[how]):
        calibrated(failing(how), model)
    assert_identical(snapshot(model), before)
    for one in (model, undisturbed):
        calibrated(X.split(16), one)
    assert_identical(snapshot(model), snapshot(undisturbed))


@pytest.mark.parametrize(
    ("data", "options"),
    [(X.split(16), {"tolerance": 1.0}), ([X[:1]], {}), ([], {}), (X, {})],
    ids=["tolerance", "one image", "no data", "one tensor"],
)
def test_what_is_refused_is_not_learned_either(data, options):
    model = prepared()
    calibrated(X[:20].split(8), model)
    before = snapshot(model)
    with pytest.raises(RetrofitError):
        calibrated(data, model, **options)
    assert_identical(snapshot(model), before)


class Cramped(nn.Conv2d):
    """Out of memory with more than `room` images at once."""

    room = 0

    def forward(self, x):
        if len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(x)


def cramped(room, net=None):
    """A prepared network whose first layer still has the memory that its second one lacks."""
    torch.manual_seed(0)
    net = net or nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Cramped(4, 6, 3), nn.ReLU())
    for layer in net.modules():
        if isinstance(layer, Cramped):
            layer.room = room
    return retrofit.prepare(net.eval())


def shrinking(data, expected, model):
    """The report of `calibrate`, which has to warn of these sizes, one after the other."""
    with pytest.warns(UserWarning, match="out of memory") as caught:
        report = retrofit.calibrate(model, data, progress=False)
    messages = [str(w.message) for w in caught if "out of memory" in str(w.message)]
    assert messages == [
        f"out of memory with {size} images at once: going on with {half}"
        for size, half in pairwise(expected)
    ]
    return report


@pytest.mark.parametrize(
    ("room", "sizes"), [(8, [16, 8]), (5, [16, 8, 4]), (3, [16, 8, 4, 2]), (1, [16, 8, 4, 2, 1])]
)
def test_in_too_small_a_memory_batches_are_halved_and_nothing_is_counted_twice(room, sizes):
    model, by_hand = cramped(room), cramped(room)
    report = shrinking(X.split(16), sizes, model)
    assert (report.images, report.batches) == (60, 4)
    parts = [part for batch in X.split(16) for part in batch.split(sizes[-1])]
    retrofit.calibrate(by_hand, parts, progress=False)
    assert_identical(snapshot(model), snapshot(by_hand))


def test_memory_that_others_take_meanwhile_halves_the_batches_from_there_on():
    model, by_hand = cramped(16), cramped(16)

    def batches():
        for i, batch in enumerate(X.split(16)):
            model[2].conv.room = 16 if i < 2 else 5
            yield batch

    shrinking(batches(), [16, 8, 4], model)
    parts = [*X[:32].split(16), *X[32:].split(4)]
    retrofit.calibrate(by_hand, parts, progress=False)
    assert_identical(snapshot(model), snapshot(by_hand))


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = Cramped(3, 4, 3)

    def forward(self, left, right, gain=1.0):
        return F.relu(self.conv(left - right) * gain)


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.conv = nn.Conv2d(3, 3, 1), Cramped(3, 4, 3)

    def forward(self, images: list[torch.Tensor]):
        return F.relu(self.conv(F.relu(self.first(torch.stack(images)))))


class Viewing(nn.Module):
    """Cannot run in channels_last."""

    def __init__(self):
        super().__init__()
        self.first, self.conv, self.last = nn.Conv2d(3, 3, 3), Cramped(3, 4, 3), nn.Conv1d(2, 5, 3)

    def forward(self, x):
        x = F.relu(self.conv(F.relu(self.first(x))))
        return F.relu(self.last(x.view(x.shape[0], 2, -1)))  # channels two by two


@pytest.mark.parametrize(
    ("net", "data"),
    [
        (Siamese, [(x, x.flip(3), "label") for x in X.split(16)]),
        (Siamese, [{"right": x.flip(3), "left": x, "gain": 2.0} for x in X.split(16)]),
        (Detector, [(list(x), [{"boxes": []}] * len(x)) for x in X.split(16)]),
        (Viewing, X.split(16)),
    ],
    ids=["two inputs", "by name", "list", "view"],
)
def test_batches_of_every_form_are_halved(net, data):
    torch.manual_seed(0)
    plain = net().eval()
    plain.conv.room = 60
    ready = [retrofit.prepare(plain, retrofit.plan(plain, example=data[0])) for _ in "12"]
    ready[0].conv.conv.room = 5
    shrinking(data, [16, 8, 4], ready[0])
    roomy = calibrated(data, ready[1])
    assert_close(moments(ready[0]), roomy, 1e-6)
    for site, observer in observers(ready[0]).items():
        assert observer.seen == 60
        assert torch.equal(observer.moments().count, observers(ready[1])[site].moments().count)


def test_a_network_that_cannot_run_in_channels_last_runs_as_it_can():
    torch.manual_seed(0)
    plain = Viewing().eval()
    plain.conv.room = 60
    plan = retrofit.plan(plain, example=X[:2])
    ours, by_hand = retrofit.prepare(plain, plan), retrofit.prepare(plain, plan)
    calibrated(X.split(16), ours)
    with torch.no_grad():
        by_hand(X)
    assert_close(moments(ours), moments(by_hand), 1e-5)
    assert {observer.seen for observer in observers(ours).values()} == {60}


def test_in_half_a_batch_too_the_image_that_gives_nan_is_named():
    x = X.clone()
    x[25, 1, 3, 3] = float("nan")
    with (
        pytest.warns(UserWarning, match="out of memory"),
        pytest.raises(NonFiniteError, match="NaN or Inf at 0 for image 25 of the data"),
    ):
        retrofit.calibrate(cramped(5), x.split(16), progress=False)


def test_an_image_that_does_not_fit_alone_raises_and_nothing_is_learned():
    model = cramped(0)
    before = snapshot(model)
    with (
        pytest.warns(UserWarning, match="out of memory"),
        pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"),
    ):
        retrofit.calibrate(model, X.split(16), progress=False)
    assert_identical(snapshot(model), before)


def test_what_a_forward_fn_runs_is_not_split():
    model, seen = cramped(8), []

    def forward(m, x):
        seen.append(len(x))
        return m(x)

    before = snapshot(model)
    with pytest.raises(torch.OutOfMemoryError):
        retrofit.calibrate(model, X.split(16), forward_fn=forward, progress=False)
    assert seen == [16]
    assert_identical(snapshot(model), before)
