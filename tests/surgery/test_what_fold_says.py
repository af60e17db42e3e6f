"""What `fold` leaves it counts, with the reasons; what it cannot do it refuses in one line."""

import enum
import types
import warnings

import nets
import pytest
import torch
import torch.nn.functional as F
import torchvision
from normed_networks import trained
from test_folding_kinds import assert_folded
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.utils import prune

import retrofit
from retrofit import RetrofitError
from retrofit.cli import main

NETS = """
import torch
from torch import nn

def some():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU()
    ).eval()

def none():
    return nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)).eval()
"""


class Mixed(nn.Module):
    """BatchNorms of which one follows a convolution alone."""

    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.conv, self.after = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.sums = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(5))
        self.unused = nn.BatchNorm2d(3)
        self.script = torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval())

    def forward(self, x):
        x = self.after(self.conv(F.relu(self.first(x))))
        for norm in self.sums:
            x = norm(x + 1)
        return self.script(x)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_what_is_left_is_counted_and_grouped_by_reason():
    model = trained(Mixed())
    with pytest.warns(UserWarning) as told:  # noqa: PT030 - the whole of it
        folded = retrofit.fold(model)
    assert len(told) == 1
    assert str(told[0].message) == (
        "8 of 9 BatchNorms stay: first: it follows the model's input, no convolution or Linear "
        "layer; sums.0, sums.1, sums.2 and 2 more: it follows add, no convolution or Linear layer; "
        "unused: no call of it is seen in eval mode; script.1: it is inside TorchScript, which "
        "cannot be changed; retrofit.unfoldable lists each"
    )
    assert told[0].filename == __file__
    assert list(retrofit.unfoldable(folded)) == list(retrofit.unfoldable(model))
    assert isinstance(folded.after, nn.Identity)
    x = nets.images(2, 3, 5, 5)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_fold_that_folds_nothing_says_so():
    assert retrofit.unfoldable(ByValue()) == {}  # no trace is needed to know that
    with pytest.warns(UserWarning, match="this Residual has no BatchNorm: nothing was folded"):
        retrofit.fold(nets.build(nets.Residual))
    normed = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    with pytest.warns(UserWarning, match="no BatchNorm is added"):
        converted = retrofit.insert(normed)
    assert retrofit.unfoldable(converted) == {"1": "it was there before the conversion"}
    with pytest.warns(UserWarning, match="1 of 1 BatchNorms stay: 1: it was there before"):
        assert str(retrofit.fold(converted)) == str(normed)


class ByValue(nn.Module):
    """What torch.fx cannot follow, without a BatchNorm."""

    def forward(self, x):
        return x if x.sum() < 1e9 else -x


