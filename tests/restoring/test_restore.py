"""A folded network back in its own class: by whatever it was folded, in whatever form it came.

References: the folded network, stock models that load strictly, and float64.
"""

import copy
import pickle
from functools import partial

import nets
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from normed_networks import trained
from promises import everything
from safetensors.torch import save_file
from timm.layers import BatchNormAct2d
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.nn.utils import fuse_conv_bn_eval, parametrizations
from torchvision.ops import FrozenBatchNorm2d

import retrofit
from retrofit.surgery.affine_map import batchnorms

pytestmark = pytest.mark.filterwarnings("ignore:the statistics of")  # few pictures are quick


class Small(nn.Module):
    """Layers with and without a bias, an activation that is no module, a residual sum."""

    def __init__(self, names=("stem", "first", "second")):
        super().__init__()
        self.names = names
        layers = (
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Conv2d(8, 8, 1, bias=False),
        )
        for name, layer in zip(names, layers, strict=True):
            setattr(self, name, layer)
            setattr(self, f"{name}_norm", nn.BatchNorm2d(8))
        self.relu = nn.ReLU()
        self.head = nn.Linear(8, 5)

    def normed(self, name, x):
        return getattr(self, f"{name}_norm")(getattr(self, name)(x))

    def forward(self, x):
        x = self.relu(self.normed(self.names[0], x))
        y = F.silu(self.normed(self.names[1], x))
        return self.head(F.relu(x + self.normed(self.names[2], y)).mean((2, 3)))


def by_hand(model):
    """Folded by torch.nn.utils, pair by pair."""
    folded = copy.deepcopy(model)
    for name in model.names:
        pair = getattr(folded, name), getattr(folded, f"{name}_norm")
        setattr(folded, name, fuse_conv_bn_eval(*pair))
        setattr(folded, f"{name}_norm", nn.Identity())
    return folded


def by_ao(*groups):
    return lambda model: torch.ao.quantization.fuse_modules(
        model, [list(group) for group in groups]
    )


PAIRS = [("first", "first_norm"), ("second", "second_norm")]
FOLDS = {
    "retrofit": retrofit.fold,
    "torch.fx": fuse,
    "torch.nn.utils": by_hand,
    "torch.ao": by_ao(("stem", "stem_norm"), *PAIRS),
    "torch.ao with relu": by_ao(("stem", "stem_norm", "relu"), *PAIRS),
}


def as_pth(folded, folder):
    torch.save({"state_dict": folded.state_dict()}, folder / "folded.pth")
    return folder / "folded.pth"


def as_safetensors(folded, folder):
    save_file(folded.state_dict(), folder / "folded.safetensors")
    return str(folder / "folded.safetensors")


FORMS = {
    "module": lambda folded, _: folded,
    "state dict": lambda folded, _: folded.state_dict(),
    "pth": as_pth,
    "safetensors": as_safetensors,
}


def made(make, seed):
    torch.manual_seed(seed)
    return make()


def relative(found, expected):
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max())


def restored(make, folded, x, form=None, **options):
    """Restore into an untrained model; the state dict loads into another, with equal outputs."""
    architecture = made(make, 1)
    kept = everything(architecture), copy.deepcopy(folded.state_dict())
    given = folded if form is None else form
    result = retrofit.restore(architecture, given, [x], progress=False, **options)
    assert everything(architecture) == kept[0]
    assert all(torch.equal(kept[1][key], value) for key, value in folded.state_dict().items())
    fresh = made(make, 2)
    fresh.load_state_dict(result.state_dict())
    with torch.no_grad():
        assert relative(fresh.eval()(x), folded.eval()(x)) < 5e-6
    assert [m.training for m in result.modules()] == [m.training for m in architecture.modules()]
    return result


