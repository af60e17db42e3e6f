"""Weights files as training scripts, trainers and hubs write them."""

import argparse
import collections
import gzip
import json
import pickle
import warnings
import zipfile

import nets
import numpy as np
import pytest
import safetensors.torch
import torch
from folders import pictures
from torch import nn

import retrofit
from retrofit import RetrofitError
from retrofit.files import model_sources
from retrofit.files.fitting import load_weights

NET = "from torch import nn\ndef net(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())\n"
DATA = "--data pictures --crop 16 --mean 0.5 --std 0.5 --workers 0"
CONVERT = f"convert net.py:net {DATA} --output bn.safetensors"


def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()


def random_state(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"0.weight": (8, 3, 3, 3), "0.bias": (8,)}
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


STATE, EMA = random_state(0), random_state(1)


def under(prefix, state=STATE):
    return {prefix + key: tensor for key, tensor in state.items()}


def assert_loaded(model, state=STATE):
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("compiled.pth", under("_orig_mod.")),
        ("compiled_ddp.pth", under("_orig_mod.module.")),
        ("lightning.ckpt", {"state_dict": under("model."), "epoch": 3, "loops": {}}),
        ("lightning_compiled.ckpt", {"state_dict": under("model._orig_mod.")}),
        ("of_a_name.ckpt", {"state_dict": under("backbone.")}),
        ("arguments.pth", {"state_dict": STATE, "args": argparse.Namespace(lr=0.1)}),
        ("numpy.pth", {"model": STATE, "best": np.float64(0.7), "mean": np.zeros(3)}),
        ("pytorch_model.bin", STATE),
        ("nested.pth", {"checkpoint": {"model": {"state_dict": under("module.")}}}),
        ("checkpoint.pth.tar", {"state_dict": under("module."), "arch": "vgg"}),
        ("gan.pth", {"generator": STATE, "discriminator": {"0.weight": torch.ones(2)}}),
        ("beside.pth", {**STATE, "epoch": 3}),
    ],
)
def test_a_file_is_converted_by_the_command_line(run, tmp_path, name, content):
    (tmp_path / "net.py").write_text(NET)
    pictures(tmp_path / "pictures", 3)
    torch.save(content, tmp_path / name)
    code, _, err = run(*CONVERT.split(), "--weights", name)
    assert (code, err) == (0, [])
    written = safetensors.torch.load_file(tmp_path / "bn.safetensors")
    assert torch.equal(written["0.conv.weight"], STATE["0.weight"])


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = net()


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "net.model."])
def test_keys_of_the_networks_own_that_look_like_a_prefix_stay(tmp_path, prefix):
    torch.save(under(f"{prefix}model."), tmp_path / "a.pth")
    assert_loaded(retrofit.load(tmp_path / "a.pth", Named()).model)


@pytest.mark.parametrize("key", [None, "state_dict", "state_dict_ema"])
def test_of_plain_and_averaged_weights_the_plain_are_used_unless_asked(tmp_path, key):
    torch.save({"state_dict_ema": EMA, "state_dict": STATE}, tmp_path / "a.pth")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        loaded = retrofit.load(tmp_path / "a.pth", net(), weights_key=key)
    assert_loaded(loaded, EMA if key == "state_dict_ema" else STATE)
    said = (
        f"{tmp_path}/a.pth holds several state dicts, 'state_dict_ema', 'state_dict': 'state_dict' "
        "is used; choose another with --weights-key (weights_key=)"
    )
    assert [str(warning.message) for warning in seen] == ([] if key else [said])


