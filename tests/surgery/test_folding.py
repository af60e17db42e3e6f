"""Folding of BatchNorms that are not the identity, against torch's own fusion."""

import copy
from contextlib import nullcontext

import nets
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.fusion import fuse_conv_bn_eval

import retrofit
from retrofit import RetrofitError
from retrofit.numerics.folded_weights import fold_weights


def trained(model):
    """BatchNorms as after some training: nothing is the identity any more."""
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight.data, module.bias.data, module.running_mean):
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.3)
            module.running_var.mul_(1.5)
    return model


@pytest.mark.parametrize("net", [n for n in nets.IMAGE_NETS if n is not nets.subclassed])
def test_a_trained_network_folds_to_one_that_computes_the_same(net):
    model = nets.build(net)
    converted = trained(retrofit.add_batchnorm(model, [nets.images(8, 3, 16, 16)], progress=False))
    before = copy.deepcopy(converted.state_dict())
    folded = retrofit.fold(converted)
    assert folded.state_dict().keys() >= model.state_dict().keys()
    report = retrofit.verify(converted, folded, [nets.images(4, 3, 16, 16)])
    assert report.passed(1e-5), report
    assert all(torch.equal(before[k], v) for k, v in converted.state_dict().items())


def test_every_foldable_pair_of_a_stock_network_is_folded():
    model = trained(torchvision.models.resnet18()).eval()
    folded = retrofit.fold(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert isinstance(folded.bn1, nn.Identity)
    assert retrofit.verify(model, folded, [nets.images(2, 3, 64, 64)]).passed(1e-4)


@pytest.mark.parametrize(
    ("conv", "norm", "shape"),
    [
        (nn.Conv2d(6, 8, 3, groups=2), nn.BatchNorm2d(8), (2, 6, 9, 9)),
        (nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8, affine=False), (2, 6, 9, 9)),
        (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), (2, 3, 9)),
        (nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4), (2, 2, 5, 5, 5)),
        (nn.ConvTranspose2d(6, 8, 3), nn.BatchNorm2d(8), (2, 6, 5, 5)),
    ],
    ids=["grouped", "without bias", "1d", "3d", "transposed"],
)
def test_against_torchs_fusion(conv, norm, shape):
    model = nn.Sequential(conv, norm).eval()
    norm.running_mean.normal_(generator=torch.Generator().manual_seed(1))
    norm.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(2))
    folded = retrofit.fold(model)
    fused = fuse_conv_bn_eval(conv, norm, transpose=isinstance(conv, nn.ConvTranspose2d))
    torch.testing.assert_close(folded[0].weight, fused.weight, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(folded[0].bias, fused.bias, rtol=1e-5, atol=1e-6)
    x = nets.images(*shape)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_grouped_transposed_convolution():
    model = nn.Sequential(nn.ConvTranspose2d(6, 9, 3, groups=3), nn.BatchNorm2d(9))
    model = trained(model).eval()
    x = nets.images(2, 6, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(retrofit.fold(model)(x), model(x), rtol=1e-4, atol=1e-5)


def test_untouched_channels_keep_their_bits():
    weight = torch.randn(3, 2, 1, 1)
    bias = torch.tensor([-0.0, 0.1, 0.2])
    alpha, shift = torch.tensor([1.0, 2.0, 1.0]), torch.tensor([0.0, 1.0, 0.0])
    new_weight, new_bias = fold_weights(weight, bias, alpha, shift)
    assert torch.equal(new_weight[::2], weight[::2])
    assert torch.signbit(new_bias[0])
    assert new_bias[1] == 0.1 * 2 + 1


def test_a_missing_bias_appears_only_where_it_is_needed():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU()).eval()
    converted = retrofit.insert(model, retrofit.plan(model))
    assert retrofit.fold(converted)[0].bias is None
    assert retrofit.fold(trained(converted))[0].bias is not None


def test_a_convolution_read_by_two_batchnorms_absorbs_neither():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.one, self.two = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.two(self.conv(F.relu(self.one(self.conv(x)))))

    with pytest.warns(UserWarning, match="2 of 2 BatchNorms stay: one, two: its layer is called"):
        folded = retrofit.fold(Shared().eval())
    assert isinstance(folded.one, nn.BatchNorm2d)


def test_a_convolution_that_others_read_before_the_batchnorm_is_left():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

        def forward(self, x):
            x = self.conv(x)
            return x + self.bn(x)

    with pytest.warns(
        UserWarning, match="1 of 1 BatchNorms stay: bn: what its layer gives is used"
    ):
        assert isinstance(retrofit.fold(Both().eval()).bn, nn.BatchNorm2d)


def test_weight_standardisation_cannot_absorb_a_trained_batchnorm():
    model = nets.build(nets.subclassed)
    converted = trained(retrofit.insert(model))
    with pytest.raises(RetrofitError, match="0, a Standardised, does not follow its weight"):
        retrofit.fold(converted)


def test_a_convolution_with_an_activation_or_a_hook_cannot_absorb_one_either():
    class Activated(nn.Conv2d):
        def forward(self, x):
            return super().forward(x).relu()

    activated = trained(nn.Sequential(Activated(3, 4, 3), nn.BatchNorm2d(4))).eval()
    with pytest.warns(UserWarning, match="its layer, a Activated, does not follow"):
        assert isinstance(retrofit.fold(activated)[1], nn.BatchNorm2d)
    hooked = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
    hooked[0].register_forward_hook(lambda _m, _i, y: y.relu())
    with pytest.warns(UserWarning, match="has a hook"):
        assert isinstance(retrofit.fold(hooked)[1], nn.BatchNorm2d)


def test_a_subclass_of_convolution_that_is_one_folds():
    class Padded(nn.Conv2d):
        def forward(self, x):
            return super().forward(F.pad(x, (1, 2, 1, 2)))

    model = trained(nn.Sequential(Padded(3, 4, 3), nn.BatchNorm2d(4))).eval()
    folded = retrofit.fold(model)
    assert isinstance(folded[1], nn.Identity)
    assert retrofit.verify(model, folded, [nets.images(4, 3, 8, 8)]).passed(1e-5)


def test_a_batchnorm_that_does_more_stays():
    class Activated(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Activated(4)).eval()
    with pytest.warns(UserWarning, match="a Activated, computes something else than a scale"):
        assert isinstance(retrofit.fold(model)[1], Activated)


def test_a_bfloat16_batchnorm_folds():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval().bfloat16()
    x = nets.images(4, 3, 8, 8).bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(retrofit.fold(model)(x), model(x), rtol=0.1, atol=0.05)


def test_a_parametrized_weight_is_named():
    model = nets.build(nets.root_sequential)
    parametrizations.spectral_norm(model[0])
    converted = retrofit.insert(model)
    assert list(retrofit.fold(converted).state_dict()) == list(model.state_dict())
    with pytest.raises(RetrofitError, match="weight of 0 is parametrized"):
        retrofit.fold(trained(converted))


def test_a_batchnorm_without_running_statistics_is_named():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    with pytest.warns(UserWarning, match="after its layer has no running statistics"):
        assert str(retrofit.fold(model)) == str(model)


def test_a_model_that_lost_its_batchnorm_is_named():
    converted = retrofit.insert(nets.build(nets.Residual))
    converted.stem = nn.Conv2d(3, 8, 3)
    with pytest.raises(RetrofitError, match=r"no stem.bn.*changed after the conversion"):
        retrofit.fold(converted)


def normed(channels):
    """A BatchNorm that is not the identity."""
    norm = nn.BatchNorm2d(channels)
    nn.init.normal_(norm.running_mean)
    return norm


class Unfollowed(nn.Module):
    """Code that torch.fx cannot follow, and that may use a convolution twice."""

    def __init__(self, twice):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 1), normed(3))
        self.twice = twice

    def forward(self, x):
        y = self.block(x)
        return y + self.block[0](x) if self.twice and x.sum() < 1e9 else y * bool(x.sum() < 1e9)


