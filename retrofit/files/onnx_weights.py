"""The layers of an ONNX file, with their weights as torch's layers have them.

What a layer holds is read off the values that reach its node, whatever the exporter did to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from retrofit.errors import RetrofitError
from retrofit.files.onnx_constants import Graph, branches
from retrofit.files.onnx_files import StrPath, named, open_onnx, run_onnx

if TYPE_CHECKING:
    from onnx import NodeProto

__all__ = ["OnnxLayer", "onnx_layers", "onnx_state_dict", "run_onnx"]

NORM = ("weight", "bias")
# What the inputs of a node are called in torch, after the first.
LAYERS: dict[str, tuple[str, ...]] = {
    "Conv": ("weight", "bias"),
    "ConvTranspose": ("weight", "bias"),
    "Gemm": ("weight", "bias"),
    "MatMul": ("weight",),
    "PRelu": ("weight",),
    "BatchNormalization": (*NORM, "running_mean", "running_var"),
    "InstanceNormalization": NORM,
    "GroupNormalization": NORM,
    "LayerNormalization": NORM,
}
ALWAYS = LAYERS.keys() - {"MatMul"}  # have weights; a MatMul may be of two activations
QUANTISED = ("QLinear", "Integer", "QuantizeMatMul", "QGemm", "QAttention", "NBits", "Bnb4")


@dataclass(frozen=True)
class OnnxLayer:
    """A node that has weights.

    Attributes:
        name: of the node; of its output, where it has none.
        op: "Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization", ...: a key of LAYERS.
        tensors: as torch's layer holds them: "weight", "bias", "running_mean", "running_var".
        names: of each of these in the file: of the initializer; of the Identity that leads from it
            (equal tensors are stored once); or of what a Constant or the graph makes.
    """

    name: str
    op: str
    tensors: dict[str, Tensor]
    names: dict[str, str]


def onnx_layers(path: StrPath) -> list[OnnxLayer]:
    """List the nodes that have weights, in order of execution.

    Weights of Linear layers (Gemm; MatMul and the Add after it) are (out, in). Constants that the
    graph computes from initializers are computed. A node whose weights depend on the input is no
    layer, nor is an InstanceNormalization that does not scale (half of an exported GroupNorm).

    Raises RetrofitError for what is no ONNX file, for one without its external data, for quantised
    layers, for those of onnxruntime's optimiser, and for those in branches.
    """
    graph = Graph(open_onnx(path), str(path))
    return [layer for node in graph.nodes if (layer := _layer(graph, node)) is not None]


def onnx_state_dict(path: StrPath) -> dict[str, Tensor]:
    """List all initializers of numbers by their names, as they are.

    One that an exporter stored once for several names is under all of them. Raises RetrofitError as
    `onnx_layers` does for the file.
    """
    graph = Graph(open_onnx(path), str(path))
    arrays = {name: graph.array(name) for name in (*graph.initializers, *graph.aliases)}
    strings = {name for name, array in arrays.items() if array.dtype == object}
    return {k: _tensor(a, f"{path}: {k}") for k, a in arrays.items() if k not in strings}


def _layer(graph: Graph, node: NodeProto) -> OnnxLayer | None:
    """Read the layer of a node; None if it has no weights of its own."""
    where = f"{graph.source}: {named(node)}"
    refuse_odd(node, where)
    given = dict(zip(LAYERS.get(node.op_type, ()), node.input[1:], strict=False))
    if given.get("weight") in graph.inputs and node.op_type in ALWAYS:
        raise RetrofitError(
            f"{where} takes its weight as an input: export the network with its parameters"
        )
    if not given or given["weight"] not in graph.constants:
        return None
    given |= _bias_of_matmul(graph, node)
    arrays = _arrays(graph, given, where)
    if _is_made_up(graph, given.get("bias", ""), arrays):
        del arrays["bias"]
    if (shaped := SHAPED.get(node.op_type)) is not None:
        arrays = shaped(node, arrays)
    tensors = {role: _tensor(array, where) for role, array in arrays.items()}
    names = {role: graph.origin(given[role]) for role in arrays}
    name = node.name or node.output[0]
    return OnnxLayer(name, node.op_type, tensors, names) if tensors else None


def _arrays(graph: Graph, given: Mapping[str, str], where: str) -> dict[str, np.ndarray]:
    constant = {role: name for role, name in given.items() if name in graph.constants and name}
    try:
        return {role: graph.array(name) for role, name in constant.items()}
    except RetrofitError as error:
        raise RetrofitError(f"{where}: {error}") from error


def _bias_of_matmul(graph: Graph, node: NodeProto) -> dict[str, str]:
    """Find the bias in the Add after a MatMul, if it is one number for each output channel."""
    after = graph.readers.get(node.output[0], [])
    add = after[0] if len(after) == 1 else None
    if node.op_type != "MatMul" or add is None or add.op_type != "Add":
        return {}
    other = add.input[1] if add.input[0] == node.output[0] else add.input[0]
    if other not in graph.constants:
        return {}
    alike = graph.array(other).shape == graph.array(node.input[1]).shape[-1:]
    return {"bias": other} if alike else {}


def _is_made_up(graph: Graph, bias: str, arrays: Mapping[str, np.ndarray]) -> bool:
    """Tell a bias of zeros that the graph makes: torch's exporter adds one to each Conv."""
    if "bias" not in arrays or arrays["bias"].any():
        return False
    maker = graph.makers.get(graph.origin(bias))
    return maker is not None and maker.op_type not in ("Constant", "Identity")