@pytest.mark.parametrize(
    ("key", "content"),
    [
        ("ema", {"ema": {"shadow": EMA, "updates": 3}, "model": STATE}),
        ("run.params_ema", {"run": {"params": STATE, "params_ema": EMA}}),
        ("state_dict.ema_model", {"state_dict": under("model.") | under("ema_model.", EMA)}),
        ("ema_model", under("model.") | under("ema_model.", EMA)),
        ("teacher", {"student": STATE, "teacher": EMA}),
    ],
)
def test_a_key_is_a_path_of_mappings_or_a_prefix_of_names(tmp_path, key, content):
    torch.save(content, tmp_path / "a.pth")
    assert_loaded(retrofit.load(tmp_path / "a.pth", net(), weights_key=key), EMA)


@pytest.mark.filterwarnings("always:.*holds several state dicts")
def test_the_command_line_takes_a_key_and_says_what_it_used_without_one(run, tmp_path):
    (tmp_path / "net.py").write_text(NET)
    pictures(tmp_path / "pictures", 3)
    torch.save({"params": STATE, "params_ema": EMA}, tmp_path / "a.pth")
    code, _, err = run(*CONVERT.split(), "--weights", "a.pth")
    assert code == 0
    assert len(err) == 1
    assert err[0].startswith("retrofit: warning: a.pth holds several state dicts")
    words = (*CONVERT.split(), "--overwrite", "--weights", "a.pth", "--weights-key", "params_ema")
    assert run(*words)[::2] == (0, [])
    written = safetensors.torch.load_file(tmp_path / "bn.safetensors")
    assert torch.equal(written["0.conv.bias"], EMA["0.bias"])
    code, out, err = run("inspect", "a.pth", "--weights-key", "params_ema")
    assert (code, err) == (0, [])
    assert "2 tensors" in out
    words = ("verify", "bn.safetensors", *CONVERT.split()[2:8], "--model", "net.py:net")
    assert run(*words, "--weights", "a.pth", "--weights-key", "params_ema")[0] == 0
    assert run(*words, "--weights", "a.pth", "--weights-key", "params")[0] == 1


@pytest.mark.parametrize(
    ("converted", "plain", "outcome"),
    [
        ("student", "teacher", "choose one with --weights-key"),
        ("model", "ema", "'model' is used"),
        ("model_ema", "model", "'model' is used"),
        ("state_dict", "state_dict_ema", "'state_dict' is used"),
    ],
)
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.filterwarnings("ignore:.*which are passed over")
def test_converted_weights_beside_plain_ones_are_chosen_as_others_are(
    tmp_path, converted, plain, outcome, flat
):
    x = torch.randn(8, 3, 9, 9)
    made = retrofit.add_batchnorm(net(), [x], progress=False)
    states = {converted: made.state_dict(), plain: STATE}
    parts = [under(f"{name}.", state) for name, state in states.items()]
    torch.save(parts[0] | parts[1] if flat else states, tmp_path / "a.pth")
    if "choose" in outcome:
        with pytest.raises(RetrofitError, match=outcome):
            retrofit.load(tmp_path / "a.pth", net())
    else:
        with pytest.warns(UserWarning, match=f"holds several state dicts.*{outcome}"):
            loaded = retrofit.load(tmp_path / "a.pth", net())
        assert (
            loaded.state_dict().keys()
            == states["model" if "model" in states else "state_dict"].keys()
        )
    for name, state in states.items():
        loaded = retrofit.load(tmp_path / "a.pth", net(), weights_key=name)
        assert_loaded(loaded, state)


def test_an_average_beside_a_network_with_batchnorms_of_its_own_is_no_converted_one(tmp_path):
    own = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    state = own.state_dict()
    torch.save(under("backbone.", state) | under("ema.backbone.", state), tmp_path / "a.pth")
    with pytest.warns(UserWarning, match="'backbone', 'ema.backbone': 'backbone' is used"):
        assert_loaded(retrofit.load(tmp_path / "a.pth", own), state)


@pytest.mark.parametrize("name", ["last.ckpt", "w.pth", "w.pt", "w.bin", "w.safetensors"])
def test_a_folder_with_one_file_of_any_kind_is_that_file(tmp_path, name):
    (safetensors.torch.save_file if "safe" in name else torch.save)(STATE, tmp_path / name)
    (tmp_path / "events.log").write_text("")
    assert_loaded(retrofit.load(tmp_path, net()))


