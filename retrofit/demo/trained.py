"""The networks of the demo, with the weights that come with the package."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from retrofit.demo.network import resnet_cifar10, vgg_cifar10
from retrofit.files.fitting import load_weights
from retrofit.files.weights import read_weights
from retrofit.surgery.folding import fold

HERE = Path(__file__).parent
WEIGHTS = HERE / "vgg-cifar10.safetensors"
FOLDED = HERE / "resnet-cifar10-folded.safetensors"


def trained_vgg() -> nn.Module:
    """Load the demo's plain VGG with its trained weights, in eval mode."""
    return _loaded(vgg_cifar10(), WEIGHTS)


def folded_resnet() -> nn.Module:
    """Load the demo's ResNet-20, whose BatchNorms were folded away after training, in eval mode.

    It has a bias in each convolution, and an Identity in the place of each BatchNorm.
    """
    return _loaded(fold(resnet_cifar10().eval()), FOLDED)


def _loaded(model: nn.Module, file: Path) -> nn.Module:
    load_weights(model, read_weights(file)[0], str(file))
    return model.eval()
