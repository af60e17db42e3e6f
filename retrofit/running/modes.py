"""How a model runs for a while: train or eval mode, batch statistics, uncompiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put every module of `models` in eval mode; afterwards each has the mode it had.

    Sets the `training` flags themselves: a model's own `train()` may do more than that.
    """
    every = (module for model in models for module in model.modules())
    # TorchScript that was frozen has no mode.
    was = [(module, module.training) for module in every if hasattr(module, "training")]
    try:
        for module, _ in was:
            module.training = False
        yield
    finally:
        for module, training in was:
            module.training = training


@contextmanager
def batch_statistics(model: nn.Module, *, frozen: bool = False) -> Iterator[None]:
    """Let `model` normalise with the statistics of each batch; all else is in eval mode.

    Dropout is off, and the running statistics are afterwards what they were. BatchNorms under
    `freeze_statistics` use their running statistics here too, unless `frozen` includes them. A
    SyncBatchNorm uses the batch of this process alone: another one that has no batch left, or does
    something else, would keep it waiting for ever.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    was = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    with evaluating(model):
        try:
            for norm in norms:
                if frozen:
                    norm.training = True
                else:
                    norm.train()
                if isinstance(norm, nn.SyncBatchNorm):
                    vars(norm)["forward"] = partial(_BatchNorm.forward, norm)
            yield
        finally:
            for norm in norms:
                if isinstance(norm, nn.SyncBatchNorm):
                    vars(norm).pop("forward", None)
            for norm, buffers in zip(norms, was, strict=True):
                for name, value in buffers.items():
                    norm.get_buffer(name).copy_(value)


def eager() -> AbstractContextManager[None]:
    """Run compiled code as Python for the length of the block, or hooks would not be called."""
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return, no-untyped-call]
