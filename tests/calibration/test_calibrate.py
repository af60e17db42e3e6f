"""Feeding data: every way it comes, and what is left behind."""

import copy
import dataclasses
import gc
import weakref

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import retrofit
from retrofit import NonFiniteError, RetrofitError


def site(prepared, path="0.bn"):
    return prepared.get_submodule(path).moments()


def prepared():
    return retrofit.prepare(nets.build(nets.root_sequential))


def calibrated(data, **options):
    model = prepared()
    report = retrofit.calibrate(model, data, progress=False, **options)
    return model, report


X = nets.images(40, 3, 12, 12)


def batches_as(kind):
    labels = torch.arange(40)
    return {
        "list": X.split(16),
        "generator": (x for x in X.split(16)),
        "loader": DataLoader(TensorDataset(X, labels), batch_size=16),
        "dicts": [{"image": x, "other": [x * 2]} for x in X.split(16)],
        "nested": [((x, 3), "label") for x in X.split(16)],
    }[kind]


@pytest.mark.parametrize("kind", ["list", "generator", "loader", "dicts", "nested"])
def test_batches_in_every_form_give_the_moments_of_a_loop_of_ones_own(kind):
    model, report = calibrated(batches_as(kind))
    assert (report.images, report.batches) == (40, 3)
    by_hand = prepared()
    with torch.no_grad():
        for x in X.split(7):
            by_hand(x)
    for path in ("0.bn", "2.bn"):
        ours, theirs = site(model, path), site(by_hand, path)
        assert torch.equal(ours.count, theirs.count)
        sigma = theirs.var.sqrt()
        assert ((ours.mean - theirs.mean).abs() < 1e-5 * sigma).all()
        assert ((ours.var - theirs.var).abs() < 1e-5 * theirs.var).all()


def test_moments_are_those_of_the_original_networks_activations():
    model, _ = calibrated(X.split(16))
    plain = nets.build(nets.root_sequential).double()
    with torch.no_grad():
        activations = plain[:3](X.double()).movedim(1, 0).flatten(1)
    moments = site(model, "2.bn")
    sigma = activations.std(1)
    assert ((moments.mean - activations.mean(1)).abs() < 1e-5 * sigma).all()
    assert ((moments.var.sqrt() - sigma).abs() < 1e-5 * sigma).all()


def test_max_images_cuts_the_last_batch():
    model, report = calibrated(X.split(16), max_images=20)
    assert report.images == 20
    only, _ = calibrated([X[:20]])
    torch.testing.assert_close(site(model).var, site(only).var, rtol=1e-5, atol=0)


def test_calling_again_adds_data():
    model, _ = calibrated(X[:10].split(5))
    retrofit.calibrate(model, X[10:].split(5), progress=False)
    whole, _ = calibrated([X])
    torch.testing.assert_close(site(model).mean, site(whole).mean, rtol=1e-6, atol=1e-7)


def test_forward_fn_calls_the_model_its_own_way():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, *, picture, gain):
            return F.relu(self.conv(picture * gain))

    model = retrofit.prepare(Named())
    data = [{"id": "a", "picture": x} for x in X.split(16)]
    seen = []

    def forward(m, batch):
        seen.append(m(picture=batch["picture"], gain=2.0).shape)

    report = retrofit.calibrate(model, data, forward_fn=forward, progress=False)
    assert report.images == 40
    assert seen[0] == (16, 4, 10, 10)


def test_a_model_that_cannot_run_in_channels_last():
    class Viewing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 4, 3)
            self.second = nn.Conv1d(2, 5, 3)

        def forward(self, x):
            x = F.relu(self.first(x))
            return F.relu(self.second(x.view(x.shape[0], 2, -1)))

    model = retrofit.prepare(Viewing())
    assert retrofit.calibrate(model, X.split(16), progress=False).images == 40
    assert (site(model, "first.bn").count == 40 * 100).all()
    assert (site(model, "second.bn").count == 40 * 198).all()


