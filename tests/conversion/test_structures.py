"""What surrounds a network: nested inputs and outputs, bigger models, wrappers; bad input."""

import copy
import dataclasses
import threading
from collections import OrderedDict
from types import SimpleNamespace
from typing import NamedTuple

import nets
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import retrofit
from retrofit import Plan, RetrofitError

X = nets.images(8, 3, 16, 16)


def retrofitted(model, *batches, **options):
    return retrofit.add_batchnorm(model, batches or [X], progress=False, **options)


def batchnorms(model):
    return [path for path, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]


@dataclasses.dataclass
class Result:
    logits: torch.Tensor
    hidden: list
    loss: object = None


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


class Wrapped(OrderedDict):
    """A mapping of its own class, as in transformers."""


OUTPUTS = {
    "dict": lambda x: {"out": x, "aux": [x + 1]},
    "tuple": lambda x: (x, (x + 1, None)),
    "named tuple": lambda x: Pair(x, x + 1),
    "dataclass": lambda x: Result(x, [x + 1]),
    "mapping": lambda x: Wrapped(a=x, b=x + 1),
    "namespace": lambda x: SimpleNamespace(a=x, inner=SimpleNamespace(b=x + 1)),
    "detections": lambda x: [{"boxes": y.flatten(1), "scores": y.mean((1, 2))} for y in x],
}


class Structured(nn.Module):
    """Two inputs by name, and any kind of output."""

    def __init__(self, kind):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.head = nn.Conv2d(4, 5, 1)
        self.kind = kind

    def forward(self, picture, other, *, scale=1.0):
        return OUTPUTS[self.kind](self.head(F.relu(self.one(picture) + self.two(other)) * scale))


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("named", [False, True], ids=["tuple", "by name"])
def test_any_structure_goes_in_and_comes_out(kind, named):
    torch.manual_seed(0)
    model = Structured(kind).eval()
    batch = {"other": -X, "picture": X, "scale": 0.5, "label": 3} if named else (X, -X, "label")
    converted = retrofitted(model, batch)
    assert batchnorms(converted) == ["one.bn", "two.bn"]
    report = retrofit.verify(model, converted, [batch])
    assert report.exact
    assert report.images == len(X)
    assert len(report.outputs) == (2 * len(X) if kind == "detections" else 2)
    with torch.no_grad():
        converted.two.bn.bias.add_(0.1)
    report = retrofit.verify(model, converted, [batch])
    assert not any(output.exact for output in report.outputs)
    assert all(output.name in str(report) for output in report.outputs)


def test_the_report_says_where_in_the_output_a_tensor_stands():
    model = Structured("dataclass").eval()
    report = retrofit.verify(model, copy.deepcopy(model), [(X, X)])
    assert [output.name for output in report.outputs] == ["output.logits", "output.hidden[0]"]


def test_a_batch_that_lacks_an_input_is_refused_by_name():
    with pytest.raises(RetrofitError, match="Structured takes picture and other: give batches"):
        retrofitted(Structured("dict"), X)


# --- a part of a bigger model ------------------------------------------------------------------


class Detector(nn.Module):
    """A backbone, and a head that fx cannot trace."""

    def __init__(self):
        super().__init__()
        self.backbone = nets.root_sequential()
        self.neck = nn.Conv2d(6, 6, 1)
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, images: list[torch.Tensor]):
        x = F.relu(self.neck(self.backbone(torch.stack(images))))
        return [{"score": y} for y in self.head(x) if y.numel() and y.sum() < 1e9]


def test_only_the_backbone_of_a_detector():
    torch.manual_seed(0)
    model = Detector().eval()
    data = [(list(X), "targets")]
    converted = retrofitted(model, *data, include="backbone.*")
    assert batchnorms(converted) == ["backbone.0.bn", "backbone.2.bn"]
    assert retrofit.verify(model, converted, data).exact


@pytest.mark.parametrize("part", ["model", "backbone"])
def test_in_place_all_references_stay_valid(part):
    torch.manual_seed(0)
    model = Detector().train()
    model.backbone[1].eval()
    expected = [y["score"] for y in copy.deepcopy(model).eval()(list(X))]
    trainer = SimpleNamespace(model=model, first=model.backbone[0].weight, neck=model.neck)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    if part == "model":
        result = retrofitted(model, list(X), include="backbone.*", inplace=True)
        assert result is model
    else:
        result = retrofitted(model.backbone, X, include="*", inplace=True)
        assert result is model.backbone

    assert batchnorms(trainer.model) == ["backbone.0.bn", "backbone.2.bn"]
    assert trainer.model.neck is trainer.neck
    assert trainer.model.backbone[0].conv.weight is trainer.first
    assert model.training
    assert model.backbone[0].bn.training
    assert not model.backbone[1].training
    modes = [module.training for module in model.modules()]
    outputs = [y["score"] for y in model.eval()(list(X))]
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert [m.training for m in model.modules()] != modes

    model.train()(list(X))[0]["score"].sum().backward()
    optimizer.step()
    assert trainer.first.grad is not None
    assert model.backbone[2].bn.weight.grad is not None


