"""Files: what is in them, what loads them, and what is refused."""

import copy
import json
import os
import pickle
from pathlib import Path

import nets
import pytest
import safetensors.torch
import torch
import torchvision
from safetensors import safe_open
from torch import nn
from torch.nn.utils import prune

import retrofit
from retrofit import RetrofitError
from retrofit.files.weights import read_weights

X = nets.images(8, 3, 16, 16)


def converted(net=nets.Residual):
    return retrofit.add_batchnorm(nets.build(net), [X], progress=False)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
@pytest.mark.parametrize("net", [nets.Residual, nets.TwoNames, nets.TiedWeights, nets.Grouped])
def test_what_is_saved_loads_into_the_plain_architecture(tmp_path, net, suffix):
    model = converted(net)
    retrofit.save(model, tmp_path / f"model{suffix}")
    plain = net()
    loaded = retrofit.load(tmp_path / f"model{suffix}", plain)
    assert type(loaded) is type(plain)
    assert not loaded.training
    assert torch.equal(loaded(X), model(X))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in plain.modules())
    folded = retrofit.fold(loaded)
    assert torch.equal(folded(X), nets.build(net)(X))
    assert [f.name for f in tmp_path.iterdir()] == [f"model{suffix}"]


def test_a_folded_file_loads_too(tmp_path):
    folded = retrofit.fold(converted())
    retrofit.save(folded, tmp_path / "a.safetensors")
    loaded = retrofit.load(tmp_path / "a.safetensors", nets.Residual())
    assert torch.equal(loaded(X), folded(X))
    assert list(loaded.state_dict()) == list(folded.state_dict())


def test_a_plain_state_dict_tells_which_layers_have_a_batchnorm(tmp_path):
    model = retrofit.add_batchnorm(
        nets.build(nets.Residual), [X], exclude=["stem", "body.2"], progress=False
    )
    retrofit.save(model, tmp_path / "a.pth")
    loaded = retrofit.load(tmp_path / "a.pth", nets.Residual())
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert torch.equal(loaded(X), model(X))


def test_torchvision_models_are_rebuilt_by_name(tmp_path):
    torch.manual_seed(0)
    model = torchvision.models.squeezenet1_1().eval()
    x = nets.images(2, 3, 64, 64)
    ours = retrofit.add_batchnorm(model, [x], exclude="features.0", progress=False)
    retrofit.save(ours, tmp_path / "s.safetensors", name="squeezenet1_1")
    loaded = retrofit.load(tmp_path / "s.safetensors")
    assert isinstance(loaded, torchvision.models.SqueezeNet)
    assert torch.equal(loaded(x), model(x))
    assert not any("features.0.bn" in key for key in loaded.state_dict())


def test_others_load_it_without_this_package(tmp_path):
    model = nets.vgg("vgg11")
    model.classifier = nn.Linear(25088, 10)  # half a gigabyte less to write
    x = nets.images(2, 3, 64, 64)
    ours = retrofit.add_batchnorm(model, [x], progress=False)
    retrofit.save(ours, tmp_path / "v.safetensors")
    retrofit.save(ours, tmp_path / "v.pth")
    for state in (
        safetensors.torch.load_file(tmp_path / "v.safetensors"),
        torch.load(tmp_path / "v.pth", weights_only=True),
    ):
        stock = nets.unwritten("vgg11_bn")
        stock.classifier = nn.Linear(25088, 10)
        stock.load_state_dict(state, strict=True)
        assert torch.equal(stock(x), model(x))


def test_a_pickled_model_names_nothing_of_this_package():
    assert b"retrofit." not in pickle.dumps(converted(nets.root_sequential))