def assert_learned(result, x):
    """Statistics are those of two passes in float64, and training gives what float64 gives."""
    seats = {seat.norm: seat for seat in retrofit.restoration_of(result).seats}
    wide = copy.deepcopy(result).double().eval()
    inputs = {}
    for norm in seats:
        wide.get_submodule(norm).register_forward_pre_hook(
            lambda _, args, norm=norm: inputs.setdefault(norm, args[0])
        )
    with torch.no_grad():
        wide(x.double())
    for norm, given in inputs.items():
        module = result.get_submodule(norm)
        axes = [axis for axis in range(given.dim()) if axis != 1]
        sigma = given.var(axes).sqrt()  # unbiased, as what BatchNorm keeps
        units = 1e-7 * module.bias.abs()  # of the mean once the bias is added, as it was folded
        off = (module.running_mean - given.mean(axes)).abs()
        assert (off <= 1e-5 * sigma + units).all(), norm
        assert ((module.running_var.sqrt() - sigma).abs() <= 1e-5 * sigma).all(), norm
    assert inputs.keys() == seats.keys()
    trained_, reference = copy.deepcopy(result).train(), copy.deepcopy(result).double().train()
    y = trained_(x)
    assert relative(y, reference(x.double())) < 1e-4
    y.square().mean().backward()
    for name, parameter in trained_.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("fold", FOLDS.values(), ids=FOLDS)
def test_however_it_was_folded_and_came(fold, form, tmp_path):
    x = nets.images(64, 3, 9, 9)
    model = trained(made(Small, 0))
    folded = fold(model)
    assert not batchnorms(folded)
    result = restored(Small, folded, x, form(folded, tmp_path))
    assert_learned(result, x)
    seats = retrofit.restoration_of(result).seats
    assert [seat.norm for seat in seats] == ["stem_norm", "first_norm", "second_norm"]
    assert [seat.bias for seat in seats] == ["running_mean", "layer", "running_mean"]


STOCK = {
    "resnet18": torchvision.models.resnet18,
    "mobilenet_v3_small": torchvision.models.mobilenet_v3_small,
    "mnasnet0_5": torchvision.models.mnasnet0_5,
    "shufflenet_v2_x0_5": torchvision.models.shufflenet_v2_x0_5,
}
TIMM = ["test_resnet", "test_efficientnet"]
LARGER = {
    "densenet121": torchvision.models.densenet121,
    "googlenet": lambda: torchvision.models.googlenet(aux_logits=False, init_weights=False),
}


def assert_stock(make, fold, form):
    x = nets.images(8, 3, 48, 48)
    model = trained(made(make, 0))
    folded = fold(model)
    result = restored(make, folded, x, FORMS[form](folded, None))
    found = retrofit.restoration_of(result)
    assert len(found.seats) + len(found.kept) == len(batchnorms(model))
    assert found.kept == tuple(batchnorms(folded))
    for path in found.kept:
        for name, tensor in model.get_submodule(path).state_dict().items():
            assert torch.equal(result.get_submodule(path).state_dict()[name], tensor)


@pytest.mark.filterwarnings("ignore:.*BatchNorms stay")
@pytest.mark.parametrize(
    ("name", "fold", "form"),
    [
        ("resnet18", fuse, "state dict"),
        ("mobilenet_v3_small", retrofit.fold, "module"),
        *(
            pytest.param(name, *how, marks=pytest.mark.slow)
            for name in ("mnasnet0_5", "shufflenet_v2_x0_5")
            for how in ((retrofit.fold, "module"), (fuse, "state dict"))
        ),
    ],
)
def test_torchvision_networks(name, fold, form):
    assert_stock(STOCK[name], fold, form)


@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize("form", ["module", "state dict"])
def test_networks_of_timm(name, form):
    assert_stock(partial(timm.create_model, name), retrofit.fold, form)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*BatchNorms stay")
@pytest.mark.parametrize(("fold", "form"), [(retrofit.fold, "module"), (fuse, "state dict")])
@pytest.mark.parametrize("make", LARGER.values(), ids=LARGER)
def test_larger_torchvision_networks(make, fold, form):
    assert_stock(make, fold, form)


