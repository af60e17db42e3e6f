"""Seats: a BatchNorm comes back where folding left an nn.Identity, under its own name."""

import copy
import dataclasses
from itertools import pairwise

import nets
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import retrofit
from retrofit import Plan, RetrofitError

X = nets.images(2, 3, 64, 64)


def with_statistics(model):
    """Draw what training would have left in the BatchNorms."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -1, 1),
                (module.running_var, 0.5, 2),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -1, 1),
            ):
                tensor.uniform_(low, high, generator=generator)
    return model.eval()


def fused(model):
    """Fold as torch's own quantization flow does: each pair of a convolution and its BatchNorm."""
    names = dict(model.named_modules())
    order = list(names)
    pairs = [
        [layer, norm]
        for layer, norm in pairwise(order)
        if isinstance(names[layer], nn.Conv2d) and isinstance(names[norm], nn.BatchNorm2d)
    ]
    return torch.ao.quantization.fuse_modules(copy.deepcopy(model), pairs), len(pairs)


def places(model, **options):
    return {site.path: site.norm for site in retrofit.plan(model, **options).inserted}


class Block(nn.Module):
    """A convolution and what reads it, under a name of the test's choice."""

    def __init__(self, name, reader=None):
        super().__init__()
        self.conv, self.name = nn.Conv2d(3, 4, 3), name
        self.add_module(name, nn.Identity() if reader is None else reader)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(F.relu(getattr(self, self.name)(self.conv(x))).mean((2, 3)))


# --- folded networks --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5", "mnasnet0_5"])
def test_a_folded_network_has_the_keys_of_its_class_again_and_its_biases(name):
    stock = with_statistics(torchvision.models.get_model(name))
    folded = retrofit.fold(stock)
    converted = retrofit.add_batchnorm(folded, [X], progress=False)
    assert torch.equal(converted(X), folded(X))
    keys, own = set(converted.state_dict()), set(stock.state_dict())
    assert keys >= own
    assert keys - own == {
        f"{path}.bias"
        for path, module in stock.named_modules()
        if isinstance(module, nn.Conv2d) and module.bias is None
    }
    kinds = {path: type(module) for path, module in stock.named_modules()}
    assert {path: type(module) for path, module in converted.named_modules()} == kinds
    back = retrofit.fold(converted)
    assert all(map(torch.equal, back.state_dict().values(), folded.state_dict().values()))
    assert str(back) == str(folded)


def test_one_that_torch_fused_too():
    stock = with_statistics(torchvision.models.resnet18())
    folded, pairs = fused(stock)
    converted = retrofit.add_batchnorm(folded, [X], progress=False)
    assert len(retrofit.plan_of(converted).inserted) == pairs == 20
    assert torch.equal(converted(X), folded(X))
    assert set(converted.state_dict()) > set(stock.state_dict())
    back = retrofit.fold(converted)
    assert all(map(torch.equal, back.state_dict().values(), folded.state_dict().values()))


def small_vgg_bn():
    """Build torchvision's VGG with BatchNorm, narrow and with a small classifier."""
    features = torchvision.models.vgg.make_layers([8, "M", 8, 16], batch_norm=True)
    vgg = torchvision.models.VGG(features, num_classes=5, init_weights=False)
    vgg.classifier = nn.Linear(16 * 7 * 7, 5)
    return with_statistics(vgg)


def test_a_folded_vgg_bn_moves_no_key_and_a_mixed_one_only_what_it_must():
    stock = small_vgg_bn()
    folded = retrofit.fold(stock)
    converted = retrofit.add_batchnorm(folded, [X], progress=False)
    assert set(converted.state_dict()) == set(stock.state_dict())
    del folded.features[1]  # of the first convolution: its BatchNorm needs a place of its own
    mixed = retrofit.add_batchnorm(folded, [X], progress=False)
    assert set(mixed.state_dict()) == set(stock.state_dict())
    assert torch.equal(mixed(X), folded(X))
    assert str(retrofit.fold(mixed)) == str(folded)
    partly = retrofit.add_batchnorm(folded, [X], exclude="features.3", progress=False)
    assert isinstance(partly.features[5], nn.Identity)
    assert torch.equal(partly(X), folded(X))
    assert str(retrofit.fold(partly)) == str(folded)


def test_insert_inplace_prepare_and_unused_sites():
    folded = retrofit.fold(with_statistics(torchvision.models.resnet18()))
    keys = set(retrofit.insert(folded).state_dict())
    assert keys > set(torchvision.models.resnet18().state_dict())
    changed = copy.deepcopy(folded)
    seat = changed.bn1
    assert retrofit.add_batchnorm(changed, [X], inplace=True, progress=False) is changed
    assert isinstance(changed.bn1, nn.BatchNorm2d)
    assert seat is not changed.bn1
    prepared = retrofit.prepare(folded)
    prepared.conv1(X)  # no observer has seen data
    with pytest.warns(UserWarning, match="no data reached it"):
        plain = retrofit.convert(prepared, skip_unused=True)
    assert str(plain) == str(folded)


