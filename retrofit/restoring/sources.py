"""The folded network that is to be restored: a module, a state dict, or a file."""

from __future__ import annotations

import inspect
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from retrofit.errors import RetrofitError
from retrofit.files.onnx_precision import in_float32
from retrofit.files.onnx_weights import onnx_layers, onnx_state_dict, run_onnx
from retrofit.files.provenance import Provenance
from retrofit.files.state_dicts import State, state_dicts
from retrofit.files.weights import WeightsFile, open_weights
from retrofit.running.call_arguments import ForwardFn, arguments_of, call_model
from retrofit.running.input_channels import input_dtype
from retrofit.running.modes import eager, evaluating
from retrofit.running.nested import tensors
from retrofit.running.shared_copy import refuse_lazy, refuse_wrappers, shared_copy
from retrofit.tracing.read_model import read

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Layer:
    """A layer that has a weight.

    Attributes:
        path: of the module; in messages.
        tensors: its own, by their names in it.
    """

    path: str
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Source:
    """A folded network.

    Attributes:
        name: for messages.
        file: its tensors, under whatever names.
        layers: lists those with a weight in the order of execution; None where nobody knows it.
        run: computes the outputs for a batch; None where there are weights alone.
        exported: it is of ONNX: among the tensors are constants of the graph, and outputs have no
            place but their number.
    """

    name: str
    file: WeightsFile
    layers: Callable[[Any], list[Layer]] | None = None
    run: Callable[[Any], Outputs] | None = None
    exported: bool = False

    def renamed(self, names: set[str], key_map: Mapping[str, str]) -> Source:
        """Give the tensors the names that the user's map leads to.

        Raises RetrofitError for a map from other names than the file's, to others than `names`, or
        to one that another tensor has.
        """
        theirs = {key for state in self.file.states.values() for key in state}
        if unknown := [key for key in key_map if key not in theirs]:
            raise RetrofitError(f"key_map has {unknown[0]!r}, which {self.name} does not have")
        if unknown := [key for key in key_map.values() if key not in names]:
            raise RetrofitError(
                f"key_map leads to {unknown[0]!r}, which the architecture does not have"
            )
        for state in self.file.states.values():
            after = Counter(key_map.get(key, key) for key in state)
            if twice := [key for key, count in after.items() if count > 1]:
                raise RetrofitError(f"key_map gives two tensors the name {twice[0]!r}")
        found = self._under(lambda key, _: key_map.get(key, key))
        return found._of(names) if self.exported else found

    def _of(self, names: set[str]) -> Source:
        """Leave out the tensors whose names are none of these, behind whatever prefix."""
        states = {
            path: {key: tensor for key, tensor in state.items() if _known(key, names)}
            for path, state in self.file.states.items()
        }
        return replace(self, file=replace(self.file, states=states))

    def without_indices(self, names: set[str]) -> Source:
        """Leave out the 0 of a ConvReLU2d, a Sequential that torch.ao makes: "conv1.0.weight"."""

        def shorter(key: str, state: State) -> str:
            less = re.sub(r"\.0\.(weight|bias)$", r".\1", key)
            weight = re.sub(r"bias$", "weight", less)  # the layer may have had no bias
            return key if key in names or less in state or not _known(weight, names) else less

        return self._under(shorter)

    def _under(self, rename: Callable[[str, State], str]) -> Source:
        states = {
            path: {rename(key, state): tensor for key, tensor in state.items()}
            for path, state in self.file.states.items()
        }
        return replace(self, file=replace(self.file, states=states))


def source_of(folded: object, architecture: nn.Module, forward_fn: ForwardFn | None) -> Source:
    """Open what the user holds; RetrofitError for what is no network, or one of integers.

    Args:
        folded: a module, a mapping, or a path.
        architecture: in whose precision a module is run, and whose arguments a file of ONNX takes.
        forward_fn: `forward_fn(model, batch)`, for any other way of calling a module.
    """
    source = _opened(folded, architecture, forward_fn)
    for state in source.file.states.values():
        for name, tensor in state.items():
            if "_packed_params" in name or (isinstance(tensor, Tensor) and tensor.is_quantized):
                raise RetrofitError(
                    f"{source.name} is quantised ({name.partition('._packed_params')[0]}): pass "
                    "the network of floating-point numbers that it was made from"
                )
    return source


def _opened(folded: object, architecture: nn.Module, forward_fn: ForwardFn | None) -> Source:
    if isinstance(folded, torch.export.ExportedProgram):
        folded = folded.module()
    if isinstance(folded, torch.jit.ScriptModule):
        return _of_script(folded, forward_fn)
    if isinstance(folded, nn.Module):
        return _of_module(folded, input_dtype(architecture), forward_fn)
    if isinstance(folded, Mapping):
        name = "the state dict"
        folded = tree_map_only(np.ndarray, torch.as_tensor, dict(folded))
        states = state_dicts(folded)
        if not states:
            raise RetrofitError(
                "the folded network is a mapping without tensors: pass a state dict, a module, or "
                "the path of a file"
            )
        return Source(name, WeightsFile(Path(name), states, Provenance()))
    if isinstance(folded, (str, os.PathLike)):
        path = Path(folded)
        if path.suffix == ".onnx":
            return _of_onnx(path, architecture, forward_fn)
        return Source(str(path), open_weights(path))
    raise RetrofitError(
        f"the folded network is a {type(folded).__name__}: pass a module, a state dict, or the "
        "path of a file"
    )