def test_tensors_beside_the_network_are_named(tmp_path):
    state = {**under("model."), "criterion.weight": torch.ones(3), "accuracy.n": torch.tensor(1)}
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    message = r"a\.ckpt holds 2 tensors beside the network in 'state_dict\.model', which are "
    with pytest.warns(
        UserWarning, match=message + r"passed over \(criterion\.weight, accuracy\.n\)"
    ):
        loaded = retrofit.load(tmp_path / "a.ckpt", net())
    assert_loaded(loaded)


def test_a_larger_network_is_not_taken_for_a_wrapped_one(tmp_path):
    for content in (
        {**STATE, "2.weight": torch.ones(3)},
        under("model.") | {"model.2": torch.ones(1)},
    ):
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(RetrofitError, match=r": 1 unexpected \(2"):
            retrofit.load(tmp_path / "a.pth", net())


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model."])
def test_a_converted_network_loads_from_a_training_runs_checkpoint(tmp_path, prefix):
    x = torch.randn(8, 3, 9, 9)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    made = retrofit.add_batchnorm(model, [x], progress=False)
    content = {"state_dict": under(prefix, made.state_dict()), "optimizer": {}, "epoch": 1}
    torch.save(content, tmp_path / "a.ckpt")
    assert torch.equal(retrofit.load(tmp_path / "a.ckpt", model)(x), made(x))


@pytest.mark.parametrize("suffix", [".bin", ".safetensors", ".ckpt", ".pth"])
@pytest.mark.parametrize("legacy", [False, True, None])
def test_the_content_says_what_a_file_is(tmp_path, suffix, legacy):
    file = tmp_path / f"a{suffix}"
    if legacy is None:
        safetensors.torch.save_file(STATE, file)
    else:
        torch.save(STATE, file, _use_new_zipfile_serialization=not legacy)
    assert_loaded(retrofit.load(file, net()))


def test_a_header_that_begins_like_a_pickle_is_one_of_safetensors(tmp_path):
    """Its length is 128, 0x80 in the first byte, as is the first opcode of a pickle."""
    for i in range(300):
        safetensors.torch.save_file(STATE, tmp_path / "a.pth", {"x": "x" * i})
        if (tmp_path / "a.pth").read_bytes()[0] == 0x80:
            break
    assert i < 299
    assert_loaded(retrofit.load(tmp_path / "a.pth", net()))


@pytest.mark.parametrize("pickles", [False, True])
@pytest.mark.parametrize("given", ["folder", "index"])
def test_shards_are_read_by_their_index(tmp_path, pickles, given):
    write = torch.save if pickles else safetensors.torch.save_file
    name = "pytorch_model.bin" if pickles else "model.safetensors"
    places = {key: f"part-{i}.{name}" for i, key in enumerate(STATE)}
    for key, place in places.items():
        write({key: STATE[key]}, tmp_path / place)
    index = tmp_path / f"{name}.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert_loaded(retrofit.load(tmp_path if given == "folder" else index, net()))


NO_SHARDS = {
    "is damaged: its weight_map must name a file for each tensor": {"0.weight": 3},
    "names '../part.bin', which is not in its own folder": {"0.weight": "../part.bin"},
    "names 1 files, and 1 of them do not exist (other.bin)": {"0.weight": "other.bin"},
    "part.bin has no 9.weight, which model.bin.index.json says is in it (1 of 2 tensors are not": {
        "0.weight": "part.bin", "9.weight": "part.bin"},
    "several.bin holds no state dict, only some under ema, model": {"0.weight": "several.bin"},
}  # fmt: skip