@pytest.mark.parametrize("twice", [False, True])
def test_a_model_that_cannot_be_traced_is_folded_only_by_an_example(twice):
    torch.manual_seed(0)
    model, x = Unfollowed(twice).eval(), nets.images(2, 3, 8, 8)
    with pytest.raises(RetrofitError, match=r"cannot trace this Unfollowed.*pass example"):
        retrofit.fold(model)
    inside = nn.Sequential(model, nn.ReLU())
    with pytest.warns(UserWarning, match=r"cannot follow \(test_folding.py:\d+\): pass example"):
        assert isinstance(retrofit.fold(inside)[0].block[1], nn.BatchNorm2d)
    left = retrofit.unfoldable(model, example=x)
    assert left == ({"block.1": "its layer is called elsewhere too"} if twice else {})
    with pytest.warns(UserWarning, match="block.1: its layer") if twice else nullcontext():
        folded = retrofit.fold(model, example=x)
    assert isinstance(folded.block[1], nn.BatchNorm2d if twice else nn.Identity)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-6)


def test_what_the_models_code_reads_or_a_hook_changes_stays():
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), normed(4)

        def forward(self, x):
            return self.norm(self.conv(x)) + self.norm.bias.sum()

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1, bias=False), normed(4)

        def forward(self, x):
            return F.conv_transpose2d(self.norm(self.conv(x)), self.conv.weight)

    hooked = nn.Sequential(nn.Conv2d(3, 4, 1), normed(4))
    hooked[1].register_forward_pre_hook(lambda _m, inputs: (inputs[0] * 2,))
    x = nets.images(2, 3, 8, 8)
    for model in (Reading().eval(), Tied().eval(), hooked.eval()):
        with pytest.warns(UserWarning, match="1 of 1 BatchNorms stay: .*(code reads|has a hook)"):
            folded = retrofit.fold(model)
        assert torch.equal(folded(x), model(x))
        assert any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())


