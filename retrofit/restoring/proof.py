"""Whether two networks compute the same: at their outputs, and at each BatchNorm that came back.

A detector chooses its boxes: where two scores are nearly equal, the last bit of a layer decides
which one comes first, and outputs jump. They tell nothing then. What the BatchNorms give for equal
inputs still does, since nothing else differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from retrofit.errors import RetrofitError, UnequalError, warn
from retrofit.numerics.comparison import Comparison
from retrofit.restoring.sources import Outputs, Source, outputs_of
from retrofit.running.call_arguments import ForwardFn
from retrofit.running.shared_copy import shared_copy

NEARLY = 1e-5  # of the largest output: more than other roundings make, less than other arithmetic

Hook = Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]


class Proof(NamedTuple):
    """How a restored network differs from the folded one, in the shape of its architecture.

    Attributes:
        relative: largest difference of an output, over that output's largest absolute value; 0
            where all are equal bit for bit.
        outputs_jump: outputs are empty, or differ as much once the last bits of the folded
            network's own layers are others.
        at: for each BatchNorm, by path, the largest difference of what it gives for the folded
            network's own input, over the root mean square.
    """

    relative: float
    outputs_jump: bool
    at: dict[str, float]


class Runs:
    """One batch, through models in eval mode.

    Args:
        seats: paths of the BatchNorms that came back, or of what stands there instead.
        example: the batch.
        forward_fn: `forward_fn(model, batch)`, for any other way of calling a model.
    """

    def __init__(self, seats: Collection[str], example: Any, forward_fn: ForwardFn | None) -> None:
        self.seats, self.example, self.forward_fn = seats, example, forward_fn

    def outputs(self, model: nn.Module) -> Outputs:
        """Compute what the model returns, as tensors by their place."""
        return outputs_of(model, self.example, self.forward_fn)

    def recorded(self, model: nn.Module) -> tuple[Outputs, dict[str, list[Tensor]]]:
        """Compute the same, and what each seat gives, call by call."""
        seen: dict[str, list[Tensor]] = {path: [] for path in self.seats}

        def keep(path: str) -> Hook:
            return lambda _m, _i, y: seen[path].append(y.clone())  # type: ignore[func-returns-value]

        with _hooked(model, self.seats, keep) as copied:
            return self.outputs(copied), seen

    def replaced(self, model: nn.Module, instead: Callable[[str, Tensor], Tensor]) -> Outputs:
        """Compute what the model returns where seats give `instead(path, what they give)`."""

        def swap(path: str) -> Hook:
            return lambda _m, _i, y: instead(path, y)

        with _hooked(model, self.seats, swap) as copied:
            return self.outputs(copied)


@contextmanager
def _hooked(
    model: nn.Module, paths: Collection[str], hook: Callable[[str], Hook]
) -> Iterator[nn.Module]:
    """Yield a copy of `model` with hooks at these paths."""
    copied = shared_copy(model)
    handles = [copied.get_submodule(p).register_forward_hook(hook(p)) for p in paths]
    try:
        yield copied
    finally:
        for handle in handles:  # where what is called is not the copy
            handle.remove()


def prove(skeleton: nn.Module, result: nn.Module, runs: Runs) -> Proof:
    """Compare a restored network with the folded one.

    Args:
        skeleton: the folded network, in the shape of the architecture.
        result: the restored one.
        runs: what both are compared on.

    Raises:
        RetrofitError: the network is random.
        UnequalError: it differs by more than `NEARLY` at the outputs, or, where these jump, at a
            BatchNorm; or somewhere else.
    """
    expected, seen = runs.recorded(skeleton)
    at = {path: Comparison() for path in runs.seats}
    waiting = {path: iter(found) for path, found in seen.items()}

    def as_folded(path: str, y: Tensor) -> Tensor:
        x = next(waiting[path])
        at[path].add(x, y, path)
        return x

    forced = runs.replaced(result, as_folded)
    if not _equal(expected, forced):
        if not _equal(expected, runs.outputs(skeleton)):
            raise RetrofitError(_random(f"this {type(result).__name__}"))
        raise UnequalError(
            f"the restored {type(result).__name__} differs from the folded network at its outputs, "
            "though all of its BatchNorms give the same: its code looks at them"
        )
    actual = runs.outputs(result)
    _, relative = difference(expected, actual)
    empty = not any(tensor.numel() for tensor in expected.values())
    jump = empty or (not relative <= NEARLY and _jump(skeleton, expected, runs))
    differences = {path: found.difference(path).relative for path, found in at.items()}
    worst = max(differences, key=lambda path: differences[path])
    if not (differences[worst] if jump else relative) <= NEARLY:
        raise UnequalError(
            f"the restored {type(result).__name__} differs from the folded network by "
            f"{relative:.1e} of its largest output, more than {NEARLY:g}; most at {worst}, by "
            f"{differences[worst]:.1e}"
        )
    return Proof(relative, jump, differences)


def refuse_other_outputs(source: Source, skeleton: nn.Module, runs: Runs) -> None:
    """Raise UnequalError unless the architecture computes with these weights what they did.

    Args:
        source: the folded network, which can run.
        skeleton: the architecture with its weights, without the BatchNorms.
        runs: what both are compared on.

    Raises RetrofitError where the folded network is random.
    """
    assert source.run is not None
    expected = source.run(runs.example)
    own = runs.outputs(skeleton)
    actual = _by_position(expected, own) if source.exported else own
    place, found = difference(expected, actual)
    if found <= NEARLY:
        return
    if not difference(expected, source.run(runs.example))[1] <= NEARLY:
        raise RetrofitError(_random(source.name))
    what = f"{place} differs by {found:.1e} of its largest value"
    if math.isinf(found):
        shapes = [{k: tuple(t.shape) for k, t in one.items()} for one in (actual, expected)]
        what = f"outputs of shapes {shapes[0]} instead of {shapes[1]}"
    if _jump(skeleton, own, runs):
        warn(
            f"whether the architecture computes what {source.name} does cannot be told: {what}, "
            "and so they do where only the last bits of its layers are others (it sorts, or "
            "chooses)"
        )
        return
    raise UnequalError(
        f"the architecture with the weights of {source.name} computes something else: {what} "
        "(another activation, stride or padding, or layers in another order)"
    )


def _by_position(expected: Outputs, actual: Outputs) -> Outputs:
    """Give outputs the names of an exporter's, which drops some of them."""
    return dict(zip(expected, actual.values(), strict=False))


