"""Other places for a BatchNorm: after functions and single calls, activations, Linear layers."""

import copy
import math
import pickle

import nets
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import retrofit
from retrofit import RetrofitError

X = nets.images(8, 3, 16, 16)


def retrofitted(model, x=X, **options):
    return retrofit.add_batchnorm(model, [x], progress=False, **options)


def assert_exact_and_foldable(model, converted, x):
    with torch.no_grad():
        ours, theirs = converted(x), model(x)
    pairs = zip(ours, theirs, strict=True) if isinstance(ours, list) else [(ours, theirs)]
    assert all(torch.equal(one, other) for one, other in pairs)
    assert retrofit.verify(model, converted, [x]).exact
    folded, state = retrofit.fold(converted).state_dict(), model.state_dict()
    assert all(torch.equal(folded[key], state[key]) for key in folded)
    assert folded.keys() == state.keys()


def trained(model):
    """After a few steps, in eval mode."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    return model.eval()


def batchnorms(model):
    return [path for path, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]


class Functional(nn.Module):
    """Convolutions as functions; one weight is computed."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.up = nn.Parameter(torch.randn(4, 2, 3, 3))
        self.block = nn.Conv2d(4, 4, 1)

    def forward(self, x, scale=None):
        x = F.relu(F.conv2d(x, self.weight))
        x = F.relu(F.conv_transpose2d(x, self.up, groups=2))
        x = F.relu(F.conv2d(x, self.weight[:, :1] - self.weight.mean(), groups=4))
        x = F.relu(self.block(x))
        return x if scale is None else x * scale


def test_the_graph_layout_has_a_place_after_functions():
    model = nets.build(Functional)
    converted = retrofitted(model, layout="graph")
    assert isinstance(converted, torch.fx.GraphModule)
    assert batchnorms(converted) == ["conv2d_bn", "convtranspose2d_bn", "conv2d_1_bn", "block_bn"]
    assert_exact_and_foldable(model, converted, nets.images(3, 3, 17, 15, seed=2))


def test_a_computed_weight_shows_its_channels_only_in_a_run():
    model = nets.build(Functional)
    reasons = {s.path: s.reason for s in retrofit.plan(model, layout="graph").sites}
    assert reasons["conv2d@1"].startswith("a function whose weight is computed")
    known = retrofit.plan(model, layout="graph", example=X)
    assert [s.channels for s in known.inserted] == [4, 4, 4, 4]


def test_the_native_layout_has_no_place_after_functions():
    model = nets.build(Functional)
    reasons = {s.path: s.reason for s in retrofit.plan(model).sites}
    assert reasons["conv2d"] == "a function: only layout='graph' has a place after it"
    with pytest.raises(RetrofitError, match=r"conv2d is a function.*layout='graph'"):
        retrofit.plan(model, include="conv2d")


# torch.fx knows a module by one of its names, so that the keys of TwoNames are not all kept.
GRAPHS = [net for net in nets.IMAGE_NETS if net is not nets.TwoNames]


@pytest.mark.parametrize("net", GRAPHS, ids=lambda net: net.__name__)
@pytest.mark.parametrize("placement", ["pre_activation", "post_activation"])
def test_every_small_network_as_a_graph(net, placement):
    model = nets.build(net)
    converted = retrofitted(model, layout="graph", placement=placement)
    assert batchnorms(converted)
    assert_exact_and_foldable(model, converted, nets.images(3, 3, 17, 15, seed=2))
    again = pickle.loads(pickle.dumps(copy.deepcopy(converted)))  # noqa: S301
    assert_exact_and_foldable(model, again, nets.images(3, 3, 17, 15, seed=2))
    assert retrofit.plan(converted, placement=placement, layout="graph").inserted == ()