@pytest.mark.parametrize("words", NO_SHARDS)
def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path, words):
    torch.save(STATE, tmp_path / "part.bin")
    torch.save({"ema": EMA, "model": STATE}, tmp_path / "several.bin")
    index = tmp_path / "model.bin.index.json"
    index.write_text(json.dumps({"weight_map": NO_SHARDS[words]}))
    with pytest.raises(RetrofitError) as refused:
        retrofit.load(index, net())
    assert words in str(refused.value)


def test_a_folder_with_one_file_of_another_name_is_that_file(tmp_path):
    safetensors.torch.save_file(STATE, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert_loaded(retrofit.load(tmp_path, net()))


def test_a_tensor_that_safetensors_left_out_as_a_second_name_is_found(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    model[1].weight = model[0].weight
    safetensors.torch.save_model(model, str(tmp_path / "a.safetensors"))
    loaded = retrofit.load(tmp_path / "a.safetensors", model)
    assert torch.equal(loaded[1].weight, model[0].weight)


def test_weights_with_more_bits_than_the_model_are_rounded_with_a_word(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    torch.save({key: tensor.double() / 3 for key, tensor in STATE.items()}, tmp_path / "a.pth")
    spec = f"{tmp_path}/net.py:net"
    message = r"2 tensors in .*a\.pth are rounded .*\(0\.weight from float64 to float32\)"
    with pytest.warns(UserWarning, match=message):
        model_sources.trained(spec, str(tmp_path / "a.pth"))
    torch.save({key: tensor.double() for key, tensor in STATE.items()}, tmp_path / "a.pth")
    assert_loaded(model_sources.trained(spec, str(tmp_path / "a.pth")))  # to the bit


def test_a_mapping_that_contains_itself_is_read_once(tmp_path):
    content = {"state_dict": STATE}
    content["self"] = content
    torch.save(content, tmp_path / "a.pth")
    assert_loaded(retrofit.load(tmp_path / "a.pth", net()))


def test_what_is_beside_the_weights_is_not_built(tmp_path, monkeypatch):
    torch.save({"state_dict": STATE, "a": np.arange(3.0), "n": np.float32(1)}, tmp_path / "a.pth")

    def built(*_):
        raise AssertionError("something of the file was built")

    before = set(torch.serialization.get_safe_globals())
    monkeypatch.setattr(np, "dtype", built)
    assert_loaded(retrofit.load(tmp_path / "a.pth", net()))
    assert set(torch.serialization.get_safe_globals()) == before


ARRAYS = {key: tensor.numpy() for key, tensor in STATE.items()}


@pytest.mark.parametrize("protocol", [1, 4, 5])  # what torch writes in 0 it cannot read itself
@pytest.mark.parametrize("legacy", [False, True])
def test_what_is_said_of_another_protocol_makes_a_file_that_loads(tmp_path, protocol, legacy):
    old = {"_use_new_zipfile_serialization": not legacy}
    torch.save(STATE, tmp_path / "a.pth", pickle_protocol=protocol, **old)
    shown = protocol if protocol > 1 else 0
    follow_the_advice(tmp_path, f"it is a pickle of protocol {shown}, which only Python")


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("content", [STATE, ARRAYS, collections.OrderedDict(STATE)])
def test_what_is_said_of_a_plain_pickle_makes_a_file_that_loads(tmp_path, protocol, content):
    (tmp_path / "a.pth").write_bytes(pickle.dumps(content, protocol))
    follow_the_advice(tmp_path, "not a file of torch.save")


def test_what_is_said_of_numpys_archive_makes_a_file_that_loads(tmp_path):
    np.savez(tmp_path / "a.npz", **ARRAYS)
    (tmp_path / "a.npz").rename(tmp_path / "a.pth")
    follow_the_advice(tmp_path, "it is numpy's .npz")


def follow_the_advice(folder, message):
    """Run the Python in the error for `a.pth`, as a user would."""
    with pytest.raises(RetrofitError, match=message) as refused:
        retrofit.load(folder / "a.pth", net())
    advice = str(refused.value)
    start = min(i for i in map(advice.find, ("import ", "torch.save({")) if i >= 0)
    code = advice[start:].partition("'weights.pth')")[0] + "'weights.pth')"
    code = code.replace("weights.pth", str(folder / "weights.pth"))
    exec(code, {"numpy": np, "torch": torch})  # noqa: S102 - written above, by this test
    assert_loaded(retrofit.load(folder / "weights.pth", net()))


def test_a_foreign_name_in_another_protocol_is_found(tmp_path):
    content = {"state_dict": STATE, "a": NET, "c": [argparse.ArgumentParser, argparse.Action]}
    torch.save(content, tmp_path / "a.pth", pickle_protocol=4)
    with pytest.raises(RetrofitError, match=r"it holds a argparse\.ArgumentParser, which only its"):
        retrofit.load(tmp_path / "a.pth", net())


def test_a_builtin_that_torch_does_not_take_is_named_or_passed_over(tmp_path):
    beside = {"rest": ..., "args": collections.ChainMap({"lr": 0.1})}
    torch.save({"model": STATE, **beside}, tmp_path / "a.pth")
    assert_loaded(retrofit.load(tmp_path / "a.pth", net()))
    torch.save({"model": STATE, "f": len}, tmp_path / "a.pth")
    with pytest.raises(RetrofitError, match=r"it holds a builtins\.len, which only"):
        retrofit.load(tmp_path / "a.pth", net())


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "bin", "weird"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty: copy or download it again"),
        (bytes(2000), "full of zeros"),
        (b"\n<!DOCTYPE html>\n<title>404</title>", "a web page, '<!DOCTYPE html> <title>404"),
        ("Zugriff verweigert: für ".encode() * 40, "text, 'Zugriff verweigert: für Zugriff"),
        (("e" + "ä" * 300).encode(), "text, 'eää"),  # the 512th byte begins a letter
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS's pointer .* run git lfs pull"),
        (gzip.compress(b"weights", mtime=0), "compressed: unpack it"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file"),
        (b"GGUF\x03" + bytes(99), "a GGUF file"),
    ],
)
def test_a_file_of_another_kind_is_called_what_it_is(tmp_path, suffix, content, message):
    (tmp_path / f"a.{suffix}").write_bytes(content)
    with pytest.raises(RetrofitError, match=f"a.{suffix} is no weights file but .*{message}"):
        retrofit.load(tmp_path / f"a.{suffix}", net())


def test_two_names_of_one_tensor_have_to_be_equal_and_nan_equals_nan():
    model = nets.build(nets.TiedWeights)
    state = {key: torch.full_like(tensor, torch.nan) for key, tensor in model.state_dict().items()}
    load_weights(model, state, "file")
    state["second.weight"] = torch.zeros_like(state["second.weight"])
    message = r"first\.weight and second\.weight are one tensor in the model, and differ in file"
    with pytest.raises(RetrofitError, match=message):
        load_weights(model, state, "file")


class Scaled(nn.Module):
    def forward(self, x):
        return x * 2


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_an_archive_that_is_no_state_dict_is_called_what_it_is(tmp_path):
    torch.jit.save(torch.jit.script(Scaled()), tmp_path / "script.pth")
    program = torch.export.export(Scaled(), (torch.ones(2),), strict=False)
    torch.export.save(program, tmp_path / "program.pt2")
    (tmp_path / "program.pt2").rename(tmp_path / "program.pth")
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("readme.txt", "weights")
    kinds = {
        "script": r"is a TorchScript archive, a program: .* torch\.save\(torch\.jit\.load\('",
        "program": r"is a program that torch\.export saved: .* torch\.save\(torch\.export\.load\('",
        "other": r"cannot be read as a state dict: it is a zip archive, but not of torch\.save$",
    }
    for name, words in kinds.items():
        with pytest.raises(RetrofitError, match=rf"{name}\.pth {words}"):
            retrofit.load(tmp_path / f"{name}.pth", net())
