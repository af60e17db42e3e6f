"""What a model of one argument takes from a batch: a tensor, or a list or mapping of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from retrofit.errors import RetrofitError
from retrofit.running.batch_checks import described, input_of, refuse_single_sample
from retrofit.running.signatures import Kind


def first_argument(model: nn.Module, batch: Any, kinds: set[Kind], axes: int) -> Any:
    """Find in `batch` what the model's only argument is annotated as.

    Args:
        model: for checks and messages.
        batch: (inputs, labels), or the inputs alone.
        kinds: what the argument is annotated as; by default a tensor.
        axes: of one sample, without the batch.

    Raises RetrofitError where there is no such thing, or several could be meant.
    """
    if not kinds - {"tensor"}:
        return input_of(model, batch)
    found = _Search(model, batch, kinds, axes).found(batch)
    if isinstance(found, Mapping) or (isinstance(found, Tensor) and "tensor" in kinds):
        return found
    if isinstance(found, Tensor) and "list" in kinds:
        return list(input_of(model, found))  # a detector's pictures
    if isinstance(found, Tensor):
        raise _ambiguous(model, batch, kinds)
    return list(found) if "list" in kinds else tuple(found)


class _Search:
    """Looks for a list, a tuple or a mapping of tensors in a batch."""

    def __init__(self, model: nn.Module, batch: Any, kinds: set[Kind], axes: int) -> None:
        self.model, self.batch, self.kinds, self.axes = model, batch, kinds, axes

    def found(self, value: Any) -> Any:
        """Return the first one; a tensor where the batch begins with that."""
        if isinstance(value, Mapping):
            return self._in_mapping(value)
        if isinstance(value, (list, tuple)) and value:
            if isinstance(value[0], (Mapping, list, tuple)):
                mappings = all(isinstance(item, Mapping) for item in value)
                return value if mappings and "mapping" not in self.kinds else self.found(value[0])
            if isinstance(value[0], Tensor) and value[0].is_floating_point():
                return self._among_tensors(value)
        return input_of(self.model, value)

    def _in_mapping(self, value: Mapping[Any, Any]) -> Any:
        if "mapping" in self.kinds:
            if "tensor" in self.kinds:
                raise _ambiguous(self.model, self.batch, self.kinds)
            return value
        lists = (v for v in value.values() if isinstance(v, (list, tuple)) and _are_tensors(v))
        return next(lists, None) or input_of(self.model, value)

    def _among_tensors(self, value: Sequence[Any]) -> Any:
        """Tell (inputs, labels) from inputs alone, where a tensor of floats comes first."""
        alone = _are_tensors(value)
        others = any(isinstance(i, Tensor) and i.is_floating_point() for i in value[1:])
        inside = value is not self.batch  # beside labels, so that nothing but inputs is in it
        if "tensor" in self.kinds and not others:
            return value[0]
        if alone and (inside or "tensor" not in self.kinds) and self.kinds & {"list", "tuple"}:
            one_rank = len({item.dim() for item in value}) == 1
            if one_rank and (len(value) > 1 or inside or value[0].dim() <= self.axes):
                return value
        refuse_single_sample(self.model, value)
        if others or alone or value[0].dim() <= self.axes:
            raise _ambiguous(self.model, self.batch, self.kinds)
        return value[0]


def _are_tensors(value: Sequence[Any]) -> bool:
    """Tell whether these are tensors of floats, and nothing else."""
    return bool(value) and all(isinstance(i, Tensor) and i.is_floating_point() for i in value)


def _ambiguous(model: nn.Module, batch: Any, kinds: set[Kind]) -> RetrofitError:
    wanted = " or ".join(f"a {kind}" for kind in sorted(kinds))
    return RetrofitError(
        f"{type(model).__name__} is annotated to take {wanted}, and which that is in a batch of "
        f"{described(batch)} cannot be told: give batches of (inputs, labels), with the inputs in "
        "one item, or pass forward_fn= to say how the model is called"
    )