def test_the_forward_pass_ends_after_the_last_site():
    class Tail(nn.Module):
        def forward(self, x):
            self.ran = True
            return x

    tail = Tail()
    model = retrofit.prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), tail))
    retrofit.calibrate(model, [X], progress=False)
    assert not hasattr(model[2], "ran")
    model(X)
    assert model[2].ran  # and only inside calibrate


class Siamese(nn.Module):
    """Two inputs, and one that has a default."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, left, right, gain=1.0):
        return F.relu(self.conv(left - right) * gain)


@pytest.mark.parametrize(
    "data",
    [
        [(x, 2 * x, "label") for x in X.split(16)],
        [{"right": 2 * x, "label": 0, "left": x} for x in X.split(16)],
    ],
    ids=["tuples", "dicts"],
)
def test_a_model_of_several_inputs_gets_them_by_place_or_by_name(data):
    model = retrofit.prepare(nets.build(Siamese))
    report = retrofit.calibrate(model, data, max_images=20, progress=False)
    assert report.images == 20
    expected = nets.build(Siamese).conv(-X[:20]).movedim(1, 0).flatten(1).double()
    ours = site(model, "conv.bn")
    torch.testing.assert_close(ours.mean, expected.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.var, expected.var(1), rtol=1e-5, atol=0)


def test_a_detector_gets_its_list_of_pictures():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, images: list[torch.Tensor]):
            return F.relu(self.conv(torch.stack(images)))

    def collated(pictures):  # as a detection loader does
        return list(pictures), [{"boxes": torch.zeros(1, 4)} for _ in pictures]

    data = [collated(x) for x in X.split(16)]
    model = retrofit.prepare(Detector(), retrofit.plan(Detector(), example=data[0]))
    assert retrofit.calibrate(model, data, max_images=20, progress=False).images == 20
    assert (site(model, "conv.bn").count == 20 * 100).all()


class Varying(nn.Module):
    """Sites that get as many samples, as often, as the test says."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 3, padding=1)
        self.again = nn.Conv2d(3, 3, 1)
        self.heads = nn.ModuleList(nn.Conv2d(3, 4, 1) for _ in range(3))
        self.times, self.kept, self.used = 1, None, 3

    def forward(self, x):
        x = F.relu(self.stem(x))
        for _ in range(self.times):
            x = F.relu(self.again(x))
        x = x[: self.kept].repeat_interleave(2, 0)
        return [F.relu(head(x)) for head in self.heads[: self.used]]


def varying(**later):
    """Planned for one run, used for others: as for models that decide by their data."""
    model = nets.build(Varying)
    ready = retrofit.prepare(model, dataclasses.replace(retrofit.plan(model), last=None))
    vars(ready).update(later)
    return ready


def test_a_site_may_be_called_more_often_than_planned_and_another_never():
    model = varying(times=3, used=2)
    report = retrofit.calibrate(model, X.split(16), progress=False)
    assert report.images == 40
    assert (site(model, "again.bn").count == 3 * 40 * 144).all()
    assert (site(model, "heads.1.bn").count == 2 * 40 * 144).all()
    assert [s.site for s in report.sites] == ["stem", "again", "heads.0", "heads.1"]


def test_sites_that_saw_nothing_are_left_out_of_the_report():
    report = retrofit.calibrate(varying(kept=0), [X], progress=False)
    assert [s.site for s in report.sites] == ["stem", "again"]


def test_a_site_that_saw_one_sample_has_no_halves():
    class Global(nn.Module):
        def __init__(self):
            super().__init__()
            self.local, self.whole = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return F.relu(self.whole(F.relu(self.local(x)).mean(0, keepdim=True)))

    report = retrofit.calibrate(retrofit.prepare(Global()), [X], progress=False)
    assert [s.site for s in report.sites] == ["local"]


