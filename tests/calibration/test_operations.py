"""How many operations a calibration adds to the forward pass: counts, which no machine changes."""

import nets
import pytest
import torch
import torchvision
from operations import operations
from torch import nn

import retrofit
from retrofit.calibration import site_samples
from retrofit.numerics.reductions import _in_one_call

SITES = 25


@pytest.fixture(scope="module")
def squeezenet():
    torch.manual_seed(0)
    return torchvision.models.squeezenet1_1().eval()


def added_by_a_batch(net):
    """What the second of two batches of 16 pictures takes more than a forward pass."""
    x = nets.images(16, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        plain = operations(net, x)

    def calibrate(batches):
        prepared = retrofit.prepare(net)
        assert len(retrofit.plan_of(prepared).inserted) == SITES
        retrofit.calibrate(prepared, [x] * batches, progress=False)
        return prepared

    return operations(calibrate, 2) - operations(calibrate, 1) - plain


def test_at_most_sixty_operations_for_a_site_and_a_batch(squeezenet):
    assert added_by_a_batch(squeezenet) <= 60 * SITES


def test_where_one_kernel_reduces_four_for_a_site_and_a_hundred_for_a_batch(
    squeezenet, monkeypatch
):
    """As on a GPU, where each operation is a kernel of its own, however small."""
    monkeypatch.setattr(site_samples, "reduced", _in_one_call)
    assert added_by_a_batch(squeezenet) <= 4 * SITES + 100


def test_one_kernel_gives_the_moments_too(monkeypatch):
    monkeypatch.setattr(site_samples, "reduced", _in_one_call)
    net, x = (
        nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(inplace=True)).eval(),
        nets.images(9, 3, 8, 8),
    )
    prepared = retrofit.prepare(net)
    retrofit.calibrate(prepared, x.split(4), progress=False)
    (found,) = retrofit.channel_moments(prepared).values()
    expected = net[0].double()(x.double()).transpose(0, 1).flatten(1)
    torch.testing.assert_close(found.mean, expected.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.var, expected.var(1), rtol=1e-6, atol=1e-6)


def test_the_number_of_threads_is_afterwards_what_it_was():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        prepared = retrofit.prepare(nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU()))
        retrofit.calibrate(prepared, [nets.images(4, 3, 9, 9)], progress=False)
        assert torch.get_num_threads() == 3
        with pytest.raises(retrofit.NonFiniteError):
            retrofit.calibrate(prepared, [nets.images(4, 3, 9, 9) / 0], progress=False)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_what_a_layer_overwrites_in_place_is_measured_before():
    """In float64 too, where there is nothing to convert that would make a copy."""
    layers = [nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)]
    net = nn.Sequential(*layers).double()
    x = nets.images(64, 3).double()
    prepared = retrofit.prepare(net, retrofit.plan(net, linear=True))
    retrofit.calibrate(prepared, x.split(16), progress=False)
    expected = net[0](x)
    found = retrofit.channel_moments(prepared)["0"]
    torch.testing.assert_close(found.mean, expected.mean(0))
    torch.testing.assert_close(found.var, expected.var(0))
