"""What `finetune_heads.py` compares: networks trained on ImageNet, with a new head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from finetune_variants import Variant
from imagenet_networks import NETWORKS, Network, added
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.vgg import VGG, cfgs, make_layers

from retrofit.demo.network import CLASSES

VARIANTS: Mapping[str, Variant] = {
    "plain": Variant("none"),
    "plain, clipped": Variant("none", clip=1.0),
    "add_batchnorm": Variant("calibrated"),
    "add_batchnorm, clipped": Variant("calibrated", clip=1.0),
    "restored": Variant("restored"),
}


@dataclass(frozen=True)
class Subject:
    """A trained network without BatchNorm that gets a new head.

    Attributes:
        network: `batchnorm` brings back the BatchNorms of its class where it is folded.
        head: makes what takes the place of `classifier`.
        pixels: a side of the pictures.
        steps, rates: of the training.
        folded: whether its class has BatchNorms, which were folded away.
    """

    network: Network
    head: Callable[[], nn.Module]
    pixels: int
    steps: int
    rates: tuple[float, ...]
    folded: bool = False

    @property
    def variants(self) -> Mapping[str, Variant]:
        return {
            name: variant
            for name, variant in VARIANTS.items()
            if variant.batchnorm != "restored" or self.folded
        }

    def inputs(self, pictures: Tensor, pixels: int) -> Tensor:
        """Turn uint8 (N, 3, H, W) into what the network takes, resized bilinearly."""
        sized = nn.functional.interpolate(pictures.float(), (pixels, pixels), mode="bilinear")
        return self.network.normalised(sized)

    def built(self, variant: Variant, weights: Path, batches: Sequence[Tensor]) -> nn.Module:
        """Build the trained network with the variant's BatchNorm, and with a new head."""
        model = self.network.plain(weights)
        if variant.batchnorm == "restored":  # in the class as it is, with its own head
            model = self.network.batchnorm(model, list(batches))
        model.classifier = self.head()
        if variant.batchnorm == "calibrated":
            model = added(model, list(batches))
        return model.to(memory_format=torch.channels_last)


def vgg16_trunk(weights: Path) -> nn.Module:
    """Build torchvision's VGG16 without its classifier: the average of the last feature map."""
    with torch.device("meta"):  # the classifier takes 500 MB and is replaced below
        model: nn.Module = VGG(nn.Sequential(), init_weights=False)
    model.features = make_layers(cfgs["D"])
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Sequential()
    model.load_state_dict({name: t.float() for name, t in load_file(weights).items()})
    return model.eval().to(memory_format=torch.channels_last)


class Head(nn.Linear):
    """A Linear of zeros, so that every variant begins with the same answers.

    Its inputs are divided by `size`, about their root mean square: in the features of SqueezeNet
    and VGG16, of which that is 8 and 12, a Linear diverges at rates that the network itself takes.
    """

    def __init__(self, width: int, size: float) -> None:
        super().__init__(width, len(CLASSES))
        self.size = size
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / self.size)


def pooled(head: Head) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


RATES = 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1
SQUEEZENET = NETWORKS["squeezenet1_1"]
# In the order in which they are run, and named as their files are.
SUBJECTS: Mapping[str, Subject] = {
    "mobilenetv2_100-folded": Subject(
        NETWORKS["mobilenetv2_100-folded"], lambda: Head(1280, 1), 64, 60, RATES, folded=True
    ),
    "squeezenet1_1": Subject(SQUEEZENET, lambda: pooled(Head(512, 8)), 64, 100, (*RATES[1:], 0.3)),
    "vgg16-features": Subject(
        Network(vgg16_trunk, added, SQUEEZENET.mean, SQUEEZENET.std),
        lambda: Head(512, 12),
        32,
        40,
        RATES,
    ),
}