def test_in_place_nothing_changes_when_something_is_wrong():
    model = Detector().eval()
    before, text = copy.deepcopy(model.state_dict()), str(model)
    bad = X.clone()
    bad[2, 0, 3, 3] = torch.nan
    with pytest.raises(RetrofitError, match=r"NaN or Inf at backbone\.0 for image 2 of the data"):
        retrofitted(model, list(bad), inplace=True)
    assert str(model) == text
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


# --- wrappers ----------------------------------------------------------------------------------


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group", "without_gpus")
@pytest.mark.parametrize(
    ("wrap", "kind", "inside"),
    [
        (nn.DataParallel, "DataParallel", "module"),
        (nn.parallel.DistributedDataParallel, "DistributedDataParallel", "module"),
        (torch.optim.swa_utils.AveragedModel, "AveragedModel", "module"),
        (lambda m: torch.compile(m, backend="eager"), "OptimizedModule", "_orig_mod"),
    ],
    ids=["DataParallel", "DDP", "AveragedModel", "compile"],
)
def test_a_wrapper_is_named_and_what_is_inside_works(wrap, kind, inside):
    model = nets.build(nets.Residual)
    wrapped = wrap(model)
    message = rf"this model is a {kind} around a Residual: .*\(model\.{inside}\)"
    for act in (retrofit.plan, retrofit.prepare, retrofit.insert, retrofit.fold):
        with pytest.raises(RetrofitError, match=message):
            act(wrapped)
    converted = retrofitted(getattr(wrapped, inside).eval())
    assert retrofit.verify(wrapped, wrap(converted), [X]).exact


def test_models_compiled_before_are_compared_at_every_site():
    model = nets.build(nets.Residual)
    converted = retrofitted(model)
    for one in (model, converted):
        one.compile(backend="eager")
        one(X)
    report = retrofit.verify(model, converted, [X])
    assert report.exact
    assert len(report.sites) == 3
    with torch.no_grad():
        converted.stem.bn.bias.add_(1)
    assert not retrofit.verify(model, converted, [X]).sites[0].exact


def test_a_wrapper_inside_a_model_is_named_with_its_path():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.DataParallel(nets.root_sequential()))
    with pytest.raises(RetrofitError, match=r"^2 of this Sequential is a DataParallel"):
        retrofit.plan(model)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_torchscript_is_refused_by_name():
    scripted = torch.jit.trace(nets.build(nets.Residual), X)
    with pytest.raises(RetrofitError, match="TorchScript module, whose layers are fixed"):
        retrofit.plan(scripted)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("looks", [False, True], ids=["traced", "watched"])
