"""A file of 16 bits as one of 32, to be run beside a network of 32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from retrofit.files.onnx_files import FLOAT, StrPath, imported, inlined, open_onnx

if TYPE_CHECKING:
    from onnx import GraphProto, TensorProto

HALVES = (10, 16)  # TensorProto.FLOAT16, BFLOAT16


def in_float32(path: StrPath) -> bytes:
    """Write an ONNX file with all numbers of 16 bits in float32, which holds each of them exactly.

    Raises RetrofitError for what is no ONNX file.
    """
    model = inlined(open_onnx(Path(path)))
    helper = imported("onnx.numpy_helper")
    for graph in [*_graphs(model.graph)]:
        for tensor in [*_tensors(graph)]:
            if tensor.data_type in HALVES:
                wide = helper.to_array(tensor).astype(np.float32)
                tensor.CopyFrom(helper.from_array(wide, tensor.name))
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type in HALVES:
                value.type.tensor_type.elem_type = FLOAT
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.name in ("to", "dtype") and attribute.i in HALVES:
                    attribute.i = FLOAT
    content: bytes = model.SerializeToString()
    return content


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """Yield a graph, and those in the attributes of its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _graphs(inner)


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (*attribute.tensors, *([attribute.t] if attribute.HasField("t") else []))