PROGRAMS = {
    "exported": lambda folded, x: torch.export.export(folded, (x,)),
    "exported, as a module": lambda folded, x: torch.export.export(folded, (x,)).module(),
    "TorchScript": torch.jit.trace,
    "numpy": lambda folded, _: {k: t.numpy() for k, t in folded.state_dict().items()},
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("form", PROGRAMS.values(), ids=PROGRAMS)
def test_programs_and_arrays(form):
    x = nets.images(32, 3, 9, 9)
    folded = retrofit.fold(trained(made(Small, 0)))
    restored(Small, folded, x, form(folded, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", ["module", "state dict"])
def test_another_precision_than_the_architectures(dtype, form):
    x = nets.images(32, 3, 9, 9)
    folded = retrofit.fold(trained(made(Small, 0))).to(dtype)
    result = retrofit.restore(made(Small, 1), FORMS[form](folded, None), [x], progress=False)
    assert folded.first.weight.dtype == dtype
    assert torch.equal(result.first.weight, folded.first.weight.float())
    with torch.no_grad():
        assert relative(result.eval()(x), folded.float()(x)) < 5e-6


# --- kinds of layers and BatchNorms -------------------------------------------------------------


class MovedAxis(nn.Sequential):
    """What reaches its BatchNorm has no layout that one of ours would be exact in."""

    def __init__(self):
        super().__init__(nn.Linear(9, 6), nn.BatchNorm1d(6))

    def forward(self, x):
        return self[1](self[0](x.mean(1)).transpose(1, 2))


def of(*layers):
    return lambda: nn.Sequential(*(layer() for layer in layers))


CONV = lambda: nn.Conv2d(3, 6, 3, bias=False)  # noqa: E731
KINDS = {
    "timm": of(CONV, lambda: BatchNormAct2d(6, eps=1e-3, momentum=0.03, act_layer=nn.PReLU)),
    "SyncBatchNorm": of(CONV, lambda: nn.SyncBatchNorm(6)),
    "frozen": of(CONV, lambda: FrozenBatchNorm2d(6, eps=1e-4)),
    "no momentum": of(CONV, lambda: nn.BatchNorm2d(6, eps=1e-2, momentum=None)),
    "transposed": of(
        lambda: nn.ConvTranspose2d(3, 6, 3, groups=3, bias=False), lambda: nn.BatchNorm2d(6)
    ),
    "weight norm": of(lambda: parametrizations.weight_norm(CONV()), lambda: nn.BatchNorm2d(6)),
    "Linear": of(nn.Flatten, lambda: nn.Linear(243, 6, bias=False), lambda: nn.BatchNorm1d(6)),
    "Linear, whose channels are moved": MovedAxis,
    "Linear of the last axis": of(
        lambda: nn.Conv2d(3, 6, 3), nn.Flatten, lambda: nn.Linear(294, 4), lambda: nn.BatchNorm1d(4)
    ),
}  # fmt: skip
OTHER_AXES = {
    "1d": (of(lambda: nn.Conv1d(3, 6, 3, bias=False), lambda: nn.BatchNorm1d(6)), (3, 9)),
    "3d": (of(lambda: nn.Conv3d(3, 6, 2), lambda: nn.BatchNorm3d(6)), (3, 4, 4, 4)),
}
ALL_KINDS = {name: (make, (3, 9, 9)) for name, make in KINDS.items()} | OTHER_AXES


@pytest.mark.parametrize("form", ["module", "state dict"])
@pytest.mark.parametrize(("make", "shape"), ALL_KINDS.values(), ids=ALL_KINDS)
def test_kinds_of_layers_and_batchnorms(make, shape, form):
    x = nets.images(32, *shape)
    folded = retrofit.fold(trained(made(make, 0)), example=x)
    result = restored(make, folded, x, FORMS[form](folded, None))
    (seat,) = retrofit.restoration_of(result).seats
    before, after = make().get_submodule(seat.norm), result.get_submodule(seat.norm)
    assert type(before) is type(after)
    assert str(before) == str(after)  # eps, momentum, activation
    if not isinstance(after, (nn.SyncBatchNorm, FrozenBatchNorm2d)):  # the one trains on GPUs alone
        assert_learned(result, x)


def test_float64_is_restored_in_float64():
    def make():
        return KINDS["no momentum"]().double()

    x = nets.images(32, 3, 9, 9).double()
    folded = retrofit.fold(trained(made(make, 0)))
    result = restored(make, folded, x)
    assert result[1].running_var.dtype == torch.float64
    with torch.no_grad():
        assert relative(result.eval()(x), folded(x)) < 1e-14


class Twice(nn.Module):
    """A block under two names, called twice."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3))
        self.alias = self.block

    def forward(self, x):
        return self.alias(F.gelu(self.block(x)))


class OneNormUnderTwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, bias=False)
        self.norm = self.alias = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.alias(self.conv(x))


@pytest.mark.parametrize("form", ["module", "state dict"])
@pytest.mark.parametrize("make", [Twice, OneNormUnderTwoNames])
def test_shared_layers(make, form):
    x = nets.images(32, 3, 9, 9)
    folded = retrofit.fold(trained(made(make, 0)))
    result = restored(make, folded, x, FORMS[form](folded, None))
    assert len(retrofit.restoration_of(result).seats) == 1
    assert result.alias is (result.block if make is Twice else result.norm)


def test_a_batchnorm_that_was_not_folded_is_taken_over():
    make = of(CONV, lambda: nn.BatchNorm2d(6), nn.ReLU, lambda: nn.BatchNorm2d(6))
    x = nets.images(32, 3, 9, 9)
    model = trained(made(make, 0))
    with pytest.warns(UserWarning, match="1 of 2 BatchNorms stay"):
        folded = retrofit.fold(model)
    result = restored(make, folded, x)
    assert retrofit.restoration_of(result).kept == ("3",)
    for name, tensor in model[3].state_dict().items():
        assert torch.equal(result[3].state_dict()[name], tensor)


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fold", FOLDS.values(), ids=FOLDS)
def test_layers_under_other_names_are_matched_in_the_order_of_execution(fold):
    other = trained(made(lambda: Small(("a", "b", "c")), 0))
    groups = [("a", "a_norm"), ("b", "b_norm"), ("c", "c_norm")]
    folded = by_ao(*groups)(other) if fold in list(FOLDS.values())[3:] else fold(other)
    x = nets.images(32, 3, 9, 9)
    with_names = restored(Small, folded, x)
    same = restored(Small, retrofit.fold(trained(made(Small, 0))), x)
    for key, tensor in same.state_dict().items():
        torch.testing.assert_close(with_names.state_dict()[key], tensor, rtol=1e-4, atol=1e-5)


class Branches(nn.Module):
    """Two branches of different layers; `first` is the one that runs first."""

    def __init__(self, names="ab", first=0):
        super().__init__()
        self.names, self.first = names, first
        for name, size in zip(names, (1, 3), strict=True):
            conv = nn.Conv2d(3, 6, size, padding=size // 2, bias=False)
            setattr(self, name, nn.Sequential(conv, nn.BatchNorm2d(6)))

    def forward(self, x):
        found = {i: getattr(self, self.names[i])(x) for i in (self.first, 1 - self.first)}
        return torch.cat([found[0], found[1]], 1)


def test_branches_that_run_in_another_order():
    x = nets.images(32, 3, 9, 9)
    folded = retrofit.fold(trained(made(lambda: Branches("cd", first=1), 0)))
    restored(Branches, folded, x)


def test_key_map_gives_a_state_dict_its_names():
    folded = retrofit.fold(trained(made(lambda: Small(("a", "b", "c")), 0)))
    x = nets.images(32, 3, 9, 9)
    names = dict(zip(("a", "b", "c"), Small().names, strict=True))
    key_map = {f"{a}.{t}": f"{b}.{t}" for a, b in names.items() for t in ("weight", "bias")}
    result = restored(Small, folded, x, folded.state_dict(), key_map=key_map)
    torch.testing.assert_close(result.stem.weight, folded.a.weight)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.net."])
@pytest.mark.parametrize("fold", [FOLDS["retrofit"], FOLDS["torch.ao with relu"]])
def test_prefixes_of_wrappers(fold, prefix):
    folded = fold(trained(made(Small, 0)))
    x = nets.images(32, 3, 9, 9)
    state = {prefix + key: tensor for key, tensor in folded.state_dict().items()}
    restored(Small, folded, x, state)


@pytest.mark.parametrize("prefix", ["", "module.", "0."])
def test_fused_modules_in_a_sequential_whose_names_are_numbers(prefix):
    make = of(CONV, lambda: nn.BatchNorm2d(6), nn.ReLU, lambda: nn.Conv2d(6, 4, 1),
              lambda: nn.BatchNorm2d(4))  # fmt: skip
    folded = by_ao(("0", "1", "2"), ("3", "4"))(trained(made(make, 0)))
    assert "0.0.weight" in folded.state_dict()
    state = {prefix + key: tensor for key, tensor in folded.state_dict().items()}
    restored(make, folded, nets.images(32, 3, 9, 9), state)


# --- data, and how the network is called --------------------------------------------------------


class TwoInputs(nn.Module):
    """torch.fx cannot follow it, and it takes two arguments."""

    def __init__(self):
        super().__init__()
        self.a, self.a_norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.b, self.b_norm = nn.Linear(9, 4, bias=False), nn.BatchNorm1d(4)

    def forward(self, x, *, y):
        if y.sum() > 1e9:
            return y
        return (
            self.a_norm(self.a(x)).mean((2, 3))
            + self.b_norm(self.b(y.mean(2).flatten(0, 1)))[: len(x)]
        )


def call_with_both(model, batch):
    return model(batch, y=batch * 2)


def test_forward_fn_calls_the_network_everywhere():
    x = nets.images(32, 3, 9, 9)
    model = trained(made(TwoInputs, 0))
    folded = retrofit.fold(model, example={"x": x, "y": x})
    assert not batchnorms(folded)
    for form in (folded, folded.state_dict()):
        result = retrofit.restore(
            made(TwoInputs, 1), form, [x], forward_fn=call_with_both, progress=False
        )
        with torch.no_grad():
            expected = call_with_both(folded, x)
            assert relative(call_with_both(result.eval(), x), expected) < 5e-6


def test_another_default_device_changes_nothing():
    x = nets.images(32, 3, 9, 9)
    architecture, folded = made(Small, 1), retrofit.fold(trained(made(Small, 0)))
    other = retrofit.fold(trained(made(lambda: Small(("a", "b", "c")), 0)))
    for form in (folded, folded.state_dict(), other):
        expected = retrofit.restore(architecture, form, [x], progress=False).state_dict()
        with torch.device("meta"):
            found = retrofit.restore(architecture, form, [x], progress=False).state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())


def test_data_may_be_an_iterator_and_max_images_ends_it():
    x = nets.images(96, 3, 9, 9)
    folded = retrofit.fold(trained(made(Small, 0)))
    whole = retrofit.restore(made(Small, 1), folded, [x[:64]], progress=False)
    parts = retrofit.restore(
        made(Small, 1), folded, iter(x.split(32)), progress=False, max_images=64
    )
    for key, tensor in whole.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            torch.testing.assert_close(parts.state_dict()[key], tensor, rtol=1e-5, atol=1e-6)
    assert retrofit.restoration_of(parts).images == 64
    assert parts.stem_norm.num_batches_tracked == 2


# --- what is said of it -------------------------------------------------------------------------


def test_the_restoration_is_told_and_survives_a_pickle():
    x = nets.images(32, 3, 9, 9)
    folded = retrofit.fold(trained(made(Small, 0)))
    result = restored(Small, folded, x)
    found = retrofit.restoration_of(result)
    assert found == retrofit.restoration_of(pickle.loads(pickle.dumps(result)))  # noqa: S301
    assert found == retrofit.restoration_of(copy.deepcopy(result))
    assert retrofit.restoration_of(folded) is None
    assert (found.images, found.compared, found.kept) == (32, 32, ())
    assert found.worst in found.seats
    assert found.relative < 5e-6
    lines = str(found).splitlines()
    assert lines[0].split() == ["BatchNorm", "layer", "channels", "folded", "bias", "difference"]
    assert any(line.split()[:4] == ["first_norm", "first", "8", "layer"] for line in lines)
    assert "3 BatchNorms restored; statistics of 32 images (standard error" in lines[-1]
    with pytest.raises(retrofit.RetrofitError, match=r"expected an nn\.Module, not a OrderedDict"):
        retrofit.restoration_of(folded.state_dict())


# --- what comes back ----------------------------------------------------------------------------


def test_class_eps_momentum_mode_and_flags_are_those_of_the_architecture():
    def make():
        model = Small().train()
        model.stem_norm = nn.SyncBatchNorm(8, eps=1e-3, momentum=0.01)
        model.head.requires_grad_(requires_grad=False)
        return model

    result = restored(make, retrofit.fold(trained(made(make, 0))), nets.images(32, 3, 9, 9))
    assert type(result.stem_norm) is nn.SyncBatchNorm
    assert (result.stem_norm.eps, result.stem_norm.momentum) == (1e-3, 0.01)
    assert result.training
    assert not result.head.weight.requires_grad
    assert result.stem.weight.requires_grad


def test_the_result_can_be_folded_again_and_saved(tmp_path):
    x = nets.images(32, 3, 9, 9)
    folded = retrofit.fold(trained(made(Small, 0)))
    result = restored(Small, folded, x).eval()
    assert relative(retrofit.fold(result)(x), folded(x)) < 5e-6
    retrofit.save(result, tmp_path / "restored.safetensors")
    loaded = retrofit.load(tmp_path / "restored.safetensors", made(Small, 1).eval())
    assert torch.equal(loaded(x), result(x))


# --- outputs that tell nothing ------------------------------------------------------------------


class Chosen(Small):
    """As a detector: what comes first hangs on the last bit."""

    def forward(self, x):
        y = super().forward(x)
        return y.flatten()[torch.frac(y * 1e6).abs().flatten().argsort()]


class Found(Small):
    """As a detector that finds nothing."""

    def forward(self, x):
        y = super().forward(x)
        return {"boxes": y[y > 1e9], "scores": y.abs()[y > 1e9]}


@pytest.mark.parametrize("make", [Chosen, Found])
@pytest.mark.parametrize("form", ["module", "state dict"])
def test_where_outputs_tell_nothing_the_batchnorms_do(make, form):
    x = nets.images(32, 3, 9, 9)
    model = trained(made(make, 0))
    folded = retrofit.fold(model, example=x)
    given = FORMS[form](folded, None)
    result = retrofit.restore(made(make, 1), given, [x], progress=False)
    found = retrofit.restoration_of(result)
    assert found.outputs_jump
    assert found.worst.relative < 5e-6
    assert "BatchNorms are equal to" in str(found)
    with torch.no_grad():  # the class without the choice computes the same
        assert relative(Small.forward(result.eval(), x), Small.forward(folded, x)) < 5e-6


def test_an_architecture_is_not_proved_by_outputs_that_jump():
    class OtherActivation(Chosen):
        def __init__(self):
            super().__init__()
            self.relu = nn.Tanh()

    x = nets.images(32, 3, 9, 9)
    folded = retrofit.fold(trained(made(OtherActivation, 0)), example=x)
    with pytest.warns(UserWarning, match="whether the architecture computes .* cannot be told"):
        retrofit.restore(made(Chosen, 1), folded, [x], progress=False)


def test_code_that_looks_at_its_batchnorms_is_refused():
    class Looks(Small):
        def forward(self, x):
            return super().forward(x) + (1 if isinstance(self.stem_norm, nn.BatchNorm2d) else 0)

    x = nets.images(32, 3, 9, 9)
    folded = by_hand(trained(made(Looks, 0)))
    with pytest.raises(retrofit.RetrofitError):
        retrofit.restore(made(Looks, 1), folded.state_dict(), [x], progress=False)
