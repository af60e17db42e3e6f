"""Networks without BatchNorm that were trained on ImageNet: as they came, and with BatchNorm."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from PIL import Image
from restored_mobilenet import stock, without_batchnorms
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize
from tqdm import tqdm

import retrofit

SIZE = 224


@dataclass(frozen=True)
class Network:
    """A trained network without BatchNorm, and the way to give it some.

    Attributes:
        plain: reads its weights from a file.
        batchnorm: from the plain one and batches of pictures, with BatchNorm and the same outputs.
        mean, std: of pixels in 0 to 1, as it was trained with.
    """

    plain: Callable[[Path], nn.Module]
    batchnorm: Callable[[nn.Module, list[Tensor]], nn.Module]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def normalised(self, pictures: Tensor) -> Tensor:
        """Turn uint8 (N, 3, H, W) into what the network takes."""
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) * 255 for v in (self.mean, self.std))
        return ((pictures - mean) / std).contiguous(memory_format=torch.channels_last)


def squeezenet(weights: Path) -> nn.Module:
    """Build torchvision's SqueezeNet 1.1; its file may be in float16."""
    model: nn.Module = torchvision.models.squeezenet1_1(weights=None)
    model.load_state_dict({name: t.float() for name, t in load_file(weights).items()})
    return model.eval().to(memory_format=torch.channels_last)


def mobilenet(weights: Path) -> nn.Module:
    """Build timm's MobileNetV2 as folded: a bias in each convolution, no BatchNorm."""
    return without_batchnorms(weights).eval().to(memory_format=torch.channels_last)


def added(plain: nn.Module, batches: list[Tensor]) -> nn.Module:
    """Put a calibrated BatchNorm after each convolution."""
    return retrofit.add_batchnorm(plain, batches, progress=False)


def restored(plain: nn.Module, batches: list[Tensor]) -> nn.Module:
    """Bring the BatchNorms of MobileNetV2 back into timm's class."""
    architecture = stock().to(memory_format=torch.channels_last)
    return retrofit.restore(architecture, plain, batches, progress=False)


NETWORKS = {
    "squeezenet1_1": Network(squeezenet, added, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "mobilenetv2_100-folded": Network(mobilenet, restored, (0.5,) * 3, (0.5,) * 3),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what names a network and the pictures."""
    add = parser.add_argument
    add("--network", choices=NETWORKS, required=True)
    add("--weights", type=Path, required=True, metavar="FILE", help=".safetensors")
    text = "folder of which the i-th picture by name shows class i"
    add("--data", type=Path, required=True, metavar="FOLDER", help=text)


def read_pictures(folder: Path) -> tuple[Tensor, Tensor]:
    """Read the pictures of a flat folder, cropped: uint8 (N, 3, 224, 224), and the labels (N,)."""
    pictures = []
    for file in tqdm(sorted(folder.iterdir()), desc="read"):
        picture = resize(Image.open(file).convert("RGB"), [256])
        pictures.append(pil_to_tensor(center_crop(picture, [SIZE])))
    return torch.stack(pictures), torch.arange(len(pictures))
