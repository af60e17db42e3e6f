"""restore: however a network was folded, it comes back in its own class, and learns again."""

import copy
import pickle

import nets
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.nn.utils import fuse_conv_bn_eval
from torchvision.ops import FrozenBatchNorm2d

import retrofit
from retrofit import RetrofitError

X = nets.images(4, 3, 64, 64)
CLOSE = 5e-6  # of the largest output
quiet = pytest.mark.filterwarnings("ignore:the statistics of:UserWarning")
pytestmark = [
    quiet,
    pytest.mark.filterwarnings("ignore:.*BatchNorms stay:UserWarning"),
    pytest.mark.filterwarnings("ignore:You are using the legacy:DeprecationWarning"),
]


def with_statistics(model):
    """Draw what training would have left in the BatchNorms."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if hasattr(module, "running_var"):
            for tensor, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 2),
                (module.weight.data, 0.7, 1.3),
                (module.bias.data, -0.3, 0.3),
            ):
                tensor.uniform_(low, high, generator=generator)
    return model.eval()


class Net(nn.Module):
    """Two convolutions with BatchNorm, one of them with a bias, and a head."""

    def __init__(self, norm=nn.BatchNorm2d, activation=nn.ReLU):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, bias=False), norm(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3), norm(8)
        self.act, self.head = activation(), nn.Linear(8, 5)

    def forward(self, x):
        x = self.act(self.bn1(self.conv1(x)))
        return self.head(self.act(self.bn2(self.conv2(x))).mean((2, 3)))


def trained(**options):
    torch.manual_seed(0)
    return with_statistics(Net(**options))


def fresh(**options):
    torch.manual_seed(1)
    return Net(**options).eval()


def restored(architecture, folded, data=(X,), **options):
    return retrofit.restore(architecture, folded, list(data), progress=False, **options)


def difference(one, other, x=X):
    with torch.no_grad():
        expected, actual = other(x), one(x)
    return float((actual - expected).abs().max() / expected.abs().max())


# --- however it was folded ------------------------------------------------------------------------


def by_hand(model):
    """Fold with torch's own function, layer by layer."""
    folded = copy.deepcopy(model)
    for i in (1, 2):
        conv, norm = getattr(folded, f"conv{i}"), getattr(folded, f"bn{i}")
        setattr(folded, f"conv{i}", fuse_conv_bn_eval(conv, norm))
        setattr(folded, f"bn{i}", nn.Identity())
    return folded


def by_torch_ao(model, *last):
    pairs = [["conv1", "bn1", *last], ["conv2", "bn2"]]
    return torch.ao.quantization.fuse_modules(copy.deepcopy(model), pairs)


FOLDS = {
    "retrofit": retrofit.fold,
    "torch.fx": lambda model: fuse(copy.deepcopy(model)),
    "torch's function": by_hand,
    "torch.ao": by_torch_ao,
}


@pytest.mark.parametrize("how", FOLDS)
@pytest.mark.parametrize("form", ["module", "state dict", ".pth", ".safetensors"])
def test_it_loads_strictly_and_computes_the_same(how, form, tmp_path):
    folded = FOLDS[how](trained())
    source = folded
    if form != "module":
        source = folded.state_dict()
    if form.startswith("."):
        path = tmp_path / f"folded{form}"
        save = torch.save if form == ".pth" else safetensors_of
        save(source, path)
        source = path
    result = restored(fresh(), source)
    assert type(result) is Net
    stock = fresh()
    stock.load_state_dict(result.state_dict(), strict=True)
    assert difference(stock, folded) < CLOSE
    found = retrofit.restoration_of(result)
    assert [seat.norm for seat in found.seats] == ["bn1", "bn2"]
    assert [seat.bias for seat in found.seats] == ["running_mean", "layer"]
    assert found.relative == pytest.approx(difference(result, folded), abs=1e-9)


def safetensors_of(state, path):
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)


def test_a_relu_fused_by_torch_ao_too():
    class Plain(Net):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x):
            x = self.relu(self.bn1(self.conv1(x)))
            return self.head(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))

    torch.manual_seed(0)
    folded = by_torch_ao(with_statistics(Plain()), "relu")
    assert "conv1.0.weight" in folded.state_dict()
    for source in (folded, folded.state_dict()):
        assert difference(restored(Plain().eval(), source), folded) < CLOSE


