"""What cannot be done in Python is refused by name; the command line's are in test_bad_requests."""

import nets
import pytest
import torch
from torch import nn

import retrofit
from retrofit import RetrofitError

X = nets.images(8, 3, 16, 16)


def converted(net=nets.root_sequential):
    return retrofit.add_batchnorm(nets.build(net), [X], progress=False)


class Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x, y):
        return self.conv(x).relu() + self.conv(y).relu()


def prepared_elsewhere():
    prepared = retrofit.prepare(nets.build(nets.root_sequential))
    retrofit.calibrate(prepared, [X], progress=False)
    prepared[0].bn = nn.Identity()
    return prepared


def graph_plan_of_another():
    plan = retrofit.plan(nets.build(nets.Residual), layout="graph")
    return retrofit.insert(nets.build(nets.root_sequential), plan)


def folded_with_another_norm():
    model = converted()
    model[0].bn = nn.GroupNorm(1, model[0].conv.out_channels)
    return retrofit.fold(model)


REFUSED = [
    (lambda: retrofit.plan("vgg16"), "plan takes an nn.Module, not a str"),
    (
        lambda: retrofit.calibrate(prepared_elsewhere(), 3),
        "must be an iterable of batches, not int",
    ),
    (lambda: retrofit.convert(prepared_elsewhere()), "0.bn is no observer"),
    (graph_plan_of_another, "it has no place after"),
    (folded_with_another_norm, "after 0 comes a GroupNorm, not a BatchNorm"),
    (lambda: retrofit.drift(converted(), converted(), [X], [0]), "must be positive, not 0"),
    (lambda: retrofit.drift(converted(), converted(), [X, X[..., 1:]]), "several sizes"),
    (lambda: retrofit.drift(Pairs(), Pairs(), [(X, X)]), "Pairs takes more than one tensor"),
    (lambda: retrofit.verify(nn.Sequential(), converted(), [X]), "a Sequential, has no 0"),
    (lambda: retrofit.fold("vgg16"), "nn.Module, not a str"),
]


@pytest.mark.parametrize(("call", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_cannot_be_done_is_refused_by_name(call, words):
    with pytest.raises(RetrofitError) as refused:
        call()
    assert words in str(refused.value)


def test_networks_that_could_never_be_trained_are_not_made():
    model, prepared = nets.build(nets.root_sequential), prepared_elsewhere()
    with torch.inference_mode():
        for act in (retrofit.prepare, retrofit.insert, retrofit.fold):
            with pytest.raises(RetrofitError, match=r"inference_mode\(\) can never be trained"):
                act(model)
        with pytest.raises(RetrofitError, match="can never be trained"):
            retrofit.convert(prepared)


class Kept(nn.Sequential):
    """A frozen teacher, say, which is shared by what is copied."""

    def __deepcopy__(self, memo):
        return self


def test_a_part_that_does_not_copy_is_named_and_left_as_it_is():
    model = nn.Sequential(Kept(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Conv2d(4, 4, 3), nn.ReLU())
    handle = model[0].register_forward_hook(lambda *_: None)
    text = str(model)
    with pytest.raises(RetrofitError, match=r"^0 of this Sequential cannot be copied"):
        retrofit.add_batchnorm(model, [X], progress=False)
    assert model[0].training
    assert handle.id in model[0]._forward_hooks
    assert str(model) == text


def test_a_model_that_does_not_copy_is_left_as_it_is():
    model = Kept(nn.Conv2d(3, 4, 3), nn.ReLU())
    text = str(model)
    with pytest.raises(RetrofitError, match=r"^a Kept cannot be copied"):
        retrofit.plan(model)
    assert model.training
    assert str(model) == text


def test_a_model_on_the_meta_device_is_told_to_get_its_tensors(tmp_path):
    with torch.device("meta"):
        model = nets.root_sequential()
    with pytest.raises(RetrofitError, match="is on the meta device"):
        retrofit.calibrate(retrofit.prepare(model.eval()), [X], progress=False)
    retrofit.save(converted(), tmp_path / "bn.pth")
    with pytest.raises(RetrofitError, match="is on the meta device"):
        retrofit.load(tmp_path / "bn.pth", model)
