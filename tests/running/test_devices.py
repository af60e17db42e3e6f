"""Models that run elsewhere for a while; torch's meta device stands in for a GPU."""

import nets
import pytest
import torch

import retrofit
from retrofit.errors import RetrofitError
from retrofit.running import devices
from retrofit.running.devices import on_device


@pytest.fixture
def meta(monkeypatch):
    monkeypatch.setattr(devices, "usable", torch.device)
    return "meta"


def tensors(model):
    return [*model.parameters(), *model.buffers()]


def test_models_come_back_as_they_were_with_their_gradients(meta):
    model = nets.build(nets.Residual)
    converted = retrofit.insert(model)
    converted.first = model.stem  # a part that both have
    converted(nets.images(2, 3, 8, 8)).sum().backward()
    both = [*tensors(model), *tensors(converted)]
    before = [(t, t.data_ptr(), t.grad) for t in both]
    with on_device(meta, model, converted) as where:
        assert where == torch.device(meta)
        assert all(t.is_meta for t in (*tensors(model), *tensors(converted)))
    after = [*tensors(model), *tensors(converted)]
    for now, (then, place, grad) in zip(after, before, strict=True):
        assert now is then
        assert now.data_ptr() == place
        assert now.grad is grad


def test_one_that_is_there_already_does_not_keep_the_other_away(meta):
    there, model = nets.build(nets.Residual), nets.build(nets.Residual)
    with on_device("cpu", there, model) as where:
        assert where == torch.device("cpu")
    with on_device(meta, torch.nn.ReLU(), model):
        assert all(t.is_meta for t in tensors(model))


def test_a_model_on_the_meta_device_is_refused():
    model = nets.build(nets.Residual).to("meta")
    with pytest.raises(RetrofitError, match="this Residual is on the meta device"):
        on_device(None, model).__enter__()
