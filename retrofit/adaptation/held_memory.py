"""How much memory the tensors take that an unfinished forward pass holds."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class HeldMemory(TorchDispatchMode):
    """Counts what was made in the block, and is still there.

    Attributes:
        bytes: of the tensors made here that something refers to, views of one storage counted once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        self._tensors: Counter[int] = Counter()  # that refer to a storage, by its address

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        given = {_address(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for made in tree_leaves(found):
            if isinstance(made, Tensor) and (_address(made) not in given or self._knows(made)):
                self._count(made)
        return found

    def _knows(self, tensor: Tensor) -> bool:
        return bool(self._tensors[_address(tensor)])

    def _count(self, tensor: Tensor) -> None:
        address, size = _address(tensor), tensor.untyped_storage().nbytes()
        if not self._tensors[address]:
            self.bytes += size
        self._tensors[address] += 1
        weakref.finalize(tensor, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._tensors[address] -= 1
        if not self._tensors[address]:
            self.bytes -= size


def _address(tensor: Tensor) -> int:
    """Name a storage, as long as it is there."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)