def test_in_the_graph_layout_each_call_has_a_batchnorm_of_its_own():
    model = nets.build(nets.SharedConv)
    converted = retrofitted(model, layout="graph")
    assert batchnorms(converted) == ["inner_bn", "shared_bn", "shared_1_bn"]
    with torch.no_grad():
        first = model.shared(F.relu(model.inner(X))).double()
        second = model.shared(F.relu(first.float())).double()
    for name, y in (("shared_bn", first), ("shared_1_bn", second)):
        mean = converted.get_submodule(name).running_mean.double()
        torch.testing.assert_close(mean, y.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)


class TwoOfOneName(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv2d = nn.Conv2d(4, 4, 3)
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, x):
        return F.relu(self.conv2d(F.relu(F.conv2d(x, self.weight))))


def test_a_module_that_is_called_like_a_function_is_another_site():
    model = nets.build(TwoOfOneName)
    assert [site.path for site in retrofit.plan(model).inserted] == ["conv2d"]
    assert_exact_and_foldable(model, retrofitted(model), X)
    converted = retrofitted(model, layout="graph")
    assert batchnorms(converted) == ["conv2d_function_bn", "conv2d_bn"]
    assert_exact_and_foldable(model, converted, X)


class TakenName(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.conv_bn = nn.Conv2d(3, 4, 3), nn.LeakyReLU()

    def forward(self, x):
        return self.conv_bn(self.conv(x))


def test_in_the_graph_layout_a_batchnorm_takes_no_name_that_is_used_already():
    model = nets.build(TakenName)
    converted = retrofitted(model, layout="graph")
    assert batchnorms(converted) == ["conv_bn_"]
    assert_exact_and_foldable(model, converted, X)


def test_one_weight_does_not_absorb_two_batchnorms():
    converted = retrofitted(nets.build(nets.SharedConv), layout="graph")
    with torch.no_grad():
        converted.get_submodule("shared_1_bn").weight.mul_(2)
    with pytest.raises(RetrofitError, match="BatchNorms of shared and shared@1: its one weight"):
        retrofit.fold(converted)


def test_a_weight_that_serves_a_function_too_does_not_absorb_a_batchnorm():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1, bias=False)

        def forward(self, x):
            return F.relu(F.conv_transpose2d(F.relu(self.conv(x)), self.conv.weight))

    model = nets.build(Tied)
    converted = retrofitted(model, layout="graph")
    assert_exact_and_foldable(model, converted, X)
    with torch.no_grad():
        converted.get_submodule("conv_bn").weight.mul_(2)
    with pytest.raises(RetrofitError, match="the weight of conv serves a function too"):
        retrofit.fold(converted)


def test_a_graph_folds_after_training_like_any_other():
    model = nets.build(nets.Residual)
    converted = trained(retrofitted(model, layout="graph"))
    with torch.no_grad():
        expected = converted(X)
        assert not torch.equal(expected, model(X))
        torch.testing.assert_close(retrofit.fold(converted)(X), expected, rtol=1e-4, atol=1e-5)


def test_a_model_that_differs_between_train_and_eval_mode_has_no_graph():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return F.relu(F.dropout(self.conv(x), 0.5, self.training))

    with pytest.raises(RetrofitError, match=r"in eval mode it computes `.*dropout.*use modules"):
        retrofit.plan(Dropping(), layout="graph")
    assert retrofitted(Dropping()).conv.bn.num_features == 4  # native


class Counting(nn.Module):
    """Writes to a buffer: what it counts, or what it sees."""

    def __init__(self, write):
        super().__init__()
        self.conv, self.write = nn.Conv2d(3, 4, 3), write
        self.register_buffer("count", torch.tensor([1.0, math.nan]))

    def forward(self, x):
        self.write(self, x)
        return self.conv(x).relu()


def assign(net, value):
    net.count = value


@pytest.mark.parametrize(
    "write",
    [
        lambda net, _x: net.count.add_(1),
        lambda net, _x: net.count.data.add_(1),
        lambda net, _x: assign(net, net.count + 1),
        pytest.param(
            lambda net, x: assign(net, x.mean()),
            marks=pytest.mark.skipif(
                torch.__version__.startswith("2.6."), reason="its torch.fx refuses that by itself"
            ),
        ),
        lambda net, _x: net.count.add_(1) if net.training else None,
    ],
)
def test_a_buffer_that_only_the_models_own_code_would_write_is_named(write):
    model = nn.Sequential(nets.build(lambda: Counting(write)), nn.Conv2d(4, 4, 3), nn.ReLU())
    with pytest.raises(RetrofitError, match=r"Sequential.forward writes to its buffer 0\.count"):
        retrofit.plan(model, layout="graph")
    assert retrofit.plan(model).inserted


