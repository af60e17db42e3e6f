"""An ONNX file as a module of torch, which onnx2torch makes.

onnx2torch reads the operations of opset 17, weights that are initializers, and shapes as they are
written. Files of today are put in that form first, and what comes of it is compared with
onnxruntime.
"""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from retrofit.errors import RetrofitError
from retrofit.files.onnx_constants import Graph
from retrofit.files.onnx_files import Session, StrPath, imported, named, open_onnx
from retrofit.files.onnx_weights import refuse_odd
from retrofit.numerics.comparison import BRANCH_TOLERANCE, Comparison
from retrofit.running.nested import tensors

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

OPSET = 17
# Their axes are an attribute up to that, and an input since.
REDUCTIONS = re.compile("Reduce(L1|L2|LogSum|LogSumExp|Max|Mean|Min|Prod|SumSquare)")
OPEN = (3, 3, 224, 224)  # of axes (N, C, H, W) that a file leaves open, to try it on
TYPES = {"tensor(float16)": np.float16, "tensor(double)": np.float64}


def module_from_onnx(path: StrPath) -> fx.GraphModule:
    """Make a module of an ONNX file by onnx2torch, in eval mode.

    It is what the command line converts for a MODEL that is an ONNX file: `load` takes it with the
    weights that `convert` wrote. Files of torch's newest exporters, which onnx2torch alone refuses,
    are put in the form that it reads.

    Args:
        path: of the file; its external data, if there is some, is beside it.

    Returns:
        A GraphModule whose layers are called as the nodes. It takes batches of any size, also where
        the file has a fixed one.

    Raises:
        RetrofitError: it is no ONNX file, or a quantised one; onnx2torch does not have one of its
            operations; or the module computes something else than onnxruntime does with the file.

    Examples:
        >>> network = retrofit.add_batchnorm(retrofit.module_from_onnx("net.onnx"), images)
    """
    made = _converted(_readable(path), str(path))
    session = Session(path)
    size = session.batch_size
    reason = _difference(made, session, size + 2 if size else None)
    if reason:
        fixed = size is not None and not _difference(made, session, size)
        way_out = f"; its batch size is fixed at {size}: export it with that axis dynamic"
        raise RetrofitError(
            f"onnx2torch's module of {path} does not compute what onnxruntime does: {reason}"
            f"{way_out if fixed else ''}"
        )
    return made


def outputs_by_module(path: StrPath) -> dict[str, str]:
    """Map the modules of `module_from_onnx(path)` to the first outputs of the nodes they are of."""
    graph = _readable(path).graph
    modules = imported("onnx2torch.onnx_graph").OnnxGraph(graph).nodes
    return {name: node.output[0] for name, node in zip(modules, graph.node, strict=True)}


def _readable(path: StrPath) -> ModelProto:
    """Read a file into the form that onnx2torch takes; its values keep their names."""
    graph = Graph(open_onnx(path), str(path))
    for node in graph.nodes:
        refuse_odd(node, f"{path}: {named(node)}")
    try:
        model = _folded(graph)
    except RetrofitError as error:
        raise RetrofitError(f"{path}: {error}") from error
    _lower(model)
    _free_batch(model)
    return model


def _folded(graph: Graph) -> ModelProto:
    """Store the constants that nodes read, and leave out what computes them."""
    outputs = {value.name for value in graph.model.graph.output}
    fixed = graph.constants - outputs
    kept = [node for node in graph.nodes if not fixed.issuperset(node.output)]
    read = dict.fromkeys(name for node in kept for name in node.input)
    made = [name for name in read if name in graph.makers and name in fixed]
    model = type(graph.model)()
    model.CopyFrom(graph.model)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    store = imported("onnx.numpy_helper").from_array
    model.graph.initializer.extend(store(graph.array(name), name) for name in made)
    return model


