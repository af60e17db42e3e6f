"""The small plain VGG that `retrofit demo` converts."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models.vgg import VGG, make_layers

CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
# Channel means and standard deviations of CIFAR-10's training pictures, in [0, 1].
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
LAYERS: list[str | int] = [32, 32, "M", 64, 64, "M", 128, 128, "M", 256, 256]


def vgg_cifar10() -> VGG:
    """Build a `torchvision.models.VGG` without BatchNorm for pictures of (3, 32, 32).

    Eight convolutions, global average pooling and one Linear; 1.17 million parameters,
    freshly initialised. Returns logits of shape (N, 10).
    """
    with torch.device("meta"):  # VGG's own classifier takes 400 MB and is replaced below
        model = VGG(nn.Sequential(), num_classes=10, init_weights=False)
    model.features = make_layers(LAYERS)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(256, 10))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    return model