def test_a_buffer_that_the_graph_writes_as_the_model_does_stays_one():
    model = nn.Sequential(Counting(lambda net, x: net.count.copy_(x.mean()))).eval()
    graph = retrofit.insert(model, retrofit.plan(model, layout="graph"))
    x = nets.images(2, 3, 8, 8)
    assert torch.equal(graph(x), model(x))
    assert torch.equal(graph.state_dict()["0.count"], model[0].count)


def test_a_sparse_buffer_is_no_hindrance_to_a_graph():
    class Mixing(nn.Module):
        """Mixes pixels by a fixed sparse matrix, as graph convolutions do."""

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.register_buffer("edges", torch.eye(9).to_sparse())

        def forward(self, x):
            return torch.sparse.mm(self.edges, self.conv(x).relu().flatten(0, 1).flatten(1).t())

    model = Mixing().eval()
    graph = retrofit.insert(model, retrofit.plan(model, layout="graph"))
    x = nets.images(2, 3, 5, 5)
    assert isinstance(graph.conv_bn, nn.BatchNorm2d)
    assert torch.equal(graph(x), model(x))


def test_what_torch_fx_cannot_follow_or_would_freeze_has_no_graph():
    class Looking(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    class Noisy(nn.Module):
        def forward(self, x):
            return F.relu(x) + torch.rand(1)

    for module, message in (
        (Looking(), "cannot trace 1 of this Sequential"),
        (Noisy(), "Sequential.forward draws random numbers"),
    ):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), module)
        with pytest.raises(RetrofitError, match=message):
            retrofit.plan(model, layout="graph")


def test_functional_linear_layers_in_a_graph():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 3))
            self.head = nn.Linear(5, 2)

        def forward(self, x):
            return self.head(F.relu(F.linear(x.movedim(1, -1), self.weight)).mean((1, 2)))

    model = nets.build(Functional)
    converted = retrofitted(model, layout="graph", linear=True)
    assert [n for n, m in converted.named_modules() if isinstance(m, nn.BatchNorm1d)] == [
        "linear_bn.bn"
    ]
    assert_exact_and_foldable(model, converted, X)


def test_a_hook_on_a_container_has_no_place_in_a_graph():
    model = nn.Sequential(nets.build(nets.Grouped), nn.ReLU())
    model[0].register_forward_hook(lambda _m, _i, y: y + 1)
    with pytest.raises(RetrofitError, match="0 has a forward hook"):
        retrofit.plan(model, layout="graph")
    assert retrofit.verify(model, retrofitted(model), [X]).exact


def test_inputs_of_every_kind_in_a_graph():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, *pictures):
            return [F.relu(self.conv(x)) for x in pictures[:1]]

    class Named(Many):
        def forward(self, *, picture):
            return F.relu(self.conv(picture))

    class Sized(Many):
        def forward(self, x, size=(8, 8)):
            return F.interpolate(F.relu(self.conv(x)), size)

    assert torch.equal(
        retrofitted(nets.build(Named), layout="graph")(picture=X), nets.build(Named)(picture=X)
    )
    with pytest.raises(RetrofitError, match=r"size=\(8, 8\) of Sized.forward cannot be fixed"):
        retrofitted(nets.build(Sized), layout="graph")
    for net in (Many, Named, Sized):
        model = nets.build(net)
        assert retrofit.verify(model, retrofitted(model), [X]).exact


