"""A calibration that is stopped at any moment goes on from its state file."""

import random
from pathlib import Path

import nets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Started
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import retrofit
from retrofit.calibration.processes import difference
from retrofit.cli import main

X = nets.images(120, 3, 10, 10)


def prepared(seed=0, channels=6):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, channels, 3), nn.ReLU())
    return retrofit.prepare(net)


def learned(model):
    observers = [m for m in model.modules() if isinstance(m, retrofit.MomentObserver)]
    return [dict(observer.named_buffers()) for observer in observers]


def same(ours, theirs):
    """All buffers, moments among them, bit for bit."""
    return all(torch.equal(a[k], b[k]) for a, b in zip(ours, theirs, strict=True) for k in b)


def test_batches_without_tensors_go_on_too(tmp_path):
    pictures = {str(i): X[i : i + 4] for i in range(0, 40, 4)}

    def by_name(model, names):
        model(torch.cat([pictures[name] for name in names]))

    names = [[str(i)] for i in range(0, 40, 4)]
    options = {"forward_fn": by_name, "state": tmp_path / "state", "progress": False}
    expected, stopped, resumed = prepared(), prepared(), prepared()
    retrofit.calibrate(expected, names, forward_fn=by_name, progress=False)
    with pytest.raises(StopError):
        retrofit.calibrate(stopped, stopping(names, 6), **options)
    retrofit.calibrate(resumed, names, **options)
    assert same(learned(resumed), learned(expected))


class StopError(Exception):
    pass


def stopping(batches, after):
    for number, batch in enumerate(batches):
        if number == after:
            raise StopError
        yield batch


class Placed:
    """Knows its place, as torchdata's StatefulDataLoader does."""

    def __init__(self, batches, end=None):
        self.batches, self.end, self.place, self.read = batches, end, 0, 0

    def __iter__(self):
        while self.place < len(self.batches):
            if self.place == self.end:
                raise StopError
            self.place += 1
            self.read += 1
            yield self.batches[self.place - 1]

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


@settings(max_examples=15, deadline=None)
@given(
    stops=st.lists(st.integers(0, 30), max_size=4),
    size=st.integers(3, 50),
    tolerance=st.sampled_from([None, 0.08, 0.3]),
    most=st.sampled_from([None, 50]),
)
def test_stopped_anywhere_it_ends_with_the_moments_it_would_have_had(
    tmp_path_factory, stops, size, tolerance, most
):
    options = {"tolerance": tolerance, "max_images": most, "progress": False}
    state = tmp_path_factory.mktemp("state") / "state"
    whole = prepared()
    report = retrofit.calibrate(whole, X.split(size), **options)
    for after in stops:
        model = prepared()
        try:
            retrofit.calibrate(model, stopping(X.split(size), after), state=state, **options)
        except StopError:
            assert not any(buffers["samples"].any() for buffers in learned(model))
    model = prepared()
    again = retrofit.calibrate(model, X.split(size), state=state, **options)
    assert same(learned(model), learned(whole))
    assert (again.images, again.batches) == (report.images, report.batches)
    assert again.standard_error == report.standard_error


def test_data_that_knows_its_place_is_not_read_again(tmp_path):
    options = {"state": tmp_path / "state", "progress": False}
    with pytest.raises(StopError):
        retrofit.calibrate(prepared(), Placed(X.split(10), end=7), **options)
    data = Placed(X.split(10))
    model, whole = prepared(), prepared()
    retrofit.calibrate(model, data, **options)
    retrofit.calibrate(whole, X.split(10), progress=False)
    assert same(learned(model), learned(whole))
    assert data.read < 12


def test_a_finished_calibration_is_not_run_again(tmp_path):
    first, second = prepared(), prepared()
    retrofit.calibrate(first, X.split(16), state=tmp_path / "state", progress=False)

    class Once(list):
        def __iter__(self):
            yield self[0]
            raise AssertionError("no second batch is needed")

    retrofit.calibrate(second, Once(X.split(16)), state=tmp_path / "state", progress=False)
    assert same(learned(second), learned(first))


