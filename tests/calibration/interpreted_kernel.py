"""The kernel as Triton's interpreter runs it, on a CPU; in a process of its own.

That is what test_fused_bias.py starts, with TRITON_INTERPRET=1.
"""

from types import SimpleNamespace

import nets
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import retrofit
from retrofit.calibration import fused_bias
from retrofit.numerics.triton_kernel import ROWS, TILES, add_bias, takes

LAYOUTS = [torch.contiguous_format, torch.channels_last]
both_layouts = pytest.mark.parametrize("layout", LAYOUTS)
# Below, at and above the rows and channels of a tile; more tiles than are merged at once.
SHAPES = [(1, 1, 1, 1), (2, 3, 7, 5), (2, 32, 16, 16), (1, 33, 16, 17), (2, 70, 9, 11)]
MANY_TILES = (1, 3, TILES + 1, ROWS)


def output_and_bias(shape, layout):
    """Channels of all scales, with means of up to 10 sigma."""
    mean, scale = torch.linspace(0, 10, shape[1]), torch.logspace(-3, 3, shape[1])
    x = (nets.images(*shape) + mean.view(-1, 1, 1)) * scale.view(-1, 1, 1)
    return x.contiguous(memory_format=layout), nets.images(shape[1], seed=1) * scale


def added(x, bias):
    return x + bias.view(-1, 1, 1)


def check(x, bias):
    """The output bit for bit as PyTorch adds, the moments as in two passes in float64.

    With ReLU the output is that of the sum, and the moments are what they are without.
    """
    whole, strides, rectified = added(x, bias), x.stride(), x.clone()
    size, mean, var = add_bias(x, bias)
    assert torch.equal(x, whole)
    again = add_bias(rectified, bias, relu=True)
    assert torch.equal(rectified, whole.relu())
    assert all(map(torch.equal, (mean, var), (again.mean, again.var)))
    assert x.stride() == rectified.stride() == strides
    assert size == x[0, 0].numel()
    wide = whole.double().flatten(2)
    their_mean = wide.mean(2)
    their_var = (wide - their_mean.unsqueeze(2)).square().mean(2)
    apart = (mean - their_mean).abs()
    assert (apart <= 1e-5 * their_var.sqrt() + 2**-24 * their_mean.abs()).all()
    assert ((var - their_var).abs() <= 2e-5 * their_var).all()


@both_layouts
@pytest.mark.parametrize("shape", [*SHAPES, MANY_TILES], ids=str)
def test_adds_the_bias_and_reduces_as_in_two_passes_in_float64(shape, layout):
    check(*output_and_bias(shape, layout))


@both_layouts
def test_means_of_a_hundred_thousand_sigma_cost_no_accuracy(layout):
    x, bias = nets.images(2, 3, 40, 41).contiguous(memory_format=layout), torch.full((3,), 1e5)
    wide = added(x, bias).double().flatten(2)
    _, mean, var = add_bias(x, bias)
    torch.testing.assert_close(mean, wide.mean(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(var, wide.var(2, correction=0), rtol=1e-5, atol=0)


@settings(max_examples=10)
@given(st.tuples(*[st.integers(1, most) for most in (3, 40, 20, 20)]), st.sampled_from(LAYOUTS))
def test_any_size(shape, layout):
    check(*output_and_bias(shape, layout))


@both_layouts
def test_float16_is_rounded_as_pytorch_does_and_summed_in_float32(layout):
    x, bias = nets.images(2, 35, 19, 17) + 30, nets.images(35, seed=1)
    check(x.half().contiguous(memory_format=layout), bias.half())


@both_layouts
def test_bfloat16_is_summed_in_float32(layout):
    """On integers that it has: the interpreter cuts off what a GPU rounds."""
    x, bias = (nets.images(2, 35, 19, 17) * 9).round(), torch.arange(35.0)
    check(x.bfloat16().contiguous(memory_format=layout), bias.bfloat16())


@both_layouts
def test_a_sample_alone_is_what_it_is_in_any_batch_bit_for_bit(layout):
    x, bias = output_and_bias((3, 33, 16, 17), layout)
    _, mean, var = add_bias(x.clone(), bias)
    for i in range(3):
        alone = add_bias(x[i : i + 1].clone(), bias)
        assert torch.equal(alone.mean[0], mean[i])
        assert torch.equal(alone.var[0], var[i])


@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")  # numpy's
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_what_is_not_finite_or_has_no_finite_square_shows(value):
    x, bias = output_and_bias((2, 3, 20, 20), torch.channels_last)
    x[1, 2, 3, 4] = value
    whole = added(x, bias)
    found = add_bias(x, bias, relu=True)
    assert torch.equal(x.isnan(), whole.isnan())
    assert torch.equal(x.nan_to_num(), whole.relu().nan_to_num())
    assert not found.finite
    assert found.var[0].isfinite().all()
    assert found.var[1, :2].isfinite().all()


def test_what_it_does_not_take():
    x = torch.zeros(2, 4, 6, 5)
    assert takes(x)
    assert not takes(x[:, :, ::2])
    assert not takes(x[:0])
    assert not takes(x.double())


@pytest.fixture
def as_on_cudnn(monkeypatch):
    """Networks on the CPU are taken for such on a GPU, and biases are added afterwards."""
    monkeypatch.setattr(fused_bias, "DEVICE", "cpu")
    monkeypatch.setattr(fused_bias, "_is_added_afterwards", lambda *_: True)

    def conv2d(x, weight, bias=None):
        y = F.conv2d(x, weight)
        return y if bias is None else added(y, bias)

    monkeypatch.setattr(fused_bias, "F", SimpleNamespace(conv2d=conv2d))


@pytest.mark.usefixtures("as_on_cudnn")
def test_a_calibration_that_uses_it_gives_the_moments_of_one_that_does_not(monkeypatch):
    layers = [nn.Conv2d(3, 5, 3), nn.ReLU(inplace=True), nn.Conv2d(5, 34, 3, 2), nn.ReLU()]
    net = nn.Sequential(*layers).eval()
    data = nets.images(5, 3, 21, 19).split(3)
    found = {}
    for used in (False, True):
        prepared = retrofit.prepare(net)
        with monkeypatch.context() as patch:
            if not used:
                patch.setattr(fused_bias, "_kernel", lambda: None)
            else:
                patch.setattr("retrofit.calibration.site_samples.reduced", None)  # nothing is read
            retrofit.calibrate(prepared, data, progress=False)
        found[used] = retrofit.channel_moments(prepared)
    for site, (mean, var) in found[True].items():
        theirs = found[False][site]
        assert ((mean - theirs.mean).abs() <= 1e-5 * theirs.var.sqrt()).all()
        torch.testing.assert_close(var, theirs.var, rtol=2e-5, atol=0)


@pytest.mark.usefixtures("as_on_cudnn")
def test_a_kernel_that_rounds_otherwise_is_found_out():
    """As the interpreter does in bfloat16."""
    with pytest.warns(UserWarning, match="otherwise than PyTorch"):
        assert not fused_bias._is_right(torch.device("cpu"), torch.bfloat16)