def test_a_graph_keeps_modes_and_refuses_other_arguments():
    model = nn.Sequential(nets.build(Functional), nn.Sequential(nn.Dropout(), nn.Conv2d(4, 3, 1)))
    model.eval()
    model[1].train()
    converted = retrofitted(model, layout="graph", include="*")
    assert not converted.training
    assert converted.get_submodule("1").training
    assert not converted.get_submodule("0.block_bn").training
    assert converted.get_submodule("1.1_bn").training
    with pytest.raises(TypeError, match="scale"):
        retrofitted(nets.build(Functional), layout="graph")(X, scale=2)


def test_a_graph_is_saved_and_loaded_into_the_plain_model(tmp_path):
    model = nets.build(Functional)
    converted = retrofitted(model, layout="graph")
    retrofit.save(converted, tmp_path / "graph.safetensors")
    loaded = retrofit.load(tmp_path / "graph.safetensors", nets.build(Functional))
    assert_exact_and_foldable(model, loaded, X)


# --- after the activation ----------------------------------------------------------------------


def test_post_activation_replaces_the_activation_in_place():
    model = nets.build(nets.Grouped)
    converted = retrofitted(model, placement="post_activation")
    assert [list(layer._modules) for layer in converted.layers] == [[], ["act", "bn"]] * 4
    assert_exact_and_foldable(model, converted, nets.images(3, 3, 17, 15, seed=2))
    moments = converted.layers[1].bn.running_mean.double()
    with torch.no_grad():
        expected = F.relu(model.layers[0](X)).double().mean((0, 2, 3))
    torch.testing.assert_close(moments, expected, rtol=1e-5, atol=1e-6)


def test_post_activation_in_a_vgg_comes_right_after_the_relu():
    with torch.device("meta"):
        model = torchvision.models.vgg11(init_weights=False)
    plan = retrofit.plan(model, placement="post_activation")
    assert [s.norm for s in plan.inserted][:3] == ["features.2", "features.6", "features.10"]


@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(), nn.LeakyReLU(inplace=True), nn.PReLU(4), nn.SiLU(), nn.GELU(), nn.Hardswish(),
     nn.Sigmoid(), F.relu, F.leaky_relu, F.silu, torch.tanh, torch.relu_],
    ids=lambda a: getattr(a, "__name__", type(a).__name__),
)  # fmt: skip
def test_which_activations_count_as_modules_and_as_functions(activation):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
            self.act = activation

        def forward(self, x):
            return self.last(self.act(self.conv(x)))

    model = nets.build(Net)
    layout = "native" if isinstance(activation, nn.Module) else "graph"
    converted = retrofitted(model, layout=layout, placement="post_activation")
    assert len(batchnorms(converted)) == 1
    assert_exact_and_foldable(model, converted, nets.images(3, 3, 17, 15, seed=2))
    state = converted.state_dict()
    norm = next(key for key in state if key.endswith("running_mean"))
    with torch.no_grad():
        expected = activation(model.conv(X)).double().mean((0, 2, 3))
    torch.testing.assert_close(state[norm].double(), expected, rtol=1e-4, atol=1e-6)


def test_an_activation_shared_by_layers_has_no_place_in_the_native_layout():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.act = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3), nn.ReLU()

        def forward(self, x):
            return self.act(self.two(self.act(self.one(x))))

    native = retrofit.plan(Shared(), placement="post_activation")
    assert [s.reason for s in native.sites] == [
        "its activation act serves other layers too: only layout='graph' has a place"
    ] * 2
    model = nets.build(Shared)
    converted = retrofitted(model, placement="post_activation", layout="graph")
    assert batchnorms(converted) == ["one_bn", "two_bn"]
    assert_exact_and_foldable(model, converted, X)


def test_without_an_activation_there_is_nothing_to_come_after():
    plan = retrofit.plan(nets.build(nets.Residual), placement="post_activation")
    assert {s.path: s.reason for s in plan.sites}["body.2"] == "no activation follows it directly"


def test_a_trained_batchnorm_after_an_activation_is_not_folded():
    converted = retrofitted(nets.build(nets.Grouped), placement="post_activation")
    with torch.no_grad():
        converted.layers[1].bn.weight.mul_(2)
    with pytest.raises(RetrofitError, match=r"of layers\.0 comes after its activation layers\.1"):
        retrofit.fold(converted)


