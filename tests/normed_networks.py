"""Any small network with BatchNorms of all kinds: a hypothesis strategy; kinds of BatchNorm."""

import copy

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.utils import parametrizations
from torchvision.ops import FrozenBatchNorm2d

from retrofit.surgery.affine_map import batchnorms


def trained(model, seed=5):
    """In eval mode, with numbers as after training in every BatchNorm, whatever its class."""
    generator = torch.Generator().manual_seed(seed)
    for norm in batchnorms(model).values():
        norm.running_mean.copy_(torch.randn(norm.running_mean.shape, generator=generator))
        norm.running_var.copy_(torch.rand(norm.running_var.shape, generator=generator) * 3 + 0.01)
        for tensor in (norm.weight, norm.bias):
            if tensor is not None:
                tensor.data.copy_(torch.randn(tensor.shape, generator=generator))
    return model.eval()


class ConstantEps(nn.Module):
    """As in detection transformers: eps is known to nobody but its own code."""

    def __init__(self, channels):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-2).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


class MyBatchNorm(ConstantEps):
    """Its name says that it is one."""


class OfTheBatch(nn.BatchNorm2d):
    """Normalises by the batch in eval mode too."""

    def forward(self, x):
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True)


NORMS = [
    nn.BatchNorm2d,
    lambda c: nn.BatchNorm2d(c, affine=False),
    nn.SyncBatchNorm,
    BatchNormAct2d,
    lambda c: BatchNormAct2d(c, act_layer=nn.Hardswish, drop_layer=nn.Dropout),
    FrozenBatchNorm2d,
    MyBatchNorm,
]
CONVS = [
    lambda c: nn.Conv2d(c, c, 3, padding=1, bias=False),
    lambda c: nn.Conv2d(c, c, 1, groups=c),
    lambda c: nn.ConvTranspose2d(c, c, 3, padding=1, groups=2),
    lambda c: parametrizations.weight_norm(nn.Conv2d(c, c, 1)),
]


class Skip(nn.Module):
    """x + block(x), or the block's norm over the sum."""

    def __init__(self, block, norm):
        super().__init__()
        self.block, self.norm = block, norm

    def forward(self, x):
        return self.norm(x + self.block(x))


@st.composite
def pieces(draw, channels):
    """(module, how many of its BatchNorms must stay)."""
    conv, norm = draw(st.sampled_from(CONVS))(channels), draw(st.sampled_from(NORMS))(channels)
    kind = draw(st.sampled_from(["pair", "pair", "before", "pooled", "batch", "spectral", "skip"]))
    if kind == "pair":
        return nn.Sequential(conv, nn.Identity(), norm, nn.LeakyReLU()), 0
    if kind == "before":
        return nn.Sequential(nn.Tanh(), norm, conv), 1
    if kind == "pooled":
        return nn.Sequential(conv, nn.AvgPool2d(3, 1, 1), norm), 1
    if kind == "batch":
        return nn.Sequential(conv, OfTheBatch(channels)), 1
    if kind == "spectral":
        spectral = parametrizations.spectral_norm(nn.Conv2d(channels, channels, 1))
        return nn.Sequential(spectral, norm), 1
    return Skip(nn.Sequential(conv, nn.BatchNorm2d(channels)), norm), 1


@st.composite
def networks(draw):
    """(network with statistics of its own data, how many of its BatchNorms must stay)."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    channels = draw(st.sampled_from([2, 4, 6]))
    drawn = [draw(pieces(channels)) for _ in range(draw(st.integers(1, 5)))]
    model = nn.Sequential(nn.Conv2d(3, channels, 1), *(piece for piece, _ in drawn))
    for norm in batchnorms(model).values():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.1, 3)
        for tensor in (norm.weight, norm.bias):
            if tensor is not None:
                nn.init.normal_(tensor, mean=0.5)
    with torch.no_grad():  # moves the statistics of those that learn them
        model.train()(torch.randn(8, 3, 6, 6))
    return model.eval(), sum(stay for _, stay in drawn)


def shuffled(model):
    """A copy with other numbers."""
    other = copy.deepcopy(model)
    for tensor in (*other.parameters(), *other.buffers()):
        if tensor.is_floating_point():
            tensor.data.copy_(torch.rand_like(tensor) + 0.1)
    return other
