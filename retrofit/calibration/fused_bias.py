"""On a GPU: the bias of a convolution, the moments of what comes out, and ReLU, in one kernel.

cuDNN's convolutions have no bias. PyTorch adds it in a pass of its own over the output, the
observer behind the convolution reads that output again, and an in-place ReLU reads and writes it;
one kernel does all three. It is Triton's, and is used once it has given PyTorch's numbers on the
device at hand.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrofit.calibration.rectified import Rectified
from retrofit.calibration.site_samples import SiteSamples
from retrofit.errors import warn
from retrofit.plans import Plan
from retrofit.surgery.native import find_site

DEVICE = "cuda"
CAPABILITY = (8, 0)  # what Triton supports; bfloat16 is in hardware there

_given_up: set[torch.device] = set()  # where the kernel failed


def observed_convolutions(model: nn.Module, plan: Plan) -> list[nn.Conv2d]:
    """List the convolutions of a prepared model that have a bias, and an observer right behind.

    None that has another `forward` than its class, and none that pads otherwise than with a number
    of zeros.
    """
    if plan.placement != "pre_activation":
        return []
    layers = [find_site(model, site)[0] for site in plan.inserted]
    return [
        layer
        for layer in dict.fromkeys(layers)
        if type(layer) is nn.Conv2d
        and layer.bias is not None
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
        and vars(layer).keys().isdisjoint({"forward", "_conv_forward"})
    ]


def fusable(convolutions: Iterable[nn.Conv2d]) -> list[nn.Conv2d]:
    """Choose those that lie on a GPU; none where there is no Triton."""
    return [c for c in convolutions if c.weight.device.type == DEVICE and _kernel() is not None]


@contextmanager
def bias_with_moments(
    convolutions: Iterable[nn.Conv2d], relus: Mapping[nn.Conv2d, nn.ReLU], samples: SiteSamples
) -> Iterator[None]:
    """Let the kernel add the biases for the length of the block, and hand its moments to `samples`.

    Those of `relus` are computed along, and pass on what they get. What goes into every other layer
    is what PyTorch computes, bit for bit.

    Args:
        convolutions: `fusable` ones.
        relus: see `relus_behind`.
        samples: what the observers behind the convolutions fill.

    Raises:
        ReadBetweenError: something but the ReLU reads what such a convolution gives.
    """
    chosen = list(convolutions)
    rectified = Rectified()
    try:
        for conv in chosen:
            mine = rectified if conv in relus else None
            vars(conv)["_conv_forward"] = functools.partial(_conv_forward, conv, samples, mine)
        for relu in relus.values():
            vars(relu)["forward"] = functools.partial(_relu_forward, relu, rectified)
        with rectified if relus else nullcontext():
            yield
    finally:
        for conv in chosen:
            vars(conv).pop("_conv_forward", None)
        for relu in relus.values():
            vars(relu).pop("forward", None)


def _conv_forward(
    conv: nn.Conv2d,
    samples: SiteSamples,
    rectified: Rectified | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Replaces `Conv2d._conv_forward`, which `forward` calls."""
    kernel = _kernel()
    if (
        kernel is None
        or bias is None
        or x.device in _given_up
        or not (_is_plain(x, weight, bias) and _is_added_afterwards(conv, x, weight, bias))
        or not _is_right(x.device, x.dtype)
    ):
        return _convolved(conv, x, weight, bias)
    y = _convolved(conv, x, weight, None)
    if not kernel.takes(y):
        return y.add_(bias.view(-1, 1, 1))
    try:
        found = kernel.add_bias(y, bias, relu=rectified is not None)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - of a compiler: of any kind
        _give_up(x.device, _in_a_line(error))
        return _convolved(conv, x, weight, bias)  # y may be half done
    samples.expect(y, found)
    if rectified is not None:
        rectified.add(y)
    return y