def test_provenance_says_where_the_file_comes_from(tmp_path):
    model = nets.build(nets.Residual)
    ours = retrofit.add_batchnorm(model, X.split(3), progress=False)
    found = retrofit.verify(model, ours, [X])
    file = tmp_path / "r.safetensors"
    retrofit.save(ours, file, name="my.module:factory", data="eight pictures", verification=found)
    with safe_open(file, framework="pt") as opened:
        told = json.loads(opened.metadata()["retrofit"])
    assert told["retrofit"] == retrofit.__version__
    assert told["torch"] == torch.__version__
    assert (told["model"], told["class"]) == ("my.module:factory", "Residual")
    assert (told["eps"], told["momentum"], told["images"]) == (1e-5, 0.1, 8)
    assert told["data"] == "eight pictures"
    assert told["verification"]["images"] == 8
    assert told["verification"]["outputs"][0]["exact"] is True
    assert [s["path"] for s in told["plan"]["sites"]] == ["stem", "body.0", "body.2"]
    assert told["date"].startswith("20")


def test_another_eps_is_restored_from_the_file(tmp_path):
    ready = retrofit.prepare(nets.build(nets.Residual))
    retrofit.calibrate(ready, [X], progress=False)
    with pytest.warns(UserWarning, match="eps"):
        ours = retrofit.convert(ready, eps=1e-3, momentum=None)
    retrofit.save(ours, tmp_path / "e.safetensors")
    loaded = retrofit.load(tmp_path / "e.safetensors", nets.Residual())
    assert (loaded.stem.bn.eps, loaded.stem.bn.momentum) == (1e-3, None)
    assert torch.equal(loaded(X), ours(X))


def batchnorms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def test_an_eps_and_momentum_set_after_the_conversion_are_restored_from_the_file(tmp_path):
    model = converted()
    for norm in batchnorms(model):
        norm.eps, norm.momentum = 2.0, 0.3
    retrofit.save(model, tmp_path / "e.safetensors")
    loaded = retrofit.load(tmp_path / "e.safetensors", nets.Residual())
    assert {(norm.eps, norm.momentum) for norm in batchnorms(loaded)} == {(2.0, 0.3)}
    assert torch.equal(loaded(X), model(X))


@pytest.mark.parametrize("change", [{"eps": 1e-3}, {"momentum": 0.01}, {"momentum": None}], ids=str)
@pytest.mark.parametrize("net", [nets.Residual, nets.TiedWeights])
def test_a_plain_state_dict_that_lacks_eps_or_momentum_says_so(tmp_path, net, change):
    model = converted(net)
    vars(batchnorms(model)[-1]).update(change)
    message = r"a\.pth does not hold eps and momentum .*load gives them 1e-05 and 0\.1"
    with pytest.warns(UserWarning, match=message) as seen:
        retrofit.save(model, tmp_path / "a.pth")
    assert len(seen) == 1
    assert ("compute something else" in str(seen[0].message)) == ("eps" in change)


def test_several_eps_are_not_saved_as_one_and_several_momenta_are_named(tmp_path):
    model, file = converted(), tmp_path / "a.safetensors"
    batchnorms(model)[1].momentum = 0.5
    with pytest.warns(UserWarning, match=r"several momenta \(0\.5 at body\.0\.bn, 0\.1 before"):
        retrofit.save(model, file)
    batchnorms(model)[1].eps = 1e-3
    with pytest.raises(RetrofitError, match=r"several eps \(0\.001 at body\.0\.bn, 1e-05 before"):
        retrofit.save(model, file, overwrite=True)
    assert torch.equal(retrofit.load(file, nets.Residual())(X), converted()(X))


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"data": 1024}, "data= cannot be stored: 1024 is no str"),
        ({"data": Path("pictures")}, "data= cannot be stored: .*Path.* is no str"),
        ({"name": 3}, "name= cannot be stored: 3 is no str"),
        ({"calibration": {"images": 3}}, "calibration= cannot be stored: .* is no Calibration"),
        ({"verification": torch.ones(2)}, "verification= cannot be stored: .* no Verification"),
        ({"drift": "none"}, "drift= cannot be stored: 'none' is no Drift"),
    ],
)
def test_what_load_would_refuse_of_the_metadata_is_not_saved(tmp_path, told, message):
    with pytest.raises(RetrofitError, match=message):
        retrofit.save(converted(), tmp_path / "a.safetensors", **told)
    assert not list(tmp_path.iterdir())


