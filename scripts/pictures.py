"""Pictures in class folders, as tensors: for the scripts and notebooks that train and compare.

Small pictures only: they are all held in memory, as uint8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from retrofit.demo.network import CLASSES, MEAN, STD
from retrofit.running.modes import evaluating


def read(folder: Path, classes: Sequence[str] = CLASSES) -> tuple[Tensor, Tensor]:
    """Read `folder`/<class>/, all of one size: uint8 (N, 3, H, W), and the labels (N,)."""
    data = ImageFolder(str(folder))
    if tuple(data.classes) != tuple(classes):
        raise SystemExit(f"{folder}: expected the class folders {', '.join(classes)}")
    pictures = [pil_to_tensor(picture) for picture, _ in tqdm(data, desc=f"read {folder.name}")]
    return torch.stack(pictures), torch.tensor(data.targets)


def normalise(pictures: Tensor) -> Tensor:
    """Turn uint8 (N, 3, H, W) into what the demo's networks take."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) * 255 for v in (MEAN, STD))
    x = (pictures - mean) / std
    return x.contiguous(memory_format=torch.channels_last)


def augment(pictures: Tensor) -> Tensor:
    """Shift each picture by up to 4 pixels (zero padding), mirror half of them."""
    n, _, height, width = pictures.shape
    padded = F.pad(pictures, (4, 4, 4, 4))
    top, left = torch.randint(9, (2, n, 1, 1, 1))
    rows = top + torch.arange(height).view(1, 1, height, 1)
    columns = torch.arange(width).view(1, 1, 1, width)
    columns = left + torch.where(torch.rand(n, 1, 1, 1) < 0.5, columns, columns.flip(-1))
    return padded[torch.arange(n).view(n, 1, 1, 1), torch.arange(3).view(1, 3, 1, 1), rows, columns]


def accuracy(
    model: nn.Module,
    pictures: Tensor,
    labels: Tensor,
    batch_size: int = 500,
    inputs: Callable[[Tensor], Tensor] = normalise,
) -> float:
    """Measure the share of right answers in eval mode; modes are afterwards as they were.

    `inputs` makes of a batch of pictures what the network takes.
    """
    with torch.no_grad(), evaluating(model):
        batches = zip(pictures.split(batch_size), labels.split(batch_size), strict=True)
        right = sum(int((model(inputs(x)).argmax(1) == y).sum()) for x, y in batches)
    return right / len(labels)
