"""The exact identity, judged by torch's own BatchNorm."""

import nets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from retrofit import RetrofitError
from retrofit.numerics.exact_identity import exact_identity


def assert_identity(mean, var, eps):
    identity = exact_identity(mean, var, eps)
    x = torch.randn(3, len(mean), generator=torch.Generator().manual_seed(0))
    x = (x * 10).to(torch.from_numpy(mean).dtype)
    with torch.no_grad():
        assert torch.equal(nets.batchnorm(identity, eps)(x), x)
    np.testing.assert_array_equal(identity.mean, mean)
    nudge = np.abs(identity.var.astype(float) - var) / (var.astype(float) + eps)
    assert nudge.max() < 1e-6
    np.testing.assert_allclose(identity.weight, np.sqrt(var.astype(float) + eps), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("eps", [1e-5, 1e-3, 1e-8, 1.0])
def test_a_million_variances_over_forty_decades(dtype, eps):
    random = np.random.default_rng(0)
    var = (10.0 ** random.uniform(-20, 20, 1_000_000)).astype(dtype)
    var[:4] = [0, np.finfo(dtype).tiny, np.finfo(dtype).smallest_subnormal, 1]
    assert_identity((random.normal(size=len(var)) * 1000).astype(dtype), var, eps)


@settings(max_examples=300, deadline=None)
@given(
    hnp.arrays(np.float32, 8, elements=st.floats(0, 2.0**120, width=32)),
    hnp.arrays(np.float32, 8, elements=st.floats(-(2.0**60), 2.0**60, width=32)),
    st.sampled_from([1e-5, 1e-3, 1e-12]),
)
def test_any_variance(var, mean, eps):
    assert_identity(mean, var, eps)


@pytest.mark.parametrize(
    ("mean", "var", "eps", "message"),
    [
        (np.nan, 1, 1e-5, "not finite"),
        (0, np.inf, 1e-5, "not finite"),
        (0, np.finfo(np.float32).max, 1e38, "too large"),
        (0, 1, 0.0, "eps must be positive"),
        (0, 1, -1e-5, "eps must be positive"),
    ],
)
def test_what_cannot_be_exact_is_refused(mean, var, eps, message):
    arrays = (np.array([v], dtype=np.float32) for v in (mean, var))
    with np.errstate(over="ignore"), pytest.raises(RetrofitError, match=message):
        exact_identity(*arrays, eps)