def test_other_things_than_a_model_and_a_path_are_named_with_the_right_call(tmp_path):
    model, file = converted(), tmp_path / "a.pth"
    retrofit.save(model, file)
    for call, given in {
        lambda: retrofit.save(model.state_dict(), file): r"save\(model, path\).* OrderedDict",
        lambda: retrofit.save(file, model): r"save\(model, path\).*Path, ?|path: Residual",
        lambda: retrofit.save(model, 3): "path: int, model: Residual",
        lambda: retrofit.load(file, nets.Residual): r"load\(path, model\).* the class Residual",
        lambda: retrofit.load(file, model.state_dict()): "model: OrderedDict",
        lambda: retrofit.load(file, "vgg16"): "model: str",
        lambda: retrofit.load(model, file): "path: Residual",
        lambda: retrofit.load(file, nets.Residual(), weights_key=3): "weights_key must be a str",
    }.items():
        with pytest.raises(RetrofitError, match=given):
            call()


def test_the_precision_of_the_file_is_kept(tmp_path):
    model = nets.build(nets.root_sequential).bfloat16()
    ours = retrofit.add_batchnorm(model, [X.bfloat16()], progress=False)
    retrofit.save(ours, tmp_path / "b.safetensors")
    loaded = retrofit.load(tmp_path / "b.safetensors", nets.root_sequential())
    assert loaded[0].conv.weight.dtype == torch.bfloat16
    assert loaded[0].bn.weight.dtype == torch.float32
    assert torch.equal(loaded(X.bfloat16()), ours(X.bfloat16()))


def test_a_link_keeps_pointing_at_the_file_it_names(tmp_path):
    (tmp_path / "real.pth").write_text("old")
    (tmp_path / "link.pth").symlink_to("real.pth")
    model = converted()
    with pytest.raises(RetrofitError, match="exists"):
        retrofit.save(model, tmp_path / "link.pth")
    retrofit.save(model, tmp_path / "link.pth", overwrite=True)
    assert (tmp_path / "link.pth").is_symlink()
    assert torch.equal(retrofit.load(tmp_path / "real.pth", nets.Residual())(X), model(X))


@pytest.mark.parametrize(
    "change",
    [
        {"images": "x"},
        {"eps": None},
        {"momentum": []},
        {"aliases": {"a": ["b"]}},
        {"aliases": 3},
        {"plan": {"renumbered": ["stem"]}},
        {"plan": {"site": {"norm": "head"}}},
        {"plan": {"site": {"conv": "head"}}},
        {"plan": {"site": {"dims": 3}}},
        {"plan": {"site": {"path": "../x"}}},
    ],
    ids=str,
)
def test_metadata_that_does_not_fit_is_refused(tmp_path, change):
    file = tmp_path / "m.safetensors"
    retrofit.save(converted(), file)
    with safe_open(file, framework="pt") as opened:
        told = json.loads(opened.metadata()["retrofit"])
    plan = change.get("plan", {})
    told["plan"]["sites"][0].update(plan.get("site", {}))
    told["plan"].update({k: v for k, v in plan.items() if k != "site"})
    told.update({k: v for k, v in change.items() if k != "plan"})
    metadata = {"retrofit": json.dumps(told)}
    safetensors.torch.save_file(safetensors.torch.load_file(file), file, metadata)
    field = next(iter(change))
    with pytest.raises(RetrofitError, match="aliases" if field == "aliases" else None):
        retrofit.load(file, nets.Residual())


def test_shared_tensors_are_stored_once(tmp_path):
    retrofit.save(converted(nets.TiedWeights), tmp_path / "t.safetensors")
    keys = safetensors.torch.load_file(tmp_path / "t.safetensors").keys()
    assert ("first.conv.weight" in keys) != ("second.conv.weight" in keys)


