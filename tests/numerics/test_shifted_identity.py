"""The identity plus a bias, judged by torch's own BatchNorm."""

import nets
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from retrofit.numerics.exact_identity import exact_identity, scale_and_shift
from retrofit.numerics.shifted_identity import shifted_identity

EPS = st.sampled_from([1e-5, 1e-3, 1e-12])


def floats(low, high):
    return hnp.arrays(np.float32, 8, elements=st.floats(low, high, width=32))


def assert_shifts(mean, var, shift, eps):
    """alpha is 1; what is added is the shift to half a unit of the mean, as the kernel adds it."""
    found = shifted_identity(mean, var, shift, eps)
    alpha, added = scale_and_shift(*found, eps)
    assert (alpha == 1).all()
    with torch.no_grad():
        zeros = torch.zeros(3, len(mean), dtype=torch.from_numpy(mean).dtype)
        assert (nets.batchnorm(found, eps)(zeros).numpy() == added).all()
    wide = np.float64 if mean.dtype == np.float32 else np.longdouble
    error = np.abs(added.astype(wide) - shift.astype(wide))
    assert (error <= np.spacing(np.abs(mean)).astype(wide) / 2).all()
    # The mean that was asked for comes out, to a unit of whatever is the larger.
    moved = found.mean.astype(wide) + shift.astype(wide) - mean.astype(wide)
    assert (np.abs(moved) <= np.spacing(np.maximum(np.abs(mean), np.abs(shift)))).all()
    np.testing.assert_array_equal(found.var, exact_identity(mean, var, eps).var)


@settings(max_examples=300)
@given(floats(-(2.0**60), 2.0**60), floats(0, 2.0**100), floats(-(2.0**60), 2.0**60), EPS)
def test_any_shift(mean, var, shift, eps):
    assert_shifts(mean, var, shift, eps)


@settings(max_examples=300)
@given(floats(-4, 4), floats(0, 4), floats(-4, 4), EPS)
def test_shifts_and_means_of_one_size(mean, var, shift, eps):
    assert_shifts(mean, var, shift, eps)
    assert_shifts(*(array.astype(np.float64) / 3 for array in (mean, var, shift)), eps)


def test_a_million_shifts():
    random = np.random.default_rng(0)

    def draw():
        sizes = 10.0 ** random.uniform(-8, 8, 1_000_000)
        return (random.normal(size=len(sizes)) * sizes).astype(np.float32)

    assert_shifts(draw(), np.abs(draw()), draw(), 1e-5)


@given(floats(-(2.0**60), 2.0**60), floats(0, 2.0**100), EPS)
def test_without_a_shift_it_is_the_identity(mean, var, eps):
    norm = nets.batchnorm(shifted_identity(mean, var, None, eps), eps)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)) * 10
    with torch.no_grad():
        assert torch.equal(norm(x), x)
