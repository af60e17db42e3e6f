"""What cannot be restored is refused by name, and nothing is changed."""

import copy
import inspect
import math

import nets
import pytest
import torch
from normed_networks import ConstantEps, trained
from promises import everything
from torch import nn

import retrofit
from retrofit import RetrofitError

pytestmark = pytest.mark.filterwarnings("ignore:the statistics of")  # few pictures are quick


def small(width=6, act=nn.ReLU, norm=nn.BatchNorm2d, layers=2, **options):
    torch.manual_seed(width)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, bias=False, **options), norm(width), act(),
        nn.Conv2d(width, 4, 1), norm(4),
        *(nn.Conv2d(4, 4, 1) for _ in range(layers - 2)),
    )  # fmt: skip


def folded(**options):
    return retrofit.fold(trained(small(**options)))


def state(change=lambda _: None):
    found = dict(folded().state_dict())
    change(found)
    return found


def images():
    return nets.images(16, 3, 7, 7)


def refused(message, architecture=None, network=None, data=None, **options):
    """The message is raised, and neither network is changed."""
    architecture = small() if architecture is None else architecture
    network = folded() if network is None else network
    modules = [m for m in (architecture, network) if isinstance(m, nn.Module)]
    real = [m for m in modules if not any(t.is_meta for t in m.parameters())]
    before = [everything(module) for module in real]
    with pytest.raises(RetrofitError, match=message):
        retrofit.restore(
            architecture, network, [images()] if data is None else data, progress=False, **options
        )
    assert [everything(module) for module in real] == before


# --- the folded network -------------------------------------------------------------------------


def test_more_layers():
    refused(r"2 unexpected \(5\.weight, 5\.bias\)", network=folded(layers=3))


def test_fewer_layers():
    three = small(layers=3)
    refused(r"the architecture has 5 of shape \(4, 4, 1, 1\), it has no more layers", three)
    refused(r"has no 5\.weight, 5\.bias, of 2 tensors that are missing", three, state())


def test_other_shapes():
    refused(
        r"0\.weight has shape \(8, 3, 3, 3\) in .*, and \(6, 3, 3, 3\) in the architecture",
        network=folded(width=8),
    )


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"act": nn.SiLU}, "output differs by .* of its largest value"),
        ({"stride": 2}, r"outputs of shapes .*5, 5\)} instead of .*3, 3\)}"),
        ({"padding": 1}, r"outputs of shapes .*5, 5\)} instead of .*7, 7\)}"),
    ],
)
def test_the_same_shapes_that_compute_something_else(options, what):
    refused(f"of the folded Sequential computes something else: {what}", network=folded(**options))


def test_other_names_and_layers_in_another_order():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3)

        def forward(self, x):
            return self.b(self.a(x))

    refused(
        r"neither by names nor layer by layer: where the architecture has 0 of shape "
        r"\(6, 3, 3, 3\), it has a of shape \(4, 3, 1, 1\): is it of another architecture\?",
        network=Other(),
    )


class Renamed(nn.Module):
    """The layers of a Sequential under other names, and as many more as asked for."""

    def __init__(self, layers, more=0):
        super().__init__()
        self.layers = nn.ModuleDict(
            {f"layer{i}": layer for i, layer in enumerate(layers) if i != 2}
        )
        self.more = nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(more)))

    def forward(self, x):
        for name, layer in self.layers.items():
            x = layer(x).relu() if name == "layer1" else layer(x)
        return self.more(x)


def test_more_layers_under_other_names():
    refused(
        r"Renamed has 2 more layers than the architecture, the first of them more\.0 of shape "
        r"\(4, 4, 1, 1\)$",
        network=Renamed(folded(), more=2),
    )


def test_a_network_of_other_names_that_is_not_folded():
    network = Renamed(trained(small()))
    refused("Renamed has all of its BatchNorms: there is nothing to restore", network=network)