def difference(expected: Outputs, actual: Outputs) -> tuple[str, float]:
    """Find the output with the largest difference, over its largest absolute value, and this.

    It is inf where the outputs are others, or of other shapes.
    """
    shapes = [{name: t.shape for name, t in one.items()} for one in (expected, actual)]
    if shapes[0] != shapes[1]:
        return "", math.inf
    found = {"": 0.0}
    for name, tensor in expected.items():
        compared = Comparison()
        compared.add(tensor, actual[name], name)
        largest = float(tensor.abs().max()) if tensor.numel() else 0.0
        if compared.max_abs:
            found[name] = compared.max_abs / largest if largest else math.inf
    place = max(found, key=lambda name: found[name])
    return place, found[place]


def _equal(expected: Outputs, actual: Outputs) -> bool:
    """Tell whether all outputs are equal, where NaN equals NaN."""
    return difference(expected, actual)[1] == 0


def _jump(skeleton: nn.Module, expected: Outputs, runs: Runs) -> bool:
    """Tell whether other last bits of what the seats give make another output."""

    def moved(step: int) -> Callable[[str, Tensor], Tensor]:
        def by_one_bit(_path: str, y: Tensor) -> Tensor:
            up = torch.arange(y.numel(), device=y.device).reshape(y.shape) % step == 0
            return torch.nextafter(y, torch.where(up, math.inf, -math.inf).to(y.dtype))

        return by_one_bit

    tried = (runs.replaced(skeleton, moved(step)) for step in (2, 3, 5))
    return any(not difference(expected, other)[1] <= NEARLY for other in tried)


def _random(name: str) -> str:
    return (
        f"{name} computes something else each time that it runs, so that nobody can tell whether "
        "the restored network computes it, too: seed what is random in it"
    )
