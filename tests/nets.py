"""Tiny networks that each show one structural case. All take (N, 3, H, W) unless they say so."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.head(F.relu(x + self.body(x)).mean((2, 3)))


class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.squeeze = nn.Conv2d(3, 4, 1)
        self.left = nn.Conv2d(4, 6, 1)
        self.right = nn.Conv2d(4, 6, 3, padding=1)
        self.last = nn.Conv2d(12, 7, 3)

    def forward(self, x):
        x = F.relu(self.squeeze(x))
        return F.relu(self.last(torch.cat([self.left(x), self.right(x)], 1).relu_()))


class SharedConv(nn.Module):
    """One convolution called at two places."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(3, 8, 3, padding=1)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = F.relu(self.inner(x))
        return F.relu(self.shared(F.relu(self.shared(x))))


class TwoNames(nn.Module):
    """One convolution registered under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.second = self.first

    def forward(self, x):
        return F.relu(self.second(F.relu(self.first(x))))


class TiedWeights(nn.Module):
    """Two convolutions over one Parameter."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.second = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return F.relu(self.second(F.relu(self.first(x))))


class Grouped(nn.Module):
    """Grouped, depthwise, dilated, strided; with and without bias; odd padding modes."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=2, dilation=2, padding_mode="reflect"),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, groups=4, bias=False),
            nn.LeakyReLU(0.1, inplace=True),
            nn.Conv2d(8, 8, 3, groups=8, stride=2),
            nn.SiLU(),
            nn.Conv2d(8, 1, 1),
            nn.ReLU6(),
        )

    def forward(self, x):
        return self.layers(x)


class ByIndex(nn.Module):
    """A Sequential whose children the model calls one by one, as perceptual losses do."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.MaxPool2d(2)
        )

    def forward(self, x):
        taps = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in (1, 3):
                taps.append(x)
        return [*taps, self.features[4](x)]


class Standardised(nn.Conv2d):
    """A weight-standardised convolution, as in BiT and NFNets."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class ReadsItsConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.read = nn.Conv2d(3, 4, 3)
        self.plain = nn.Conv2d(4, 4, 3)

    def forward(self, x):
        pad = self.read.kernel_size[0] // 2
        return F.relu(self.plain(F.relu(self.read(F.pad(x, (pad, pad, pad, pad))))))


class AlreadyNormed(nn.Module):
    def __init__(self):
        super().__init__()
        self.batch = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.group = nn.Conv2d(4, 4, 3)
        self.gn = nn.GroupNorm(2, 4)
        self.layer = nn.Conv2d(4, 4, 3)
        self.ln = nn.LayerNorm(4)
        self.function = nn.Conv2d(4, 4, 3)
        self.free = nn.Conv2d(4, 4, 3)

    def forward(self, x):
        x = F.relu(self.bn(self.batch(x)))
        x = F.relu(self.gn(self.group(x)))
        x = self.ln(self.layer(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = F.relu(F.instance_norm(self.function(x)))
        return F.relu(self.free(x))


class Volume(nn.Module):
    """Three spatial axes; takes (N, 2, D, H, W)."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv3d(2, 4, 3, stride=2)
        self.up = nn.ConvTranspose3d(4, 6, 2, groups=2)

    def forward(self, x):
        return F.relu(self.up(F.relu(self.down(x))))


class Audio(nn.Module):
    """One spatial axis; takes (N, 3, L)."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv1d(3, 8, 5, stride=2)
        self.up = nn.ConvTranspose1d(8, 4, 4, stride=2)

    def forward(self, x):
        return F.relu(self.up(F.relu(self.down(x))))


def root_sequential():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.MaxPool2d(2)
    )


def with_empty_sequentials():
    """As left behind by code that builds optional layers."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.Sequential(),
        nn.ReLU(),
        nn.Sequential(),
        nn.Conv2d(6, 4, 1),
        nn.ReLU(),
    )


def named_sequential():
    return nn.Sequential(
        OrderedDict(one=nn.Conv2d(3, 6, 3), act=nn.Tanh(), two=nn.Conv2d(6, 4, 1), last=nn.ReLU())
    )


def subclassed():
    return nn.Sequential(Standardised(3, 8, 3), nn.ReLU(), Standardised(8, 4, 3), nn.ReLU())


def transposed():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 2, bias=False),
        nn.ReLU(),
    )


IMAGE_NETS = [
    Residual,
    Concat,
    SharedConv,
    TwoNames,
    TiedWeights,
    Grouped,
    ByIndex,
    ReadsItsConv,
    AlreadyNormed,
    root_sequential,
    with_empty_sequentials,
    named_sequential,
    subclassed,
    transposed,
]


def build(net):
    """The network, seeded, in eval mode."""
    torch.manual_seed(0)
    return net().eval()


def unwritten(name):
    """torchvision's network, for weights to be loaded into: drawing its own takes seconds."""
    with torch.device("meta"):
        return torchvision.models.get_model(name, weights=None).eval().to_empty(device="cpu")


def vgg(name):
    """torchvision's, with random weights that keep the activations at one scale."""
    torch.manual_seed(0)
    model = unwritten(name)
    for key, parameter in model.named_parameters():
        if key.endswith("weight"):
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
        else:
            nn.init.normal_(parameter, std=0.1)
    return model


def norms(model):
    """The BatchNorms of a model, by path."""
    return {path: m for path, m in model.named_modules() if isinstance(m, _BatchNorm)}


def make_stale(model):
    """Give the BatchNorms of a model other numbers than those of its data."""
    for norm in norms(model).values():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            nn.init.uniform_(tensor, 0.5, 2)


def batchnorm(identity, eps):
    """torch's own BatchNorm, with these numbers."""
    dtype = torch.from_numpy(identity.mean).dtype
    norm = nn.BatchNorm1d(len(identity.mean), eps=eps, dtype=dtype).eval()
    names = ("running_mean", "running_var", "weight", "bias")
    state = {n: torch.from_numpy(a) for n, a in zip(names, identity, strict=True)}
    norm.load_state_dict(state, strict=False)
    return norm


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
