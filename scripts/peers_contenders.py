"""The tools that `peers.py` compares: each gives a plain network BatchNorms."""

from __future__ import annotations

import copy
import functools
import importlib.util
import logging
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

import other_tools
import torch
from peers_outcomes import Modules, OnnxGraph, Outcome
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import retrofit

if TYPE_CHECKING:
    from onnx import ModelProto


@dataclass(frozen=True)
class Subject:
    """A trained network without BatchNorm, and what there is to calibrate it on.

    Attributes:
        plain: in eval mode. It is shared: do not change it.
        batches: of pictures to calibrate on.
        stock: makes the class that the weights were published for.
        label: what that class is called.
        folded: whether that class has BatchNorms, which were folded away.
    """

    plain: nn.Module
    batches: list[Tensor]
    stock: Callable[[], nn.Module]
    label: str
    folded: bool


@dataclass(frozen=True)
class Done:
    """What a tool made of a network.

    Attributes:
        outcome: as its users need it: with the outputs that it had.
        left: makes what there is without what they have to see to; None if that is nothing.
    """

    outcome: Outcome
    left: Callable[[], Outcome] | None = None


Pass = Callable[[], Done]


@dataclass(frozen=True)
class Contender:
    """A tool.

    Attributes:
        ready: prepares what takes no part in the time, and returns what does.
        module: what has to be there to import.
        distribution: what pip calls it; nothing where pip does not know it.
        source: where to get it.
        folded: whether it is for networks alone whose BatchNorms were folded away.
    """

    ready: Callable[[Subject], Pass]
    module: str = "torch"
    distribution: str = "torch"
    source: str = ""
    folded: bool = False

    def missing(self) -> str:
        """Say what is not installed; nothing if all is."""
        try:
            there = importlib.util.find_spec(self.module) is not None
        except ModuleNotFoundError:  # of the package around it
            there = False
        return "" if there else f"not installed: {self.module}; get it from {self.source}"

    def version(self) -> str:
        """Return its version; nothing for a checkout that is importable without one."""
        try:
            return metadata.version(self.distribution) if self.distribution else ""
        except metadata.PackageNotFoundError:
            return ""


def added(subject: Subject) -> Pass:
    def run() -> Done:
        model = retrofit.add_batchnorm(subject.plain, subject.batches, progress=False)
        return Done(Modules(model, subject.plain))

    return run


def restored(subject: Subject) -> Pass:
    def run() -> Done:
        stock = subject.stock().eval().to(memory_format=torch.channels_last)
        model = retrofit.restore(stock, subject.plain, subject.batches, progress=False)
        return Done(Modules(model, subject.plain))

    return run


def onnxsim_bn_recovery(subject: Subject) -> Pass:
    from onnxsim.bn_recovery import (  # type: ignore[import-not-found] # noqa: PLC0415 - optional
        recover_batch_norm,
    )

    plain = exported(subject.plain, subject.batches[0][:2])
    name = plain.graph.input[0].name
    data = [{name: x.contiguous().numpy()} for x in subject.batches]

    def recovered(target: ModelProto | None) -> Outcome:
        graph = recover_batch_norm(plain, calibration_data=data, target_model=target)
        return OnnxGraph(graph, plain)

    # Only with a target are its outputs kept, and what they are to be like is the plain network.
    return lambda: Done(recovered(plain), lambda: recovered(None))


