"""Models that torch.fx cannot follow: planned from one real run, by the same rules."""

import copy
import functools
import random
from concurrent.futures import ThreadPoolExecutor

import nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from decisions import decisions
from torch import nn

import retrofit
from retrofit import RetrofitError

X = nets.images(6, 3, 16, 16)


def inserted(model, **options):
    return [s.path for s in retrofit.plan(model, **options).inserted]


class Branching(nn.Module):
    """What it does depends on the values it sees."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.bright = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU())
        self.dark = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU())
        self.normed = nn.Conv2d(6, 6, 1)
        self.norm = nn.GroupNorm(2, 6)
        self.squeeze = nn.Conv2d(6, 2, 1)
        self.excite = nn.Conv2d(2, 6, 1)
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = self.bright(x) if x.sum() > 0 else self.dark(x)
        x = F.relu(self.norm(self.normed(x)))
        gate = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1))))
        return self.head(x * torch.sigmoid(gate)).softmax(1)


def test_the_rules_are_those_of_traced_models():
    assert decisions(Branching(), example=X) == {
        "stem": ("insert", "no norm follows"),
        "bright.0": ("insert", "no norm follows"),
        "normed": ("skip", "already normalised by norm"),
        "squeeze": (
            "skip",
            "its feature map is a single pixel: training would fail on a batch of one",
        ),
        "excite": (
            "skip",
            "its feature map is a single pixel: training would fail on a batch of one",
        ),
        "head": ("skip", "output head"),
        "dark.0": ("skip", "not called on the example"),
    }


@pytest.mark.parametrize("net", nets.IMAGE_NETS, ids=lambda net: net.__name__)
def test_a_run_gives_the_plan_that_torch_fx_gives(net):
    """The same network, made impossible to trace by a look at its input."""

    class Looking(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x if x.sum() < 1e9 else -x)

    traced = retrofit.plan(nn.Sequential(nets.build(net)), example=X)
    watched = retrofit.plan(Looking(nets.build(net)), example=X)
    assert watched.last is None
    assert traced.last is not None
    assert [(s.path, s.decision, s.reason) for s in traced.sites] == [
        (s.path.replace("net", "0"), s.decision, s.reason.replace("net.", "0."))
        for s in watched.sites
    ]


def test_converted_from_its_first_batch_it_computes_the_same_and_folds_back():
    model = Branching().eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match=r"1 layer of Branching got no BatchNorm, .* \(dark\.0\)"):
        converted = retrofit.add_batchnorm(model, [X], progress=False)
    assert isinstance(converted.stem.bn, nn.BatchNorm2d)
    assert retrofit.verify(model, converted, [nets.images(5, 3, 12, 14)]).exact
    folded = retrofit.fold(converted).state_dict()
    assert list(folded) == list(before)
    assert all(torch.equal(before[key], value) for key, value in folded.items())


class Factor(Branching):
    """A constant that depends on the types of its layers, and which no call shows."""

    def forward(self, x):
        return super().forward(x) * (1 + isinstance(self.bright[0], nn.Conv2d))


def test_a_run_whose_result_depends_on_the_types_of_layers_is_refused():
    with pytest.raises(RetrofitError, match="does something else once layers are inserted"):
        retrofit.plan(Factor(), example=X)


class OfTwo(Branching):
    def forward(self, x, y):
        return super().forward(x + y)


def test_an_example_that_lacks_an_input_is_refused_by_its_name():
    with pytest.raises(RetrofitError, match="OfTwo takes x and y"):
        retrofit.plan(OfTwo(), example=X)


def test_a_site_the_data_does_not_reach_is_named_or_left_out():
    model = nn.Sequential(Branching(), nn.ReLU()).eval()
    model[0].stem.requires_grad_(False)
    plan = retrofit.plan(model, example=X, include="*.bright.0")
    prepared = retrofit.prepare(model, plan)
    with torch.no_grad():
        model[0].stem.weight.zero_()
        model[0].stem.bias.fill_(-1)  # nothing is bright from now on
    with pytest.warns(UserWarning, match="none of the observed layers got any"):
        retrofit.calibrate(prepared, [X], progress=False)
    with pytest.raises(RetrofitError, match=r"0\.bright\.0 saw no data.*--skip-unused"):
        retrofit.convert(prepared)
    with pytest.warns(UserWarning, match="no BatchNorm is added"):
        converted = retrofit.convert(prepared, skip_unused=True)
    assert str(converted) == str(model)
    assert retrofit.verify(model, converted, [X]).exact


def test_left_out_sites_of_a_renumbered_sequential_leave_no_gap():
    class Choosing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*nets.build(nets.root_sequential))

        def forward(self, x):
            return self.layers(x) if x.mean() > 0 else x

    model = Choosing().eval()
    plan = retrofit.plan(model, example=X.abs(), renumber="layers")
    prepared = retrofit.prepare(model, plan)
    with torch.no_grad():
        prepared.layers[:3](X)  # a loop that stops early
    converted = retrofit.convert(prepared, skip_unused=True)
    names = [type(layer).__name__ for layer in converted.layers]
    assert names == ["Conv2d", "BatchNorm2d", "ReLU", "Conv2d", "ReLU", "MaxPool2d"]
    assert retrofit.verify(model, converted, [X.abs()]).exact
    assert str(retrofit.fold(converted)) == str(model)


def test_without_an_example_the_largest_traceable_parts_are_planned():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
            self.own = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            x = self.body(x)
            return self.own(x) if x.sum() > 0 else x

    found = decisions(Outer())
    assert found["body.0"] == ("insert", "no norm follows")
    assert found["body.2"] == (
        "skip",
        "its values go where torch.fx cannot follow: pass example (--data)",
    )
    assert found["own"][1].startswith("inside code, which torch.fx cannot trace (test_untraceable")


def test_a_sequential_whose_caller_cannot_be_traced_is_renumbered_only_with_an_example():
    class Indexing(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nets.build(nets.root_sequential)

        def forward(self, x):
            return self.features[:2](x) if x.sum() > 1e9 else self.features(x)

    with pytest.raises(RetrofitError, match=r"cannot renumber features: .*pass example"):
        retrofit.plan(Indexing(), renumber="features")
    plan = retrofit.plan(Indexing(), renumber="features", example=X)
    assert [site.norm for site in plan.inserted] == ["features.1", "features.4"]


def test_a_forward_fn_says_how_the_model_is_run():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x, which):
            return F.relu(self.one(x) if which == "one" else self.two(x)).flatten(1)

    def run(model, batch):
        model(batch["pictures"], "two")  # returns nothing

    data = [{"pictures": X, "name": "a"}]
    assert inserted(Two(), example=data[0], forward_fn=run) == ["two"]
    with pytest.warns(UserWarning, match=r"got no BatchNorm, .* not reach it \(one\)"):
        converted = retrofit.add_batchnorm(Two(), data, forward_fn=run, progress=False)
    assert [n for n, m in converted.named_modules() if isinstance(m, nn.BatchNorm2d)] == ["two.bn"]


def test_layers_for_training_alone_are_told_too():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.aux = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            x = F.relu(self.main(x))
            found = self.head(x.mean((2, 3)))
            return (found, F.relu(self.aux(x)).mean((2, 3))) if self.training else found

    with pytest.warns(UserWarning, match=r"1 layer of Auxiliary got no BatchNorm, .* \(aux\)"):
        retrofit.add_batchnorm(Auxiliary(), [X], progress=False)
    normed = Auxiliary()
    normed.aux = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    retrofit.add_batchnorm(normed, [X], progress=False)  # it has one, and says nothing
    only = retrofit.add_batchnorm(Auxiliary(), [X], exclude="aux", progress=False)  # not asked for
    assert isinstance(only.main.bn, nn.BatchNorm2d)


OWN = np.random.default_rng(0)


def from_numpy():
    return np.random.rand()  # noqa: NPY002


def from_a_generator_of_its_own():
    return OWN.random()


def from_torch():
    return torch.rand(()).item()


class Masking(nn.Module):
    """Masks its input at random in train mode, as speech models do."""

    def __init__(self, draw):
        super().__init__()
        self.conv, self.head, self.draw = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), draw

    def forward(self, x):
        if self.training:
            x = x * (torch.arange(x.shape[-1]) >= int(self.draw() * x.shape[-1]))
        return self.head(F.relu(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize(
    "draw", [from_numpy, random.random, from_torch, from_a_generator_of_its_own]
)
def test_what_draws_at_random_in_train_mode_does_not_do_something_else(draw):
    model = Masking(draw)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    assert inserted(model, example=X) == ["conv"]
    assert random.getstate() == states[0]
    assert all(map(np.array_equal, np.random.get_state(), states[1]))  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


def test_an_example_that_the_model_rejects_shows_its_own_message():
    with pytest.raises(RetrofitError, match=r"Branching does not run .* 3 channels, but got 5"):
        retrofit.plan(Branching(), example=torch.randn(2, 5, 16, 16))


def test_a_run_leaves_no_trace(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _: pytest.fail("seeds other devices"))
    model = Branching().train()
    call, state = nn.Module.__call__, torch.get_rng_state()
    with pytest.raises(RetrofitError):
        retrofit.plan(model, example=torch.randn(2, 5, 16, 16))
    torch.set_rng_state(state)
    retrofit.plan(model, example=X)
    assert nn.Module.__call__ is call
    assert "__getattribute__" not in vars(nn.Module)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_values_pasted_into_another_tensor_still_make_a_head():
    class Pasting(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.logits = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            masks = self.logits(F.relu(self.conv(x))).sigmoid()
            canvas = torch.zeros(len(masks), 2, 20, 20)
            canvas[:, :, 2 : 2 + masks.shape[2], 3 : 3 + masks.shape[3]] = masks
            return {"masks": canvas}

    assert decisions(Pasting(), example=X) == {
        "conv": ("insert", "no norm follows"),
        "logits": ("skip", "output head"),
    }


def test_code_that_reads_a_convolution_is_seen_in_a_run_too():
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            x = x if x.sum() > 0 else -x
            return F.relu(self.conv(x) + self.conv.weight.mean())

    found = decisions(Reading(), example=X)
    assert found["conv"] == ("skip", "the model's own code reads its .weight")


def test_threads_that_plan_at_the_same_time_do_not_disturb_each_other():
    def work(_):
        return inserted(Branching(), example=X), inserted(nets.build(nets.Residual))

    expected = work(0)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(12))) == [expected] * 12


def test_code_that_asks_for_tensors_is_planned_from_the_run():
    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x):
            for _ in range(3 if isinstance(x, torch.Tensor) else 1):  # torch.fx passes a Proxy
                x = F.relu(self.one(x))
            return F.relu(self.two(x))

    plan = retrofit.plan(Asking(), example=X)
    assert [(s.path, s.calls) for s in plan.inserted] == [("one", 3), ("two", 1)]
    with pytest.raises(RetrofitError, match="sees other calls in Asking than a run"):
        retrofit.plan(Asking(), example=X, layout="graph")

    class Scaling(Asking):
        def forward(self, x):
            return F.relu(self.two(x / 255 if isinstance(x, torch.Tensor) else x))

    with pytest.raises(RetrofitError, match="makes of Scaling computes something else"):
        retrofit.add_batchnorm(Scaling(), [X], layout="graph", progress=False)


def test_what_forward_keeps_of_the_calibration_is_not_in_the_result():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.register_buffer("calls", torch.zeros(()))
            self.seen = None

        def forward(self, x):
            self.calls += 1
            self.seen = x
            return F.relu(self.conv(x)) * self.calls

    model = Counting().eval()
    converted = retrofit.add_batchnorm(model, [X, X], progress=False)
    assert (converted.calls, converted.seen) == (0, None)
    assert torch.equal(converted(X), model(X))


def test_values_that_cannot_be_followed_and_closures_are_named():
    class Leaving(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return torch.from_numpy(self.last(F.relu(self.conv(x))).numpy())

    found = decisions(Leaving(), example=X)
    assert found["conv"][0] == "insert"
    assert found["last"] == ("skip", "its values go where they cannot be followed")

    model = nn.Module()
    model.net = nn.Conv2d(3, 4, 3)
    model.forward = lambda x: F.relu(model.net(x))
    with pytest.raises(RetrofitError, match=r"called nothing of this Module: .*a closure"):
        retrofit.plan(model, example=X)


def test_layers_inside_a_layer_are_said_to_be():
    class Normed(nn.Conv2d):
        """As in detectron2."""

        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.norm = nn.GroupNorm(2, sizes[1])

        def forward(self, x):
            return self.norm(super().forward(x))

    model = nn.Sequential(Normed(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.ReLU())
    model.append(nn.Flatten(2)).append(nn.TransformerEncoderLayer(196, 2, 8))
    found = decisions(model, example=X, linear=True)
    assert found["0"] == ("skip", "already normalised by 0.norm")
    assert found["5.linear1"] == ("skip", "inside 5, which counts as one layer")


def converts(model, data, **options):
    """All layers without a norm, but heads and single pixels, get one; nothing else changes."""
    converted = retrofit.add_batchnorm(model, data, progress=False, **options)
    assert retrofit.verify(model, converted, data).exact
    folded, state = retrofit.fold(converted).state_dict(), model.state_dict()
    assert list(folded) == list(state)
    assert all(torch.equal(folded[key], value) for key, value in state.items())
    return retrofit.plan(model, example=data[0], **options)


@pytest.mark.slow
def test_torchvisions_ssd_with_a_vgg_inside():
    torch.manual_seed(0)
    model = torchvision.models.detection.ssd300_vgg16(
        weights=None, weights_backbone=None, score_thresh=0.5
    ).eval()
    data = [[torch.rand(3, 80, 100), torch.rand(3, 120, 90)]]
    plan = retrofit.plan(model, example=data[0])
    skipped = {s.path: s.reason.partition(": the")[0] for s in plan.sites if s.decision == "skip"}
    assert skipped.pop("backbone.extra.4.2").startswith("its feature map is a single pixel")
    assert {path.rpartition(".")[0] for path in skipped} == {
        "head.classification_head.module_list",
        "head.regression_head.module_list",
    }
    assert set(skipped.values()) == {"output head"}
    assert len(plan.inserted) == 22

    # And with the single pixel, all that have no norm and are no head.
    backbone = [path for path, m in model.backbone.named_modules() if isinstance(m, nn.Conv2d)]
    plan = converts(model, data, include="backbone.*")
    assert sorted(s.path for s in plan.inserted) == sorted(f"backbone.{p}" for p in backbone)


@pytest.mark.slow
def test_torchvisions_raft_takes_two_images_and_calls_its_layers_twelve_times():
    torch.manual_seed(0)
    model = torchvision.models.optical_flow.raft_small(weights=None).eval()
    plan = converts(model, [(torch.rand(2, 3, 128, 128), torch.rand(2, 3, 128, 128))])
    skipped = {s.path: s.reason for s in plan.sites if s.decision == "skip"}
    assert skipped.pop("update_block.flow_head.conv2").startswith("output head")
    assert all("normalised by feature_encoder" in reason for reason in skipped.values())
    assert {s.calls for s in plan.inserted} == {1, 12}


def wrapped(forward):
    """As transformers' decorators: what is called is not what the model's author wrote."""

    @functools.wraps(forward)
    def call(self, *args, **kwargs):
        return forward(self, *args, **{key: kwargs.get(key) for key in list(kwargs)})

    return call


def test_where_a_decorator_stops_the_tracing_the_models_forward_is_named():
    class Decorated(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        @wrapped
        def forward(self, x, scale=1, **more):  # noqa: ARG002
            return F.relu(self.conv(x)) * scale

    (site,) = retrofit.plan(Decorated().eval()).sites
    assert "torch.fx cannot trace (test_untraceable.py:" in site.reason