def _linear(node: NodeProto, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Turn Gemm's and MatMul's into a Linear layer's; nothing where that is none."""
    options = {a.name: a.i or a.f for a in node.attribute}
    weight = arrays["weight"]
    if weight.ndim != 2 or options.get("transA"):
        return {}
    weight = weight if options.get("transB") else weight.T
    found = {"weight": _scaled(weight, options.get("alpha", 1.0))}
    if "bias" in arrays:
        bias = np.broadcast_to(arrays["bias"].reshape(-1), (len(weight),))
        found["bias"] = _scaled(bias, options.get("beta", 1.0))
    return found


def _scaled(array: np.ndarray, factor: float) -> np.ndarray:
    return array if factor == 1 else (array * factor).astype(array.dtype)


def _slopes(_node: NodeProto, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Turn PRelu's, which have axes for height and width, into one for each channel."""
    return {"weight": arrays["weight"].reshape(-1)}


def _scaling(_node: NodeProto, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Take InstanceNormalization's unless they change nothing: it has to have some."""
    trivial = (arrays["weight"] == 1).all() and not arrays.get("bias", np.zeros(1)).any()
    return {} if trivial else arrays


SHAPED: dict[str, Callable[[NodeProto, dict[str, np.ndarray]], dict[str, np.ndarray]]] = {
    "Gemm": _linear,
    "MatMul": _linear,
    "PRelu": _slopes,
    "InstanceNormalization": _scaling,
}


def refuse_odd(node: NodeProto, where: str) -> None:
    """Raise RetrofitError for a node whose weights are not those of a layer of torch."""
    if any(text in node.op_type for text in QUANTISED):
        raise RetrofitError(f"{where} is quantised: take the file from before that")
    if node.op_type.startswith(("Fused", "NhwcFused")):
        raise RetrofitError(
            f"{where} was made by onnxruntime's optimiser: take the file from before that"
        )
    inner = [n.op_type for graph in branches(node) for n in graph.node]
    if found := sorted(ALWAYS.intersection(inner)):
        raise RetrofitError(
            f"{where} has layers in its branches ({', '.join(found)}), and which of them run is "
            "not known: export the network with inputs of a fixed shape"
        )


def _tensor(array: np.ndarray, where: str) -> Tensor:
    """Make a tensor of its own memory; RetrofitError for a type that torch does not have."""
    if array.dtype.name == "bfloat16":  # of ml_dtypes, which torch does not know
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    try:
        return torch.from_numpy(array.copy())
    except TypeError as error:
        raise RetrofitError(f"{where} holds {array.dtype}: take a file of floats") from error
