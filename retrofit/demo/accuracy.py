"""How often a network is right."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from retrofit.running.modes import batch_statistics, evaluating

BATCH = 128


def accuracy(model: nn.Module, x: Tensor, labels: Tensor, *, batchwise: bool = False) -> float:
    """Compute the share of right answers, under running statistics or those of whole batches."""
    if batchwise:
        x = x[: len(x) // BATCH * BATCH]
    with batch_statistics(model) if batchwise else evaluating(model), torch.no_grad():
        answers = torch.cat([model(batch).argmax(1) for batch in x.split(BATCH)])
    return float((answers == labels[: len(x)]).float().mean())
