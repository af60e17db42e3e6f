"""What an operation is: convolution, normalisation, activation.

An operation goes by one name whether it is a module or a function: the torch name in lower case
without underscores, so that nn.LeakyReLU, F.leaky_relu and Tensor.relu_ are "leakyrelu" and "relu".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

CONVOLUTIONS = {f"conv{t}{d}d" for t in ("", "transpose") for d in (1, 2, 3)}
NORMS = {"batchnorm", "groupnorm", "layernorm", "instancenorm", "rmsnorm"}
# What aten, the language of exported programs, calls otherwise.
ATEN_NAMES = {
    "cudnnbatchnorm": "batchnorm",
    "fusedrmsnorm": "rmsnorm",
    "nativebatchnorm": "batchnorm",
    "batchnormwithupdate": "batchnorm",
    "miopenbatchnorm": "batchnorm",
    "nativebatchnormlegit": "batchnorm",
    "nativebatchnormlegitfunctional": "batchnorm",
    "nativebatchnormlegitnotraining": "batchnorm",
    "nativedropout": "dropout",
    "nativegroupnorm": "groupnorm",
    "nativelayernorm": "layernorm",
    "unsafeview": "view",
}
# The same values in another order, shape, memory format or precision.
VIEWS = {
    "alias",
    "bfloat16",
    "clone",
    "contiguous",
    "cpu",
    "cuda",
    "data",
    "detach",
    "double",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "expand",
    "flatten",
    "flip",
    "float",
    "half",
    "identity",
    "moveaxis",
    "movedim",
    "mt",
    "permute",
    "pixelshuffle",
    "pixelunshuffle",
    "ravel",
    "reshape",
    "roll",
    "squeeze",
    "swapaxes",
    "swapdims",
    "t",
    "to",
    "transpose",
    "type",
    "typeas",
    "unflatten",
    "unsqueeze",
    "view",
}
# They read what a tensor is (its shape, its type), and none of its values.
SHAPE_READERS = {
    "device",
    "dim",
    "dtype",
    "elementsize",
    "getdevice",
    "iscomplex",
    "iscuda",
    "isfloatingpoint",
    "isleaf",
    "ismeta",
    "isquantized",
    "itemsize",
    "layout",
    "len",
    "nbytes",
    "ndim",
    "ndimension",
    "nelement",
    "numel",
    "requiresgrad",
    "shape",
    "size",
    "stride",
    "symnumel",
    "symsize",
    *(f"{name}like" for name in ("empty", "full", "ones", "rand", "randint", "randn", "zeros")),
    *(f"new{name}" for name in ("empty", "emptystrided", "full", "ones", "tensor", "zeros")),
}
# They give no tensor, but what is made of its values.
READ_OUT = {
    "allclose",
    "array",
    "bool",
    "complex",
    "contains",
    "dlpack",
    "equal",
    "float",
    "index",
    "int",
    "isnonzero",
    "item",
    "numpy",
    "tolist",
}
# They take the values of their first argument, and of others the shape or type alone.
SHAPED_LIKE = {"expandas", "reshapeas", "viewas"}
LIKE_ANOTHER = SHAPED_LIKE | {"sumtosize", "to", "type", "typeas"}
FLATTENINGS = {"flatten", "getitem", "reshape", "squeeze", "view"}
# Squashing that ends a network without making a hidden layer of its logits.
OUTPUT_ACTIVATIONS = {
    "hardsigmoid",
    "hardtanh",
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
    | {"gelutanh", "quickgelu", "swish"}  # as timm calls them
) - (OUTPUT_ACTIVATIONS | {"multiheadattention"})
# After one of these comes a BatchNorm in post-activation placement. (GLU halves the channels.)
HIDDEN_ACTIVATIONS = (ACTIVATIONS | {"hardsigmoid", "hardtanh", "sigmoid", "tanh"}) - {"glu"}
AFFINE_FUNCTIONS = CONVOLUTIONS | {"linear"}
WEIGHTED_FUNCTIONS = AFFINE_FUNCTIONS | NORMS | {"bilinear", "deformconv2d", "embedding"}
# Weighted where one factor is a parameter, or made of parameters alone; to the name, how many
# arguments come before the factors.
PRODUCTS = {
    "addbmm": 1,
    "addmm": 1,
    "addmv": 1,
    "baddbmm": 1,
    "bmm": 0,
    "cdist": 0,
    "cosinesimilarity": 0,
    "dot": 0,
    "einsum": 0,
    "inner": 0,
    "linalgmatmul": 0,
    "linalgmultidot": 0,
    "matmul": 0,
    "mm": 0,
    "mv": 0,
    "rmatmul": 0,
    "tensordot": 0,
}
_NORM_CLASS = re.compile(r"Norm(?!al)")


def function_name(name: str, args: Sequence[Any] = ()) -> str:
    """Name the operation of a function or method: "leaky_relu_" is "leakyrelu".

    Of aten's operations too, whose names have an overload ("conv2d.default"); one of them needs its
    arguments, since it stands for every kind of convolution.
    """
    plain = name.partition(".")[0].replace("_", "").lower()
    if plain == "convolution" and len(args) > 6:  # input, weight, bias, stride, ..., transposed
        return f"conv{'transpose' if args[6] is True else ''}{len(args[3])}d"
    return ATEN_NAMES.get(plain, plain)


def called_name(func: Any) -> str:
    """Name a function, a method, or a property of tensors such as `T`."""
    name: str = getattr(func, "__name__", type(func).__name__)
    return func.__self__.__name__ if name == "__get__" else name


def with_values(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """List those arguments of a function whose values reach its result."""
    if name in SHAPE_READERS:
        return ()
    if name == "set":  # x.data = y
        return args[1:]
    return args[:1] if name in LIKE_ANOTHER else (args, kwargs)


def factors(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """List what a product multiplies: a parameter among it makes it a weighted layer."""
    before = PRODUCTS[name]
    return (args[before:], {k: v for k, v in kwargs.items() if not (before and k == "input")})


def keeps_dim(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Read the keepdim argument of a reduction, `mean(x, dim, keepdim)`, given by name or place."""
    given = kwargs.get("keepdim", args[2] if len(args) > 2 else False)
    return given is True


