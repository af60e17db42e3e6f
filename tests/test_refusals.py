"""What cannot be done in Python is refused by name; and what is rarely asked for works."""

import copy
import threading

import nets
import pytest
import torch
import torchvision
from torch import nn

import retrofit
from retrofit import RetrofitError
from retrofit.cli import main
from retrofit.zoo import trained

X = nets.images(8, 3, 16, 16)


def converted(net=nets.root_sequential):
    return retrofit.add_batchnorm(nets.build(net), [X], progress=False)


class Extra(nn.Conv2d):
    """Keeps something in its state dict that is no tensor."""

    def get_extra_state(self):
        return "extra"

    def set_extra_state(self, state):
        pass


def with_extra_state():
    return nn.Sequential(Extra(3, 4, 3), nn.ReLU()).eval()


class Standardised(nn.Linear):
    """A Linear layer with a forward of its own; `fold` has to try what it computes."""

    def forward(self, x):
        return super().forward(x) * 1.0


class Picky(nn.Conv2d):
    """Takes nothing but what has eight pixels a side."""

    def forward(self, x):
        if x.shape[-1] != 8:
            raise ValueError("eight pixels")
        return super().forward(x)


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
    (lambda: retrofit.calibrate(prepared_elsewhere(), 3), "data is a int: pass an iterable"),
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


def test_a_model_on_the_meta_device_is_told_to_get_its_tensors(tmp_path):
    with torch.device("meta"):
        model = nets.root_sequential()
    with pytest.raises(RetrofitError, match="is on the meta device"):
        retrofit.calibrate(retrofit.prepare(model.eval()), [X], progress=False)
    retrofit.save(converted(), tmp_path / "bn.pth")
    with pytest.raises(RetrofitError, match="is on the meta device"):
        retrofit.load(tmp_path / "bn.pth", model)


def test_state_that_is_no_tensor_goes_into_a_pth_alone(tmp_path):
    with pytest.raises(RetrofitError, match=r"0\._extra_state is no tensor: save as \.pth"):
        retrofit.save(with_extra_state(), tmp_path / "extra.safetensors")
    assert not list(tmp_path.iterdir())
    retrofit.save(with_extra_state(), tmp_path / "extra.pth")
    assert torch.load(tmp_path / "extra.pth", weights_only=True)["0._extra_state"] == "extra"


def test_views_of_one_storage_are_stored_apart(tmp_path):
    model = nets.build(nets.root_sequential)
    whole = torch.randn(2, *model[0].weight.shape)
    model[0].weight = nn.Parameter(whole[0])
    model[0].register_buffer("other", whole[1])
    retrofit.save(model, tmp_path / "views.safetensors")
    again = copy.deepcopy(model)
    nn.init.zeros_(again[0].weight)
    loaded = retrofit.load(tmp_path / "views.safetensors", again)
    assert torch.equal(loaded[0].weight, whole[0])
    assert torch.equal(loaded[0].other, whole[1])


def test_weights_of_a_data_parallel_model_lose_its_prefix(tmp_path):
    model = nets.build(nets.root_sequential)
    torch.save(nn.DataParallel(model).state_dict(), tmp_path / "parallel.pth")
    loaded = retrofit.load(tmp_path / "parallel.pth", nets.root_sequential().eval())
    assert torch.equal(loaded(X), model(X))


def test_a_layer_with_a_forward_of_its_own_is_tried_before_it_is_folded():
    net = nn.Sequential(Standardised(6, 8), nn.BatchNorm1d(8)).eval()
    nn.init.uniform_(net[1].running_mean)
    folded, x = retrofit.fold(net), nets.images(5, 6)
    assert isinstance(folded[1], nn.Identity)
    torch.testing.assert_close(folded(x), net(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(RetrofitError, match="the output of 0, a Picky, does not follow"):
        retrofit.fold(nn.Sequential(Picky(3, 8, 3), nn.BatchNorm2d(8)).eval())


def test_the_command_runs_in_a_thread_too(capsys):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main(["plan", "alexnet"])))
    thread.start()
    thread.join()
    assert codes == [0]
    assert "features.0" in capsys.readouterr().out