def test_more_data_is_added_to_what_was_there_before_also_after_a_stop(tmp_path):
    model, whole = prepared(), prepared()
    for one in (model, whole):
        retrofit.calibrate(one, X[:40].split(8), progress=False)
    with pytest.raises(StopError):
        retrofit.calibrate(
            model, stopping(X[40:].split(8), 5), state=tmp_path / "state", progress=False
        )
    retrofit.calibrate(model, X[40:].split(8), state=tmp_path / "state", progress=False)
    retrofit.calibrate(whole, X[40:].split(8), progress=False)
    assert same(learned(model), learned(whole))
    assert int(learned(model)[0]["samples"][0]) == len(X)


def other_weights():
    model = prepared()
    with torch.no_grad():
        model[2].conv.weight[0, 0, 0, 0] += 1e-3
    return model


@pytest.mark.parametrize(
    ("model", "size", "data", "words"),
    [
        (lambda: prepared(seed=1), 16, X, "different weights at 0.conv.weight and 3 more"),
        (other_weights, 16, X, "different weights at 2.conv.weight"),
        (lambda: prepared(channels=4), 16, X, "different weights at 2.conv.weight"),
        (prepared, 8, X, "begins with another batch"),
        (prepared, 16, X.flip(0), "begins with another batch"),
        (prepared, 16, X[:0], "begins with another batch"),
    ],
)
def test_the_state_of_another_calibration_is_refused(tmp_path, model, size, data, words):
    state = tmp_path / "state"
    with pytest.raises(StopError):
        retrofit.calibrate(prepared(), stopping(X.split(16), 3), state=state, progress=False)
    before = state.read_bytes()
    batches = data.split(size) if len(data) else []
    with pytest.raises(retrofit.RetrofitError, match=words):
        retrofit.calibrate(model(), batches, state=state, progress=False)
    assert state.read_bytes() == before


def test_another_plan_is_refused_with_the_layer(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU())
    fewer = retrofit.prepare(net, retrofit.plan(net, exclude="2"))
    retrofit.calibrate(retrofit.prepare(net), [X], state=tmp_path / "state", progress=False)
    with pytest.raises(retrofit.RetrofitError, match="this one has different plan at 2"):
        retrofit.calibrate(fewer, [X], state=tmp_path / "state", progress=False)


def test_another_tolerance_is_refused_rather_than_taken_for_reached(tmp_path):
    options = {"state": tmp_path / "state", "progress": False}
    retrofit.calibrate(prepared(), X.split(8), tolerance=0.5, **options)
    with pytest.raises(retrofit.RetrofitError, match=r"a different tolerance \(0.1, not 0.5\)"):
        retrofit.calibrate(prepared(), X.split(8), tolerance=0.1, **options)


ALMOST = {"format": 2, "described": {}, "processes": [{}]}
FOREIGN = [{"weight": torch.ones(3)}, torch.ones(3), ALMOST | {"described": 3}]
FOREIGN += [ALMOST | {"processes": None}]


@pytest.mark.parametrize("content", [b"", b"no state", b"PK\x03\x04", b"\x80\xc8", *FOREIGN])
def test_what_is_no_state_file_is_named_and_left_alone(tmp_path, content):
    state = tmp_path / "state"
    if isinstance(content, bytes):
        state.write_bytes(content)
    else:
        torch.save(content, state)
    before = state.read_bytes()
    with pytest.raises(retrofit.RetrofitError, match="state is no state file of a calibration"):
        retrofit.calibrate(prepared(), [X], state=state, progress=False)
    assert state.read_bytes() == before


def test_data_whose_place_could_not_be_read_again_is_refused_before_anything_is_written(tmp_path):
    data = Placed(X.split(8))
    data.state_dict = lambda: {"place": object()}
    with pytest.raises(retrofit.RetrofitError, match=r"state_dict\(\) holds more than"):
        retrofit.calibrate(prepared(), data, state=tmp_path / "state", progress=False)
    assert not list(tmp_path.iterdir())


def test_a_state_of_data_that_knows_its_place_is_not_for_other_data(tmp_path):
    options = {"state": tmp_path / "state", "progress": False}
    retrofit.calibrate(prepared(), Placed(X.split(8)), **options)
    with pytest.raises(retrofit.RetrofitError, match="and this is a tuple"):
        retrofit.calibrate(prepared(), X.split(8), **options)


