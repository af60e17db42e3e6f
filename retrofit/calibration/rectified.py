"""Outputs of convolutions on which ReLU was computed before its layer is called."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from retrofit.running.nested import tensors
from retrofit.running.remembered import Remembered
from retrofit.tracing.operations import SHAPE_READERS, called_name, function_name

LOOKS = SHAPE_READERS | {"iscontiguous", "version"}  # at a tensor, and not at its values


class ReadBetweenError(BaseException):  # no Exception, which the model might catch
    """Something reads such an output before its ReLU does."""


class Rectified(TorchFunctionMode):
    """Knows these outputs until their ReLU gets them; raises ReadBetweenError for other readers.

    torch.fx says that there are none. But it does not see what the code of a layer reads, nor what
    a model does for values that are none of its own.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._waiting: list[Remembered] = []

    def add(self, y: Tensor) -> None:
        """Wait for the ReLU of y."""
        self._waiting.append(Remembered(y))

    def take(self, x: Tensor) -> bool:
        """Tell whether x is such an output; from then on it is none."""
        waiting = [one for one in self._waiting if not one.is_still(x)]
        found = len(waiting) < len(self._waiting)
        self._waiting = waiting
        return found

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._waiting and function_name(called_name(func), args) not in LOOKS:
            read = tensors((args, kwargs)).values()
            if any(one.is_still(tensor) for one in self._waiting for tensor in read):
                raise ReadBetweenError
        return func(*args, **kwargs)