def test_nan_in_samples_that_are_not_images_is_not_blamed_on_an_image():
    model = varying()
    with torch.no_grad():
        model.heads[0].conv.weight[:] = torch.finfo(torch.float32).max
    data = torch.zeros(40, 3, 12, 12)
    data[25] = 10
    with pytest.raises(NonFiniteError, match=r"NaN or Inf at heads\.0 for item 18 of the batch"):
        retrofit.calibrate(model, data.split(16), progress=False)


def test_a_model_that_writes_to_its_input_does_not_change_the_data():
    data = [x.clone() for x in X.split(16)]
    model = retrofit.prepare(nn.Sequential(nn.ReLU(True), nn.Conv2d(3, 4, 3), nn.ReLU()))
    retrofit.calibrate(model, data, progress=False)
    assert torch.equal(torch.cat(data), X)


def test_a_site_called_several_times_is_measured_at_each_call():
    model = retrofit.prepare(nets.build(nets.SharedConv))
    retrofit.calibrate(model, [X], progress=False)
    assert (site(model, "shared.bn").count == 2 * 40 * 144).all()
    assert model.get_submodule("shared.bn").seen == 80


def test_the_original_is_untouched_and_shares_its_storage():
    model = nets.build(nets.AlreadyNormed).train()
    model.free.eval()
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    ready = retrofit.prepare(model)
    retrofit.calibrate(ready, [X], progress=False)
    assert [m.training for m in model.modules()] == modes
    assert not any(m.training for m in ready.modules())
    assert not any(m._forward_hooks for m in (*model.modules(), *ready.modules()))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert ready.batch.weight.data_ptr() == model.batch.weight.data_ptr()
    assert ready.batch.weight is not model.batch.weight
    ready.double()
    assert model.batch.weight.dtype == torch.float32
    converted = retrofit.convert(ready)
    assert converted.training
    assert not converted.free.bn.training
    assert converted.batch.weight.data_ptr() != model.batch.weight.data_ptr()


def test_hooks_are_removed_and_modes_restored_when_the_model_raises():
    model = prepared().train()
    with pytest.raises(RetrofitError, match="takes"):
        retrofit.calibrate(model, [torch.randn(2, 5, 8, 8)], progress=False)
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())
    assert torch.is_grad_enabled()


def test_ties_between_parameters_stay_ties():
    converted = retrofit.add_batchnorm(nets.build(nets.TiedWeights), [X], progress=False)
    assert converted.first.conv.weight is converted.second.conv.weight


def test_batchnorm_learns_where_the_weight_is_computed_from_parameters():
    model = nets.build(nets.root_sequential)
    nn.utils.parametrizations.weight_norm(model[0])
    with torch.no_grad():
        converted = retrofit.add_batchnorm(model, [X], progress=False)
    assert converted[0].bn.weight.requires_grad


def test_forward_fn_may_make_its_own_tensors():
    data = [x.numpy() for x in X.split(16)]
    model, report = calibrated(data, forward_fn=lambda m, a: m(torch.from_numpy(a)), max_images=20)
    assert report.images == 32


def test_images_of_batches_without_tensors_are_counted_by_the_first_layer_that_runs():
    data = [x.numpy() for x in X.split(16)]
    model = varying(times=2)
    report = retrofit.calibrate(
        model, data, forward_fn=lambda m, a: m(torch.from_numpy(a)), progress=False
    )
    assert report.images == 40


def test_converting_a_converted_model_changes_nothing():
    once = retrofit.add_batchnorm(nets.build(nets.Residual), [X], progress=False)
    with pytest.warns(UserWarning, match="no BatchNorm is added"):
        again = retrofit.add_batchnorm(once, [X], progress=False)
    assert torch.equal(again(X), once(X))
    plain = retrofit.fold(again)
    assert list(plain.state_dict()) == list(nets.build(nets.Residual).state_dict())