def exported(model: nn.Module, x: Tensor) -> ModelProto:
    """Export to ONNX, for batches of any size."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, of torch itself
        program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert program is not None
    graph: ModelProto = program.model_proto
    return graph


def tinynn_restore_bn(subject: Subject, passes: int = 1, *, chosen: bool = False) -> Pass:
    """Make a pass of TinyNeuralNetwork.

    Args:
        passes: how often it sees the pictures.
        chosen: name the layers: those that are nn.Conv2d itself. By default it takes subclasses,
            too, and then does not know them.
    """
    from tinynn.util.bn_restore import (  # type: ignore[import-not-found] # noqa: PLC0415 - optional
        model_restore_bn,
    )

    def run() -> Done:
        batches, device = subject.batches * passes, torch.device("cpu")
        layers = [path for path, m in subject.plain.named_modules() if type(m) is nn.Conv2d]
        named = {"layers_fused_bn": layers} if chosen else {}
        model = model_restore_bn(subject.plain, device, run_on, batches, **named)
        return Done(Modules(model, subject.plain))

    return run


def run_on(model: nn.Module, batches: list[Tensor]) -> None:
    with torch.no_grad():
        for x in batches:
            model(x)


def repvgg_style(subject: Subject) -> Pass:
    def run() -> Done:
        model = retrofit.insert(subject.plain).eval()  # each the identity: all see plain's values
        running: dict[nn.Module, tuple[Tensor, Tensor]] = {}

        def observe(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            other_tools.repvgg_moving_average(running, norm, inputs[0])

        with ExitStack() as stack:
            for norm in batchnorms(model):
                stack.callback(norm.register_forward_pre_hook(observe).remove)
            run_on(model, subject.batches)
        for norm in batchnorms(model):
            norm.running_mean, norm.running_var = running[norm]
        return Done(Modules(settled(model), subject.plain))

    return run


def fvcore_update_bn_stats(subject: Subject) -> Pass:
    update_bn_stats = other_tools.fvcore_update_bn_stats()

    def update(model: nn.Module) -> None:
        update_bn_stats(model.train(), subject.batches, len(subject.batches))

    return statistics_alone(subject, update)


def swa_update_bn(subject: Subject) -> Pass:
    return statistics_alone(
        subject, lambda model: torch.optim.swa_utils.update_bn(subject.batches, model)
    )


def statistics_alone(subject: Subject, update: Callable[[nn.Module], None]) -> Pass:
    """Make a pass of a tool that sets running statistics, and leaves gamma and beta to its user."""

    def run() -> Done:
        model = retrofit.insert(subject.plain)
        update(model)
        left = Modules(copy.deepcopy(model), subject.plain)
        return Done(Modules(settled(model), subject.plain), lambda: left)

    return run


def batchnorms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def settled(model: nn.Module) -> nn.Module:
    """Set gamma and beta of each BatchNorm so that in eval mode it changes nothing."""
    with torch.no_grad():
        for norm in batchnorms(model):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.weight.copy_((norm.running_var + norm.eps).sqrt())
            norm.bias.copy_(norm.running_mean)
    return model


PASSES = 8
Own = functools.partial(Contender, module="retrofit", distribution="batchnorm-retrofit")
TinyNeuralNetwork = functools.partial(
    Contender,
    module="tinynn.util.bn_restore",
    distribution="",
    source="github.com/alibaba/TinyNeuralNetwork (tinynn of PyPI is another package)",
)
CONTENDERS: dict[str, Contender] = {
    "retrofit.add_batchnorm": Own(added),
    "retrofit.restore": Own(restored, folded=True),
    "onnxsim bn_recovery": Contender(
        onnxsim_bn_recovery, "onnxsim.bn_recovery", "onnxsim", "PyPI: onnxsim>=0.8"
    ),
    "TinyNeuralNetwork model_restore_bn": TinyNeuralNetwork(tinynn_restore_bn),
    f"TinyNeuralNetwork, {PASSES} passes, nn.Conv2d named": TinyNeuralNetwork(
        functools.partial(tinynn_restore_bn, passes=PASSES, chosen=True)
    ),
    "RepVGG-style moving average": Contender(repvgg_style, distribution=""),
    "fvcore update_bn_stats": Contender(
        fvcore_update_bn_stats, "fvcore.nn", "fvcore", "PyPI: fvcore"
    ),
    "torch.optim.swa_utils.update_bn": Contender(swa_update_bn),
}