def test_names_behind_prefixes_and_others_by_a_map_or_in_order():
    folded = retrofit.fold(trained())
    state = folded.state_dict()
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}
    assert difference(restored(fresh(), {"state_dict": wrapped}), folded) < CLOSE
    other = {name.replace("conv", "stage"): tensor for name, tensor in state.items()}
    key_map = {name: name.replace("stage", "conv") for name in other if "stage" in name}
    assert difference(restored(fresh(), other, key_map=key_map), folded) < CLOSE
    with pytest.raises(RetrofitError, match=r"the state dict has no conv1\.weight"):
        restored(fresh(), other)

    class Renamed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (
                copy.deepcopy(m) for m in (folded.conv1, folded.conv2, folded.head)
            )

        def forward(self, x):
            return self.c(self.b(self.a(x).relu()).relu().mean((2, 3)))

    assert difference(restored(fresh(), Renamed().eval()), folded) < CLOSE


def test_what_was_not_folded_is_taken_over():
    model = trained()
    partly = torch.ao.quantization.fuse_modules(copy.deepcopy(model), [["conv2", "bn2"]])
    result = restored(fresh(), partly)
    found = retrofit.restoration_of(result)
    assert found.kept == ("bn1",)
    for name, tensor in model.bn1.state_dict().items():
        assert torch.equal(result.bn1.state_dict()[name], tensor)
    assert difference(result, model) < CLOSE


# --- what comes back ----------------------------------------------------------------------------


def test_the_statistics_are_those_of_two_passes_in_float64():
    folded = retrofit.fold(trained())
    data = nets.images(12, 3, 20, 20).split(5)
    result = restored(fresh(), folded, data)
    x = folded.conv1(torch.cat(data)).double()
    expected = x.mean((0, 2, 3)), x.var((0, 2, 3))
    moved = result.bn1.running_mean + folded.conv1.bias
    assert ((moved - expected[0]).abs() / expected[1].sqrt() < 1e-5).all()
    assert torch.allclose(result.bn1.running_var.double(), expected[1], rtol=1e-4)
    assert torch.allclose(result.bn1.bias.double(), expected[0], atol=1e-5)
    assert result.bn1.num_batches_tracked == 3


def test_in_train_mode_it_is_the_class_that_learns():
    result = restored(fresh(), retrofit.fold(trained())).train()
    wide = copy.deepcopy(result).double()
    outputs = result(X)
    torch.testing.assert_close(outputs.double(), wide(X.double()), rtol=1e-4, atol=1e-4)
    outputs.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in result.parameters())
    assert result.bn1.weight.grad.abs().max() > 0


def test_class_eps_momentum_mode_and_flags_are_those_of_the_architecture():
    def norm(channels):
        return nn.SyncBatchNorm(channels, eps=1e-3, momentum=0.01)

    architecture = fresh(norm=norm).train()
    architecture.head.requires_grad_(requires_grad=False)
    result = restored(architecture, retrofit.fold(trained(norm=norm)))
    assert type(result.bn1) is nn.SyncBatchNorm
    assert (result.bn1.eps, result.bn1.momentum) == (1e-3, 0.01)
    assert result.training
    assert not result.head.weight.requires_grad
    assert result.conv1.weight.requires_grad


def test_architecture_and_folded_network_stay_as_they_were():
    architecture, folded = fresh().train(), retrofit.fold(trained())
    before = [copy.deepcopy(model.state_dict()) for model in (architecture, folded)]
    restored(architecture, folded)
    with pytest.raises(RetrofitError):
        restored(architecture, fresh(activation=nn.Tanh))
    for model, state in zip((architecture, folded), before, strict=True):
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert architecture.training
    assert not folded.training
    assert isinstance(architecture.bn1, nn.BatchNorm2d)


