"""ONNX files: read whole or refused, and run by onnxruntime as they stand."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from retrofit.errors import RetrofitError

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

StrPath = str | os.PathLike[str]
SUFFIX = ".onnx"
FLOAT = 1  # TensorProto.FLOAT
COLOURS = (1, 3, 4)


def imported(name: str) -> Any:
    """Import one of the packages of the extra; RetrofitError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RetrofitError(
            f"{name.partition('.')[0]} is needed for ONNX files: "
            "pip install 'batchnorm-retrofit[onnx]'"
        ) from error


def is_onnx(path: StrPath) -> bool:
    """Tell by its name whether this is an ONNX file."""
    return Path(path).suffix == SUFFIX


def open_onnx(path: StrPath) -> ModelProto:
    """Read an ONNX file with its external data; RetrofitError for anything else."""
    model, path = _parsed(Path(path)), Path(path)
    try:
        imported("onnx").load_external_data_for_model(model, str(path.parent))
    except Exception as error:
        kept = (entry for t in model.graph.initializer for entry in t.external_data)
        files = sorted({entry.value for entry in kept if entry.key == "location"})
        raise RetrofitError(
            f"{path} keeps its weights in {', '.join(files)}, which is not beside it, or damaged: "
            f"copy both files, or export with external_data=False ({error})"
        ) from error
    return model


def picture_size(path: StrPath) -> tuple[int, int] | None:
    """Find the height and width of the pictures that a file takes; None if it leaves them open.

    Raises RetrofitError for a file that takes something else than pictures (N, C, H, W).
    """
    graph = _parsed(Path(path)).graph
    stored = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in stored]
    kinds = [value.type.tensor_type for value in inputs]
    axes = [[axis.dim_value for axis in kind.shape.dim] for kind in kinds]
    told = ", ".join(
        f"{value.name} {tuple(size or '?' for size in sizes)}"
        for value, sizes in zip(inputs, axes, strict=True)
    )
    fits = len(inputs) == 1 and len(axes[0]) == 4 and kinds[0].elem_type == FLOAT
    if not fits or (axes[0][3] in COLOURS and axes[0][1] > max(COLOURS)):
        raise RetrofitError(
            f"{path} takes {told}, and pictures are one input of float32 (N, C, H, W): give "
            "batches of your own, --data file.py:loader, or convert "
            "retrofit.module_from_onnx(path) in Python"
        )
    height, width = axes[0][2:]
    return (height, width) if height and width else None


def _parsed(path: Path) -> ModelProto:
    """Read an ONNX file without its external data; RetrofitError for anything else."""
    onnx = imported("onnx")
    try:
        model: ModelProto = onnx.load(path, format="protobuf", load_external_data=False)
    except OSError as error:
        reason = f"there is no file {path}" if not path.exists() else f"{path}: {error.strerror}"
        raise RetrofitError(reason) from error
    except Exception as error:  # of protobuf, which is no package of ours
        raise RetrofitError(f"{path} is no ONNX file, or damaged: {error}") from error
    if not model.graph.node:  # a file of no length is a valid message
        raise RetrofitError(f"{path} is no ONNX file, or damaged: it has no nodes")
    return model


def inlined(model: ModelProto) -> ModelProto:
    """Put the functions of a file, which torch's exporter makes of modules, where they are called.

    A file without functions is returned as it is.
    """
    if not model.functions:
        return model
    found: ModelProto = imported("onnx.inliner").inline_local_functions(model)
    return found


def named(node: NodeProto) -> str:
    """Name a node, for messages."""
    return f"{node.op_type} {node.name or node.output[0]}"


def run_onnx(path: StrPath | bytes, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Run a file by onnxruntime on the CPU, without optimisations of its graph.

    Args:
        path: of the file; or its content.
        arrays: its inputs in order, (N, ...) each. Where the file has a fixed batch size, they
            are run in batches of that, the last of them filled up.

    Returns:
        Its outputs in order.

    Raises:
        RetrofitError: the file cannot be run, or not on these.
    """
    return Session(path).run(arrays)


class Session:
    """A file that onnxruntime has loaded.

    Attributes:
        inputs: what it takes, each with a name, a shape and a type.
        batch_size: of its inputs, if the file has it fixed.
    """

    def __init__(self, path: StrPath | bytes, *, optimised: bool = False) -> None:
        runtime = imported("onnxruntime")
        self.source = "the ONNX file" if isinstance(path, bytes) else str(path)
        options = runtime.SessionOptions()
        if not optimised:
            level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.graph_optimization_level = level
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # warnings would go to stderr past Python
        content = path if isinstance(path, bytes) else os.fspath(path)
        providers = ["CPUExecutionProvider"]
        try:
            self.session = runtime.InferenceSession(content, options, providers=providers)
        except Exception as error:  # of many classes of its own
            raise RetrofitError(f"onnxruntime cannot load {self.source}: {error}") from error
        self.inputs = self.session.get_inputs()
        sizes = {value.shape[0] if value.shape else None for value in self.inputs}
        size = sizes.pop() if len(sizes) == 1 else None
        self.batch_size = size if isinstance(size, int) else None

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run it on inputs in order; see `run_onnx`."""
        if len(arrays) != len(self.inputs):
            names = ", ".join(value.name for value in self.inputs)
            raise RetrofitError(
                f"{self.source} takes {len(self.inputs)} inputs ({names}), not {len(arrays)}"
            )
        for value, array in zip(self.inputs, arrays, strict=True):
            self._refuse_other_size(value, array)
        size = self.batch_size
        if size is None or all(len(array) == size for array in arrays):
            return self._run(arrays)
        count = len(arrays[0])
        starts = range(0, count, size)
        parts = [[_filled(a[start : start + size], size) for a in arrays] for start in starts]
        outputs = [self._run(part) for part in parts]
        if any(output.shape[:1] != (size,) for output in outputs[0]):
            raise RetrofitError(
                f"{self.source} has a fixed batch size of {size}, and an output without that axis: "
                f"give it {size} at once"
            )
        return [np.concatenate(found)[:count] for found in zip(*outputs, strict=True)]

    def _refuse_other_size(self, value: Any, array: np.ndarray) -> None:
        fixed = [size if isinstance(size, int) else None for size in value.shape[1:]]
        if len(fixed) != array.ndim - 1 or any(
            size not in (None, found) for size, found in zip(fixed, array.shape[1:], strict=True)
        ):
            takes = ", ".join(["N", *(str(size or "any") for size in fixed)])
            crop = f", on the command line by --crop {fixed[-1]}" if len(fixed) == 3 else ""
            raise RetrofitError(
                f"{self.source} takes {value.name} of shape ({takes}), not {array.shape}: give it "
                f"what has that size{crop}"
            )

    def _run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        feeds = {value.name: array for value, array in zip(self.inputs, arrays, strict=True)}
        try:
            found: list[np.ndarray] = self.session.run(None, feeds)
        except Exception as error:
            said = " ".join(str(error).split())
            raise RetrofitError(f"onnxruntime cannot run {self.source}: {said}") from error
        return found


def _filled(array: np.ndarray, size: int) -> np.ndarray:
    """Fill up a batch with its last sample."""
    return np.concatenate([array, np.repeat(array[-1:], size - len(array), 0)])