def test_a_state_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(retrofit.RetrofitError, match=r"absent/state cannot be written"):
        retrofit.calibrate(prepared(), [X], state=tmp_path / "absent" / "state", progress=False)


def test_a_shuffled_loader_without_a_seed_is_refused(tmp_path):
    first, second = prepared(), prepared()
    loader = DataLoader(TensorDataset(X), batch_size=16, shuffle=True)
    retrofit.calibrate(first, loader, state=tmp_path / "state", progress=False)
    with pytest.raises(retrofit.RetrofitError, match="same data in the same order"):
        retrofit.calibrate(second, loader, state=tmp_path / "state", progress=False)


# --- the command -------------------------------------------------------------------------------


def converting(folder, *options):
    return [
        *("convert", "retrofit.demo:trained_vgg", "--data", f"{folder}/pictures.npy"),
        *("--crop", "32", "--workers", "0", "--images", "800", "--batch-size", "4"),
        *("--output", f"{folder}/out.safetensors", *options),
    ]


def convert(folder, *options):
    return main(converting(folder, *options))


def pictures(folder):
    pixels = np.random.default_rng(0).integers(0, 255, (900, 32, 32, 3), dtype=np.uint8)
    np.save(Path(folder) / "pictures.npy", pixels)


def saved(state):
    return state.stat().st_mtime_ns if state.exists() else None


@pytest.mark.slow
def test_killed_at_twenty_random_moments_it_writes_the_same_file(tmp_path):
    pictures(tmp_path)
    assert convert(tmp_path) == 0
    output, state = tmp_path / "out.safetensors", tmp_path / "state"
    expected = load_file(output)
    output.unlink()

    moments, resumed = random.Random(0), 0
    for life in range(20):
        before = saved(state)
        resumed += before is not None
        started = Started(tmp_path, *converting(tmp_path, "--state", str(state)))
        while life % 2 and saved(state) == before and started.process.is_alive():
            started.process.join(0.01)  # every second one gets somewhere, on a slow machine too
        started.process.join(moments.uniform(0, 0.2))
        started.killed()
        if output.exists():  # never partial
            break
    assert resumed > 3, resumed
    assert output.exists() or convert(tmp_path, "--state", str(state)) == 0
    found = load_file(output)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_one_file_cannot_be_the_state_and_the_output(tmp_path, capsys):
    pictures(tmp_path)
    assert convert(tmp_path, "--state", f"{tmp_path}/out.safetensors", "--overwrite") == 2
    assert "--state and --output are both" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_removes_the_state_at_the_end_and_refuses_that_of_other_data(tmp_path, capsys):
    pictures(tmp_path)
    state = tmp_path / "state"
    assert convert(tmp_path, "--state", str(state), "--images", "24") == 0
    assert not state.exists()
    (tmp_path / "out.safetensors").unlink()
    started = Started(tmp_path, *converting(tmp_path, "--state", str(state)))
    while not state.exists():
        assert started.process.is_alive(), started.finished()
        started.process.join(0.02)
    started.killed()
    capsys.readouterr()
    for option, words in {"--batch-size": "another batch size: 4, not 8", "--seed": "SHA"}.items():
        assert convert(tmp_path, "--state", str(state), option, "8") == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def test_a_state_of_another_version_is_told(tmp_path):
    state, prepared = tmp_path / "state", retrofit.prepare(nets.build(nets.root_sequential))
    retrofit.calibrate(prepared, [X], state=state, progress=False)
    content = torch.load(state, weights_only=True)
    torch.save(content | {"format": -1}, state)
    again = retrofit.prepare(nets.build(nets.root_sequential))
    with pytest.raises(retrofit.RetrofitError, match="written by another version: remove it"):
        retrofit.calibrate(again, [X], state=state, progress=False)


@pytest.mark.parametrize("one", [{"a": 1}, {"a": 1, "b": {"x": 2}}, {}])
@pytest.mark.parametrize("other", [{"a": 1}, {"a": 1, "b": {"x": 2}}, {}])
def test_a_difference_is_seen_from_either_side(one, other):
    assert bool(difference(one, other)) == bool(difference(other, one)) == (one != other)
