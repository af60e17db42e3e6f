"""What the tools that `peers.py` compares leave: a network of modules, or a graph in ONNX."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

if TYPE_CHECKING:
    from onnx import ModelProto

Answer = Callable[[Tensor], Tensor]


class Moments(NamedTuple):
    """Mean and standard deviation of each channel, float64 (C,)."""

    mean: Tensor
    std: Tensor


class Outcome(ABC):
    """A network with BatchNorms, from a plain one.

    Attributes:
        elsewhere: what it is, where its weights fit into no class.
        plain: the plain network, run by what runs this one.
    """

    elsewhere: str
    plain: Answer

    @abstractmethod
    def answer(self, x: Tensor) -> Tensor:
        """Compute the outputs in eval mode."""

    @abstractmethod
    def moments(self, plain: nn.Module, x: Tensor) -> dict[str, Moments]:
        """Read the moments that the BatchNorms hold: of what which of plain's convolutions gives.

        Args:
            x: any input, of which no more is asked than that the networks run on it.
        """

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """List the weights by their names."""


class Modules(Outcome):
    """A network of torch's modules."""

    elsewhere = "its own modules alone"

    def __init__(self, model: nn.Module, plain: nn.Module) -> None:
        self.model, self.plain = model.eval(), forward(plain)

    def answer(self, x: Tensor) -> Tensor:
        return forward(self.model)(x)

    def moments(self, plain: nn.Module, x: Tensor) -> dict[str, Moments]:
        # The convolutions have other paths here, and run in the order that they always had.
        paths = {module: path for path, module in plain.named_modules()}
        both = zip(readers(plain, x), readers(self.model, x), strict=True)
        found = {}
        for (before, _), (after, norm) in both:
            if norm is None:
                continue
            assert norm.running_mean is not None
            assert norm.running_var is not None
            moved = bias(before) - bias(after)  # a bias that is now in the BatchNorm
            mean, std = norm.running_mean.double() + moved, norm.running_var.double().sqrt()
            found[paths[before]] = Moments(mean, std)
        return found

    def state(self) -> dict[str, Tensor]:
        return dict(self.model.state_dict())


class OnnxGraph(Outcome):
    """A graph of ONNX, run by onnxruntime as it is: it fuses no BatchNorm with a convolution."""

    elsewhere = "an ONNX graph alone"

    def __init__(self, graph: ModelProto, plain: ModelProto) -> None:
        self.graph, self.answers, self.plain = graph, onnx_forward(graph), onnx_forward(plain)

    def answer(self, x: Tensor) -> Tensor:
        return self.answers(x)

    def moments(self, plain: nn.Module, x: Tensor) -> dict[str, Moments]:
        del x  # the graph says by itself what follows what
        weights, known = self.state(), dict(plain.named_modules())
        makers = {name: node for node in self.graph.graph.node for name in node.output}
        found = {}
        for node in self.graph.graph.node:
            if node.op_type != "BatchNormalization":
                continue
            path = makers[node.input[0]].input[1].removesuffix(".weight")
            if path not in known:
                raise ValueError(f"{node.name} follows {path}, which the plain network lacks")
            mean, var = (weights[name].double() for name in node.input[3:5])
            found[path] = Moments(mean, var.sqrt())
        return found

    def state(self) -> dict[str, Tensor]:
        from onnx import numpy_helper  # noqa: PLC0415 - the other outcomes need none

        tensors = self.graph.graph.initializer
        return {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in tensors}


def forward(model: nn.Module) -> Answer:
    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            output: Tensor = model(x)
        return output

    return run


def onnx_forward(graph: ModelProto) -> Answer:
    import onnxruntime  # type: ignore[import-untyped] # noqa: PLC0415 - as above

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (name,) = (value.name for value in session.get_inputs())
    return lambda x: torch.from_numpy(session.run(None, {name: x.contiguous().numpy()})[0])


def bias(conv: _ConvNd) -> Tensor:
    """Return the bias of a convolution in float64, of zeros where it has none."""
    values = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
    return values.double()


def readers(model: nn.Module, x: Tensor) -> list[tuple[_ConvNd, _BatchNorm | None]]:
    """List the convolutions in the order in which they run, with the BatchNorm right after each."""
    outputs: list[tuple[_ConvNd, Tensor]] = []  # which live on, so that none takes another's place
    norms: dict[int, _BatchNorm] = {}

    def ran(conv: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(conv, _ConvNd)
        outputs.append((conv, output))

    def reads(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, _BatchNorm)
        norms[id(inputs[0])] = norm

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, _ConvNd):
                stack.callback(module.register_forward_hook(ran).remove)
            elif isinstance(module, _BatchNorm):
                stack.callback(module.register_forward_pre_hook(reads).remove)
        forward(model)(x)
    return [(conv, norms.get(id(output))) for conv, output in outputs]


def two_passes(plain: nn.Module, batches: Iterable[Tensor]) -> dict[str, Moments]:
    """Compute the moments of what each convolution gives in two passes, summed in float64.

    The variance is the sum of squares over n - 1, as in the running_var of torch.
    """
    batches = list(batches)
    paths = {m: path for path, m in plain.named_modules() if isinstance(m, _ConvNd)}
    sums = {path: torch.zeros((), dtype=torch.float64) for path in paths.values()}
    counts = dict.fromkeys(sums, 0)

    def first(conv: nn.Module, _inputs: tuple[Tensor, ...], y: Tensor) -> None:
        path = paths[conv]  # type: ignore[index]
        sums[path] = sums[path] + y.double().sum((0, 2, 3))
        counts[path] += y.numel() // y.shape[1]

    hooked_pass(plain, batches, paths, first)
    means = {path: total / counts[path] for path, total in sums.items()}
    squares = {path: torch.zeros_like(mean) for path, mean in means.items()}

    def second(conv: nn.Module, _inputs: tuple[Tensor, ...], y: Tensor) -> None:
        path = paths[conv]  # type: ignore[index]
        off = y.double() - means[path].view(1, -1, 1, 1)
        squares[path] = squares[path] + off.square().sum((0, 2, 3))

    hooked_pass(plain, batches, paths, second)
    return {
        path: Moments(mean, (squares[path] / (counts[path] - 1)).sqrt())
        for path, mean in means.items()
    }


def hooked_pass(
    model: nn.Module,
    batches: Iterable[Tensor],
    modules: Iterable[nn.Module],
    hook: Callable[[nn.Module, tuple[Tensor, ...], Tensor], None],
) -> None:
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(hook).remove)
        for x in batches:
            forward(model)(x)
