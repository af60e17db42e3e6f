"""The promise: bit for bit the same network, before and after, there and back."""

import copy

import nets
import pytest
import torch
import torchvision
from torch import nn

import retrofit


def assert_equal_outputs(a, b, x):
    with torch.no_grad():
        ours, theirs = a(x), b(x)
    for one, other in zip(
        ours if isinstance(ours, list) else [ours],
        theirs if isinstance(theirs, list) else [theirs],
        strict=True,
    ):
        assert torch.equal(one, other)


def assert_same_state(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key
        assert tensor.dtype == theirs[key].dtype


def retrofitted(model, *batches):
    return retrofit.add_batchnorm(model, batches, progress=False)


@pytest.mark.parametrize("net", nets.IMAGE_NETS, ids=lambda net: net.__name__)
def test_small_networks_compute_the_same_and_fold_back_to_their_bits(net):
    model = nets.build(net)
    before = copy.deepcopy(model.state_dict())
    converted = retrofitted(model, nets.images(8, 3, 16, 16), nets.images(5, 3, 16, 16))

    assert type(converted) is type(model)
    assert any(isinstance(m, nn.BatchNorm2d) for m in converted.modules())
    for shape in ((1, 3, 16, 16), (5, 3, 17, 19)):
        x = nets.images(*shape, seed=2)
        assert_equal_outputs(converted, model, x)
        channels_last = x.contiguous(memory_format=torch.channels_last)
        assert_equal_outputs(converted, model, channels_last)
    assert retrofit.verify(model, converted, [nets.images(4, 3, 16, 16)]).exact
    folded = retrofit.fold(converted)
    assert_same_state(folded, model)
    assert str(folded) == str(model)
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("net", "shape"), [(nets.Audio, (3, 40)), (nets.Volume, (2, 9, 10, 11))], ids=["1d", "3d"]
)
def test_one_and_three_spatial_axes(net, shape):
    model = nets.build(net)
    converted = retrofitted(model, nets.images(6, *shape))
    assert_equal_outputs(converted, model, nets.images(3, *shape, seed=2))
    assert_same_state(retrofit.fold(converted), model)


@pytest.mark.parametrize("name", ["vgg11", "vgg13", "vgg16", "vgg19"])
@pytest.mark.slow
def test_a_retrofitted_vgg_is_torchvisions_own_vgg_bn(name):
    model = nets.vgg(name)
    converted = retrofitted(model, nets.images(4, 3, 96, 96))
    stock = nets.unwritten(f"{name}_bn")
    stock.load_state_dict(converted.state_dict(), strict=True)

    for shape in ((1, 3, 224, 224), (2, 3, 67, 71)):
        x = nets.images(*shape, seed=2)
        assert_equal_outputs(stock, model, x)
        assert_equal_outputs(stock, model, x.contiguous(memory_format=torch.channels_last))
    assert_equal_outputs(converted, model, x)
    assert_same_state(retrofit.fold(converted), model)


@pytest.mark.slow
def test_vgg16_of_any_size_with_threads_and_in_a_channels_last_model_too():
    model, stock = nets.vgg("vgg16"), nets.unwritten("vgg16_bn")
    stock.load_state_dict(retrofitted(model, nets.images(2, 3, 64, 64)).state_dict())
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            model, stock = (m.to(memory_format=memory_format) for m in (model, stock))
            for shape in ((1, 3, 224, 224), (3, 3, 197, 211)):
                x = nets.images(*shape, seed=2).contiguous(memory_format=memory_format)
                assert_equal_outputs(stock, model, x)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "name",
    [
        "alexnet",
        "squeezenet1_0",
        "squeezenet1_1",
        pytest.param("vgg16", marks=pytest.mark.slow),
    ],
)
def test_torchvision_networks(name):
    assert_equal_beside(name)


@pytest.mark.parametrize(
    "name",
    [
        "squeezenet1_1",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("alexnet", "squeezenet1_0", "vgg16")
        ),
    ],
)
def test_torchvision_networks_under_autocast(name):
    assert_equal_beside(name, autocast=True)


def assert_equal_beside(name, *, autocast=False):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    converted = retrofitted(model, nets.images(4, 3, 96, 96))
    shapes = (1, 3, 224, 224), (3, 3, 127, 131)
    if autocast and name == "vgg16":  # two minutes where the processor has no bfloat16
        shapes = (1, 3, 96, 96), (3, 3, 67, 71)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for shape in shapes:
            x = nets.images(*shape, seed=2)
            assert_equal_outputs(converted, model, x)
            assert_equal_outputs(converted, model, x.to(memory_format=torch.channels_last))
    assert_same_state(retrofit.fold(converted), model)


@pytest.mark.slow
def test_timms_vgg_and_the_features_it_returns_by_index():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vgg11", num_classes=10).eval()
    converted = retrofitted(model, nets.images(2, 3, 224, 224))
    x = nets.images(2, 3, 224, 224, seed=2)
    assert_equal_outputs(converted, model, x)
    assert_same_state(retrofit.fold(converted), model)
    if not hasattr(model, "forward_intermediates"):
        pytest.skip("this timm's VGG returns no features by index")
    with torch.no_grad():
        ours, theirs = converted.forward_intermediates(x), model.forward_intermediates(x)
    assert torch.equal(ours[0], theirs[0])
    assert len(ours[1]) == len(theirs[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(ours[1], theirs[1], strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype):
    model = nets.build(nets.root_sequential).to(dtype)
    converted = retrofitted(model, nets.images(8, 3, 16, 16).to(dtype))
    norm = next(m for m in converted.modules() if isinstance(m, nn.BatchNorm2d))
    assert norm.weight.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_equal_outputs(converted, model, nets.images(3, 3, 17, 15, seed=2).to(dtype))
    assert_same_state(retrofit.fold(converted), model)


def test_a_constant_channel_stays_the_identity_and_keeps_its_gradient():
    model = nets.build(nets.root_sequential)
    with torch.no_grad():
        model[0].weight[2] = 0
    converted = retrofitted(model, nets.images(8, 3, 16, 16))
    norm = converted.get_submodule("0.bn")
    assert norm.running_var[2] < 1e-12
    x = nets.images(4, 3, 16, 16, seed=2)
    assert_equal_outputs(converted, model, x)
    converted(x).sum().backward()
    assert converted.get_submodule("0.conv").weight.grad[2].isfinite().all()
    assert norm.weight[2] > 0


def test_training_mode_runs_and_every_gradient_is_finite():
    converted = retrofitted(nets.build(nets.Residual), nets.images(16, 3, 16, 16)).train()
    converted(nets.images(8, 3, 16, 16)).square().sum().backward()
    for name, parameter in converted.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_inserting_without_data_is_exact_too():
    model = nets.build(nets.Concat)
    inserted = retrofit.insert(model)
    assert_equal_outputs(inserted, model, nets.images(3, 3, 16, 16))
    assert_same_state(retrofit.fold(inserted), model)
    norm = inserted.get_submodule("squeeze.bn")
    assert torch.equal(norm.running_mean, torch.zeros(4))
    torch.testing.assert_close(norm.running_var, torch.ones(4))