def test_converting_more_of_a_converted_model_is_refused():
    some = retrofit.insert(
        nets.build(nets.Residual), retrofit.plan(nets.build(nets.Residual), include="stem")
    )
    with pytest.raises(RetrofitError, match="was converted before: fold it"):
        retrofit.add_batchnorm(some, [X], progress=False)


def test_batchnorm_parameters_follow_the_convolutions_requires_grad():
    model = nets.build(nets.root_sequential)
    model[0].weight.requires_grad_(False)
    with pytest.warns(UserWarning, match="1 of 2 BatchNorms follow frozen layers"):
        converted = retrofit.add_batchnorm(model, [X], progress=False)
    assert [converted[i].bn.weight.requires_grad for i in (0, 2)] == [False, True]
    assert [converted[i].bn.bias.requires_grad for i in (0, 2)] == [False, True]


def test_what_convert_records():
    converted = retrofit.add_batchnorm(
        nets.build(nets.root_sequential), X.split(16), momentum=None, progress=False
    )
    norm = converted[0].bn
    assert (norm.eps, norm.momentum, int(norm.num_batches_tracked)) == (1e-5, None, 3)


def test_another_eps_is_exact_and_warned_of():
    model, _ = calibrated([X])
    with pytest.warns(UserWarning, match=r"eps=0\.001 is not stored in a state dict"):
        converted = retrofit.convert(model, eps=1e-3)
    assert torch.equal(converted(X), nets.build(nets.root_sequential)(X))


def test_convert_can_share_the_tensors():
    model = nets.build(nets.root_sequential)
    ready = retrofit.prepare(model)
    retrofit.calibrate(ready, [X], progress=False)
    shared = retrofit.convert(ready, share_storage=True)
    assert shared[0].conv.weight.data_ptr() == model[0].weight.data_ptr()


def test_a_sample_sorted_by_kind_is_warned_of_and_a_mixed_one_is_not():
    kinds = torch.cat([X + 2, X - 2])
    with pytest.warns(UserWarning, match=r"two halves of the 80 .* sorted by class"):
        _, report = calibrated(kinds.split(10))
    assert report.disagreement > 1
    assert report.sites[0].mean_worst >= report.sites[0].mean
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    _, mixed = calibrated(kinds[order].split(10))
    assert mixed.disagreement < 1
    assert "80 images in" in str(mixed)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "got 0 of the at least 2 images"),
        ([X[:1]], "got 1 of the at least 2 images"),
        (X, r"one tensor of shape \(40, 3, 12, 12\)"),
        (["a"], "a batch of type str holds no tensor"),
        ([X.mul(10).to(torch.uint8)], "the batches are torch.uint8"),
        ([X[0]], r"a single picture of shape \(3, 12, 12\), without a batch axis"),
    ],
    ids=["empty", "single", "tensor", "text", "uint8", "unbatched"],
)
def test_data_that_cannot_be_used_is_named(data, message):
    with pytest.raises(RetrofitError, match=message):
        calibrated(data)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_image_that_gives_nan_is_named_with_its_layer(value):
    data = X.clone()
    data[25, 1, 3, 3] = value
    with pytest.raises(NonFiniteError, match="NaN or Inf at 0 for image 25 of the data"):
        calibrated(data.split(16))


def test_a_device_that_is_not_there_is_named():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(RetrofitError, match="device cuda cannot be used here"):
        calibrated([X], device="cuda")


@pytest.mark.parametrize("device", ["nope", "meta"])
def test_a_device_that_is_none_is_named(device):
    with pytest.raises(RetrofitError, match=f"device {device} cannot be used here"):
        calibrated([X], device=device)


def test_converting_without_data_names_the_site():
    with pytest.raises(RetrofitError, match="0, 2 saw no data"):
        retrofit.convert(prepared())


