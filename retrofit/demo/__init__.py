"""What retrofit does, shown on two small networks for CIFAR-10 that come with the package."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from retrofit.demo.accuracy import accuracy
from retrofit.demo.converting import Converted, convert_vgg
from retrofit.demo.network import CLASSES, MEAN, STD, resnet_cifar10, vgg_cifar10
from retrofit.demo.pictures import PICTURES, labelled, unpack
from retrofit.demo.restoring import Restored, restore_resnet
from retrofit.demo.trained import FOLDED, WEIGHTS, folded_resnet, trained_vgg
from retrofit.tables import Part

__all__ = [
    "CLASSES",
    "FOLDED",
    "MEAN",
    "PICTURES",
    "STD",
    "WEIGHTS",
    "Shown",
    "accuracy",
    "folded_resnet",
    "labelled",
    "resnet_cifar10",
    "run",
    "trained_vgg",
    "unpack",
    "vgg_cifar10",
]


@dataclass(frozen=True)
class Shown:
    """What the demo found, and how long it took."""

    converted: Converted
    restored: Restored
    seconds: float

    def _parts(self) -> Iterator[Part]:
        yield from self.converted._parts()
        yield from self.restored._parts()
        yield f"{self.seconds:.1f} s in all"


def run(folder: Path, *, progress: bool = True) -> Shown:
    """Convert the plain VGG and restore the folded ResNet in `folder`."""
    start = time.perf_counter()
    unpack(folder)
    images, labels = labelled(folder / "calibration")
    test, test_labels = labelled(folder / "test")
    converted = convert_vgg(folder, images, test, test_labels, progress=progress)
    restored = restore_resnet(folder, images, labels, test, test_labels, progress=progress)
    return Shown(converted, restored, time.perf_counter() - start)