def test_channels_last_weights_are_stored(tmp_path):
    model = converted().to(memory_format=torch.channels_last)
    retrofit.save(model, tmp_path / "c.safetensors")
    assert torch.equal(
        retrofit.load(tmp_path / "c.safetensors", nets.Residual()).stem.conv.weight,
        model.stem.conv.weight,
    )


def test_a_file_is_not_overwritten_unasked(tmp_path):
    model, file = converted(), tmp_path / "m.pth"
    file.write_text("precious")
    with pytest.raises(RetrofitError, match=r"m\.pth exists"):
        retrofit.save(model, file)
    assert file.read_text() == "precious"
    retrofit.save(model, file, overwrite=True)
    assert torch.equal(retrofit.load(file, nets.Residual())(X), model(X))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.bin", "must end in .safetensors, .pth or .pt"),
        ("missing/model.pth", "the folder .*missing does not exist"),
    ],
)
def test_a_path_that_cannot_be_written_is_named(tmp_path, name, message):
    with pytest.raises(RetrofitError, match=message):
        retrofit.save(converted(), tmp_path / name)


class Evil:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def write(path, kind):
    state = nets.build(nets.Residual).state_dict()
    if kind == "truncated pth":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "truncated safetensors":
        safetensors.torch.save_file(state, path)
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Evil()))
    elif kind == "no tensors":
        torch.save({"state_dict": {"epoch": 3}}, path)
    elif kind == "a list":
        torch.save([torch.ones(3)], path)
    elif kind == "whole model":
        torch.save(nets.build(nets.Residual), path)
    elif kind == "fewer keys":
        torch.save({k: v for k, v in state.items() if not k.startswith("body")}, path)
    elif kind == "other shapes":
        torch.save({**state, "head.weight": torch.zeros(7, 8)}, path)
    elif kind == "bad plan":
        told = {"plan": {"sites": "x"}, "eps": 1e-5, "momentum": 0.1, "images": 8}
        metadata = {"retrofit": json.dumps(told)}
        safetensors.torch.save_file(state, path, metadata)
    elif kind == "bad metadata":
        safetensors.torch.save_file(state, path, {"retrofit": "{"})


@pytest.mark.parametrize(
    ("kind", "suffix", "message"),
    [
        ("missing", ".pth", "there is no file"),
        ("truncated pth", ".pth", "cannot be read as a state dict"),
        ("truncated safetensors", ".safetensors", "cannot be read as safetensors"),
        ("pickle", ".pth", "cannot be read as a state dict"),
        ("no tensors", ".pth", "holds no state dict but {state_dict: dict}"),
        ("a list", ".pth", "holds no state dict but a list: expected tensors by name"),
        ("whole model", ".pth", "cannot be read as a state dict"),
        ("fewer keys", ".pth", r"by their keys: \d+ missing \(.*, \.\.\.\)"),
        ("other shapes", ".pth", r"head.weight \(7, 8\) instead of \(5, 8\)"),
        ("bad plan", ".safetensors", "metadata is damaged, plan"),
        ("bad metadata", ".safetensors", "metadata cannot be read"),
    ],
)
def test_files_that_are_refused(tmp_path, monkeypatch, kind, suffix, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"bad{suffix}"
    write(path, kind)
    model = nets.Residual()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RetrofitError, match=message) as raised:
        retrofit.load(path, model)
    assert "\n" not in str(raised.value)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not (tmp_path / "executed").exists()


def test_a_file_never_names_code_to_import(tmp_path):
    retrofit.save(converted(), tmp_path / "m.safetensors", name="nets:Residual")
    with pytest.raises(
        RetrofitError,
        match=r"is of nets:Residual, .*: pass the network .*, load\('m.safetensors', network\)",
    ):
        retrofit.load(tmp_path / "m.safetensors")


class Extra(nn.Conv2d):
    """Keeps something in its state dict that is no tensor."""

    def get_extra_state(self):
        return "extra"

    def set_extra_state(self, state):
        pass