# --- Linear layers -----------------------------------------------------------------------------


class Tokens(nn.Module):
    """Linear layers over (N, T, C) and (N, C); takes (N, 3, H, W)."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.mlp = nn.Linear(8, 12, bias=False)
        self.back = nn.Linear(12, 8)
        self.head = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, x):
        x = F.relu(self.patches(x)).flatten(2).transpose(1, 2)
        x = x + self.back(F.gelu(self.mlp(x)))
        return self.head(x.mean(1))


def test_linear_layers_are_off_by_default_and_on_by_request():
    assert [s.path for s in retrofit.plan(Tokens()).sites] == ["patches"]
    plan = retrofit.plan(Tokens(), linear=True, example=X)
    assert {s.path: (s.decision, s.dims, s.last_axis) for s in plan.sites} == {
        "patches": ("insert", 2, False),
        "mlp": ("insert", 0, True),
        "back": ("insert", 0, True),
        "head.0": ("insert", 0, False),
        "head.2": ("skip", 0, False),
    }
    assert str(plan).endswith("Tokens: 4 of 5 layers get a BatchNorm")


@pytest.mark.parametrize("layout", ["native", "graph"])
def test_the_last_axis_is_normalised_whatever_the_rank(layout):
    model = nets.build(Tokens)
    converted = retrofitted(model, linear=True, layout=layout)
    assert_exact_and_foldable(model, converted, nets.images(3, 3, 20, 12, seed=2))
    norms = [m for m in converted.modules() if isinstance(m, nn.BatchNorm1d)]
    assert sorted(norm.num_features for norm in norms) == [6, 8, 12]
    after_mlp = next(norm for norm in norms if norm.num_features == 12)
    with torch.no_grad():
        tokens = F.relu(model.patches(X)).flatten(2).transpose(1, 2)
        expected = model.mlp(tokens).double().flatten(0, 1)
    mean, var = after_mlp.running_mean.double(), after_mlp.running_var.double()
    torch.testing.assert_close(mean, expected.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var, expected.var(0), rtol=1e-5, atol=0)


def test_linear_layers_train_synchronise_and_fold():
    converted = trained(retrofitted(nets.build(Tokens), linear=True))
    with torch.no_grad():
        expected = converted(X)
        torch.testing.assert_close(retrofit.fold(converted)(X), expected, rtol=1e-4, atol=1e-5)
        synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(converted))
        assert sum(isinstance(m, nn.SyncBatchNorm) for m in synchronised.modules()) == 4
        torch.testing.assert_close(synchronised(X), expected)


def test_without_an_example_every_linear_layer_takes_any_rank():
    model = nets.build(Tokens)
    inserted = retrofit.insert(model, retrofit.plan(model, linear=True))
    assert_exact_and_foldable(model, inserted, X)


def test_a_batchnorm_of_somebody_else_after_a_linear_layer_is_folded():
    model = nn.Sequential(nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7), nn.ReLU()).train()
    model(torch.randn(64, 5) * 3 + 1)
    model.eval()
    x = torch.randn(9, 5)
    folded = retrofit.fold(model, example=x)
    assert not any(isinstance(m, nn.BatchNorm1d) for m in folded.modules())
    reference = torch.nn.utils.fusion.fuse_linear_bn_eval(model[0], model[1])
    torch.testing.assert_close(folded(x), F.relu(reference(x)), rtol=1e-5, atol=1e-6)


def test_layout_and_placement_are_checked():
    with pytest.raises(RetrofitError, match="layout must be one of native, graph, not 'fx'"):
        retrofit.plan(nets.build(nets.Residual), layout="fx")
    with pytest.raises(RetrofitError, match="the graph layout moves no key"):
        retrofit.plan(nets.build(nets.Grouped), layout="graph", renumber="layers")
    with pytest.raises(RetrofitError, match="cannot be done in place"):
        retrofitted(nets.build(nets.Grouped), layout="graph", inplace=True)