class Beside(nn.Module):
    """Two convolutions beside each other; `first` is the one that runs first."""

    def __init__(self, names="ab", *, first=0, bias=True):
        super().__init__()
        self.stem, self.names, self.first = small(), names, first
        for name, size in zip(names, (1, 3), strict=True):
            setattr(self, name, nn.Conv2d(4, 4, size, padding=size // 2, bias=bias))

    def forward(self, x):
        x = self.stem(x)
        found = {i: getattr(self, self.names[i])(x) for i in (self.first, 1 - self.first)}
        return found[0] * found[1]


def test_other_names_another_order_and_no_biases():
    network = retrofit.fold(trained(Beside("cd", first=1, bias=False)))
    refused("neither by names nor layer by layer: .* has a of .* it has d of", Beside(), network)


def test_a_parametrized_layer_under_other_names():
    architecture = small()
    nn.utils.parametrizations.weight_norm(architecture[0])
    refused(r"other names than .*, in which 0 is parametrized", architecture)


def test_a_network_that_is_not_folded():
    refused("loads as it is: all of its BatchNorms are there", network=trained(small()))
    refused("loads as it is", network=trained(small()).state_dict())


def test_batchnorms_that_were_left_out():
    dropped = {k: t for k, t in trained(small()).state_dict().items() if k[0] not in "14"}
    del dropped["3.bias"]
    architecture = small()
    architecture[3] = nn.Conv2d(6, 4, 1, bias=False)
    with pytest.warns(UserWarning, match="no layer in the state dict has the bias that folding"):
        retrofit.restore(architecture, dropped, [images()], progress=False)


def test_statistics_without_the_rest():
    tensors = trained(small()).state_dict()
    del tensors["1.weight"], tensors["4.bias"]
    refused(r"none was folded, and lacks 1\.weight, 4\.bias", network=tensors)


def test_missing_tensors():
    def lose(tensors):
        tensors["3.kernel"] = tensors.pop("3.weight")

    refused(r"has no 3\.weight, of 1 tensors that are missing.*nearest name there is",
            network=state(lose))  # fmt: skip


def test_a_batchnorm_that_is_in_no_weight():
    architecture = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.BatchNorm2d(6))
    refused(
        r"has no 2\.running_var, and this BatchNorm is in no layer's weight: it follows",
        architecture,
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU()).state_dict(),
    )


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
class Tied(nn.Module):
    """Two convolutions of one weight, each with a BatchNorm of its own, which fold apart."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(2))
        self.b.weight = self.a.weight
        self.a_norm, self.b_norm = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.b_norm(self.b(self.a_norm(self.a(x)).relu()))


def test_two_weights_for_one():
    model = trained(Tied())
    apart = copy.deepcopy(model)
    for name in "ab":
        pair = getattr(apart, name), getattr(apart, f"{name}_norm")
        setattr(apart, name, nn.utils.fuse_conv_bn_eval(*pair))
        setattr(apart, f"{name}_norm", nn.Identity())
    for network in (apart, apart.state_dict()):
        refused(r"a\.weight and b\.weight are one tensor in the model, and differ", Tied(), network)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_integer_and_quantised_weights():
    def integers(tensors):
        tensors["0.weight"] = (tensors["0.weight"] * 100).to(torch.int8)

    def quantised(tensors):
        tensors["0.weight"] = torch.quantize_per_tensor(tensors["0.weight"], 0.1, 0, torch.qint8)

    refused(r"of another kind \(0\.weight int8\)", network=state(integers))
    refused(r"is quantised \(0\.weight\): pass the network of floating", network=state(quantised))
    model = nn.Sequential(folded(), nn.Linear(5, 2))
    dynamic = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    refused(r"is quantised \(1\): pass the network of floating", network=dynamic)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_frozen_torchscript():
    frozen = torch.jit.freeze(torch.jit.trace(folded(), images()))
    with pytest.raises(RetrofitError, match=r"frozen, .* torch\.onnx\.export"):
        retrofit.restore(small(), frozen, [images()], progress=False)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers(value):
    def spoil(tensors):
        tensors["0.weight"] = tensors["0.weight"].clone().fill_(value)

    refused("there is a NaN or Inf at 0 for image 0.*check the weights", network=state(spoil))


def test_what_is_no_network(tmp_path):
    refused("the folded network is a mapping without tensors", network={})
    refused("the folded network is a mapping without tensors", network={"epoch": 3})
    refused("the folded network is a int: pass a module, a state dict, or the path", network=3)
    refused("the folded network is a list", network=[folded()])
    refused("there is no file .*no-such-file", network=tmp_path / "no-such-file.pth")


def test_a_folded_network_that_is_random():
    class Random(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + torch.rand_like(x[:, :1, :1, :1])

    network = folded()
    refused("Random computes something else each time that it runs", network=Random(*network))


def test_a_folded_network_that_does_not_run():
    class Broken(nn.Sequential):
        def forward(self, _):
            raise ValueError("broken")

    refused("the folded Broken does not run on the example: ValueError: broken",
            network=Broken(*folded()))  # fmt: skip

    class Two(nn.Sequential):
        def forward(self, x, _):
            return super().forward(x)

    refused("^Two takes x and _: give batches that are tuples of", network=Two(*folded()))


# --- the architecture ---------------------------------------------------------------------------


def test_architectures_without_a_batchnorm():
    refused("has no BatchNorm to restore: add_batchnorm", nn.Sequential(nn.Conv2d(3, 6, 3)))
    refused(r"restore takes an nn\.Module, not a str", architecture="resnet50")


def test_a_converted_architecture():
    plain = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.ReLU())
    converted = retrofit.add_batchnorm(plain, [images()], progress=False)
    refused("this Sequential was converted: restore takes the class as it was", converted, plain)


def test_an_architecture_on_meta():
    refused(r"0\.weight is on the meta device: pass a model that has its tensors",
            small().to("meta"))  # fmt: skip


@pytest.mark.parametrize("missing", ["affine", "bias"])
def test_a_batchnorm_without_parameters(missing):
    def norm(channels):
        return nn.BatchNorm2d(channels, **{missing: False})

    if missing == "bias" and "bias" not in inspect.signature(nn.BatchNorm2d).parameters:
        pytest.skip("BatchNorms of this torch have both or none")
    refused(r"1 has no (weight|bias) \(affine=False, or bias=False\)", small(norm=norm),
            folded(norm=norm))  # fmt: skip


class EpsBatchNorm(ConstantEps):
    """Its eps is in its code."""


class WrongEps(nn.BatchNorm2d):
    """Its eps is not the one that it says."""

    def forward(self, x):
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=0.1
        )


def test_a_batchnorm_whose_eps_is_not_known():
    refused("1, a EpsBatchNorm, has no eps that could be read", small(norm=EpsBatchNorm),
            folded(norm=EpsBatchNorm))  # fmt: skip
    refused(
        r"1, a WrongEps, does not compute \(x - running_mean\) / ",
        small(norm=WrongEps),
        folded(norm=WrongEps),
    )


def test_16_bits():
    with pytest.raises(RetrofitError, match=r"1 is in torch\.bfloat16, too coarse.*\.float\(\)"):
        retrofit.restore(
            small().bfloat16(), folded().bfloat16(), [images().bfloat16()], progress=False
        )


class Saturating(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).clamp(-50, 50)


def test_a_batchnorm_that_computes_something_else_of_large_numbers():
    network = folded()
    network[0].weight.data.mul_(1000)
    refused(
        r"restored Sequential differs from the folded network by \S+ of its largest output, more "
        "than 1e-05; most at 4, by",
        small(norm=Saturating),
        network,
    )


def test_a_batchnorm_that_rounds():
    class Rounding(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x.bfloat16()).float()

    refused("^1 cannot be restored: the BatchNorm after its layer, a Rounding, computes something",
            small(norm=Rounding))  # fmt: skip


def test_an_architecture_that_is_random():
    class Random(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + torch.rand_like(x[:, :1, :1, :1])

    refused("this Random computes something else each", Random(*small()), state())


def test_hooks_on_a_batchnorm():
    architecture = small()
    architecture[1].register_forward_hook(lambda *_: None)
    reason = "the BatchNorm after its layer has a hook"
    refused(rf"has 1 of shape \(6,\) \({reason}.*, it has 3", architecture)
    refused(f"in no layer's weight: {reason}", architecture, state())


def test_neither_torch_fx_nor_a_run_can_follow():
    class Broken(nn.Sequential):
        def forward(self, x):
            if x.sum() > 1e9:
                return x
            raise ValueError("no run")

    refused("Broken does not run on the example: ValueError: no run", Broken(*small()))


def test_data_does_not_reach_a_batchnorm():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.idle = small(), small()

        def forward(self, x):
            return self.idle(x) if x.sum() > 1e9 else self.body(x)

    network = Idle()
    network.body, network.idle = folded(), folded()
    refused(
        r"idle\.1\.running_var, .* no call of it is seen in eval mode", Idle(), network.state_dict()
    )


# --- options and data ---------------------------------------------------------------------------


def test_key_map_to_a_name_that_the_architecture_lacks():
    refused("key_map leads to 'none', which the architecture does not have",
            key_map={"0.weight": "none"})  # fmt: skip


def test_key_map_that_does_nothing_or_too_much():
    refused("key_map has 'typo', which the folded Sequential does not have",
            key_map={"typo": "0.weight"})  # fmt: skip
    refused(r"key_map gives two tensors the name '0\.weight'", key_map={"3.weight": "0.weight"})


def test_data_without_images():
    refused("there is no data: the first batch never came", data=[])
    refused("there is no data: .* is used up, or was empty", data=iter(()))
    refused("data must be an iterable of batches, not int", data=3)


def test_data_that_is_not_finite():
    x = images()
    x[3] = math.nan
    with pytest.raises(RetrofitError, match="NaN"):
        retrofit.restore(small(), folded(), [x], progress=False)
    with pytest.raises(retrofit.NonFiniteError):
        retrofit.restore(small(), folded(), [images(), x], progress=False)


def test_an_empty_first_batch_compares_nothing_and_is_passed_over():
    other = folded(act=nn.SiLU)
    refused("something else", network=other, data=[images()[:0], images()])


def test_few_images():
    refused("calibration got 1 of the at least 2 images", data=[images()[:1]])
    with pytest.warns(UserWarning, match="the statistics of 4 images are uncertain by"):
        retrofit.restore(small(), folded(), [images()[:4]], progress=False)


def test_data_of_too_large_a_variance():
    refused(
        r"^1: the moments of channel 0 are not finite in float32 \(mean \S+, variance inf\): scale",
        data=[images() * 1e20],
    )


def test_data_of_another_shape():
    refused("does not run on a batch: .*to have 3 channels", data=[nets.images(4, 1, 7, 7)])


def test_an_error_leaves_modes_and_hooks():
    architecture, network = small().train(), folded()
    architecture[2].register_forward_hook(nets_hook)
    kept = copy.deepcopy(network.state_dict())
    refused("something else", architecture, folded(act=nn.SiLU))
    assert all(torch.equal(kept[key], value) for key, value in network.state_dict().items())
    assert architecture.training


def nets_hook(_module, _inputs, _output):
    """A hook of the user's."""