def test_a_scripted_layer_inside_is_one_call(looks):
    class Scripted(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
            self.act = torch.jit.script(nn.ReLU())

        def forward(self, x):
            if looks and x.sum() > 1e9:
                return x
            return self.act(self.two(self.act(self.one(x))))

    model = nets.build(Scripted)
    converted = retrofitted(model)
    assert batchnorms(converted) == ["one.bn", "two.bn"]
    assert retrofit.verify(model, converted, [X]).exact


@pytest.mark.parametrize("layout", ["native", "graph"])
def test_a_convolution_left_in_train_mode_does_not_put_its_batchnorm_there(layout):
    model = nets.build(nets.Residual)
    model.body[0].train()  # as timm's reparameterize_model does
    converted = retrofitted(model, layout=layout)
    with torch.no_grad():
        assert torch.equal(converted(X), model(X))


# --- parametrized weights ----------------------------------------------------------------------


class Symmetric(nn.Module):
    def forward(self, weight):
        return (weight + weight.flip(-1)) / 2


def parametrized():
    model = nets.build(nets.root_sequential)
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    parametrizations.weight_norm(model[2])
    return model


def weight_normed():
    model = nets.build(nets.root_sequential)
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(model[0])
    return model


def spectral():
    model = nets.build(nets.root_sequential)
    parametrizations.spectral_norm(model[0])
    return model.eval()


@pytest.mark.filterwarnings("ignore::FutureWarning:torch")
@pytest.mark.parametrize("layout", ["native", "graph"])
@pytest.mark.parametrize("make", [parametrized, weight_normed, spectral])
def test_computed_weights_stay_computed(make, layout):
    model = make()
    converted = retrofitted(model, layout=layout)
    assert len(batchnorms(converted)) == 2
    x = nets.images(3, 3, 17, 15, seed=2)
    with torch.no_grad():
        assert torch.equal(converted(x), model(x))
    folded, state = retrofit.fold(converted).state_dict(), model.state_dict()
    assert folded.keys() == state.keys()
    assert all(torch.equal(folded[key], value) for key, value in state.items())
    converted.train()(X).sum().backward()
    assert all(p.grad is not None for p in converted.parameters())


def test_a_trained_batchnorm_after_a_computed_weight_is_not_folded():
    converted = retrofitted(parametrized())
    with torch.no_grad():
        converted[0].bn.bias.add_(1)
    with pytest.raises(RetrofitError, match="the weight of 0 is parametrized: remove"):
        retrofit.fold(converted)


# --- what goes wrong ---------------------------------------------------------------------------


def test_a_random_original_is_named_as_such():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return F.dropout(F.relu(self.conv(x)))  # training=True, whatever the mode

    model = Noisy().eval()
    converted = retrofitted(model)
    with pytest.raises(RetrofitError, match="this Noisy is random in eval mode"):
        retrofit.verify(model, converted, [X])


def test_a_wrong_conversion_of_a_deterministic_model_is_a_parity_failure():
    model = nets.build(nets.Residual)
    converted = retrofitted(model)
    with torch.no_grad():
        converted.stem.bn.bias.add_(0.1)
    assert not retrofit.verify(model, converted, [X]).exact


@pytest.mark.parametrize(
    "change",
    [
        {"decision": "insert"},  # of a site that the plan skipped
        {"decision": "insert", "norm": "read.bn", "layer": "read.conv"},
        {"decision": "insert", "host": "gone", "norm": "gone.bn", "layer": "gone"},
        {"decision": "insert", "host": "read", "norm": "plain.bn", "layer": "read.conv"},
        {"decision": "insert", "host": "read", "norm": "read.bn", "layer": "plain.conv",
         "channels": 5},
    ],
    ids=["only insert", "no host", "no such module", "wrong place", "wrong channels"],
)  # fmt: skip
def test_a_plan_edited_to_an_impossible_site_is_refused(change):
    model = nets.build(nets.ReadsItsConv)
    plan = retrofit.plan(model)
    sites = [dataclasses.replace(s, **change) if s.path == "read" else s for s in plan.sites]
    edited = dataclasses.replace(plan, sites=tuple(sites))
    assert Plan.from_json(edited.to_json()) == edited
    text = str(model)
    with pytest.raises(RetrofitError, match="the plan does not fit this ReadsItsConv"):
        retrofit.prepare(model, edited)
    assert str(model) == text


def test_a_function_edited_into_a_native_plan_is_refused():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

        def forward(self, x):
            return F.relu(F.conv2d(x, self.weight))

    plan = retrofit.plan(Functional())
    site = dataclasses.replace(plan.sites[0], decision="insert", norm="conv2d_bn")
    with pytest.raises(RetrofitError, match="conv2d is not a conv2d with 4 output channels"):
        retrofit.prepare(Functional(), dataclasses.replace(plan, sites=(site,)))


def test_converting_again_changes_nothing(tmp_path):
    model = nets.build(nets.Residual)
    converted = retrofitted(model)
    retrofit.save(converted, tmp_path / "model.safetensors")
    loaded = retrofit.load(tmp_path / "model.safetensors", model)
    for earlier in (converted, loaded):
        with pytest.warns(UserWarning, match="no BatchNorm is added"):
            again = retrofitted(earlier)
        assert str(again) == str(earlier)
        before, after = earlier.state_dict(), again.state_dict()
        assert list(before) == list(after)
        assert all(torch.equal(before[key], value) for key, value in after.items())
        assert str(retrofit.fold(again)) == str(model)


class CachedBias(nn.Module):
    """Keeps what it has computed of a parameter, as timm's LeViT keeps its attention biases."""

    def __init__(self):
        super().__init__()
        self.conv, self.scale = nn.Conv2d(3, 4, 3), nn.Parameter(torch.ones(4))
        self.last, self.cache = None, {"by size": [{}]}

    def forward(self, x):
        table = self.cache["by size"][0]
        if x.shape[-1] not in table:
            table[x.shape[-1]] = self.scale[:, None, None] * 0.5
        self.last = self.conv(x).relu() + table[x.shape[-1]]
        return self.last


def test_what_a_forward_pass_has_cached_with_gradients_is_copied_without_them():
    model, x = CachedBias().eval(), nets.images(4, 3, 9, 9)
    expected = model(x)
    converted = retrofit.add_batchnorm(model, [x], progress=False, include="conv")
    assert torch.equal(converted(x), expected)
    assert model.last is expected
    assert expected.requires_grad
    assert model.cache["by size"][0][9].grad_fn is not None
    assert not converted.cache["by size"][0][9].requires_grad


class Holding(nn.Module):
    def __init__(self, thing):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.body[1].thing = thing

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize(
    ("thing", "kind"), [(threading.Lock(), "lock"), ((x for x in "a"), "generator")]
)
def test_what_does_not_copy_is_named_by_the_place_where_it_is(thing, kind):
    with pytest.raises(
        RetrofitError, match=rf"^this Holding .* delete its attribute body\.1\.thing, a {kind}, and"
    ):
        retrofit.plan(Holding(thing))