def _relu_forward(relu: nn.ReLU, rectified: Rectified, x: Tensor) -> Tensor:
    """Replaces `ReLU.forward`: what the kernel has done is not done again."""
    return x if rectified.take(x) else nn.ReLU.forward(relu, x)


def _convolved(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = nn.Conv2d._conv_forward(conv, x, weight, bias)
    return y


def _is_plain(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Tell whether these are tensors of one device and dtype, without gradients or autocast."""
    return (
        type(x) is Tensor
        and x.dim() == 4
        and x.device == weight.device == bias.device
        and x.dtype == weight.dtype == bias.dtype
        and not torch.is_grad_enabled()
        and not torch.is_inference_mode_enabled()
        and not torch.is_autocast_enabled(x.device.type)
    )


def _is_added_afterwards(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Tell whether PyTorch would add the bias after the convolution; others begin with it."""
    settings = conv.stride, conv.padding, conv.dilation, False, (0, 0), conv.groups
    try:
        backend = torch._C._select_conv_backend(x, weight, bias, *settings)
        return bool(backend.name == "Cudnn")
    except (AttributeError, TypeError) as error:  # it is private, and may change
        _give_up(x.device, _in_a_line(error))
        return False


@functools.cache
def _kernel() -> ModuleType | None:
    """Import the kernel; None where there is no Triton."""
    try:
        from retrofit.numerics import triton_kernel  # noqa: PLC0415 - not wherever torch is
    except ImportError:
        return None
    return triton_kernel


@functools.cache
def _is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Compile the kernel for a device and compare it with PyTorch there, once; warn if it fails."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        return False
    try:
        wrong = _fault(device, dtype)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - of a compiler: of any kind
        wrong = _in_a_line(error)
    if wrong:
        _give_up(device, wrong)
    return not wrong


def _fault(device: torch.device, dtype: torch.dtype) -> str:
    """Compare small convolutions with PyTorch's; say what differs, "" if nothing does."""
    seeded = torch.Generator("cpu").manual_seed(0)
    # The first has more tiles than are merged at once, and sizes that are no multiples of a tile's.
    for samples, channels, height, width in ((1, 5, 131, 127), (2, 64, 16, 16)):
        shapes = (samples, 4, height, width), (channels, 4, 1, 1), (channels,)
        drawn = [torch.randn(shape, generator=seeded, device="cpu") for shape in shapes]
        x, weight, bias = (tensor.to(device, dtype) for tensor in drawn)
        weight[0], bias[0] = 0.0, 1e-40  # not to be flushed to zero
        for layout in (torch.contiguous_format, torch.channels_last):
            x = x.contiguous(memory_format=layout)
            whole = F.conv2d(x, weight, bias)
            wrong = (_difference(F.conv2d(x, weight), bias, whole, relu) for relu in (False, True))
            if found := next(filter(None, wrong), ""):
                return found
    return ""


def _difference(y: Tensor, bias: Tensor, whole: Tensor, relu: bool) -> str:
    """Say what the kernel makes otherwise of y than `whole`, which has the bias; "" for nothing."""
    kernel = _kernel()
    assert kernel is not None
    mean, var = kernel.add_bias(y, bias, relu=relu)[1:]
    if not torch.equal(y, whole.relu() if relu else whole):
        return f"it {'computes ReLU' if relu else 'adds a bias'} otherwise than PyTorch"
    their_var, their_mean = torch.var_mean(whole.double(), (2, 3), correction=0)
    apart = (mean - their_mean).abs() - 1e-5 * their_var.sqrt() - 2**-24 * their_mean.abs()
    # Not "more than", so that NaN is a fault.
    if not bool((apart <= 0).all() and ((var - their_var).abs() <= 2e-5 * their_var).all()):
        return "it computes other moments than PyTorch"
    return ""


def _give_up(device: torch.device, reason: str) -> None:
    _given_up.add(device)
    warn(
        f"Triton's kernel for the bias of convolutions is not used on {device} ({reason}): the "
        "moments are the same, but the calibration reads the activations once more"
    )


def _in_a_line(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
