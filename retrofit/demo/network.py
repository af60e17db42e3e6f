"""The small networks of `retrofit demo`: a plain VGG to convert, a ResNet to restore."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet
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


def resnet_cifar10() -> ResNet:
    """Build a `torchvision.models.ResNet` of 20 layers for pictures of (3, 32, 32).

    As in section 4.2 of He et al. (2016), but for 1x1 convolutions where the shortcut changes its
    width: 0.27 million parameters, freshly initialised. Returns logits of shape (N, 10).
    """
    with torch.device("meta"):  # most of its layers are replaced below
        model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)
    model.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    model.bn1 = nn.BatchNorm2d(16)
    model.maxpool = nn.Identity()  # type: ignore[assignment]
    model.layer1 = _stage(16, 16, stride=1)
    model.layer2 = _stage(16, 32, stride=2)
    model.layer3 = _stage(32, 64, stride=2)
    model.layer4 = nn.Sequential()
    model.fc = nn.Linear(64, 10)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def _stage(channels: int, width: int, stride: int) -> nn.Sequential:
    """Build three blocks, of which the first one changes the size."""
    shortcut = None
    if channels != width:
        conv = nn.Conv2d(channels, width, 1, stride, bias=False)
        shortcut = nn.Sequential(conv, nn.BatchNorm2d(width))
    first = BasicBlock(channels, width, stride, shortcut)
    return nn.Sequential(first, BasicBlock(width, width), BasicBlock(width, width))
