"""An ONNX file with the BatchNorms of a module that was made of it, as nodes of its own.

Nothing else changes but the name of what a node before a BatchNorm gives: what reads it keeps
reading the old name, which is the BatchNorm's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from retrofit.errors import RetrofitError
from retrofit.files.onnx_files import Session, StrPath, imported, open_onnx
from retrofit.files.onnx_modules import outputs_by_module
from retrofit.numerics.comparison import Comparison, Difference
from retrofit.plans import Site
from retrofit.surgery.record import required_record

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

TENSORS = ("weight", "bias", "running_mean", "running_var")  # in the order of the node's inputs
OLDEST = 7  # opset of which BatchNormalization is that of inference
MOST = 2**31 - 1  # bytes in a file of protobuf
WITH_INPUTS = 3  # versions of the format up to this list initializers among the inputs, too


@dataclass(frozen=True)
class Agreement:
    """How two ONNX files compare in onnxruntime.

    Attributes:
        exact: equal bit for bit, without optimisations of the graph.
        relative: the largest difference then, of the root mean square of an output.
        optimised: the same with onnxruntime's optimisations, which merge BatchNorms.
    """

    exact: bool
    relative: float
    optimised: float


def with_batchnorms(path: StrPath, converted: nn.Module) -> bytes:
    """Insert the BatchNorms of a converted `module_from_onnx(path)` into the file's content.

    Weights that the file keeps in another file are in the result, too.

    Raises RetrofitError for what a node cannot be put after, and for a file that is too old or,
    with its weights, too large.
    """
    model = open_onnx(path)
    outputs = outputs_by_module(path)
    sites = required_record(converted, "with_batchnorms").plan.inserted
    after = {outputs[site.host.partition(".")[0]]: site for site in sites}
    _refuse_unfit(model, after, str(path))
    taken = _names(model)
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        model.graph.node.append(node)
        if (site := after.get(node.output[0])) is not None:
            batchnorm = converted.get_submodule(site.batchnorm)
            _append(model, model.graph.node[-1], batchnorm, taken)
    if model.ByteSize() > MOST:
        raise RetrofitError(f"{path} with its weights is too large for one file: save as another")
    imported("onnx.checker").check_model(model)
    content: bytes = model.SerializeToString()
    return content


def agreement(path: StrPath, content: bytes, batches: Sequence[Sequence[Tensor]]) -> Agreement:
    """Compare a file with another's content on batches, each a tensor for each input."""
    plain = _differences(path, content, batches, optimised=False)
    merged = _differences(path, content, batches, optimised=True)
    return Agreement(
        all(d.exact for d in plain),
        max((d.relative for d in plain), default=0.0),
        max((d.relative for d in merged), default=0.0),
    )


def _differences(
    path: StrPath, content: bytes, batches: Sequence[Sequence[Tensor]], *, optimised: bool
) -> list[Difference]:
    """Compare each output of two files."""
    sessions = [Session(source, optimised=optimised) for source in (path, content)]
    found: dict[int, Comparison] = {}
    for batch in batches:
        outputs = (session.run([tensor.numpy() for tensor in batch]) for session in sessions)
        for i, (one, other) in enumerate(zip(*outputs, strict=True)):
            pair = torch.from_numpy(one), torch.from_numpy(other)
            found.setdefault(i, Comparison()).add(*pair, "an output")
    return [comparison.difference("an output") for comparison in found.values()]


def _refuse_unfit(model: ModelProto, after: dict[str, Site], source: str) -> None:
    """Raise RetrofitError where there is no place for one of the BatchNorms."""
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    if opset < OLDEST:
        raise RetrofitError(
            f"{source} is of opset {opset}, and BatchNorms are written from {OLDEST} on: pass it "
            "through onnx.version_converter.convert_version"
        )
    found = {node.output[0] for node in model.graph.node}
    for output, site in after.items():
        if output not in found or site.last_axis:
            reason = "lies in a function" if output not in found else "has its channels last"
            raise RetrofitError(
                f"{site.path} of {source} {reason}, and ONNX has no place for a BatchNorm after "
                "it: exclude it (--exclude), or save as .safetensors"
            )


def _names(model: ModelProto) -> set[str]:
    graph = model.graph
    found = {node.name for node in graph.node} | {tensor.name for tensor in graph.initializer}
    found.update(name for node in graph.node for name in (*node.input, *node.output))
    return found | {value.name for value in (*graph.input, *graph.output)}


def _append(model: ModelProto, node: NodeProto, batchnorm: Any, taken: set[str]) -> None:
    """Add a BatchNorm that takes over the name of what the node before it gives."""
    helper, graph = imported("onnx.helper"), model.graph
    name = _free(f"{node.name or node.output[0]}_bn", taken)
    inputs = [_free(f"{name}.{role}", taken) for role in TENSORS]
    given, node.output[0] = node.output[0], _free(f"{node.output[0]}_before_bn", taken)
    for role, key in zip(TENSORS, inputs, strict=True):
        array: np.ndarray = getattr(batchnorm, role).detach().cpu().numpy()
        graph.initializer.append(imported("onnx.numpy_helper").from_array(array, key))
        if model.ir_version <= WITH_INPUTS:
            kind = graph.initializer[-1].data_type
            graph.input.append(helper.make_tensor_value_info(key, kind, array.shape))
    graph.node.append(
        helper.make_node(
            "BatchNormalization",
            [node.output[0], *inputs],
            [given],
            name=name,
            epsilon=batchnorm.eps,
            momentum=1.0 - batchnorm.momentum,
        )
    )


def _free(name: str, taken: set[str]) -> str:
    """Choose a name that nothing has, and take it."""
    while name in taken:
        name += "_"
    taken.add(name)
    return name
