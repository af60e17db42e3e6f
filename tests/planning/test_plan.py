"""What the plan decides, what it says, and what it refuses."""

import json
import threading

import nets
import pytest
import torch
import torch.nn.functional as F
import torchvision
from decisions import decisions
from torch import nn

import retrofit
from retrofit import Plan, RetrofitError, Site


def inserted(model, **options):
    return [s.path for s in retrofit.plan(model, **options).inserted]


def test_the_printed_plan():
    assert str(retrofit.plan(nets.build(nets.AlreadyNormed))) == (
        "layer     type    channels  decision  BatchNorm  reason\n"
        "--------  ------  --------  --------  ---------  ----------------------------------\n"
        "batch     Conv2d         4  skip                 already normalised by bn\n"
        "group     Conv2d         4  skip                 already normalised by gn\n"
        "layer     Conv2d         4  skip                 already normalised by ln\n"
        "function  Conv2d         4  skip                 already normalised by instancenorm\n"
        "free      Conv2d         4  insert    free.bn    no norm follows\n"
        "AlreadyNormed: 1 of 5 convolutions get a BatchNorm"
    )


def test_vgg16_gets_the_thirteen_batchnorms_of_vgg16_bn():
    plan = retrofit.plan(torchvision.models.vgg16(init_weights=False))
    stock = torchvision.models.vgg16_bn(init_weights=False)
    norms = [path for path, m in stock.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert [site.norm for site in plan.inserted] == norms
    assert set(plan.key_map.values()) < set(stock.state_dict())


def test_a_checkpoint_of_the_original_loads_through_the_key_map():
    for net in nets.IMAGE_NETS:
        model = nets.build(net)
        plan = retrofit.plan(model)
        converted = retrofit.insert(model, plan)
        state = converted.state_dict()
        for old, new in plan.key_map.items():
            assert torch.equal(model.state_dict()[old], state[new])
        own = {key.rpartition(".")[0] for key in state} - {
            key.rpartition(".")[0] for key in plan.key_map.values()
        }
        assert all(isinstance(converted.get_submodule(m), nn.BatchNorm2d) for m in own)


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5", "vgg11_bn"])
def test_networks_that_have_their_norms_get_none(name):
    assert inserted(torchvision.models.get_model(name, weights=None)) == []


def test_converting_twice_changes_nothing():
    once = retrofit.insert(nets.build(nets.Residual))
    assert inserted(once) == []
    with pytest.warns(UserWarning, match=r"no BatchNorm is added .* already normalised \(\d\)"):
        twice = retrofit.insert(once)
    assert list(twice.state_dict()) == list(once.state_dict())


class Counting(nn.Module):
    """What it returns depends on the types of its layers."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)
        )

    def forward(self, x):
        if self.kind == "factor":
            count = sum(isinstance(layer, nn.Conv2d) for layer in self.layers)
            return self.layers(x).mean((2, 3)) * count
        found, convs, before = {}, 0, None
        for layer in self.layers:
            x = layer(x)
            convs += isinstance(layer, nn.Conv2d)
            if self.kind == "names" and isinstance(layer, nn.ReLU):
                found[f"relu{convs}"] = x
            elif self.kind == "before" and isinstance(before, nn.Conv2d):
                found[len(found)] = x
            before = layer
        return {**found, "last": x}


@pytest.mark.parametrize("kind", ["factor", "names", "before"])
@pytest.mark.parametrize("example", [None, nets.images(2, 3, 12, 12)], ids=["traced", "run"])
def test_a_model_whose_outputs_depend_on_the_types_of_its_layers_is_refused(kind, example):
    model = Counting(kind).eval()
    for whole in (model, nn.Sequential(model, nn.Identity())):
        with pytest.raises(RetrofitError, match="does something else once layers are inserted"):
            retrofit.plan(whole, example=example)


class Hidden(nn.Module):
    """Its first layer is in a plain list, and so in no state dict."""

    def __init__(self):
        super().__init__()
        self.layers = [nn.Conv2d(3, 4, 3)]
        self.head = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())

    def forward(self, x):
        return self.head(self.layers[0](x))


def test_a_layer_that_is_no_module_of_the_model_is_left_alone():
    model = nets.build(Hidden)
    assert [site.path for site in retrofit.plan(model).sites] == ["head.0"]
    x = nets.images(4, 3, 12, 12)
    converted = retrofit.add_batchnorm(model, [x], progress=False)
    assert retrofit.verify(model, converted, [x]).exact


def test_a_model_that_is_one_layer_is_told_to_wrap_it():
    layer = nn.Conv2d(3, 4, 3)
    reasons = {site.path: site.reason for site in retrofit.plan(layer).sites}
    assert reasons[""] == "the model itself is this layer: wrap it in nn.Sequential"
    assert inserted(nn.Sequential(layer, nn.ReLU())) == ["0"]


class Ends(nn.Module):
    def __init__(self, end):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.last = nn.Conv2d(4, 4, 3)
        self.end = end

    def forward(self, x):
        return self.end(self.last(F.relu(self.stem(x))))


@pytest.mark.parametrize(
    ("end", "head"),
    [
        (nn.Identity(), True),
        (nn.Softmax(1), True),
        (nn.Sigmoid(), True),
        (nn.Hardsigmoid(), True),
        (nn.Upsample(scale_factor=2), True),
        (nn.PixelShuffle(2), True),
        (nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), True),
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LogSoftmax(1)), True),
        (nn.ReLU(), False),
        (nn.PReLU(), False),
        (nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), False),
        (nn.Sequential(nn.Flatten(), nn.Linear(576, 3)), False),
    ],
    ids=repr,
)
def test_which_last_convolution_is_an_output_head(end, head):
    last = decisions(Ends(end))["last"]
    assert last == (("skip", "output head") if head else ("insert", "no norm follows"))


def test_a_backbone_that_ends_pooled_has_no_heads_but_its_last_layer():
    class Stages(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.one, self.two = (nn.Conv2d(c, 4, 3, padding=1) for c in (3, 4, 4))

        def forward(self, x):
            x = F.relu(self.stem(x))
            x = F.relu(x + self.one(x))
            x = F.relu(x + self.two(x))
            return F.adaptive_avg_pool2d(x, 1).flatten(1)

    found = {path: reason for path, (_, reason) in decisions(Stages()).items()}
    assert found == {"stem": "no norm follows", "one": "no norm follows", "two": "output head"}


@pytest.mark.parametrize("patterns", [[], [3]], ids=["none", "number"])
def test_what_is_no_pattern_is_refused(patterns):
    with pytest.raises(RetrofitError, match=r"names nothing|is no module path"):
        retrofit.plan(nets.build(nets.Grouped), include=patterns)


def test_a_head_that_returns_the_mean_over_pixels():
    class Mean(nn.Sequential):
        def forward(self, x):
            return F.relu(super().forward(x)).mean([2, 3])

    assert decisions(Mean(nn.Conv2d(3, 4, 3)))["0"] == ("skip", "output head")


def test_the_last_convolution_of_a_backbone_is_no_head():
    features = torchvision.models.vgg11(init_weights=False).features
    assert len(inserted(features)) == 8


def test_include_asks_for_a_head_and_leaves_the_rest():
    model = torchvision.models.squeezenet1_1()
    assert decisions(model)["classifier.1"] == ("skip", "output head")
    assert inserted(model, include="classifier.*") == ["classifier.1"]
    assert len(inserted(model, include="*")) == 26


def test_exclude_wins():
    model = nets.build(nets.Grouped)
    assert inserted(model, include="layers.*", exclude=["layers.0", "layers.[46]"]) == ["layers.2"]
    assert decisions(model, exclude="layers.0")["layers.0"] == ("skip", "excluded by 'layers.0'")


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(RetrofitError, match=r"'feature\.\*' matches none of the 4 conv"):
        retrofit.plan(nets.build(nets.Grouped), exclude="feature.*")


def test_a_convolution_called_twice_is_one_site():
    (inner, shared) = retrofit.plan(nets.build(nets.SharedConv)).sites
    assert (inner.calls, shared.calls) == (1, 2)
    assert shared.reason == "called 2 times: one BatchNorm, moments pooled"


def test_a_convolution_that_the_models_code_reads_is_left_alone():
    found = decisions(nets.build(nets.ReadsItsConv))
    assert found["read"] == ("skip", "the model's own code reads its .kernel_size")
    assert found["plain"][0] == "insert"


def test_what_is_read_in_training_only_is_seen_too():
    class Penalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x):
            y = F.relu(self.two(F.relu(self.one(x))))
            return (y, self.one.weight.square().sum()) if self.training else y

    found = decisions(Penalised())
    assert found["one"] == ("skip", "the model's own code reads its .weight")
    assert found["two"][0] == "insert"


def test_a_transposed_convolution_called_with_an_output_size_is_left_alone():
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 4, 3, stride=2)

        def forward(self, x):
            return F.relu(self.up(x, output_size=(12, 12)))

    assert decisions(Sized())["up"] == ("skip", "called with more than its input")


def test_what_is_not_called_or_no_module_is_said():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.never = nn.Conv2d(3, 4, 3)
            self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

        def forward(self, x):
            return F.relu(F.conv2d(x, self.weight))

    assert decisions(Odd()) == {
        "conv2d": ("skip", "a function: only layout='graph' has a place after it"),
        "never": ("skip", "not called in eval mode"),
    }


def test_a_model_that_is_a_convolution():
    assert decisions(nn.Conv2d(3, 4, 3))[""][0] == "skip"


def test_arguments_with_defaults_keep_them():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x, mask=None, *, flat=False):
            x = F.relu(self.conv(x))
            if mask is not None:
                x = x * mask
            return x.flatten(1) if flat else x

    assert inserted(Optional()) == ["conv"]


def test_in_place_is_the_default_and_moves_no_index():
    model = nets.build(nets.ByIndex)
    converted = retrofit.insert(model)
    assert len(converted.features) == len(model.features)
    assert list(converted.features[0]._modules) == ["conv", "bn"]


def test_renumbering_by_request():
    model = nets.build(nets.Grouped)
    converted = retrofit.insert(model, retrofit.plan(model, renumber="layers"))
    kinds = [type(layer).__name__ for layer in converted.layers]
    assert kinds[:5] == ["Conv2d", "BatchNorm2d", "ReLU", "Conv2d", "BatchNorm2d"]
    x = nets.images(2, 3, 16, 16)
    assert torch.equal(converted(x), model(x))
    assert str(retrofit.fold(converted)) == str(model)


@pytest.mark.parametrize(
    ("net", "norms"),
    [(nets.root_sequential, ["1", "4"]), (nets.with_empty_sequentials, ["1", "6"])],
)
def test_renumbering_the_root(net, norms):
    model = nets.build(net)
    plan = retrofit.plan(model, renumber="")
    converted = retrofit.insert(model, plan)
    assert [site.norm for site in plan.inserted] == norms
    x = nets.images(2, 3, 16, 16)
    assert torch.equal(converted(x), model(x))
    assert str(retrofit.fold(converted)) == str(model)


@pytest.mark.parametrize(
    ("net", "path", "reason"),
    [
        (nets.ByIndex, "features", "features.0 is called from outside its forward"),
        (nets.named_sequential, "", "its children have names of their own"),
        (nets.Residual, "stem", "it is a Conv2d, not an nn.Sequential"),
        (nets.Residual, "trunk", "Residual has no such module"),
    ],
)
def test_renumbering_that_would_break_the_model_is_refused(net, path, reason):
    with pytest.raises(RetrofitError, match=f"cannot renumber .*: {reason}"):
        retrofit.plan(nets.build(net), renumber=path)


def test_a_subclass_of_vgg_that_indexes_its_features_is_not_renumbered():
    class Perceptual(torchvision.models.VGG):
        def forward(self, x):
            return [x := layer(x) for layer in self.features]

    features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
    with torch.device("meta"):
        model = Perceptual(features, init_weights=False)
    assert [s.norm for s in retrofit.plan(model, include="*").inserted] == [
        "features.0.bn",
        "features.2.bn",
    ]


def test_a_convolution_called_through_a_list_is_left_alone():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
            self.layers = [self.second]

        def forward(self, x):
            x = F.relu(self.first(x))
            for layer in self.layers:
                x = F.relu(layer(x))
            return x

    assert decisions(Listed()) == {
        "first": ("insert", "no norm follows"),
        "second": (
            "skip",
            "the model's own code calls it past its module tree, from a list say",
        ),
    }


def test_a_model_whose_code_asks_for_the_type_of_its_layers_is_refused():
    class Asking(nn.Sequential):
        def forward(self, x):
            for layer in self:
                x = layer(x)
                if isinstance(layer, nn.Conv2d):
                    x = F.relu(x)
            return x

    model = Asking(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    with pytest.raises(RetrofitError, match="code of Asking does something else once layers"):
        retrofit.plan(model)


def test_a_submodule_that_cannot_be_traced_is_left_out_and_named():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.conv(x) if x.sum() > 0 else x

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Branching(), nn.ReLU())
    found = decisions(model)
    assert found["0"][0] == "insert"
    assert found["2.conv"][0] == "skip"
    assert "inside 2, which torch.fx cannot trace (test_plan.py:" in found["2.conv"][1]


def test_a_model_that_cannot_be_traced_names_the_line_where_it_must_be():
    class Untraceable(nn.Module):
        def forward(self, x):
            if x.mean() > 0:
                return x
            return -x

    with pytest.raises(
        RetrofitError, match=r'test_plan\.py:\d+, in forward: "if x\.mean\(\) > 0:"'
    ):
        retrofit.plan(Untraceable(), layout="graph")


class SpectralNormConv2d(nn.Conv2d):
    """A convolution, whatever it is called."""


@pytest.mark.parametrize(
    "after",
    [
        SpectralNormConv2d(4, 4, 1),
        nn.LocalResponseNorm(2),
        nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1)),
    ],
    ids=["a convolution", "across channels", "nothing"],
)
def test_what_is_only_called_a_norm_is_none(after):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), after, nn.ReLU())
    assert decisions(model)["0"] == ("insert", "no norm follows")


def test_a_model_whose_inputs_are_all_optional_gets_its_first():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.text = nn.Conv2d(3, 4, 3), nn.Conv1d(3, 4, 3)

        def forward(self, image=None, text=None):
            found = {}
            if image is not None:
                found["image"] = F.relu(self.image(image))
            if text is not None:
                found["text"] = F.relu(self.text(text))
            return found

    assert inserted(Optional()) == ["image"]
    x, text = nets.images(2, 3, 8, 8), nets.images(2, 3, 8)
    assert inserted(Optional(), example=x) == ["image"]
    assert inserted(Optional(), example={"image": x, "text": text}) == ["image", "text"]


def test_a_constant_that_forward_makes_is_no_obstacle():
    class Blurring(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return F.relu(self.conv(F.conv2d(x, torch.full((3, 1, 2, 2), 0.25), groups=3)))

    model = nets.build(Blurring)
    assert inserted(model) == ["conv"]
    assert inserted(model, layout="graph") == ["conv2d", "conv"]
    x = nets.images(4, 3, 9, 9)
    for layout in ("native", "graph"):
        converted = retrofit.insert(model, retrofit.plan(model, layout=layout))
        assert torch.equal(converted(x), model(x))


def test_lazy_modules_are_named():
    with pytest.raises(RetrofitError, match="0 is a lazy LazyConv2d"):
        retrofit.plan(nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU()))


def test_an_untraceable_submodule_with_odd_arguments_ends():
    class Settings:
        pass

    class Branching(nn.Module):
        def forward(self, x, _settings):
            return x if x.sum() > 0 else -x

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.block, self.settings = nn.Conv2d(3, 4, 3), Branching(), Settings()

        def forward(self, x):
            return self.block(self.conv(x), self.settings)

    (reason,) = [reason for _, reason in decisions(Odd()).values()]
    assert reason.startswith("inside code, which torch.fx cannot trace")


def test_tracing_leaves_buffers_and_hooks_alone():
    class Counting(nn.Sequential):
        def __init__(self, *layers):
            super().__init__(*layers)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1)
            self.seen = x
            return super().forward(x)

    model, seen = Counting(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.ReLU()), []
    model[0].register_forward_hook(lambda _m, _i, y: seen.append(y))
    ready = retrofit.prepare(model)
    retrofit.calibrate(ready, [nets.images(4, 3, 8, 8)], progress=False)
    assert model.calls == 0
    assert not hasattr(model, "seen")
    assert all(isinstance(y, torch.Tensor) for y in seen)


def test_a_model_that_cannot_be_copied_is_named():
    model = nets.build(nets.Residual)
    model.lock = threading.Lock()
    with pytest.raises(RetrofitError, match=r"this Residual cannot be copied: .*lock"):
        retrofit.plan(model)


def test_a_plan_leaves_the_model_alone():
    model = nets.build(nets.SharedConv).train()
    model.inner.eval()
    names = sorted(vars(model))
    retrofit.plan(model)
    assert model.training
    assert not model.inner.training
    assert sorted(vars(model)) == names
    assert "__getattribute__" not in vars(nn.modules.conv._ConvNd)


def test_a_plan_survives_json():
    plan = retrofit.plan(nets.build(nets.Concat), exclude="left")
    assert Plan.from_json(plan.to_json()) == plan


BAD_SITE = {**vars(Site("a", "Conv2d", 4, 2, 1, "insert", "")), "dims": 7}
BAD_PLAN = {"model": "", "sites": [BAD_SITE], "renumbered": [], "last": None, "key_map": {}}
NO_SITES = BAD_PLAN | {"sites": []}
NO_PLANS = [
    BAD_PLAN,
    BAD_PLAN | {"sites": [BAD_SITE | {"dims": 2, "path": 7}]},
    NO_SITES | {"layout": "round"},
    NO_SITES | {"placement": "nowhere"},
]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"sites": 3}', "[" * 5000, *map(json.dumps, NO_PLANS)], ids=len
)
def test_text_that_is_no_plan_is_refused(text):
    with pytest.raises(RetrofitError, match="not a plan"):
        Plan.from_json(text)


def test_a_plan_of_another_model_is_refused_by_name():
    plan = retrofit.plan(nets.build(nets.Concat))
    with pytest.raises(RetrofitError, match="does not fit this Residual: squeeze is not"):
        retrofit.prepare(nets.build(nets.Residual), plan)


def test_timm_models_whose_code_reads_a_convolution():
    timm = pytest.importorskip("timm")
    reasons = [reason for _, reason in decisions(timm.create_model("davit_tiny")).values()]
    assert "the model's own code reads its .kernel_size" in reasons


def test_the_plan_of_a_network_without_convolutions_says_so():
    plan = retrofit.plan(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
    assert str(plan).endswith("has no convolutions")


def test_complex_weights_are_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, dtype=torch.complex64), nn.Identity())
    (site,) = retrofit.plan(model).sites
    assert (site.decision, site.reason) == ("skip", "complex weights")


class Counted(nn.Module):
    """Counts how often its forward is run or traced; the mode matters to it where it asks."""

    read = 0

    def __init__(self, asks=False, branches=False):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        self.asks, self.branches = asks, branches

    def forward(self, x):
        Counted.read += 1
        x = F.relu(self.conv(x))
        if self.asks:
            x = F.dropout(x, training=self.training)
        if self.branches and x.mean() < 0:  # which torch.fx cannot follow
            x = -x
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("options", "example", "times"),
    [
        ({}, False, 2),  # the model, and a trial of the plan
        ({}, True, 3),  # and a run on the example
        ({"asks": True}, False, 4),  # and both in train mode
        ({"branches": True}, True, 3),  # in vain, on the example, and the trial
        ({"asks": True, "branches": True}, True, 5),
    ],
)
def test_the_model_is_read_no_more_often_than_needed(options, example, times):
    model, Counted.read = Counted(**options).eval(), 0
    plan = retrofit.plan(model, example=torch.randn(4, 3, 9, 9) if example else None)
    assert [site.path for site in plan.inserted] == ["conv"]
    assert Counted.read == times


def test_a_converted_model_knows_its_plan():
    model = nets.build(nets.Residual)
    plan = retrofit.plan(model)
    assert retrofit.plan_of(model) is None
    assert retrofit.plan_of(retrofit.prepare(model, plan)) == plan
    assert retrofit.plan_of(retrofit.insert(model, plan)) == plan


class Penalised(nn.Module):
    """Adds up its own weights, in training alone."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x):
        y = F.relu(self.conv(x))
        return y + self.conv.weight.sum() if self.training else y


class AroundPenalised(nn.Module):
    """torch.fx cannot follow it, but what is inside."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.head = nn.Conv2d(3, 4, 3), Penalised(), nn.Linear(4, 2)

    def forward(self, x):
        y = F.relu(self.stem(x))
        y = self.inner(y) if y.mean() > -1 else y
        return self.head(y.mean((2, 3)))


def test_what_a_part_reads_in_training_counts_also_where_the_whole_cannot_be_traced():
    reason = "the model's own code reads its .weight"
    assert decisions(nn.Sequential(nn.Conv2d(3, 4, 1), Penalised()))["1.conv"] == ("skip", reason)
    for model in (AroundPenalised(), nn.Sequential(AroundPenalised())):
        path = "inner.conv" if isinstance(model, AroundPenalised) else "0.inner.conv"
        assert decisions(model)[path] == ("skip", reason)


class Pooled(nn.Module):
    """Ends pooled, with its two axes kept, and not flattened; keepdim by place or by name."""

    def __init__(self, by_name):
        super().__init__()
        self.conv, self.by_name = nn.Conv2d(3, 4, 3), by_name

    def forward(self, x):
        x = F.relu(self.conv(x))
        return x.mean((2, 3), keepdim=True) if self.by_name else x.mean((2, 3), True)


@pytest.mark.parametrize("example", [None, torch.randn(2, 3, 9, 9)])
def test_keepdim_is_understood_by_place_as_by_name(example):
    seen = [decisions(Pooled(by_name), example=example) for by_name in (False, True)]
    assert seen[0] == seen[1]
    assert seen[0]["conv"][0] == "insert"


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x=None, **_):
        return F.relu(self.last(F.relu(self.conv(x))))


def test_the_only_input_may_have_a_default_beside_keywords_of_any_name():
    model, x = Keywords().eval(), torch.randn(4, 3, 9, 9)
    for layout in ("native", "graph"):
        converted = retrofit.add_batchnorm(model, [x], layout=layout, progress=False)
        assert torch.equal(converted(x), model(x))


def test_a_patch_of_torch_modules_that_was_there_stays(monkeypatch):
    seen = []

    def patched(module, name):
        seen.append(name)
        return object.__getattribute__(module, name)

    monkeypatch.setattr(nn.Module, "__getattribute__", patched, raising=False)
    retrofit.plan(nets.build(nets.Residual))
    assert nn.Module.__getattribute__ is patched
    assert "forward" in seen
