"""Models of torch.inference_mode(), and another default device than the one of the model."""

import copy
import warnings
from functools import partial

import nets
import pytest
import torch
from torch import nn

import retrofit
from retrofit import RetrofitError


class Own(nn.Conv2d):
    """Of another class than torch's, so that fold has to try it."""


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x)


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()).eval()


def normed():
    torch.manual_seed(0)
    model = nn.Sequential(
        Own(3, 4, 3), OwnNorm(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(4, 4), nn.BatchNorm1d(4),
    ).eval()  # fmt: skip
    for norm in (model[1], model[3], model[7]):
        nn.init.uniform_(norm.running_mean)
    return model


def trains(model, x):
    model.train()(x).square().mean().backward()
    return all(parameter.grad is not None for parameter in model.parameters())


def test_a_model_of_inference_mode_is_converted_and_folded_to_one_that_trains():
    with torch.inference_mode():
        model, with_norms = plain(), normed()
    x = nets.images(8, 3, 9, 9)
    converted = retrofit.add_batchnorm(model, [x], include="*", progress=False)
    folded = retrofit.fold(with_norms)
    with torch.no_grad():
        assert torch.equal(converted(x), model(x))
        torch.testing.assert_close(folded(x), with_norms(x), rtol=1e-4, atol=1e-5)
    assert trains(converted, x)
    assert trains(folded, x)
    assert trains(retrofit.insert(model), x)
    assert all(p.is_inference() for p in (*model.parameters(), *with_norms.parameters()))


def test_a_model_of_inference_mode_is_recalibrated_in_a_copy_only():
    with torch.inference_mode():
        model = normed()
    with pytest.raises(RetrofitError, match=r"1 was made in torch\.inference_mode.*deepcopy"):
        retrofit.recalibrate(model, [nets.images(8, 3, 9, 9)], progress=False)
    recalibrated = copy.deepcopy(model)
    retrofit.recalibrate(recalibrated, [nets.images(64, 3, 9, 9)], progress=False)
    assert not torch.equal(recalibrated[1].running_mean, model[1].running_mean)


def converted(x):
    return retrofit.add_batchnorm(plain(), [x], include="*", progress=False, tolerance=0.5)


def recalibrated(x):
    model = normed()
    retrofit.recalibrate(model, [x], layerwise=True, prior=4, progress=False)
    return model


DOING = {
    "add_batchnorm": converted,
    "a graph": lambda x: retrofit.add_batchnorm(plain(), [x], layout="graph", progress=False),
    "insert": lambda _: retrofit.insert(plain()),
    "fold": lambda _: retrofit.fold(normed()),
    "fold with an example": lambda x: retrofit.fold(normed(), example=x),
    "fold of a conversion": lambda x: retrofit.fold(converted(x)),
    "recalibrate": recalibrated,
}  # fmt: skip


@pytest.mark.parametrize("doing", DOING.values(), ids=DOING)
def test_another_default_device_changes_nothing(doing, monkeypatch):
    x = nets.images(8, 3, 9, 9)
    for make in (plain, normed):  # made before, on the CPU
        monkeypatch.setitem(globals(), make.__name__, partial(copy.deepcopy, make()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = doing(x).state_dict()
        with torch.device("meta"):
            found = doing(x).state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert torch.equal(tensor, expected[key]), key


def test_verify_and_drift_compare_under_another_default_device():
    x = nets.images(8, 3, 9, 9)
    model, with_norms = plain(), converted(x)
    with torch.device("meta"):
        assert retrofit.verify(model, with_norms, [x]).exact
        assert retrofit.drift(model, with_norms, [x], batch_sizes=(4,)).rows[0].images == 8