@pytest.mark.parametrize(
    "forward_fn", [lambda _model, _x: None, lambda _model, x: nets.build(nets.root_sequential)(x)]
)
def test_data_that_reaches_no_site_is_warned_of(forward_fn):
    with pytest.warns(UserWarning, match="none of the observed layers got any of the 40 calib"):
        model, report = calibrated(X.split(16), forward_fn=forward_fn)
    assert report.sites == ()
    with pytest.raises(RetrofitError, match="saw no data"):
        retrofit.convert(model)


def test_what_was_not_prepared_is_refused():
    with pytest.raises(
        RetrofitError, match=r"calibrate takes a model made by prepare, and this Residual is not"
    ):
        retrofit.calibrate(nets.build(nets.Residual), [X])
    converted = retrofit.insert(nets.build(nets.Residual))
    with pytest.raises(RetrofitError, match="converted already: recalibrate measures its BatchN"):
        retrofit.calibrate(converted, [X])
    with pytest.raises(RetrofitError, match="already prepared"):
        retrofit.prepare(prepared())


def test_folding_undoes_the_conversion_even_if_that_added_nothing():
    model = nets.build(nets.AlreadyNormed)
    with pytest.warns(UserWarning, match="no BatchNorm is added"):
        same = retrofit.add_batchnorm(model, [X], exclude="free", progress=False)
    with pytest.warns(UserWarning, match="it was there before"):
        assert isinstance(retrofit.fold(same).bn, nn.BatchNorm2d)
    assert isinstance(retrofit.fold(model).bn, nn.Identity)


def test_a_network_with_nothing_to_insert_needs_no_data():
    model = nets.build(nets.AlreadyNormed)
    plan = retrofit.plan(model, exclude="free")
    with pytest.warns(UserWarning, match="no BatchNorm is added"):
        ready = retrofit.prepare(model, plan)
    assert retrofit.calibrate(ready, [], progress=False).images == 0
    assert torch.equal(retrofit.convert(ready)(X), model(X))