def test_modes_are_those_of_the_network_around():
    model = Block("bn").train()
    model.bn.eval()
    converted = retrofit.add_batchnorm(model, [X], progress=False)
    assert converted.bn.training
    converted.conv.eval()
    assert isinstance(retrofit.fold(converted).bn, nn.Identity)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_of_such_networks_load(tmp_path, suffix):
    folded = retrofit.fold(with_statistics(torchvision.models.resnet18()))
    converted = retrofit.add_batchnorm(folded, [X], progress=False)
    path = tmp_path / f"resnet{suffix}"
    retrofit.save(converted, path)
    loaded = retrofit.load(path, folded)
    assert torch.equal(loaded(X), folded(X))
    assert str(loaded) == str(converted)


def test_the_plan_names_the_seat_and_is_stored_with_it():
    plan = retrofit.plan(Block("bn1"))
    assert "takes the seat of bn1, an nn.Identity" in str(plan)
    assert [site.seat for site in plan.sites] == ["bn1"]
    assert Plan.from_json(plan.to_json()) == plan
    before = plan.to_json().replace(', "seat": "bn1"', "")  # of a version without seats
    assert Plan.from_json(before).sites[0].seat == ""


# --- what is a seat, and what is none -----------------------------------------------------------


@pytest.mark.parametrize("name", ["bn", "bn1", "conv_bn", "norm", "norm_layer", "batch_norm2"])
def test_an_identity_named_like_a_norm_is_a_seat(name):
    assert places(Block(name).eval()) == {"conv": name}


@pytest.mark.parametrize("name", ["drop", "drop_path", "act1", "shortcut", "stochastic_depth"])
def test_what_is_switched_off_is_none(name):
    assert places(Block(name).eval()) == {"conv": "conv.bn"}


@pytest.mark.parametrize("reader", [nn.Dropout(0.0), nn.Sequential(), nn.Flatten(1, 1)])
def test_nor_is_another_module_of_that_name(reader):
    assert places(Block("bn", reader).eval()) == {"conv": "conv.bn"}


def test_nor_a_subclass_nor_one_with_a_hook():
    class Probe(nn.Identity):
        pass

    assert places(Block("bn", Probe()).eval()) == {"conv": "conv.bn"}
    hooked = Block("bn").eval()
    hooked.bn.register_forward_hook(lambda _m, _i, y: y)
    assert places(hooked) == {"conv": "conv.bn"}


def test_in_a_sequential_it_comes_right_after_the_layer():
    after = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), nn.ReLU(), nn.Conv2d(4, 4, 3))
    net = nn.Sequential(after, nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    assert places(net)["0.0"] == "0.1"
    apart = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Identity(), nn.ReLU(), nn.Flatten())
    assert places(nn.Sequential(apart, nn.Linear(3600, 2)).eval()) == {"0.0.0": "0.0.0.bn"}


class Between(nn.Module):
    """Two convolutions, the second maybe called twice, around one nn.Identity."""

    def __init__(self, between):
        super().__init__()
        self.one, self.two, self.bn = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Identity()
        self.head, self.between = nn.Linear(4, 2), between

    def forward(self, x):
        return self.head(F.relu(self.between(self, x)).mean((2, 3)))


def test_one_that_reads_something_else_too_is_none():
    own = {"one": "one.bn", "two": "two.bn"}
    for between in (
        lambda m, x: m.bn(m.one(x)) + m.bn(m.two(x)),
        lambda m, x: m.bn(m.one(x)) + m.bn(m.two(x).relu()),
        lambda m, x: (y := m.one(x)) + m.bn(y) + m.two(x),
        lambda m, x: m.bn(m.one(x) + m.two(x)),
    ):
        net = Between(between).eval()
        assert places(net) == own
        assert places(net, example=X) == own


def test_a_layer_called_twice_into_its_seat():
    net = Between(lambda m, x: m.bn(m.one(x)) + m.bn(m.one(x.flip(0))) + m.two(x)).eval()
    assert places(net) == {"one": "bn", "two": "two.bn"}
    converted = retrofit.add_batchnorm(net, [X], progress=False)
    assert torch.equal(converted(X), net(X))


def test_after_an_activation_or_in_a_graph_a_batchnorm_has_a_place_of_its_own():
    net = Block("bn").eval()
    graph = retrofit.add_batchnorm(net, [X], layout="graph", progress=False)
    assert isinstance(graph.bn, nn.Identity)
    assert torch.equal(graph(X), net(X))
    after = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Identity(), nn.Conv2d(4, 4, 3))
    net = nn.Sequential(after, nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    assert places(net, placement="post_activation")["0.0"] == "0.1.bn"


def test_a_plan_whose_seat_is_taken_is_refused():
    plan = retrofit.plan(Block("bn1"))
    taken = Block("bn1", nn.ReLU())
    with pytest.raises(RetrofitError, match=r"bn1 is no nn\.Identity; plan this model anew"):
        retrofit.prepare(taken, plan)
    assert isinstance(taken.bn1, nn.ReLU)
    elsewhere = dataclasses.replace(plan.sites[0], seat="gone")
    with pytest.raises(RetrofitError, match=r"gone is no nn\.Identity"):
        retrofit.prepare(Block("bn1"), dataclasses.replace(plan, sites=(elsewhere,)))
