"""`recalibrate(layerwise=True)`, against a pass over all data for each BatchNorm in turn."""

from concurrent.futures import ThreadPoolExecutor

import nets
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from nets import norms
from operations import operations
from torch import nn

import retrofit
from retrofit import RetrofitError

pytestmark = pytest.mark.filterwarnings("ignore:the statistics (of|are)")  # of so few images

X = nets.images(24, 3, 9, 9) + torch.linspace(-2, 2, 24).view(-1, 1, 1, 1)
INPUT = 3 * 9 * 9 * 4  # bytes of a picture


class Residual(nn.Module):
    """With a shortcut, so that more than one activation waits."""

    def __init__(self):
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.body, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.last = nn.BatchNorm1d(4)
        nets.make_stale(self)

    def forward(self, x):
        x = F.relu(self.first(self.stem(x)))
        x = x + self.second(self.body(x)).exp()
        return self.last(x.mean((2, 3)))


class Shared(Residual):
    def forward(self, x):
        x = F.relu(self.first(self.stem(x)))
        x = x + self.second(self.body(x)).exp()
        return self.last(self.second(self.body(x)).tanh().amax((2, 3)) + self.first(x).mean((2, 3)))


class ByBrightness(Residual):
    """Which BatchNorms are called, and in what order, depends on the batch."""

    def forward(self, x):
        dark = x.mean() < 0
        x = F.relu(self.stem(x))
        if dark:
            return self.last(self.second(self.first(x)).mean((2, 3)))
        return self.last(self.first(self.second(x) ** 2).mean((2, 3)))


class Skipping(Residual):
    """All batches come by the first one; what is behind it depends on the batch."""

    def forward(self, x):
        dark = x.mean() < 0
        x = F.relu(self.first(self.stem(x)))
        return self.last((self.second(self.body(x)) if dark else x).mean((2, 3)))


class Switching(Residual):
    """What it switches on for a while must not reach the batches that run meanwhile."""

    def forward(self, x):
        with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
            x = F.relu(self.first(self.stem(x)))
        assert not torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        x = x.float() + self.second(self.body(x.float()))
        return self.last(x.mean((2, 3)))


NETS = [Residual, Shared, ByBrightness, Skipping, Switching]


def in_turn(model, data, prior):
    """Settle each BatchNorm in a pass over all data, in the order of first calls; in float64."""
    seen, order = {}, []

    def look(path):
        def hook(_norm, args):
            if path not in order:
                order.append(path)
            seen.setdefault(path, []).append(args[0].double().movedim(1, 0).flatten(1))

        return hook

    handles = [n.register_forward_pre_hook(look(path)) for path, n in norms(model).items()]
    with torch.no_grad():
        for batch in data:
            model(batch)
        for path in order:
            seen.clear()
            for batch in data:
                model(batch)
            inputs, norm = torch.cat(seen[path], 1), norms(model)[path]
            new = len(X) / (len(X) + prior)
            norm.running_mean.lerp_(inputs.mean(1).to(norm.running_mean), new)
            norm.running_var.lerp_(inputs.var(1).to(norm.running_var), new)
    for handle in handles:
        handle.remove()
    return order


def layerwise(model, data, **options):
    return retrofit.recalibrate(model, data, layerwise=True, progress=False, **options)


def assert_same_statistics(ours, theirs, mean=2e-6, var=5e-6):
    """In float32 the bounds are those of the activations, which each layer rounds anew."""
    for path, norm in norms(theirs).items():
        found, sigma = norms(ours)[path], norm.running_var.sqrt()
        assert ((found.running_mean - norm.running_mean).abs() <= mean * sigma).all(), path
        torch.testing.assert_close(found.running_var, norm.running_var, rtol=var, atol=0)


sizes_of_batches = st.lists(st.integers(1, 9), min_size=1, max_size=16).filter(
    lambda sizes: sum(sizes) <= 22
)
priors, memories = st.sampled_from([0, 5, 64]), st.sampled_from([0, 10_000, 20_000, 1e9])