def _lower(model: ModelProto) -> None:
    """Write the operations of newer opsets as in OPSET, where that has them."""
    helper, constants = imported("onnx.helper"), _initializers(model)
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = min(entry.version, OPSET)
    for node in model.graph.node:
        reduces, reshapes = REDUCTIONS.fullmatch(node.op_type), node.op_type == "Reshape"
        if not (reduces or reshapes) or node.input[-1] not in constants or len(node.input) < 2:
            continue
        numbers = _numbers(constants[node.input[1]])
        if reduces:
            del node.input[1]
            node.attribute.append(helper.make_attribute("axes", numbers))
        elif 0 not in numbers:  # allowzero does nothing then
            del node.attribute[:]


def _free_batch(model: ModelProto) -> None:
    """Let the first axis of shapes that hold a fixed batch size be that of the batch itself."""
    size = _batch_size(model)
    constants = _initializers(model)
    if size is None:
        return
    inferred = imported("onnx.shape_inference").infer_shapes(model).graph
    first = {value.name: _first_axis(value) for value in (*inferred.value_info, *inferred.input)}
    store = imported("onnx.numpy_helper").from_array
    for node in model.graph.node:
        if node.op_type != "Reshape" or node.input[1] not in constants:
            continue
        numbers = _numbers(constants[node.input[1]])
        if numbers[:1] == [size] and first.get(node.input[0]) in (size, None):
            # A 0 keeps the axis of the input; onnx2torch prefers to work it out, where it can.
            shape = np.array([0 if -1 in numbers else -1, *numbers[1:]], np.int64)
            name = f"{node.output[0]}_any_batch"
            model.graph.initializer.append(store(shape, name))
            node.input[1] = name


def _initializers(model: ModelProto) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def _numbers(tensor: TensorProto) -> list[int]:
    found: list[int] = imported("onnx.numpy_helper").to_array(tensor).reshape(-1).tolist()
    return found


def _batch_size(model: ModelProto) -> int | None:
    """Find the batch size of the inputs, if it is fixed, and one."""
    stored = _initializers(model)
    sizes = {_first_axis(value) for value in model.graph.input if value.name not in stored}
    return sizes.pop() if len(sizes) == 1 else None


def _first_axis(value: Any) -> int | None:
    axes = value.type.tensor_type.shape.dim
    return axes[0].dim_value or None if axes else None


def _converted(model: ModelProto, source: str) -> fx.GraphModule:
    convert = imported("onnx2torch").convert
    try:
        made: fx.GraphModule = convert(model)
    except Exception as error:  # of any class, some without words
        missing = re.search(r"operation_type='(\w+)'", str(error))
        reason = f"it has no {missing[1]}" if missing else f"{type(error).__name__}: {error}"
        raise RetrofitError(
            f"onnx2torch cannot make a module of {source}: {reason}; convert the network that was "
            f"exported instead, or export it with dynamo=False, opset_version={OPSET}"
        ) from error
    return made.eval()


def _difference(made: fx.GraphModule, session: Session, size: int | None) -> str:
    """Say how the outputs of the module and of the file differ; nothing if by rounding alone."""
    x = [_example(value, size) for value in session.inputs]
    expected = [torch.from_numpy(array) for array in session.run([one.numpy() for one in x])]
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run that counts will warn
            found = list(tensors(made(*x)).values())
    except Exception as error:  # noqa: BLE001 - of any operation
        return f"{type(error).__name__}: {error}"
    if [t.shape for t in expected] != [t.shape for t in found]:
        shapes = (", ".join(str(tuple(t.shape)) for t in ts) for ts in (found, expected))
        return "outputs of {} in place of {}".format(*shapes)
    for one, other in zip(expected, found, strict=True):
        comparison = Comparison()
        comparison.add(one, other, "output")
        relative = comparison.difference("output").relative
        if relative > BRANCH_TOLERANCE:
            return f"an output differs by {relative:.2g} of its root mean square"
    return ""


def _example(value: Any, size: int | None) -> Tensor:
    """Draw an input of onnxruntime's description, in a batch of that size."""
    fixed = [axis if isinstance(axis, int) else None for axis in value.shape]
    fixed[:1] = [size]
    usual = (*OPEN, *(1 for _ in fixed))
    shape = [axis or one for axis, one in zip(fixed, usual, strict=False)]
    drawn = np.random.default_rng(0).standard_normal(shape)
    return torch.from_numpy(drawn.astype(TYPES.get(value.type, np.float32)))