def test_what_was_there_before_the_conversion_is_not_remarked_on():
    model = nets.build(nets.AlreadyNormed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folded = retrofit.fold(retrofit.insert(model))
    assert list(folded.state_dict()) == list(model.state_dict())
    assert retrofit.unfoldable(folded) == {}  # without the conversion's record each is asked


def test_only_the_batchnorms_before_a_convolution_stay_in_a_densenet():
    model = trained(torchvision.models.DenseNet(8, (2, 2), 16))
    left = retrofit.unfoldable(model)
    before_conv = [p for p in left if p.endswith(("norm1", "norm", "norm5"))]
    assert before_conv == list(left)
    assert len(left) == 6
    assert_folded(model, nets.images(2, 3, 32, 32), left=left)


class Masking(nn.BatchNorm2d):
    """A BatchNorm of sequences that are filled up."""

    def forward(self, x, mask):
        return super().forward(x) * mask


class Several(nn.Module):
    """`use(self, x)` calls two convolutions and two BatchNorms."""

    def __init__(self, use, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.bn, self.more, self.use = norm(4), nn.BatchNorm2d(4), use

    def forward(self, x):
        return self.use(self, x)


def after_both(m, x):
    return m.bn(m.conv(x)) + m.bn(m.other(x)) + m.more(m.conv(x) * 2)


def both_after(m, x):
    y = m.conv(x)
    return m.bn(y) + m.more(y)


def with_a_mask(m, x):
    return m.bn(m.conv(x), x[:, :1, 1:-1, 1:-1] > 0) + m.more(m.other(x))


ONE_EACH = [
    (after_both, nn.BatchNorm2d, "it is called after several layers", ["bn", "more"]),
    (both_after, nn.BatchNorm2d, "its layer feeds several BatchNorms, and", ["bn", "more"]),
    (with_a_mask, Masking, "it is called with more than its one input", ["bn"]),
]


@pytest.mark.parametrize(("use", "norm", "words", "left"), ONE_EACH)
@pytest.mark.parametrize("run", [False, True])
def test_a_batchnorm_that_is_no_scale_of_one_layer_stays(use, norm, words, left, run):
    model, x = trained(Several(use, norm)), nets.images(2, 3, 7, 7)
    example = x if run else None
    assert words in retrofit.unfoldable(model, example=example)["bn"]
    assert_folded(model, x, left=left, example=example)


# --- branches that default arguments hide --------------------------------------------------------


class Mode(enum.Enum):
    NORMED = 1
    PLAIN = 2


class Branching(nn.Module):
    """`use(self, x, argument)` decides how conv and bn are called."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)


class ByName(Branching):
    def forward(self, x, mode="a"):
        x = self.stem(x)
        if mode == "a":
            return self.bn(self.conv(x))
        if mode in ("b", "c"):
            return self.conv(x)
        raise ValueError(mode)


class ByAnyOther(Branching):
    def forward(self, x, mode="a"):
        y = self.conv(self.stem(x))
        return self.bn(y) if mode == "a" else y


class ByNoName(Branching):
    def forward(self, x, mode=None):
        y = self.conv(self.stem(x))
        return y if mode == "raw" else self.bn(y)


class ByOneName(Branching):
    def forward(self, x, mode=None):
        y = self.conv(self.stem(x))
        if mode is not None and mode != "raw":
            raise ValueError(mode)
        return y if mode == "raw" else self.bn(y)


class ByFlag(Branching):
    def forward(self, x, normed=True, *, twice=False):
        y = self.conv(self.stem(x))
        return self.bn(y) if normed or twice else y


class ByTensor(Branching):
    def forward(self, x, mask=None):
        y = self.conv(self.stem(x))
        return self.bn(y) if mask is None else self.bn(y * mask)


class ByTruth(Branching):
    def forward(self, x, features=None):
        y = self.conv(self.stem(x))
        return (self.bn(y), y) if features else self.bn(y)


class ByMember(Branching):
    def forward(self, x, mode=Mode.NORMED):
        y = self.conv(self.stem(x))
        return self.bn(y) if mode is Mode.NORMED else y


class Both(Branching):
    def forward(self, x, one=False, other=False):
        y = self.conv(self.stem(x))
        return y if one and other else self.bn(y)


BRANCHES = [
    (ByName, {"mode": "b"}, "forward(mode='b') uses it or its layer otherwise"),
    (ByFlag, {"normed": False}, "forward(normed=False) uses it or its layer otherwise"),
    (ByTensor, {"mask": torch.ones(1)}, "forward(mask=...) uses it or its layer otherwise"),
    (ByTruth, {"features": True}, "forward(features=True) uses it or its layer otherwise"),
    (
        ByMember,
        {"mode": Mode.PLAIN},
        "forward(mode=<Mode.PLAIN: 2>) uses it or its layer otherwise",
    ),
    (
        Both,
        {"one": True, "other": True},
        "forward(one=True, other=True) uses it or its layer otherwise",
    ),
]


@pytest.mark.parametrize(("net", "arguments", "reason"), BRANCHES)
def test_what_another_branch_uses_otherwise_stays(net, arguments, reason):
    model, x = trained(net()), nets.images(2, 3, 5, 5)
    assert retrofit.unfoldable(model) == {"bn": reason}
    folded = assert_folded(model, x, left=["bn"])
    ours, theirs = folded(x, **arguments), model(x, **arguments)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert_folded(model, x, left=["bn"], example=x)


def test_an_example_with_other_arguments_does_not_change_what_the_default_computes():
    class Swapped(Branching):
        def forward(self, x, normed=False):
            y = self.conv(self.stem(x))
            return self.bn(y) if normed else y

    model, x = trained(Swapped()), nets.images(2, 3, 5, 5)
    assert_folded(model, x, left=["bn"], example={"x": x, "normed": True})


def test_arguments_that_change_no_branch_or_use_both_together_change_nothing():
    class Scaled(Branching):
        def forward(self, x, scale=2.0, skip=False, name="x"):
            x = self.stem(x)
            return {name: x if skip else self.bn(self.conv(x)) * scale}["x"]

    assert_folded(trained(ByPlace()), nets.images(2, 3, 5, 5))
    model = trained(Scaled())
    with pytest.warns(UserWarning, match="values of name may call other layers"):
        folded = retrofit.fold(model)
    assert isinstance(folded.bn, nn.Identity)


def test_a_branch_that_cannot_be_followed_is_said():
    class Hidden(Branching):
        def forward(self, x, clip=False):
            y = self.conv(self.stem(x))
            return self.bn(y) if not clip or y.max() < 1 else y.clamp(max=1)

    class Many(Branching):
        def forward(self, x, a=False, b=False, c=False, d=False, e=False):
            y = self.conv(self.stem(x))
            return y if a and b and c and d and e else self.bn(y)

    class Above(Branching):
        def forward(self, x, threshold=0.5):
            y = self.conv(self.stem(x))
            return self.bn(y) if threshold > 0.3 else y

    with pytest.warns(UserWarning, match="other values of clip may call other layers"):
        retrofit.fold(trained(Hidden()))
    with pytest.warns(UserWarning, match="other values of threshold may call other layers"):
        retrofit.fold(trained(Above()))
    with pytest.warns(UserWarning, match="other values of a, b, c, d, e may call"):
        retrofit.fold(trained(Many()))


class ByPlace(Branching):
    """Its flag decides where the same pair is called."""

    def forward(self, x, late=False):
        return self.bn(self.conv(self.stem(x))) if late else self.stem(self.bn(self.conv(x)))


class Domains(Branching):
    """One convolution, and a BatchNorm for each domain that the caller names."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleDict({"a": nn.BatchNorm2d(3), "b": nn.BatchNorm2d(3)})

    def forward(self, x, domain="a"):
        return self.norms[domain](self.conv(self.stem(x)))


class NumberedDomains(Branching):
    """The same by number."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)])

    def forward(self, x, domain=0):
        return self.norms[domain](self.conv(self.stem(x)))


@pytest.mark.parametrize(("net", "first", "other"), [(Domains, "a", "b"), (NumberedDomains, 0, 1)])
def test_batchnorms_for_several_domains_stay_and_what_is_not_known_is_said(net, first, other):
    model, x = trained(net()), nets.images(2, 3, 5, 5)
    assert retrofit.unfoldable(model) == {
        "bn": "no call of it is seen in eval mode",
        f"norms.{first}": f"forward(domain={other!r}) uses it or its layer otherwise",
        f"norms.{other}": "no call of it is seen in eval mode",
    }
    unsure = "other values of domain may call other layers"
    with pytest.warns(UserWarning, match="3 of 4"), pytest.warns(UserWarning, match=unsure):
        folded = retrofit.fold(model)
    assert isinstance(folded.stem[1], nn.Identity)
    for domain in (first, other):
        torch.testing.assert_close(folded(x, domain), model(x, domain), rtol=1e-5, atol=1e-5)


# --- what a trace does not show ------------------------------------------------------------------


def test_a_hook_on_what_lies_between_keeps_the_batchnorm():
    model = trained(nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)))
    model[0].register_forward_hook(lambda _m, _i, y: y.relu())
    assert_folded(model, nets.images(2, 3, 5, 5), left=["1"])
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4))))
    model[1].register_forward_pre_hook(lambda _m, inputs: (inputs[0].relu(),))
    assert_folded(model, nets.images(2, 3, 5, 5), left=["1.0"])
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), nn.BatchNorm2d(4)))
    model[1].register_forward_hook(lambda _m, _i, y: y.relu())
    assert_folded(model, nets.images(2, 3, 5, 5), left=["2"])


def test_a_module_that_code_nobody_followed_has_too_is_left():
    class Unfollowed(nn.Module):
        def __init__(self, conv):
            super().__init__()
            self.conv = conv

        def forward(self, x):
            return self.conv(x) if x.sum() < 1e9 else x

    pair = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model = trained(nn.Sequential(pair, Unfollowed(pair[0])))
    assert "cannot follow (test_what_fold_says.py" in retrofit.unfoldable(model)["0.1"]
    assert_folded(model, nets.images(2, 3, 5, 5), left=["0.1"])


def test_only_a_reader_of_sizes_reads_nothing_of_what_the_layer_gives():
    class Sized(Branching):
        def forward(self, x):
            y = self.conv(self.stem(x))
            return self.bn(y).view(y.shape[0], y.size(1) * y.shape[2], -1)

    class Turned(Branching):
        def forward(self, x):
            y = self.conv(self.stem(x))
            return self.bn(y) + y.mT

    class Windows(Branching):
        def forward(self, x):
            b, c, h, w = x.shape
            y = F.relu(self.conv(self.stem(x))).reshape(b, c, h * w // 5, 5)
            return self.bn(y.permute(0, 1, 3, 2).reshape(b, c, h, w))

    x = nets.images(2, 3, 5, 5)
    assert_folded(trained(Sized()), x)
    assert_folded(trained(Turned()), x, left=["bn"])
    assert retrofit.unfoldable(Windows()) == {
        "bn": "it follows relu, no convolution or Linear layer"
    }


def test_dropout_that_eval_mode_does_not_switch_off_keeps_the_batchnorm():
    class Always(Branching):
        def forward(self, x):
            return self.bn(F.dropout(self.conv(x), 0.5, training=True)) + self.stem(x)

    assert retrofit.unfoldable(Always()) == {
        "bn": "it follows dropout, no convolution or Linear layer"
    }


def test_weights_that_would_leave_their_range_or_do_not_fit_keep_the_batchnorm():
    half = nn.Sequential(nn.Conv2d(3, 4, 3).half(), nn.BatchNorm2d(4)).eval()
    half[1].weight.data.fill_(1e6)
    assert "would leave the range of torch.float16" in retrofit.unfoldable(half)["1"]
    misfit = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(5)).eval()
    assert "has 5 channels, and its layer 4" in retrofit.unfoldable(misfit)["1"]
    with torch.device("meta"):
        empty = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    assert "meta device" in retrofit.unfoldable(empty)["1"]


# --- bad requests ------------------------------------------------------------------------------


def exported():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    return torch.export.export(model, (torch.randn(2, 3, 5, 5),))


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval())


class Asking(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x)) if x.sum() < 1e9 else x


def trained_conversion(change):
    """A conversion whose BatchNorm was then changed, or replaced by what `change` returns."""
    converted = retrofit.insert(nets.build(nets.root_sequential))
    converted[0].bn = change(converted[0].bn) or converted[0].bn
    return converted


def hooked(norm):
    norm.register_forward_hook(lambda _m, _i, y: y.relu())


def activated(norm):
    return BatchNormAct2d(norm.num_features).eval()


def without_statistics(norm):
    norm.running_mean = norm.running_var = None


REFUSED = [
    (lambda: retrofit.fold(exported()), "this is an exported program, which has functions"),
    (lambda: retrofit.fold(exported().module()), "fold the model that it was exported from"),
    (lambda: retrofit.fold(scripted()), "TorchScript module, whose layers are fixed: pass"),
    (lambda: retrofit.fold(Asking()), "cannot trace this Asking (test_what_fold_says.py"),
    (lambda: retrofit.unfoldable(Asking()), "follows: pass example"),
    (lambda: retrofit.fold(Asking(), example=torch.ones(2, 5, 4, 4)), "conv takes (N, 3, H, W)"),
    (lambda: retrofit.fold(Asking(), example="picture"), "holds no tensor"),
    (
        lambda: retrofit.fold(nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyBatchNorm2d())),
        "1 is a lazy LazyBatchNorm2d that has no shape yet: run one batch through the model first",
    ),
    (lambda: retrofit.unfoldable(3), "expected an nn.Module, not a int"),
    (
        lambda: retrofit.fold(trained_conversion(hooked)),
        "the BatchNorm after 0 has a hook, which folding would lose: remove it",
    ),
    (
        lambda: retrofit.fold(trained_conversion(without_statistics)),
        "the BatchNorm after 0 has no running statistics (track_running_stats=False)",
    ),
    (
        lambda: retrofit.fold(trained_conversion(activated)),
        "the BatchNorm after 0 has an activation of its own, for which the plain model has no",
    ),
    (
        lambda: retrofit.fold(nets.build(nets.Residual), retrofit.plan(nets.build(nets.Residual))),
        "it has no stem.bn, the place of stem",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_a_bad_request_is_refused_in_one_line(call, words):
    with pytest.raises(RetrofitError) as refused:
        call()
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Weights of NETS, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NETS)
    scope = {}
    exec(NETS, scope)  # noqa: S102
    for name in ("some", "none"):
        retrofit.save(scope[name](), tmp_path / f"{name}.pth")
    return tmp_path


def test_the_command_prints_what_stays_in_one_line(weights, capsys):
    words = ["fold", "some.pth", "--model", "net.py:some", "--output", "out.pth"]
    assert main(words) == 0
    assert (weights / "out.pth").exists()
    out, err = capsys.readouterr()
    assert out == "1 BatchNorms folded, 1 left; written: out.pth\n"
    assert len([line for line in err.splitlines() if not line.endswith(" ...")]) == 1
    assert "warning: 1 of 2 BatchNorms stay: 3: it follows ReLU, no convolution" in err


def test_the_command_refuses_a_model_in_which_nothing_can_be_folded(weights, capsys):
    assert main(["fold", "none.pth", "--model", "net.py:none", "--output", "out.pth"]) == 2
    err = capsys.readouterr().err
    assert err == (
        "retrofit: none.pth has no BatchNorm that can be folded: 1 of 1 BatchNorms stay: 1: it "
        "follows ReLU, no convolution or Linear layer\n"
    )
    assert not (weights / "out.pth").exists()


def test_a_weight_that_is_a_buffer_is_said_to_be_no_parameter():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    weight = model[0].weight.detach()
    del model[0].weight
    model[0].register_buffer("weight", weight)
    converted = retrofit.add_batchnorm(model, [nets.images(8, 3, 8, 8)], progress=False)
    with torch.no_grad():
        converted[0].bn.running_mean.add_(1)
    with pytest.raises(RetrofitError, match=r"weight and bias of 0 are not both of nn\.Parameter"):
        retrofit.fold(converted)


@pytest.mark.parametrize("net", [ByAnyOther, ByNoName, ByOneName])
def test_what_any_other_string_leads_to_is_followed(net):
    assert "uses it or its layer otherwise" in retrofit.unfoldable(trained(net()))["bn"]


def test_a_method_of_a_string_is_a_branch_that_cannot_be_followed():
    class ByPrefix(Branching):
        def forward(self, x, mode="full"):
            y = self.conv(self.stem(x))
            return self.bn(y) if mode.startswith("full") else y

    with pytest.warns(UserWarning, match=r"mode|stay"):
        retrofit.fold(trained(ByPrefix()))


def test_a_forward_that_somebody_patched_is_tried():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)))
    model[1].forward = types.MethodType(
        lambda self, x: F.relu(nn.BatchNorm2d.forward(self, x)), model[1]
    )
    assert list(retrofit.unfoldable(model)) == ["1"]


def test_trying_a_layer_leaves_what_it_keeps_alone():
    class Masked(nn.Conv2d):
        """Writes to its weight whenever it runs, and keeps what it saw."""

        largest = 0.0

        def forward(self, x):
            self.largest = max(self.largest, float(x.abs().max()))
            self.weight.data[:, :, 0, 0] = 0
            return super().forward(x)

    model = trained(nn.Sequential(nn.Conv2d(3, 3, 1), Masked(3, 4, 3), nn.BatchNorm2d(4)))
    nn.init.ones_(model[1].weight)
    model[1].largest = 0.0
    retrofit.unfoldable(model)
    assert bool((model[1].weight == 1).all())
    assert model[1].largest == 0.0


def test_a_batchnorm_over_the_middle_axis_stays_where_linear_widths_differ():
    model = trained(
        nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 9),
                      nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(9, 2))
    )  # fmt: skip
    assert sorted(retrofit.unfoldable(model)) == ["1", "4"]


@pytest.mark.parametrize("second", [torch.zeros(2, 3, 8, 8), [1], "plan", {}], ids=type)
def test_a_batch_in_the_place_of_the_plan_is_told_its_keyword(second):
    with pytest.raises(RetrofitError, match=r"plan must be a Plan, .* example="):
        retrofit.fold(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), second)


# --- parts that were converted ---------------------------------------------------------------


class Whole(nn.Module):
    """A part, and around it a pair that was there before."""

    def __init__(self):
        super().__init__()
        self.before = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        )

    def forward(self, x):
        return self.net(self.before(x)).relu()


@pytest.mark.parametrize("layout", ["native", "graph"])
def test_the_containers_of_a_part_that_was_converted_go_when_the_whole_is_folded(layout):
    whole, x = trained(Whole()), nets.images(8, 3, 7, 7)
    keys = list(whole.state_dict())
    whole.net = retrofit.add_batchnorm(whole.net, [x], layout=layout, include="0", progress=False)
    trained(whole)
    assert retrofit.unfoldable(whole) == {"net.3": "it was there before the conversion"}
    folded = retrofit.fold(whole)
    assert list(folded.state_dict()) == [key for key in keys if not key.startswith("before.1.")]
    assert retrofit.plan_of(folded.net) is None
    torch.testing.assert_close(folded(x), whole(x), rtol=1e-4, atol=1e-5)


def test_a_part_that_was_converted_needs_no_trace_of_the_whole():
    class Untraceable(Asking):
        def forward(self, x):
            return self.conv(x) if x.sum() < 1e9 else x

    model = Untraceable().eval()
    model.bn, weight, part = None, model.conv.weight, nn.Sequential(model.conv).eval()
    model.conv = retrofit.insert(part, retrofit.plan(part, include="0"))
    folded = retrofit.fold(model)
    assert torch.equal(folded.conv[0].weight, weight)
    assert list(folded.state_dict()) == ["conv.0.weight", "conv.0.bias"]


def test_a_part_that_is_prepared_is_named():
    whole = Whole().eval()
    whole.net = retrofit.prepare(whole.net)
    with pytest.raises(RetrofitError, match="net Sequential is prepared, not converted"):
        retrofit.fold(whole)


def test_a_batchnorm_that_was_added_after_the_conversion_is_said_to_be():
    converted = retrofit.insert(nets.build(nets.AlreadyNormed))
    later = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    converted.later = later
    with pytest.warns(UserWarning, match=r"later.1: it was added after the conversion: fold the"):
        folded = retrofit.fold(converted)
    assert retrofit.unfoldable(converted)["later.1"].startswith("it was added after")
    assert any("before" in reason for reason in retrofit.unfoldable(converted).values())
    assert isinstance(folded.later[1], nn.BatchNorm2d)


def test_a_batchnorm_alone_is_told_that_it_has_no_layer():
    words = "there is no layer before it: fold the model that it is a part of"
    assert retrofit.unfoldable(nn.BatchNorm2d(3)) == {"": words}
    with pytest.warns(UserWarning, match=f"1 of 1 BatchNorms stay: the model: {words}"):
        retrofit.fold(nn.BatchNorm2d(3), example=torch.ones(2, 3, 4, 4))


# --- the right reason ------------------------------------------------------------------------


def pair(change=None, conv=nn.Conv2d, norm=nn.BatchNorm2d):
    model = trained(nn.Sequential(conv(3, 4, 3), norm(4)))
    if change:
        change(*model)
    return model


class Activated(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).relu()


class Particular(nn.Conv2d):
    def forward(self, x):
        if x.shape[-1] != 7:
            raise ValueError("made for 7 pixels")
        return super().forward(x)


class Casting(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def pruned(module, _=None):
    prune.l1_unstructured(module, "weight", amount=0.5)


REASONS = {
    "its layer has a hook": lambda conv, _: conv.register_forward_hook(lambda *_: None),
    "its layer has a hook, which may": lambda conv, _: conv.register_forward_pre_hook(
        lambda *_: None
    ),
    "the BatchNorm after its layer has a hook": lambda _, norm: norm.register_forward_pre_hook(
        lambda *_: None
    ),
    "which folding would lose": lambda _, norm: norm.register_full_backward_hook(lambda *_: None),
    "the weight of its layer is pruned at each call: make that lasting with "
    "torch.nn.utils.prune.remove(module, 'weight')": pruned,
    "the weight of the BatchNorm after its layer is pruned": lambda _, norm: pruned(norm),
    "has no running_var, without which": lambda _, norm: setattr(norm, "running_var", None),
    "has a NaN, an Inf or a negative": lambda _, norm: norm.weight.data.fill_(torch.inf),
    "divides by zero: a running_var of 0, and eps=0": lambda _, norm: (
        setattr(norm, "eps", 0), norm.running_var.zero_()),
}  # fmt: skip


@pytest.mark.parametrize("words", REASONS)
def test_what_is_wrong_with_a_pair_is_named(words):
    assert words in retrofit.unfoldable(pair(REASONS[words]))["1"]


def test_what_is_wrong_with_a_layer_of_another_class_is_named():
    activated = retrofit.unfoldable(pair(conv=Activated))["1"]
    assert "an activation inside?" in activated
    assert "hook" not in activated
    particular = retrofit.unfoldable(pair(conv=Particular))["1"]
    assert "does not run on random numbers" in particular
    assert "made for 7 pixels" in particular


def test_a_layer_whose_weight_and_bias_differ_in_precision_is_tried_in_the_coarser():
    model = pair(lambda conv, _: setattr(conv.bias, "data", conv.bias.data.half()), conv=Casting)
    folded, x = retrofit.fold(model), nets.images(2, 3, 7, 7)
    assert isinstance(folded[1], nn.Identity)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-2, atol=1e-2)


def test_a_hook_on_what_lies_between_is_named():
    model = trained(nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)))
    model[0].register_forward_hook(lambda _m, _i, y: y.relu())
    assert retrofit.unfoldable(model) == {"1": "0, between it and its layer, has a hook"}


# --- arguments without a name ----------------------------------------------------------------


class ByKeyword(Branching):
    def forward(self, x, **options):
        y = self.conv(self.stem(x))
        return y if options.get("raw") is True else self.bn(y)


class ByTruthOfKeyword(Branching):
    def forward(self, x, **options):
        y = self.conv(self.stem(x))
        return y if "raw" in options else self.bn(y)


class ByCount(Branching):
    def forward(self, x, *others):
        y = self.conv(self.stem(x))
        return y if others else self.bn(y)


class Ignoring(Branching):
    def forward(self, x, *_others, **_options):
        return self.bn(self.conv(self.stem(x)))


@pytest.mark.parametrize(
    ("net", "run", "name"),
    [
        (ByKeyword, False, r"\*\*options"),
        (ByKeyword, True, r"\*\*options"),
        (ByTruthOfKeyword, True, r"\*\*options"),
        (ByCount, True, r"\*others"),
    ],
)
def test_arguments_without_a_name_that_may_switch_branches_are_said(net, run, name):
    with pytest.warns(UserWarning, match=f"other values of {name} may call other layers"):
        retrofit.fold(trained(net()), example=nets.images(2, 3, 5, 5) if run else None)


def test_arguments_without_a_name_that_the_code_ignores_are_not():
    x = nets.images(2, 3, 5, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_folded(trained(Ignoring()), x)
        assert_folded(trained(Ignoring()), x, example=x)