def module_name(module: nn.Module) -> str:
    """Name the operation of a module: that of the torch class it is or derives from."""
    if isinstance(module, torch.jit.ScriptModule):
        return str(module.original_name).lower()
    classes = type(module).__mro__
    own = next((c for c in classes if c.__module__.startswith("torch.nn.modules")), classes[0])
    return (classes[0] if own is nn.Module else own).__name__.lower()


def is_conv(module: nn.Module) -> bool:
    """Tell whether this is a convolution, transposed or not, of torch or derived from one."""
    return isinstance(module, _ConvNd)


def is_linear(module: nn.Module) -> bool:
    """Tell whether this is an nn.Linear or derived from it."""
    return isinstance(module, nn.Linear)


def is_affine(module: nn.Module) -> bool:
    """Tell whether this is a convolution or a Linear layer, which a BatchNorm may follow."""
    return is_conv(module) or is_linear(module)


def is_norm(module: nn.Module) -> bool:
    """Tell whether this is a norm layer.

    torch's own, their subclasses, and what is named and built like one: it has numbers of its own,
    and nothing in it but activations (FrozenBatchNorm2d, timm's EvoNorm2dS0).
    """
    if isinstance(module, (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)):
        return True
    named = any(_NORM_CLASS.search(c.__name__) for c in type(module).__mro__)
    numbers = any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
    return (named and numbers and not is_affine(module)) and all(
        is_activation(child) or isinstance(child, (nn.Identity, nn.Dropout))
        for child in module.children()
    )


def is_activation(module: nn.Module) -> bool:
    """Tell whether this is an activation of torch's, or derived from one."""
    return module_name(module) in ACTIVATIONS | OUTPUT_ACTIVATIONS


def is_weighted(module: nn.Module) -> bool:
    """Tell whether this has parameters, other than those of an activation such as PReLU."""
    return not is_activation(module) and any(True for _ in module.parameters())


def is_frozen(module: nn.Module) -> bool:
    """Tell whether it has parameters, and none of them but biases requires a gradient."""
    weights = [p for name, p in module.named_parameters() if not name.endswith("bias")]
    return bool(weights) and not any(p.requires_grad for p in weights)


def is_leaf(module: nn.Module) -> bool:
    """Tell whether this counts as one call: torch's layers, convolutions, Linear layers and norms.

    Subclasses too, or a weight-standardised convolution, say, would dissolve into functions; and
    ScriptModules, which cannot be traced.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return True
    own = module.__module__.startswith(("torch.nn", "torch.ao.nn"))
    container = isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
    return (own and not container) or is_affine(module) or is_norm(module)


def dims(layer: nn.Module) -> Literal[0, 1, 2, 3]:
    """Count the spatial axes: 1, 2 or 3; 0 for a Linear layer."""
    return len(layer.kernel_size) if is_conv(layer) else 0  # type: ignore[arg-type, return-value]


def channels(layer: nn.Module) -> int:
    """Count the channels of its output."""
    return int(layer.out_channels if is_conv(layer) else layer.out_features)  # type: ignore[arg-type]


def child_name(layer: nn.Module) -> str:
    """Name the layer in the Sequential that takes its place."""
    return "conv" if is_conv(layer) else "linear" if is_linear(layer) else "act"


def is_transposed(conv: nn.Module) -> bool:
    """Tell whether this is a transposed convolution."""
    return isinstance(conv, _ConvTransposeNd)
