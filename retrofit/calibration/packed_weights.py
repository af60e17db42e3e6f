"""Convolution weights laid out once for the CPU's kernels, instead of at every call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeGuard

import torch
from torch import Tensor, nn


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Give plain Conv2d layers their weights in oneDNN's own order, for the length of the block.

    oneDNN brings a convolution's weights into the order that its kernel wants each time that the
    layer runs; here it does so once, with the operators that torch.compile uses. The kernel is the
    same, and it costs the memory of a second copy of the weights. For passes without gradients.
    """
    convs = [m for m in model.modules() if _is_packable(m)] if _is_available() else []
    try:
        for conv in convs:
            conv.forward = _Packed(conv)  # type: ignore[method-assign]
        yield
    finally:
        for conv in convs:
            del conv.forward


class _Packed:
    """Replaces `Conv2d.forward`; uses the prepacked weight."""

    def __init__(self, conv: nn.Conv2d) -> None:
        self.conv = conv
        self.source: object = None  # the weight that was packed

    def __call__(self, input: Tensor) -> Tensor:  # noqa: A002 - as Conv2d has it
        conv, weight = self.conv, self.conv.weight
        if not _is_plain(input) or input.shape[1] != conv.in_channels:
            return type(conv).forward(conv, input)
        where = (conv.padding, conv.stride, conv.dilation, conv.groups)
        source = (id(weight), weight.data_ptr(), weight._version)
        if source != self.source:
            # The order depends on the size of the pictures too; with others it is only slower.
            self.source, self.original = source, weight  # which lives, so that its id stays its own
            reorder = torch._C._nn.mkldnn_reorder_conv2d_weight
            self.weight = reorder(weight.detach().to_mkldnn(), *where, list(input.shape))  # type: ignore[arg-type, call-arg]
        result: Tensor = torch.ops.mkldnn._convolution_pointwise(
            input, self.weight, conv.bias, *where, "none", [], ""
        )
        return result


def _is_available() -> bool:
    """Tell whether this torch has the operators, which are its own and may go."""
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight")
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    )


def _is_packable(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Tell whether the operators compute what this layer does."""
    return (
        type(module) is nn.Conv2d
        and "forward" not in vars(module)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and module.weight.dtype == torch.float32
        and module.weight.device.type == "cpu"
        and not module.weight.is_inference()  # such tensors have no version
    )


def _is_plain(x: Tensor) -> bool:
    """Tell whether this is a batch of float32 in channels_last, as the result will be."""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and x.dim() == 4
        and x.dtype == torch.float32
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
    )
