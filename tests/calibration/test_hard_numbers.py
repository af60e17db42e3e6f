"""Numbers at the edges: tiny, huge, constant, few, and not numbers at all."""

import copy
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import images
from torch import nn

import retrofit
from retrofit import NonFiniteError, RetrofitError

FLOATS = {torch.float32: np.float32, torch.float64: np.float64}


def net(scale=1.0, shift=0.0, dtype=torch.float32):
    """Whose first convolution gives numbers of this scale, about this shift."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
    with torch.no_grad():
        first.weight.mul_(scale)
        first.bias.mul_(scale).add_(shift)
        second.weight.div_(max(abs(shift), scale, 1e-30))
    return nn.Sequential(first, nn.LeakyReLU(0.1), second, nn.Tanh()).eval().to(dtype)


def exact_and_back(model, data, others):
    """Equal bit for bit on data that was not seen, folded to the bit, trained without NaN."""
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # halves of few images differ
        converted = retrofit.add_batchnorm(model, data, progress=False)
    with torch.no_grad():
        for x in (*data, *others):
            assert torch.equal(converted(x), model(x))
    assert retrofit.verify(model, converted, data).exact
    folded = retrofit.fold(converted).state_dict()
    assert all(torch.equal(folded[key], value) for key, value in before.items())
    converted.train()(data[0]).float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in converted.parameters())
    return converted


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@given(exponent=st.floats(-22, 15), shift=st.sampled_from([0.0, 1.0, -3e4, 1e8, 1e15]))
def test_activations_of_any_scale(dtype, exponent, shift):
    model = net(10.0**exponent, shift, dtype)
    data = [images(4, 3, 9, 9).to(dtype), images(3, 3, 9, 9, seed=2).to(dtype)]
    exact_and_back(model, data, [images(2, 3, 12, 7, seed=3).to(dtype)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_networks_in_half_precision(dtype, scale):
    model = net(scale, 0.0, dtype)
    data = [images(4, 3, 9, 9).to(dtype), images(3, 3, 9, 9, seed=2).to(dtype)]
    converted = exact_and_back(model, data, [images(2, 3, 12, 7, seed=3).to(dtype)])
    assert converted[0].bn.weight.dtype == torch.float32
    assert converted[0].conv.weight.dtype == dtype


def test_constant_channels_stay_the_identity_and_can_learn():
    model = net()
    with torch.no_grad():
        model[0].weight[:4] = 0
        model[0].bias[:4] = torch.tensor([0.0, 1e-30, -7.3, 1e30])
        model[2].weight[:, 3] = 0
    data = [images(4, 3, 9, 9), images(3, 3, 9, 9, seed=2)]
    converted = exact_and_back(model, data, [images(2, 3, 12, 7, seed=3)])
    norm = converted[0].bn
    assert (norm.running_var[:4] == 0).all()
    torch.testing.assert_close(norm.running_mean[:4], model[0].bias[:4].detach(), rtol=1e-6, atol=0)
    assert (norm.weight > 0).all()


def test_two_images_and_feature_maps_of_one_pixel():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Tanh()).eval()
    data = [images(1, 3, 3, 3), images(1, 3, 3, 3, seed=2)]
    converted = retrofit.add_batchnorm(model, data, include="*", progress=False)
    assert torch.equal(converted(data[0]), model(data[0]))
    pixels = torch.cat([model[0](x) for x in data]).double()
    mean, var = pixels.mean((0, 2, 3)), pixels.var((0, 2, 3))
    torch.testing.assert_close(converted[0].bn.running_mean.double(), mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(converted[0].bn.running_var.double(), var, rtol=1e-5, atol=1e-7)


def test_a_single_image_is_refused_by_what_is_missing():
    with pytest.raises(RetrofitError, match="1 of the at least 2 images"):
        retrofit.add_batchnorm(net(), [images(1, 3, 9, 9)], progress=False)


def test_what_a_report_of_few_images_says():
    prepared = retrofit.prepare(net())
    report = retrofit.calibrate(prepared, [images(2, 3, 9, 9)], progress=False)
    assert "2 images in" in str(report)
    assert report.images_needed(0.02) > 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["weight", "bias", "picture", "pixel", "buffer"])
def test_what_is_no_number_is_named_and_nothing_is_changed(value, where):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU6(), nn.Conv2d(4, 4, 3), nn.ReLU()
    ).eval()
    x, site = images(6, 3, 9, 9), "3"
    if where == "picture":
        x[4] = value
    elif where == "pixel":
        value = x[4, 1, 5, 5] = float("nan")  # of Inf alone ReLU6 makes a number, which is no fault
    elif where == "buffer":
        value = float("nan")
        model[1].running_mean[2] = value
    else:
        with torch.no_grad():
            getattr(model[3], where)[1] = value
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NonFiniteError) as caught:
        retrofit.add_batchnorm(model, [x[:3], x[3:]], inplace=True, progress=False)
    assert caught.value.site == site
    if where in ("picture", "pixel") and value != value:  # noqa: PLR0124 - a NaN
        assert caught.value.image == 4
    state = model.state_dict()
    assert state.keys() == before.keys()
    for key, tensor in state.items():
        torch.testing.assert_close(tensor, before[key], rtol=0, atol=0, equal_nan=True)


def test_an_outlier_does_not_hide_what_the_rest_is():
    x = images(64, 3, 9, 9)
    x[7, 0, 0, 0] = 1e18
    conv = nn.Conv2d(3, 3, 1, groups=3, bias=False)
    nn.init.ones_(conv.weight)
    model = nn.Sequential(conv, nn.Tanh(), nn.Conv2d(3, 3, 1), nn.Tanh()).eval()
    prepared = retrofit.prepare(model, retrofit.plan(model, include="0"))
    retrofit.calibrate(prepared, x.split(16), progress=False)
    (found,) = retrofit.channel_moments(prepared).values()
    wide = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(found.mean, wide.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.var, wide.var(1), rtol=1e-5, atol=1e-6)


def test_activations_whose_variance_leaves_float32_are_refused_by_name():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Tanh()).eval()
    with torch.no_grad():
        model[0].weight.mul_(1e20)
        model[2].weight.mul_(1e-20)
    with pytest.raises(RetrofitError, match=r"^0: .*(not finite|too large)"):
        retrofit.add_batchnorm(model, [images(4, 3, 9, 9)], progress=False)


def test_float64_activations_whose_squares_overflow_are_refused_by_name():
    model = net(dtype=torch.float64)
    with torch.no_grad():
        model[0].weight.mul_(1e160)
        model[2].weight.mul_(1e-160)
    with pytest.raises(RetrofitError, match=r"^0: .*(not finite|too large)"):
        retrofit.add_batchnorm(model, [images(4, 3, 9, 9).double()], progress=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_networks_in_half_precision_are_the_same_after_a_file(tmp_path, dtype, suffix):
    model, file = net(dtype=dtype), tmp_path / f"net.{suffix}"
    x = images(8, 3, 9, 9).to(dtype)
    retrofit.save(retrofit.add_batchnorm(model, [x], progress=False), file)
    loaded = retrofit.load(file, net(dtype=dtype))
    assert torch.equal(loaded(x), model(x))
    folded = retrofit.fold(loaded).state_dict()
    assert all(torch.equal(folded[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_running_statistics_that_are_no_numbers_spoil_nothing_else(value):
    converted = retrofit.add_batchnorm(net(), [images(8, 3, 9, 9)], progress=False)
    norm = converted.get_submodule("0.bn")
    norm.running_var[2] = value
    before = copy.deepcopy(converted.state_dict())
    with pytest.raises(RetrofitError, match=r"after 0 has a NaN, an Inf or a negative running_var"):
        retrofit.fold(converted)
    with pytest.raises(RetrofitError, match=r"statistics of 0\.bn hold .*leave the prior out"):
        retrofit.recalibrate(converted, [images(8, 3, 9, 9)], prior=4, progress=False)
    for key, tensor in converted.state_dict().items():
        torch.testing.assert_close(tensor, before[key], rtol=0, atol=0, equal_nan=True)
    retrofit.recalibrate(converted, [images(8, 3, 9, 9)], progress=False)
    assert norm.running_var.isfinite().all()