def _of_module(folded: nn.Module, dtype: torch.dtype, forward_fn: ForwardFn | None) -> Source:
    refuse_wrappers(folded)
    refuse_lazy(folded)
    if input_dtype(folded) != dtype:  # as for data, such as a checkpoint of 16 bits
        folded = shared_copy(folded).to(dtype)
    source = _named(folded, lambda batch: outputs_of(folded, batch, forward_fn))
    return replace(source, layers=lambda batch: layers_of(folded, batch, forward_fn))


def _of_script(folded: torch.jit.ScriptModule, forward_fn: ForwardFn | None) -> Source:
    """Take TorchScript by its names; in which order its layers run is not to be seen."""
    if not folded.state_dict():
        raise RetrofitError(
            "the folded network is TorchScript that was frozen, whose weights have no names: write "
            "it with torch.onnx.export(..., dynamo=False), and pass that file"
        )

    def run(batch: Any) -> Outputs:
        with torch.no_grad():
            return tensors(call_model(folded, batch, forward_fn), "output")

    return _named(folded, run)


def _named(folded: nn.Module, outputs: Callable[[Any], Outputs]) -> Source:
    name = f"the folded {type(folded).__name__}"

    def run(batch: Any) -> Outputs:
        try:
            return outputs(batch)
        except RetrofitError:  # which says what is wrong with the batch
            raise
        except Exception as error:
            raise RetrofitError(
                f"{name} does not run on the example: {type(error).__name__}: {error}"
            ) from error

    state: State = dict(folded.state_dict())
    return Source(name, WeightsFile(Path(name), {"": state}, Provenance()), run=run)


def _of_onnx(path: Path, architecture: nn.Module, forward_fn: ForwardFn | None) -> Source:
    """Read a file of ONNX, whose layers have the names of torch's where the exporter kept them."""
    listed = onnx_layers(path)
    state: State = {**onnx_state_dict(path)}
    for layer in listed:  # whose bias goes by any name, if folding made it or others are equal
        owner = layer.names["weight"].removesuffix("weight")
        state |= {f"{owner}{name}": tensor for name, tensor in layer.tensors.items()}
    halves = any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in state.values())
    runs = in_float32(path) if halves else path  # as data, and the network that it runs beside

    def run(batch: Any) -> Outputs:
        given = _arguments(architecture, batch, forward_fn)
        arrays = [tensor.detach().cpu().numpy() for tensor in tensors(given).values()]
        found = run_onnx(runs, arrays)
        return {f"output[{i}]": torch.from_numpy(array) for i, array in enumerate(found)}

    def layers(_: Any) -> list[Layer]:
        return [Layer(layer.name, layer.tensors) for layer in listed]

    file = WeightsFile(path, {"": state}, Provenance())
    return Source(str(path), file, layers, run, exported=True)


def _arguments(model: nn.Module, batch: Any, forward_fn: ForwardFn | None) -> Any:
    """Find what the model gets for a batch: without its labels, and as forward_fn makes it.

    In the order of its forward, which is that of an export's inputs.
    """
    seen: list[tuple[Any, Any]] = []
    if forward_fn is None:
        arguments = arguments_of(model, batch)
        seen.append((arguments.args, arguments.kwargs))
    else:
        copied = shared_copy(model)
        copied.register_forward_pre_hook(lambda _m, *given: seen.append(given), with_kwargs=True)
        outputs_of(copied, batch, forward_fn)
    if not seen:
        raise RetrofitError("forward_fn does not call the model that it is given")
    args, kwargs = seen[0]
    return list(inspect.signature(model.forward).bind(*args, **kwargs).arguments.values())


def outputs_of(model: nn.Module, batch: Any, forward_fn: ForwardFn | None) -> Outputs:
    """Compute what a model returns in eval mode, as tensors by their place."""
    copied = shared_copy(model)  # forward may count or cache
    with evaluating(copied), torch.no_grad(), eager():
        return tensors(call_model(copied, batch, forward_fn), "output")


def layers_of(model: nn.Module, batch: Any, forward_fn: ForwardFn | None) -> list[Layer]:
    """List the layers with a weight in the order in which they are first called."""
    trace = read(shared_copy(model), batch, forward_fn)
    found: dict[str, Layer] = {}
    for path in trace.modules_called:
        module = model.get_submodule(path)
        own = {**module._parameters, **module._buffers}
        present = {name: tensor for name, tensor in own.items() if isinstance(tensor, Tensor)}
        if "running_var" in present:  # without a weight, it has ones in an exported file
            present.setdefault("weight", torch.ones_like(present["running_var"]))
        if "weight" in present:
            found.setdefault(path, Layer(path, present))
    return list(found.values())


def _known(key: str, names: set[str]) -> bool:
    """Tell whether this is one of the names, maybe behind a prefix."""
    parts = key.split(".")
    return any(".".join(parts[i:]) in names for i in range(len(parts)))
