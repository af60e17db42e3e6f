"""The constants of an ONNX graph: initializers, and what is computed from nothing else.

Exporters rename weights, transpose them, lead them through Identity nodes, store equal ones once,
and compute zeros for a bias that a convolution lacks.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from retrofit.errors import RetrofitError
from retrofit.files.onnx_files import imported, inlined, named

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

# A tensor that comes out of these is still the one that went in.
MOVES = {"Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Cast", "CastLike"}
RANDOM = {"RandomNormal", "RandomUniform"}  # of no inputs, and yet no constants


class Graph:
    """The nodes of an ONNX file and its constants, computed where they are asked for."""

    def __init__(self, model: ModelProto, source: str) -> None:
        self.model, self.source = inlined(model), source
        model = self.model
        self.nodes = list(model.graph.node)
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.inputs = {value.name for value in model.graph.input} - self.initializers.keys()
        self.makers = {output: node for node in self.nodes for output in node.output if output}
        self.arrays: dict[str, np.ndarray] = {}

    @cached_property
    def constants(self) -> set[str]:
        """Names of the values that no input has a part in; of what is left out, too: ""."""
        found = {*self.initializers, ""}
        for node in self.nodes:
            inputs = node.input[:1] if node.op_type == "CastLike" else node.input
            fixed = node.op_type not in RANDOM and not list(branches(node))
            if fixed and found.issuperset(inputs):
                found.update(node.output)
        return found

    @cached_property
    def aliases(self) -> list[str]:
        """Names that Identity nodes give to initializers."""
        nodes = (node for node in self.nodes if node.op_type == "Identity")
        return [node.output[0] for node in nodes if node.input[0] in self.initializers]

    @cached_property
    def readers(self) -> dict[str, list[NodeProto | None]]:
        """What reads each value; None where it is an output of the graph."""
        found: dict[str, list[NodeProto | None]] = {}
        for output in self.model.graph.output:
            found[output.name] = [None]
        for node in self.nodes:
            for name in node.input:
                found.setdefault(name, []).append(node)
        return found

    def array(self, name: str) -> np.ndarray:
        """Compute a constant; RetrofitError where it cannot be, or is quantised."""
        if name not in self.arrays and name in self.initializers:
            to_array = imported("onnx.numpy_helper").to_array
            self.arrays[name] = np.asarray(to_array(self.initializers[name]))
        elif name not in self.arrays:
            self._compute(self.makers[name])
        return self.arrays[name]

    def _compute(self, node: NodeProto) -> None:
        if node.op_type == "DequantizeLinear":
            raise RetrofitError("its weights are quantised: take the file from before that")
        feeds = {name: self.array(name) for name in node.input if name in self.constants and name}
        try:
            if node.op_type == "CastLike" and len(feeds) == 1:
                (x,) = feeds.values()  # to the type of an activation: a float, if x is none
                self.arrays[node.output[0]] = np.asarray(x, None if x.dtype.kind == "f" else "f4")
            else:
                self._evaluate(node, feeds)
        except Exception as error:  # of onnx's reference implementation of any operation
            raise RetrofitError(
                f"its constants cannot be computed ({named(node)}): {type(error).__name__}: {error}"
            ) from error

    def _evaluate(self, node: NodeProto, feeds: dict[str, np.ndarray]) -> None:
        opsets, outputs = self.model.opset_import, list(node.output)
        make = imported("onnx.helper").make_function
        alone = make("retrofit", "constant", list(feeds), outputs, [node], opsets)
        made = imported("onnx.reference").ReferenceEvaluator(alone).run(outputs, feeds, {})
        self.arrays.update(zip(outputs, map(np.asarray, made), strict=True))

    def origin(self, name: str) -> str:
        """Follow a constant back to the name that its numbers have in the file."""
        while name in self.makers and name not in self.aliases:
            if self.makers[name].op_type not in MOVES:
                break
            name = self.makers[name].input[0]
        return name


def branches(node: NodeProto) -> Iterator[GraphProto]:
    """List the graphs inside a node (If, Loop, Scan)."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
