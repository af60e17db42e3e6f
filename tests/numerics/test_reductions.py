"""One sample's mean and squared deviations: by every path, and whatever else is in its batch."""

import nets
import pytest
import torch

from retrofit import NonFiniteError
from retrofit.numerics.reductions import finite, reduced

# Samples short and long, with few channels and many: what is summed up in one go differs.
SHAPES = [
    (5, 6),
    (5, 6, 50),
    (9, 3, 7, 5),
    (70, 64, 12, 12),
    (3, 64, 40, 41),
    (2, 16, 200, 201),
    (2, 1, 300, 301),
    (2, 300, 15, 15),
    (2, 70000, 1, 1),
    (2, 5, 9, 40, 41),
]
LAYOUTS = {
    2: [torch.contiguous_format],
    3: [torch.contiguous_format],
    4: [torch.contiguous_format, torch.channels_last],
    5: [torch.contiguous_format, torch.channels_last_3d],
}
CASES = [(shape, layout) for shape in SHAPES for layout in LAYOUTS[len(shape)]]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
every_case = pytest.mark.parametrize(("shape", "layout"), CASES, ids=str)


def sample(shape, layout):
    """Channels of all scales, with means of up to 10 sigma."""
    one = (1, -1, *[1] * (len(shape) - 2))
    mean = torch.linspace(0, 10, shape[1]).view(one)
    scale = torch.logspace(-3, 3, shape[1]).view(one)
    return ((nets.images(*shape) + mean) * scale).contiguous(memory_format=layout)


def expected(x):
    """In float64, in two passes, for each sample and channel: mean and mean squared deviation."""
    x = x.double().flatten(2) if x.dim() > 2 else x.double().unsqueeze(2)
    mean = x.mean(2)
    return mean, (x - mean.unsqueeze(2)).square().mean(2)


@pytest.mark.parametrize("device", DEVICES)
@every_case
def test_every_sample_is_reduced_as_in_two_passes_in_float64(shape, layout, device):
    x = sample(shape, layout)
    size, mean, var = reduced(x.to(device))
    assert size == x[0, 0].numel()
    theirs = expected(x)
    sigma = theirs[1].sqrt()
    assert ((mean.cpu() - theirs[0]).abs() <= 1e-5 * sigma + 2**-24 * theirs[0].abs()).all()
    assert ((var.cpu() - theirs[1]).abs() <= 2e-5 * theirs[1]).all()


@every_case
def test_a_sample_alone_is_what_it_is_in_any_batch_bit_for_bit(shape, layout):
    x = sample(shape, layout)
    whole = reduced(x)
    for i in range(len(x)):
        other = reduced(torch.cat([x[i : i + 1], x[: i % 3]]).contiguous(memory_format=layout))
        assert torch.equal(other.mean[0], whole.mean[i])
        assert torch.equal(other.var[0], whole.var[i])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS[4])
@pytest.mark.parametrize("side", [9, 60])
def test_other_precisions_are_not_added_up_in_their_own(dtype, layout, side):
    x = (nets.images(2, 64, side, side + 1) + 30).to(dtype).contiguous(memory_format=layout)
    _, mean, var = reduced(x)
    theirs = expected(x)
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    assert ((mean - theirs[0]).abs() <= bound * theirs[1].sqrt()).all()
    assert ((var - theirs[1]).abs() <= 2 * bound * theirs[1]).all()


@every_case
def test_squares_that_leave_float32_are_reduced_all_the_same(shape, layout):
    x = sample(shape, layout) * 1e27
    _, mean, var = finite(x, "layer")
    theirs = expected(x)
    torch.testing.assert_close(mean, theirs[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(var, theirs[1], rtol=1e-9, atol=0)


@every_case
def test_a_single_element_that_is_not_finite_is_found(shape, layout):
    for value in (float("nan"), float("inf"), -float("inf")):
        x = sample(shape, layout)
        x[(-1,) * x.dim()] = value
        with pytest.raises(NonFiniteError, match=f"at layer for item {len(x) - 1} of the batch"):
            finite(x, "layer")
