"""Any small network with BatchNorms of all kinds: folded, it comes back into its own class."""

import copy
import warnings

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from normed_networks import MyBatchNorm, networks, shuffled
from torch import nn

import retrofit
from retrofit.surgery.affine_map import batchnorms


def cannot_be_identity(norm):
    return isinstance(norm, MyBatchNorm) or norm.weight is None


@given(networks(), st.booleans())
def test_any_network_is_restored_into_its_class_with_equal_outputs(drawn, as_module):
    model, _ = drawn
    x = torch.randn(16, 3, 6, 6)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*BatchNorms stay|the statistics of")
        folded = retrofit.fold(model) if batchnorms(model) else model
        absorbed = [n for path, n in batchnorms(model).items() if path not in batchnorms(folded)]
        assume(absorbed)
        architecture = shuffled(model)
        before = copy.deepcopy(architecture.state_dict())
        given_ = folded if as_module else folded.state_dict()
        if any(map(cannot_be_identity, absorbed)):
            with pytest.raises(retrofit.RetrofitError, match=r"has no (weight|eps)"):
                retrofit.restore(architecture, given_, [x], progress=False)
            return
        result = retrofit.restore(architecture, given_, [x], progress=False)
    assert all(torch.equal(before[key], t) for key, t in architecture.state_dict().items())
    fresh: nn.Module = shuffled(model)
    fresh.load_state_dict(result.state_dict())
    with torch.no_grad():
        expected = folded(x)
        error = (fresh.eval()(x) - expected).abs().max()
    assert error <= 1e-5 * expected.square().mean().sqrt() + 1e-12