class TwoSizes(nn.Module):
    """Convolutions of many kinds, run on several sizes."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 8, 3, padding=1)
        self.two = nn.Conv2d(8, 8, 3, stride=2, dilation=2, groups=4, bias=False)
        self.three = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.four = nn.utils.weight_norm(nn.Conv2d(8, 8, 1))
        self.five = nn.Conv2d(8, 6, 3, padding="same")

    def forward(self, x):
        for size in (12, 25):
            y = F.relu(self.two(F.relu(self.one(F.interpolate(x, size=(size, size))))))
            x = F.relu(self.five(F.relu(self.four(F.relu(self.three(y))))))[:, :3].contiguous()
        return x


def test_a_weight_that_forward_sets_is_used_and_not_the_one_before():
    class Setting(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
            self.scale = 1.0

        def forward(self, x):
            self.scale *= 2
            first = next(self.parameters())
            first.data = torch.full_like(first, self.scale)
            return F.relu(self.last(F.relu(self.conv(x))))

    plain = Setting().eval()
    plan = retrofit.plan(plain, example=X[:2])
    model, by_hand = retrofit.prepare(plain, plan), retrofit.prepare(copy.deepcopy(plain), plan)
    retrofit.calibrate(model, X.split(16), progress=False)
    with torch.no_grad():
        for x in X.split(16):
            by_hand(x)
    ours, theirs = site(model, "conv.bn"), site(by_hand, "conv.bn")
    torch.testing.assert_close(ours.var, theirs.var, rtol=1e-5, atol=0)


def test_a_pass_that_is_repeated_begins_with_the_same_input():
    class Scaling(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x):
            return F.relu(self.two(F.relu(self.one(x.mul_(1e5)))))

    torch.manual_seed(0)
    model, by_hand = (retrofit.prepare(Scaling()) for _ in range(2))
    by_hand.load_state_dict(model.state_dict())
    large = X * 1e17  # their squares leave float32, and are measured again in float64
    retrofit.calibrate(model, large.split(16), progress=False)
    with torch.no_grad():
        for x in large.split(16):
            by_hand(x.clone())
    for path in ("one.bn", "two.bn"):
        torch.testing.assert_close(
            site(model, path).var, site(by_hand, path).var, rtol=1e-5, atol=0
        )


def test_a_later_batch_may_show_that_the_model_cannot_run_in_channels_last():
    class ViewingBatches(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(1, 5, 3)

        def forward(self, x):
            x = F.relu(self.first(x))
            return F.relu(self.second(x.view(x.shape[0] * 4, 1, *x.shape[2:])))

    plain = ViewingBatches()
    model = retrofit.prepare(plain, retrofit.plan(plain, example=X[:2]))
    data = [X[:1], X[1:]]
    assert retrofit.calibrate(model, data, progress=False).images == 40
    assert (site(model, "second.bn").count == 40 * 4 * 64).all()


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("size", [(16, 12), (9, 31)])
def test_convolutions_of_every_kind_are_measured_as_in_a_loop_of_ones_own(size):
    torch.manual_seed(0)
    plain = TwoSizes().eval()
    x = nets.images(20, 3, *size)
    model, by_hand = retrofit.prepare(plain), retrofit.prepare(plain)
    retrofit.calibrate(model, x.split(6), progress=False)
    with torch.no_grad():
        for batch in x.split(6):
            by_hand(batch)
    for path in [s.norm for s in retrofit.plan(plain).inserted]:
        ours, theirs = site(model, path), site(by_hand, path)
        sigma = theirs.var.sqrt()
        assert ((ours.mean - theirs.mean).abs() < 1e-5 * sigma).all()
        assert ((ours.var.sqrt() - theirs.var.sqrt()).abs() < 1e-5 * sigma).all()
    assert torch.equal(retrofit.convert(model)(x), plain(x))


def test_no_activation_outlives_its_batch():
    model, alive = prepared(), []

    def note(_module, _args, output):
        alive.append(weakref.ref(output))

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(note)
    gc.collect()
    gc.disable()  # it finds what lies in cycles, but late
    try:
        retrofit.calibrate(model, X.split(8), progress=False)
        assert len(alive) >= 10
        assert not any(ref() is not None for ref in alive)
    finally:
        gc.enable()


def test_a_layer_that_returns_no_tensor_is_named():
    class Twice(nn.Conv2d):
        def forward(self, x):
            return super().forward(x), x

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = Twice(3, 4, 3), nn.Conv2d(4, 2, 3)

        def forward(self, x):
            return self.last(self.conv(x)[0].relu()).relu()

    with pytest.raises(RetrofitError, match="conv returns a tuple, not a tensor: exclude"):
        retrofit.add_batchnorm(Net().eval(), [X], progress=False)


class Strict(nn.Module):
    """Runs in no other memory format than the one it was written for."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        y = self.conv(x)
        assert y.is_contiguous()
        return y.relu()


def test_a_model_that_takes_no_channels_last_is_calibrated_as_it_is():
    model = Strict().eval()
    found = retrofit.add_batchnorm(model, [X], progress=False)
    y = model.conv(X).double()
    torch.testing.assert_close(found.conv.bn.running_mean.double(), y.mean((0, 2, 3)))


class Shuffled(nn.Conv2d):
    def forward(self, x):
        return F.pixel_shuffle(super().forward(x), 2)


def test_a_layer_of_another_number_of_channels_than_it_says_is_named():
    model = nn.Sequential(Shuffled(3, 16, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()).eval()
    with pytest.raises(RetrofitError, match="0 returns 4 channels, not the 16 that it says it has"):
        retrofit.add_batchnorm(model, [X], progress=False)
    converted = retrofit.add_batchnorm(model, [X], exclude="0", progress=False)
    assert retrofit.verify(model, converted, [X]).exact
