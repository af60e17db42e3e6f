"""Any small network with BatchNorms of all kinds: folded, it computes what float64 does.

What must stay is known from how it was drawn.
"""

import copy

import torch
from hypothesis import given
from hypothesis import strategies as st
from normed_networks import networks

import retrofit
from retrofit.surgery.affine_map import batchnorms
from retrofit.surgery.folding import folded


@given(networks(), st.booleans())
def test_any_network_computes_the_same_once_folded_and_keeps_what_must_stay(drawn, shown):
    model, stay = drawn
    x = torch.randn(3, 3, 6, 6)
    state = copy.deepcopy(model.state_dict())
    result = folded(model, example=x if shown else None)
    assert len(result.left) == len(batchnorms(result.model)) == stay
    assert retrofit.unfoldable(result.model).keys() == result.left.keys()
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
        error = (result.model(x) - expected).abs().max()
    assert error <= 1e-4 * expected.abs().max() + 1e-6
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
