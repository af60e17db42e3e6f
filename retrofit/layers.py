"""What an operation is: convolution, normalisation, activation; and the BatchNorm that fits it.

An operation goes by one name whether it is a module or a function: the torch name in lower case
without underscores, so that nn.LeakyReLU, F.leaky_relu and Tensor.relu_ are "leakyrelu" and "relu".
"""

from __future__ import annotations

import re

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

CONVOLUTIONS = {f"conv{t}{d}d" for t in ("", "transpose") for d in (1, 2, 3)}
NORMS = {"batchnorm", "groupnorm", "layernorm", "instancenorm", "rmsnorm"}
# The same values in another order, shape or memory format.
VIEWS = {
    "contiguous",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "flatten",
    "identity",
    "movedim",
    "permute",
    "reshape",
    "squeeze",
    "swapaxes",
    "transpose",
    "unflatten",
    "unsqueeze",
    "view",
}
FLATTENINGS = {"flatten", "getitem", "reshape", "squeeze", "view"}
# Squashing that ends a network without making a hidden layer of its logits.
OUTPUT_ACTIVATIONS = {
    "logsigmoid",
    "logsoftmax",
    "sigmoid",
    "softmax",
    "softmax2d",
    "softmin",
    "tanh",
}
ACTIVATIONS = (
    {name.lower() for name in nn.modules.activation.__all__}
    - OUTPUT_ACTIVATIONS
    - {"multiheadattention"}
)
WEIGHTED_FUNCTIONS = CONVOLUTIONS | NORMS | {"linear", "bilinear", "embedding"}
_NORM_CLASS = re.compile(r"(Batch|Group|Layer|Instance|RMS)_?Norm", re.IGNORECASE)


def function_name(name: str) -> str:
    """The operation of a function or method: "leaky_relu_" is "leakyrelu"."""
    return name.replace("_", "").lower()


def module_name(module: nn.Module) -> str:
    """The operation of a module: that of the torch class it is or derives from."""
    classes = type(module).__mro__
    own = next((c for c in classes if c.__module__.startswith("torch.nn.modules")), classes[0])
    return (classes[0] if own is nn.Module else own).__name__.lower()


def is_conv(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd)


def is_norm(module: nn.Module) -> bool:
    """torch's norm layers, their subclasses, and leaves named as norms (FrozenBatchNorm2d)."""
    if isinstance(module, (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)):
        return True
    named = any(_NORM_CLASS.search(c.__name__) for c in type(module).__mro__)
    return named and not any(True for _ in module.children())


def is_activation(module: nn.Module) -> bool:
    return module_name(module) in ACTIVATIONS | OUTPUT_ACTIVATIONS


def is_weighted(module: nn.Module) -> bool:
    """Has parameters of its own, other than those of an activation such as PReLU."""
    return not is_activation(module) and any(True for _ in module.parameters())


def dims(conv: nn.Module) -> int:
    """Spatial axes: 1, 2 or 3."""
    return len(conv.kernel_size)  # type: ignore[arg-type]


def is_transposed(conv: nn.Module) -> bool:
    return isinstance(conv, _ConvTransposeNd)


def batchnorm_class(dims: int) -> type[_BatchNorm]:
    """The BatchNorm for activations with that many spatial axes."""
    return {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