def with_extra_state():
    return nn.Sequential(Extra(3, 4, 3), nn.ReLU()).eval()


def test_numbers_that_safetensors_has_no_type_for_go_into_a_pth_alone(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    model.register_buffer("filter", torch.ones(3, dtype=torch.complex128))
    with pytest.raises(RetrofitError, match=r"cannot store torch\.complex128: save as \.pth"):
        retrofit.save(model, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    retrofit.save(model, tmp_path / "a.pth")
    assert torch.load(tmp_path / "a.pth", weights_only=True)["filter"].equal(model.filter)


@pytest.mark.parametrize("weights", [{"0.weight": torch.ones(4, 3, 3, 3)}, None], ids=["", "plan"])
def test_a_model_that_is_lazy_is_told_to_run_first(tmp_path, weights):
    if weights is None:
        model = retrofit.insert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval())
        retrofit.save(model, tmp_path / "a.safetensors")
    else:
        safetensors.torch.save_file(weights, tmp_path / "a.safetensors")
    with pytest.raises(RetrofitError, match=r"has no shape yet: run one batch through the model"):
        retrofit.load(tmp_path / "a.safetensors", nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU()))


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


@pytest.mark.usefixtures("without_gpus")
def test_weights_of_a_data_parallel_model_lose_its_prefix(tmp_path):
    model = nets.build(nets.root_sequential)
    torch.save(nn.DataParallel(model).state_dict(), tmp_path / "parallel.pth")
    loaded = retrofit.load(tmp_path / "parallel.pth", nets.root_sequential().eval())
    assert torch.equal(loaded(X), model(X))


def test_a_folder_is_no_place_for_a_file(tmp_path):
    (tmp_path / "there.pth").mkdir()
    with pytest.raises(RetrofitError, match=r"there\.pth is a folder"):
        retrofit.save(converted(), tmp_path / "there.pth", overwrite=True)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_file_without_the_counts_of_batches_loads_as_in_torch(tmp_path, suffix):
    model = converted()
    state = {k: v for k, v in model.state_dict().items() if "num_batches_tracked" not in k}
    file = tmp_path / f"old.{suffix}"
    if suffix == "pth":
        torch.save(state, file)
    else:
        safetensors.torch.save_file(state, file)
    assert torch.equal(retrofit.load(file, nets.Residual())(X), model(X))