@given(st.sampled_from(NETS), sizes_of_batches, priors, memories)
def test_the_statistics_are_those_of_a_pass_for_each(build, sizes, prior, max_memory):
    data = X.split([*sizes, 24 - sum(sizes)])
    ours, theirs = nets.build(build).eval(), nets.build(build).eval()
    order = in_turn(theirs, data, prior)
    found = layerwise(ours, data, prior=prior, max_memory=max_memory)
    assert_same_statistics(ours, theirs)
    assert list(found.layers) == order
    assert (found.images, found.batches) == (24, len(data))
    assert not any(m._forward_pre_hooks for m in ours.modules())
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


@given(st.sampled_from([Residual, Shared, ByBrightness]), sizes_of_batches, priors, memories)
def test_in_float64_they_are_to_twelve_digits(build, sizes, prior, max_memory):
    data = X.double().split([*sizes, 24 - sum(sizes)])
    ours, theirs = nets.build(build).double().eval(), nets.build(build).double().eval()
    in_turn(theirs, data, prior)
    layerwise(ours, data, prior=prior, max_memory=max_memory)
    assert_same_statistics(ours, theirs, mean=1e-12, var=1e-12)


def test_every_picture_passes_once():
    model, pictures = nets.build(Residual), []
    model.stem.register_forward_hook(lambda _m, args, _y: pictures.append(len(args[0])))
    found = layerwise(model, X.split(5))
    # One of them first alone, to see what it takes, and the first batch alone in the end.
    assert sum(pictures) == 1 + 24 + 5
    assert found.passes == 1
    # At `second`: the output of the stem's ReLU, that of the body, and the picture itself.
    assert found.held == 24 * (INPUT + 2 * 4 * 7 * 7 * 4)


@pytest.mark.parametrize(("waiting", "passes"), [(10, 4), (0, 4), (24, 1)])
def test_what_does_not_fit_into_the_memory_runs_for_each_batchnorm(waiting, passes):
    model, bodies = nets.build(Residual), []
    model.body.register_forward_hook(lambda _m, args, _y: bodies.append(len(args[0])))
    each = INPUT + 2 * 4 * 7 * 7 * 4
    found = layerwise(model, X.split(5), max_memory=waiting * each)
    waits = max(waiting, 5)  # one batch in any case
    # The others end at each BatchNorm, those before them passed, and in the end run to the end.
    assert sum(bodies) == 1 + waits + 3 * (24 - waits) + 5
    assert (found.passes, found.held) == (passes, waits * each)


@pytest.mark.parametrize("prior", [0, 64])
@pytest.mark.parametrize("sizes", [[4] * 3, [1] * 12, [5, 1, 6]])
def test_a_deep_network_gets_the_same_statistics_with_any_budget(sizes, prior):
    """What differs in one layer grows in those behind it, so there may be nothing to begin with."""
    torch.manual_seed(0)
    model, data = torchvision.models.mobilenet_v2().eval(), nets.images(12, 3, 32, 32).split(sizes)
    handle = layerwise(model, data, prior=prior)
    found = {path: norm.running_var.clone() for path, norm in norms(model).items()}
    for budget in (0, handle.held / 2):
        handle.remove()
        handle = layerwise(model, data, prior=prior, max_memory=budget)
        assert handle.passes == len(found) + 1
        for path, norm in norms(model).items():
            torch.testing.assert_close(norm.running_var, found[path], rtol=1e-6, atol=0)


class OnItself(nn.Module):
    """Keeps an activation between two BatchNorms outside of the pass, as nets with hooks do."""

    def __init__(self, removes=False):
        super().__init__()
        self.stem, self.removes = nn.Conv2d(3, 4, 3, padding=1), removes
        self.first, self.body = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.second, self.third = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        self.kept = self.stem(x)
        y = self.second(self.body(self.first(self.kept).relu()))
        y = self.third(y + self.kept)
        if self.removes:
            del self.kept
        return y


class Workspace(OnItself):
    """Writes to the same memory for every batch."""

    def forward(self, x):
        if getattr(self, "space", None) is None or self.space.shape != x.shape:
            self.space = torch.empty_like(x)
        return super().forward(torch.mul(x, 2, out=self.space).view_as(x))


