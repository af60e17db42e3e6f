"""How many channels a network takes is found wherever its first layer is, and however it is fed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

from retrofit.running.input_channels import input_channels

SIZE = (28, 28)


class Net(nn.Module):
    """Modules are defined from the head to the stem, which takes `channels`."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels
        self.head = nn.Conv2d(8, 4, 1)
        self.stem = nn.Conv2d(channels, 8, 3)

    def forward(self, x):
        return self.head(self.stem(x).relu())


class Functional(Net):
    def forward(self, x):
        return self.head(F.conv2d(x, self.stem.weight * 2))


class Blurred(Net):
    def forward(self, x):
        kernel = torch.ones(x.shape[1], 1, 3, 3)
        return super().forward(F.conv2d(x, kernel, groups=x.shape[1]))


class Folded(Net):
    def __init__(self, channels):
        super().__init__(4 * channels)

    def forward(self, x):
        return super().forward(F.pixel_unshuffle(x, 2))


class LowRank(Net):
    def __init__(self, channels):
        super().__init__(channels)
        self.down, self.up = (
            nn.Parameter(torch.ones(3, 9 * channels)),
            nn.Parameter(torch.ones(8, 3)),
        )

    def forward(self, x):
        return F.conv2d(x, (self.up @ self.down).view(8, self.channels, 3, 3))


class Asserting(Net):
    def forward(self, x):
        assert x.shape[1] == self.channels
        return super().forward(x)


class InferenceMode(Net):
    @torch.inference_mode()
    def forward(self, x):
        return super().forward(x)


class Flattening(nn.Sequential):
    def __init__(self, channels):
        super().__init__(nn.Flatten(), nn.Linear(channels * 28 * 28, 4))


class ChannelsLast(Net):
    def __init__(self, channels):
        super().__init__(8)
        self.embed = nn.Linear(channels, 8)

    def forward(self, x):
        return super().forward(self.embed(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class Listing(Net):
    def forward(self, images: list[torch.Tensor]):
        return [super(Listing, self).forward(image[None]) for image in images]


KINDS = [Net, Functional, Blurred, Folded, LowRank, Asserting, InferenceMode, Flattening,
         ChannelsLast, Listing]  # fmt: skip


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_that_reads_the_picture_tells(kind, channels):
    assert input_channels(kind(channels), SIZE) == channels


@pytest.mark.parametrize("name", ["squeezenet1_1", "ssdlite320_mobilenet_v3_large", "swin_t"])
def test_torchvisions_networks_take_three(name):
    weights = {"weights": None} | ({"weights_backbone": None} if "ssd" in name else {})
    assert input_channels(models.get_model(name, **weights), (64, 64)) == 3


class Counting(Net):
    def __init__(self, channels):
        super().__init__(channels)
        self.norm = nn.BatchNorm2d(channels)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(self.norm(x) * torch.rand(()))


def test_a_model_and_the_random_generator_are_left_as_they_were():
    model = Counting(1).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    assert input_channels(model, SIZE) == 1
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.norm.training
    assert torch.equal(torch.get_rng_state(), random)


class Refusing(Net):
    def forward(self, _):
        raise RuntimeError("no")


class Locked(Net):
    def __deepcopy__(self, memo):
        raise TypeError("cannot pickle a lock")


@pytest.mark.parametrize(
    "model",
    [nn.Identity(), Refusing(3), Locked(3)],
    ids=["no layer", "raises", "does not copy"],
)
def test_of_some_models_it_cannot_be_told(model):
    assert input_channels(model, SIZE) is None