def test_a_lazily_negated_buffer_is_stored_as_it_reads(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    z = torch.randn(5, dtype=torch.complex64)
    model.register_buffer("imaginary", z.imag)
    model.register_buffer("negated", z.conj().imag)  # of the same memory
    retrofit.save(model, tmp_path / "z.safetensors")
    stored = safetensors.torch.load_file(tmp_path / "z.safetensors")
    assert torch.equal(stored["imaginary"], z.imag)
    assert torch.equal(stored["negated"], -z.imag)


def test_a_buffer_that_is_not_dense_is_named(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    with pytest.raises(RetrofitError, match=r"the tensor sparse is not dense: save as \.pth"):
        retrofit.save(model, tmp_path / "s.safetensors")


def test_a_model_with_the_old_weight_norm_loads_after_it_ran(tmp_path):
    with pytest.warns(FutureWarning, match="weight_norm"):
        model = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU()).eval()
    retrofit.save(model, tmp_path / "w.pth")
    model(X)
    assert torch.equal(retrofit.load(tmp_path / "w.pth", model)(X), model(X))


class Old(nn.Module):
    """The network of `written/before-0.1.0.safetensors`."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.body = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU())
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.body(self.stem(x).relu()).mean((2, 3)))


def test_a_file_of_the_version_before_loads_and_says_what_it_said():
    file = Path(__file__).parent / "written" / "before-0.1.0.safetensors"
    loaded = retrofit.load(file, Old())
    plain = retrofit.fold(loaded)
    x = torch.randn(16, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    assert isinstance(loaded.stem.bn, nn.BatchNorm2d)
    assert torch.equal(loaded(x), plain(x))
    _, provenance = read_weights(file)
    assert (provenance.model, provenance.images, provenance.eps) == ("nets:Old", 16, 1e-5)
    assert provenance.verification.exact
    assert provenance.verification.images == 16
    assert [row.batch_size for row in provenance.drift.rows] == [8]
    assert [site.site for site in provenance.calibration.sites] == ["stem", "body.0"]


def without_statistics(norm):
    """As Tent sets a BatchNorm up."""
    norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    return norm


CHANGES = {
    "no running statistics": (lambda m: without_statistics(m.stem.bn), r"stem\.bn, BatchNorm2d"),
    "another norm": (lambda m: setattr(m.stem, "bn", nn.GroupNorm(2, 8)), r"stem\.bn, GroupNorm"),
    "no norm": (lambda m: setattr(m.stem, "bn", nn.Identity()), r"stem\.bn, Identity"),
    "another width": (lambda m: setattr(m.stem, "bn", nn.BatchNorm2d(3)), r"stem\.bn"),
    "no affine": (lambda m: setattr(m.stem, "bn", nn.BatchNorm2d(8, affine=False)), "weight gone"),
    "pruned": (
        lambda m: prune.l1_unstructured(m.stem.conv, "weight", 0.5),
        r"stem\.conv\.weight gone; stem\.conv\.weight_mask, stem\.conv\.weight_orig new",
    ),
    "parametrized": (
        lambda m: nn.utils.parametrizations.weight_norm(m.stem.conv),
        r"stem\.conv\.weight gone; stem\.conv\.parametrizations",
    ),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_site_that_load_could_not_read_is_not_saved(tmp_path, change, suffix):
    model = converted()
    alter, message = CHANGES[change]
    alter(model)
    with pytest.raises(RetrofitError, match=rf"stem and its BatchNorm \({message}|{message}"):
        retrofit.save(model, tmp_path / f"a{suffix}")
    assert not list(tmp_path.iterdir())


def test_a_prepared_model_is_not_saved_as_a_converted_one(tmp_path):
    with pytest.raises(RetrofitError, match=r"stem\.bn, MomentObserver"):
        retrofit.save(retrofit.prepare(nets.build(nets.Residual)), tmp_path / "a.safetensors")


def test_a_synchronised_batchnorm_loads_as_an_ordinary_one(tmp_path):
    model = converted()
    retrofit.save(nn.SyncBatchNorm.convert_sync_batchnorm(model), tmp_path / "a.safetensors")
    assert torch.equal(retrofit.load(tmp_path / "a.safetensors", nets.Residual())(X), model(X))


def test_a_new_head_is_saved_with_a_word_and_loads_into_a_network_that_has_one(tmp_path):
    model, plain = converted(), nets.build(nets.Residual)
    for net in (model, plain):
        net.head = nn.Sequential(nn.Dropout(), net.head).eval()
    with pytest.warns(UserWarning, match=r"changed after the conversion \(head\.1\.bias, head"):
        retrofit.save(model, tmp_path / "a.safetensors")
    assert torch.equal(retrofit.load(tmp_path / "a.safetensors", plain)(X), model(X))


def test_a_model_without_numbers_is_not_saved(tmp_path):
    for suffix in (".pth", ".safetensors"):
        with pytest.raises(RetrofitError, match=r"stem\.weight is on the meta device"):
            retrofit.save(nets.Residual().to("meta"), tmp_path / f"a{suffix}")


@pytest.mark.parametrize(
    "options",
    [
        {"include": "*"},
        {"include": "0", "linear": True},
        {"placement": "post_activation"},
    ],
    ids=str,
)
def test_the_keys_of_a_plain_state_dict_tell_what_was_asked_for(tmp_path, options):
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1)).eval()
    if "linear" in options:  # over the last axis
        plain = nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 4)).eval()
    made = retrofit.add_batchnorm(plain, [X], progress=False, **options)
    retrofit.save(made, tmp_path / "a.pth")
    loaded = retrofit.load(tmp_path / "a.pth", plain)
    assert list(loaded.state_dict()) == list(made.state_dict())
    assert torch.equal(loaded(X), made(X))


class SmallVGG(torchvision.models.VGG):
    """Its `features` are renumbered."""

    def __init__(self):
        nn.Module.__init__(self)
        convs = [layer for c in (3, 4, 5, 6) for layer in (nn.Conv2d(c, c + 1, 3), nn.ReLU())]
        self.features, self.avgpool = nn.Sequential(*convs), nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 2))


@pytest.mark.parametrize("placement", ["pre_activation", "post_activation"])
@pytest.mark.parametrize(
    "left_out",
    ["2", "024", *(pytest.param(o, marks=pytest.mark.slow) for o in ("0", "6", "02", "04", "26"))],
)
def test_keys_that_moved_up_tell_which_layers_have_a_batchnorm(tmp_path, left_out, placement):
    options = {"exclude": [f"features.{i}" for i in left_out], "placement": placement}
    made = retrofit.add_batchnorm(nets.build(SmallVGG), [X], progress=False, **options)
    retrofit.save(made, tmp_path / "a.pth")
    loaded = retrofit.load(tmp_path / "a.pth", SmallVGG())
    assert list(loaded.state_dict()) == list(made.state_dict())
    assert torch.equal(loaded(X), made(X))
    torch.save({"state_dict": {f"module.{k}": v for k, v in made.state_dict().items()}},
               tmp_path / "run.ckpt")  # fmt: skip
    assert torch.equal(retrofit.load(tmp_path / "run.ckpt", SmallVGG())(X), made(X))


CANNOT_TELL = {
    "graph": (nets.Residual, {"layout": "graph"}),
    "renumber": (nets.root_sequential, {"renumber": ""}),
    "no renumbering": (SmallVGG, {"renumber": ()}),
    "linear": (SmallVGG, {"include": "classifier.*", "linear": True}),
    "linear after the activation": (
        SmallVGG,
        {"include": "classifier.0", "linear": True, "placement": "post_activation"},
    ),
}


@pytest.mark.parametrize("case", CANNOT_TELL)
def test_a_plain_state_dict_that_cannot_tell_says_so(tmp_path, case):
    net, options = CANNOT_TELL[case]
    made = retrofit.add_batchnorm(nets.build(net), [X], progress=False, **options)
    with pytest.warns(UserWarning, match=r"a\.pth will not say where its BatchNorms are"):
        retrofit.save(made, tmp_path / "a.pth")
    with pytest.raises(RetrofitError, match="do not fit"):
        retrofit.load(tmp_path / "a.pth", net())
    retrofit.save(made, tmp_path / "a.safetensors")
    assert torch.equal(retrofit.load(tmp_path / "a.safetensors", net())(X), made(X))


def test_extra_state_comes_back_from_a_pth(tmp_path):
    class Counting(Extra):
        def set_extra_state(self, state):
            self.seen = state

    plain = nn.Sequential(Counting(3, 4, 3), nn.ReLU()).eval()
    retrofit.save(with_extra_state(), tmp_path / "extra.pth")
    assert retrofit.load(tmp_path / "extra.pth", plain)[0].seen == "extra"


def test_a_network_with_extra_state_or_a_sparse_buffer_is_saved_as_pth(tmp_path):
    class Extra(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU())
            self.register_buffer("sparse", torch.eye(3).to_sparse())

        def get_extra_state(self):
            return {"step": 3}

        def set_extra_state(self, state):
            pass

    converted = retrofit.add_batchnorm(Extra().eval(), [nets.images(8, 3, 8, 8)], progress=False)
    retrofit.save(converted, tmp_path / "extra.pth")
    written = torch.load(tmp_path / "extra.pth", weights_only=False)
    assert written["_extra_state"] == {"step": 3}
    with pytest.raises(RetrofitError, match=r"save as \.pth instead"):
        retrofit.save(converted, tmp_path / "extra.safetensors")