class WorkspaceForTheFirst(nn.Sequential):
    def __init__(self):
        super().__init__(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.space = torch.empty(4, 3, 9, 9)

    def forward(self, x):
        return super().forward(torch.mul(x, 2, out=self.space[: len(x)]))


class Listed(OnItself):
    """Keeps activations in a list that a hook fills, and takes them from there."""

    def __init__(self):
        super().__init__()
        self.stem.register_forward_hook(lambda _m, _x, y: self.outputs.append(y))
        self.outputs = []

    def forward(self, x):
        y = self.second(self.body(self.first(self.stem(x)).relu()))
        return self.third(y + self.outputs.pop())


APART = [OnItself, lambda: OnItself(removes=True), Workspace, WorkspaceForTheFirst, Listed]


@pytest.mark.parametrize("prior", [0, 7])
@pytest.mark.parametrize("max_memory", [None, 0])
@pytest.mark.parametrize("build", APART)
def test_batches_that_come_upon_what_others_left_are_measured_in_passes(build, max_memory, prior):
    data = [x + i for i, x in enumerate(X.split(4))]
    ours, theirs = nets.build(build), nets.build(build)
    found = layerwise(ours, data, prior=prior, max_memory=max_memory)
    in_turn(theirs, data, prior)
    assert_same_statistics(ours, theirs)
    assert found.passes > 1
    one = nets.build(build)
    assert layerwise(one, data[:1]).passes == 1  # which meets no other


def test_images_of_two_sizes_meet_nobody_elses_activations():
    data = [nets.images(3, 3, size, size) for size in (8, 9, 8)]
    ours, theirs = nets.build(OnItself), nets.build(OnItself)
    layerwise(ours, data)
    in_turn(theirs, data, 0)
    assert_same_statistics(ours, theirs)


def test_data_that_fill_one_buffer_again_and_again():
    data, buffer = [x + i for i, x in enumerate(X.split(6))], torch.empty_like(X[:6])

    class Reused:
        def __iter__(self):
            return (buffer.copy_(x) for x in data)

    def build():
        return nn.Sequential(nn.BatchNorm2d(3), nets.build(Residual))

    ours, theirs = nets.build(build), nets.build(build)
    layerwise(ours, Reused(), forward_fn=lambda model, x: model(x))
    in_turn(theirs, data, 0)
    assert_same_statistics(ours, theirs)


@pytest.mark.parametrize("build", [ByBrightness, OnItself])
def test_data_that_differ_in_a_later_pass_are_refused_one_by_one_too(build):
    passes = []

    class Growing:
        def __iter__(self):
            passes.append(None)
            return iter(X.split(6)[: 3 if len(passes) == 1 else 4])

    with pytest.raises(RetrofitError, match="18 images in 3 batches at first and 24"):
        layerwise(nets.build(build), Growing())


def test_a_model_that_runs_in_another_thread():
    def forward_in_a_pool(model, x):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(model, x).result()

    theirs = nets.build(Residual)
    in_turn(theirs, X.split(6), 0)
    ours = nets.build(Residual)
    layerwise(ours, X.split(6), forward_fn=forward_in_a_pool)
    assert_same_statistics(ours, theirs)


def switched(model, x):
    with torch.inference_mode():
        model(x)


def typed(model, x):
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        model(x)
    finally:
        torch.set_default_dtype(usual)


@pytest.mark.parametrize("forward", [switched, typed])
@pytest.mark.parametrize("batches", [1, 2, 4])
@pytest.mark.parametrize("inference", [False, True])
def test_what_a_pass_switches_for_a_while_is_as_it_was(forward, batches, inference):
    ours, theirs, data = nets.build(Residual), nets.build(Residual), X.chunk(batches)
    in_turn(theirs, data, 0)
    with torch.inference_mode(inference):
        found = layerwise(ours, data, forward_fn=forward)
        assert torch.is_inference_mode_enabled() is inference
    assert not torch.is_inference_mode_enabled()
    assert not torch.zeros(1).is_inference()
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    assert found.passes == 1
    assert_same_statistics(ours, theirs)


def test_a_batchnorm_called_again_has_a_pass_of_its_own():
    found = layerwise(nets.build(Shared), X.split(5))
    # Each of these is called again once in vain: `second`, `first`, and `second` behind that.
    assert found.passes == 1 + 3 * 2
    assert str(found) == "Recalibration(3 BatchNorms on 24 images in 5 batches, 7 times)"


def test_what_was_settled_is_forgotten_where_batches_part_behind_it():
    ours, theirs = nets.build(Skipping).eval(), nets.build(Skipping).eval()
    in_turn(theirs, X.split(6), 5)
    found = layerwise(ours, X.split(6), prior=5)
    assert found.passes == 1 + 1 + 3  # together as far as that goes, to see the order, one for each
    assert_same_statistics(ours, theirs)


def test_more_batches_in_another_pass_are_refused():
    class Growing:
        count = 1

        def __iter__(self):
            self.count += 1
            return iter(X.split(6)[: self.count])

    model = nets.build(Shared)
    before = {path: norm.running_mean.clone() for path, norm in norms(model).items()}
    with pytest.raises(RetrofitError, match=r"12 images in 2 batches at first and 18 in 3 then"):
        layerwise(model, Growing())
    assert all(torch.equal(norms(model)[path].running_mean, old) for path, old in before.items())


def test_other_batches_in_another_pass_are_refused_where_not_all_wait():
    class Shuffled:
        def __init__(self):
            self.batches = list(X.split(6))

        def __iter__(self):
            self.batches.append(self.batches.pop(0))
            return iter(self.batches)

    model = nets.build(Residual)
    before = {path: norm.running_mean.clone() for path, norm in norms(model).items()}
    with pytest.raises(RetrofitError, match=r"24 images in 4 batches at first and .* or others"):
        layerwise(model, Shuffled(), max_memory=0)
    assert all(torch.equal(norms(model)[path].running_mean, old) for path, old in before.items())
    layerwise(model, Shuffled())


def test_what_fails_in_a_batch_that_waited_leaves_nothing_behind():
    model = nets.build(Residual).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batches = list(X.split(8))
    original = model.body.forward

    def failing(x):
        if float(x.mean()) > float(threshold):
            raise ValueError("too bright")
        return original(x)

    threshold = torch.tensor(1.0)
    model.body.forward = failing
    batches[1] = batches[1] + 100
    with pytest.raises(ValueError, match="too bright"):
        layerwise(model, batches)
    del model.body.forward
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.training
    assert torch.is_grad_enabled()


def test_a_model_that_takes_no_single_picture_is_measured_all_the_same():
    class Pairs(Residual):
        def forward(self, x):
            return super().forward(x.view(-1, 2, *x.shape[1:]).mean(1))

    ours, theirs = nets.build(Pairs).eval(), nets.build(Pairs).eval()
    data = X.split(8)
    in_turn(theirs, data, 0)
    assert layerwise(ours, data).passes == 1
    assert_same_statistics(ours, theirs)


def test_small_batches_are_reduced_together():
    """So that single pictures, of which there are many, cost calls of the model and little else."""
    model, pictures = nets.build(Residual).eval(), nets.images(64, 3, 9, 9)
    with torch.no_grad():
        plain = operations(model, pictures[:1])
    for_32, for_64 = (operations(layerwise, model, pictures[:n].split(1)) for n in (32, 64))
    assert (for_64 - for_32) / 32 <= plain + 6 * len(norms(model))


@pytest.mark.parametrize("sizes", [[1] * 24, [2, 1, 1, 4, 1, 15], [24]])
@pytest.mark.parametrize("max_memory", [0, 1e9])
@pytest.mark.parametrize("image", [0, 2, 23])
def test_a_picture_that_gives_nan_is_named_by_its_place_in_the_data(sizes, max_memory, image):
    class Roots(Residual):
        def forward(self, x):
            bright = (x.flatten(1).mean(1) > 50).view(-1, 1, 1, 1)
            x = F.relu(self.first(self.stem(x)))
            return self.last(self.second(self.body(torch.where(bright, x / 0, x))).mean((2, 3)))

    pictures = X.clone()
    pictures[image] += 100
    model = nets.build(Roots).eval()
    before = {path: norm.running_mean.clone() for path, norm in norms(model).items()}
    with pytest.raises(
        retrofit.NonFiniteError, match=f"NaN or Inf at second for image {image} of the data"
    ):
        layerwise(model, pictures.split(sizes), max_memory=max_memory)
    for path, norm in norms(model).items():
        assert norm.running_mean.equal(before[path])