def test_the_result_can_be_folded_saved_and_pickled(tmp_path):
    folded = retrofit.fold(trained())
    result = restored(fresh(), folded)
    assert difference(retrofit.fold(result), folded) < CLOSE
    loaded = pickle.loads(pickle.dumps(result))  # noqa: S301 - our own
    assert retrofit.restoration_of(loaded) == retrofit.restoration_of(result)
    retrofit.save(result, tmp_path / "r.safetensors")
    assert torch.equal(retrofit.load(tmp_path / "r.safetensors", fresh())(X), result(X))
    text = str(retrofit.restoration_of(result))
    assert "2 BatchNorms restored; statistics of 4 images" in text
    assert "running_mean" in text
    assert retrofit.restoration_of(fresh()) is None


LAYERS = {
    "Conv1d": (nn.Conv1d(3, 4, 3, bias=False), nn.BatchNorm1d, (8, 3, 20)),
    "Conv3d": (nn.Conv3d(3, 4, 3, bias=False), nn.BatchNorm3d, (4, 3, 6, 6, 6)),
    "ConvTranspose2d": (nn.ConvTranspose2d(3, 4, 3, bias=False), nn.BatchNorm2d, (4, 3, 9, 9)),
    "Linear": (nn.Linear(3, 4, bias=False), nn.BatchNorm1d, (64, 3)),
    "FrozenBatchNorm2d": (nn.Conv2d(3, 4, 3, bias=False), FrozenBatchNorm2d, (4, 3, 9, 9)),
    "float64": (nn.Conv2d(3, 4, 3, bias=False).double(), nn.BatchNorm2d, (4, 3, 9, 9)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer(name):
    layer, norm, shape = LAYERS[name]
    x = nets.images(*shape).to(layer.weight.dtype)
    model = with_statistics(nn.Sequential(copy.deepcopy(layer), norm(4), nn.ReLU()).to(x.dtype))
    architecture = copy.deepcopy(model)
    for tensor in architecture.state_dict().values():
        tensor.fill_(1)
    folded = retrofit.fold(model, example=x)
    result = restored(architecture, folded, [x])
    assert type(result[1]) is norm
    assert difference(result, model, x) < CLOSE


# --- stock classes ------------------------------------------------------------------------------

STOCK = {
    "resnet18": torchvision.models.resnet18,
    "mobilenet_v3_small": torchvision.models.mobilenet_v3_small,
    "mnasnet0_5": torchvision.models.mnasnet0_5,
    "shufflenet_v2_x0_5": torchvision.models.shufflenet_v2_x0_5,
    "timm efficientnet": lambda: timm.create_model("test_efficientnet"),
    "timm resnet": lambda: timm.create_model("test_resnet"),
}


@pytest.mark.parametrize("name", STOCK)
def test_stock_networks(name):
    torch.manual_seed(0)
    model = with_statistics(STOCK[name]())
    folds = [retrofit.fold(model).state_dict()]
    if not name.startswith("timm"):  # whose BatchNormAct2d torch.fx does not fuse
        folds.append(fuse(copy.deepcopy(model)))
    for folded in folds:
        result = restored(STOCK[name]().eval(), folded)
        STOCK[name]().load_state_dict(result.state_dict(), strict=True)
        assert difference(result, model) < CLOSE
        kinds = [type(module) for module in model.modules()]
        assert [type(module) for module in result.modules()] == kinds


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_onnx_files_of_both_exporters(dynamo, named, tmp_path):
    torch.manual_seed(0)
    model = with_statistics(torchvision.models.mobilenet_v3_small())
    source = retrofit.fold(model) if named else model  # which the exporter folds and renames
    path = tmp_path / "folded.onnx"
    options = {"dynamo": True} if dynamo else {"dynamo": False, "input_names": ["x"]}
    torch.onnx.export(source, (X,), path, verbose=False, **options)
    result = restored(torchvision.models.mobilenet_v3_small().eval(), path)
    torchvision.models.mobilenet_v3_small().load_state_dict(result.state_dict(), strict=True)
    assert difference(result, model) < CLOSE
    with pytest.raises(RetrofitError, match="neither by names nor layer by layer"):
        restored(torchvision.models.resnet18().eval(), path)


# --- what cannot be -----------------------------------------------------------------------------


def folded_state(**changes):
    state = dict(retrofit.fold(trained()).state_dict())
    return {**state, **changes}


def without(name):
    return {key: tensor for key, tensor in folded_state().items() if key != name}


class Loop(nn.Module):
    """What torch.fx cannot follow, and a run on this example does not reach."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, x):
        return self.net(x) if float(x.sum()) == 0 else x.flatten(1).mean(1, keepdim=True)


class Noisy(Net):
    def forward(self, x):
        return super().forward(x) + torch.rand(5)


NO_WEIGHT = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)).eval()
BAD = [
    (fresh, trained, "loads as it is: all of its BatchNorms are there"),
    (fresh, lambda: without("head.weight"), r"has no head\.weight, of 1 tensors"),
    (fresh, lambda: without("conv2.weight"), r"has no conv2\.weight"),
    (
        fresh,
        lambda: folded_state(**{"conv2.weight": torch.zeros(9, 8, 3, 3)}),
        r"conv2\.weight has shape \(9, 8, 3, 3\) in the state dict, and \(8, 8, 3, 3\) in the arch",
    ),
    (
        fresh,
        lambda: folded_state(**{"conv3.weight": torch.zeros(3)}),
        r"keys 1 unexpected \(conv3\.weight\)",
    ),
    (
        fresh,
        lambda: folded_state(**{"conv2.weight": torch.zeros(8, 8, 3, 3, dtype=torch.int8)}),
        r"of another kind \(conv2\.weight int8\)",
    ),
    (fresh, lambda: retrofit.fold(trained(activation=nn.Tanh)), "computes something else: output"),
    (
        fresh,
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3)).eval(),
        "it has no more layers; pass key_map",
    ),
    (fresh, dict, "a mapping without tensors"),
    (fresh, lambda: 3, "the folded network is a int: pass a module, a state dict, or the path"),
    (fresh, lambda: "nowhere.pth", r"there is no file nowhere\.pth"),
    (lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), folded_state, "has no BatchNorm to restore"),
    (lambda: "resnet18", folded_state, "restore takes an nn.Module, not a str"),
    (lambda: fresh().to("meta"), folded_state, "is on the meta device"),
    (
        lambda: copy.deepcopy(NO_WEIGHT),
        lambda: retrofit.fold(NO_WEIGHT),
        r"1 has no weight \(affine=False\)",
    ),
    (
        lambda: retrofit.add_batchnorm(
            nets.Residual().eval(), [nets.images(4, 3, 8, 8)], progress=False
        ),
        folded_state,
        "was converted: restore takes the class as it was trained",
    ),
    (
        lambda: Loop().eval(),
        lambda: {f"net.{k}": t for k, t in folded_state().items()},
        "nothing of this Loop",
    ),
    (
        lambda: Noisy().eval(),
        lambda: retrofit.fold(with_statistics(Noisy())),
        "something else|random",
    ),
]


@pytest.mark.parametrize(("architecture", "folded", "message"), BAD)
def test_what_cannot_be_restored_is_refused_by_name(architecture, folded, message):
    with pytest.raises(RetrofitError, match=message):
        restored(architecture(), folded())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "there is no data"),
        ([X[:1]], "at least 2 images"),
        ([X.where(X < 2, torch.nan)], "NaN"),
        ([X[:, :1]], "channels"),
    ],
)
def test_so_is_data_that_tells_nothing(data, message):
    with pytest.raises(RetrofitError, match=message):
        restored(fresh(), retrofit.fold(trained()).state_dict(), data)


def test_a_name_in_key_map_that_is_none():
    with pytest.raises(RetrofitError, match=r"key_map leads to 'conv9\.weight'"):
        restored(fresh(), folded_state(), key_map={"conv1.weight": "conv9.weight"})


@pytest.mark.filterwarnings("default:the statistics of:UserWarning")
def test_a_sample_that_is_too_small_is_said_to_be():
    with pytest.warns(UserWarning, match=r"the statistics of 2 images are uncertain by \d+%"):
        restored(fresh(), retrofit.fold(trained()), [nets.images(2, 3, 7, 7)])