def test_torchvisions_pretrained_weights_are_loaded(tmp_path, monkeypatch):
    """From the cache of downloads, where a file of that name lies."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    weights = torchvision.models.SqueezeNet1_1_Weights.DEFAULT
    model = torchvision.models.squeezenet1_1().eval()
    file = tmp_path / "hub" / "checkpoints" / weights.url.rpartition("/")[2]
    torch.save(model.state_dict(), file)
    x = nets.images(2, 3, 64, 64)
    assert torch.equal(trained("squeezenet1_1", "DEFAULT").eval()(x), model(x))

    def unreachable(*_, **__):
        raise OSError("no route to the host")

    file.unlink()
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(RetrofitError, match="cannot be downloaded: no route to the host"):
        trained("squeezenet1_1", "DEFAULT")


def test_a_state_of_another_version_is_told(tmp_path):
    state, prepared = tmp_path / "state", retrofit.prepare(nets.build(nets.root_sequential))
    retrofit.calibrate(prepared, [X], state=state, progress=False)
    content = torch.load(state, weights_only=True)
    torch.save(content | {"format": -1}, state)
    again = retrofit.prepare(nets.build(nets.root_sequential))
    with pytest.raises(RetrofitError, match="written by another version: remove it"):
        retrofit.calibrate(again, [X], state=state, progress=False)


def test_an_undo_and_an_observer_say_what_they_are():
    model = converted()
    undo = retrofit.recalibrate(model, [X], progress=False)
    assert repr(undo) == "Recalibration(2 BatchNorms on 8 images in 1 batches)"
    prepared = retrofit.prepare(nets.build(nets.root_sequential))
    retrofit.calibrate(prepared, [X], progress=False)
    assert "site='0', images=8" in repr(prepared)


def test_the_plan_of_a_network_without_convolutions_says_so():
    plan = retrofit.plan(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
    assert str(plan).endswith("has no convolutions")


def test_a_forward_fn_of_ones_own_verifies_and_counts_pictures_beside_targets():
    model, model_bn = nets.build(nets.root_sequential), converted()
    batch = (list(X[:3]), ["cat", "dog", "cow"])

    def forward(model, batch):
        return model(torch.stack(batch[0]))

    assert retrofit.verify(model, model_bn, [batch], forward_fn=forward).exact
    prepared = retrofit.prepare(model)
    found = retrofit.calibrate(prepared, [batch, batch], forward_fn=forward, progress=False)
    assert found.images == 6


def test_outputs_of_another_structure_or_of_a_new_one_each_time_are_not_compared():
    model, model_bn = nets.build(nets.root_sequential), converted()

    def named(m, x):
        return m(x) if m is model else {"logits": m(x)}

    with pytest.raises(RetrofitError, match="the outputs differ in structure"):
        retrofit.verify(model, model_bn, [X], forward_fn=named)

    calls = []

    def growing(m, x):
        calls.append(m)
        return [m(x)] * len(calls)

    with pytest.raises(RetrofitError, match="is random in eval mode, or keeps state"):
        retrofit.verify(model, model_bn, [X], forward_fn=growing)


def test_a_layer_that_returns_no_tensor_is_named():
    class Twice(nn.Conv2d):
        def forward(self, x):
            return super().forward(x), x

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = Twice(3, 4, 3), nn.Conv2d(4, 2, 3)

        def forward(self, x):
            return self.last(self.conv(x)[0].relu()).relu()

    with pytest.raises(RetrofitError, match="conv returns a tuple, not a tensor: exclude"):
        retrofit.add_batchnorm(Net().eval(), [X], progress=False)


def test_a_folder_is_no_place_for_a_file(tmp_path):
    (tmp_path / "there.pth").mkdir()
    with pytest.raises(RetrofitError, match=r"there\.pth is a folder"):
        retrofit.save(converted(), tmp_path / "there.pth", overwrite=True)


def test_a_number_that_is_none_is_a_bad_request(capsys):
    words = "adapt a.pth --output b.pth --data c --prior many"
    with pytest.raises(SystemExit) as stopped:
        main(words.split())
    assert stopped.value.code == 2
    assert "many is not a number from 0 up" in capsys.readouterr().err


def test_complex_weights_are_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, dtype=torch.complex64), nn.Identity())
    (site,) = retrofit.plan(model).sites
    assert (site.decision, site.reason) == ("skip", "complex weights")
