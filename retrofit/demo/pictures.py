"""The pictures of CIFAR-10 that come with the package."""

from __future__ import annotations

import tarfile
from pathlib import Path

import torch
from torch import Tensor

from retrofit.demo.network import CLASSES, MEAN, STD
from retrofit.pictures.batches import PictureBatches, shuffled
from retrofit.pictures.preprocessing import preprocessing
from retrofit.pictures.sources import open_pictures

PICTURES = Path(__file__).parent / "cifar10-sample.tar.xz"


def unpack(folder: Path) -> None:
    """Write the pictures to `folder`/calibration/*.jpg and `folder`/test/<class>/*.jpg."""
    with tarfile.open(PICTURES) as tar:
        for member in tar:
            content = tar.extractfile(member)
            if content is not None:
                file = folder / member.name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content.read())


def labelled(folder: Path) -> tuple[Tensor, Tensor]:
    """Read all pictures of a folder, in an order that mixes the classes, and their labels.

    The pictures are ready for the networks. The class is what their folder, or else their own name
    up to the first dash, is called; the label of a picture that tells none is -1.
    """
    pictures = open_pictures(folder)
    transform = preprocessing(resize=32, crop=32, mean=MEAN, std=STD)
    order = shuffled(len(pictures), seed=0)
    batches = PictureBatches(pictures, order, transform, batch_size=128, workers=0)
    labels = [_label(Path(pictures.name(i))) for i in order]
    images = torch.cat(list(batches)).contiguous(memory_format=torch.channels_last)
    return images, torch.tensor(labels)


def _label(file: Path) -> int:
    named = [name for name in (file.parent.name, file.name.partition("-")[0]) if name in CLASSES]
    return CLASSES.index(named[0]) if named else -1


def inverted(x: Tensor) -> Tensor:
    """Invert pictures that are normalised: 1 - p for p in 0 to 1."""
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (MEAN, STD))
    return ((1 - 2 * mean) / std - x).contiguous(memory_format=torch.channels_last)