def test_bf16_weights_fold_in_float32():
    model = nets.build(nets.root_sequential).bfloat16()
    converted = trained(retrofit.add_batchnorm(model, [nets.images(8, 3, 16, 16).bfloat16()]))
    folded = retrofit.fold(converted)
    assert folded[0].weight.dtype == torch.bfloat16
    x = nets.images(4, 3, 16, 16).bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(folded(x).float(), converted(x).float(), rtol=0.1, atol=0.05)


class Standardised(nn.Linear):
    """A Linear layer with a forward of its own; `fold` has to try what it computes."""

    def forward(self, x):
        return super().forward(x) * 1.0


class Scaled(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 1.0


class Picky(nn.Conv2d):
    """Takes nothing but what has eight pixels a side."""

    def forward(self, x):
        if x.shape[-1] != 8:
            raise ValueError("eight pixels")
        return super().forward(x)


@pytest.mark.parametrize(
    ("layer", "norm", "x"),
    [
        (Standardised(6, 8), nn.BatchNorm1d(8), nets.images(5, 6)),
        (Scaled(3, 8, 3, dilation=20), nn.BatchNorm2d(8), nets.images(2, 3, 50, 50)),
    ],
)
def test_a_layer_with_a_forward_of_its_own_is_tried_before_it_is_folded(layer, norm, x):
    net = nn.Sequential(layer, norm).eval()
    nn.init.uniform_(norm.running_mean)
    folded = retrofit.fold(net, example=x)
    assert isinstance(folded[1], nn.Identity)
    torch.testing.assert_close(folded(x), net(x), rtol=1e-5, atol=1e-5)
    with pytest.warns(UserWarning, match="its layer, a Picky, does not run on random numbers"):
        retrofit.fold(nn.Sequential(Picky(3, 8, 3), nn.BatchNorm2d(8)).eval())
