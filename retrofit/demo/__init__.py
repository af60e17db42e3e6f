"""What retrofit does, shown on two small networks for CIFAR-10 that come with the package."""

from __future__ import annotations

import time
from pathlib import Path

from retrofit.demo.accuracy import accuracy
from retrofit.demo.converting import convert_vgg
from retrofit.demo.network import CLASSES, MEAN, STD, resnet_cifar10, vgg_cifar10
from retrofit.demo.pictures import PICTURES, labelled, unpack
from retrofit.demo.restoring import restore_resnet
from retrofit.demo.trained import FOLDED, WEIGHTS, folded_resnet, trained_vgg

__all__ = [
    "CLASSES",
    "FOLDED",
    "MEAN",
    "PICTURES",
    "STD",
    "WEIGHTS",
    "accuracy",
    "folded_resnet",
    "labelled",
    "resnet_cifar10",
    "run",
    "trained_vgg",
    "unpack",
    "vgg_cifar10",
]


def run(folder: Path, *, progress: bool = True) -> str:
    """Convert the plain VGG and restore the folded ResNet in `folder`; returns what was found."""
    start = time.perf_counter()
    unpack(folder)
    images, labels = labelled(folder / "calibration")
    test, test_labels = labelled(folder / "test")
    converted = convert_vgg(folder, images, test, test_labels, progress=progress)
    restored = restore_resnet(folder, images, labels, test, test_labels, progress=progress)
    return f"{converted}\n\n{restored}\n\n{time.perf_counter() - start:.1f} s in all"
