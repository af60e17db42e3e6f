"""Any network: drawn at random, converted, compared, folded. `make fuzz` draws thousands."""

from hypothesis import given
from hypothesis import strategies as st
from networks import networks
from promises import OPTIONS, check


@given(networks(), st.sampled_from(OPTIONS))
def test_any_network_converts_exactly_and_back(drawn, options):
    check(drawn, options)
