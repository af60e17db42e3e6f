"""Several processes, each with pictures of its own: one calibration."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nets
import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import Started, in_environment, started
from safetensors.torch import load_file
from torch import nn

import retrofit
from retrofit.cli import main

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
PATH = os.pathsep.join([str(HERE), str(HERE.parent)])  # where this file is, and `nets`
X = nets.images(63, 3, 16, 16)
SPLITS = {"37 and 26": 37, "all and none": 63, "none and all": 0, "1 and 62": 1}


def prepared(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 6, 3)
    )
    return retrofit.prepare(net, retrofit.plan(net, include="*"))


def learned(model):
    observers = [m for m in model.modules() if isinstance(m, retrofit.MomentObserver)]
    return [dict(observer.named_buffers()) for observer in observers]


def parts(data, size=8):
    return data.split(size) if len(data) else []


def calibrate(model, data, **options):
    options.setdefault("process_group", dist.group.WORLD)
    return retrofit.calibrate(model, data, progress=False, **options)


def refused(model, data, **options):
    before = learned(model)
    with pytest.raises(retrofit.RetrofitError) as caught:
        calibrate(model, data, **options)
    assert all(
        torch.equal(a[k], b[k]) for a, b in zip(before, learned(model), strict=True) for k in a
    )
    return type(caught.value).__name__, str(caught.value)


def one_process(rank, folder):
    """What the tests look at, of one of two processes in a group."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    result = {}
    for name, cut in SPLITS.items():
        model = prepared()
        report = calibrate(model, parts([X[:cut], X[cut:]][rank]))
        result[name] = learned(model), report.images, report.standard_error
    model = prepared()
    for half in X.split(32):
        calibrate(model, parts(half[rank::2]))
    result["in two calls"] = learned(model), len(X), 0.0
    many = nets.images(600, 3, 16, 16).split(4)
    model = prepared()
    used = calibrate(model, many[rank::2], tolerance=0.1).images
    result["tolerance"] = learned(model), used, 0.0

    mine = parts(X[rank::2])
    result["no data"] = refused(prepared(), [])
    result["other weights"] = refused(prepared(seed=rank), mine)
    result["other options"] = refused(prepared(), mine, max_images=[20, 30][rank])
    model = prepared()
    if rank == 1:
        retrofit.calibrate(model, mine, progress=False)
    result["other data before"] = refused(model, mine)
    broken = [x.clone() for x in mine]
    if rank == 1:
        broken[2][1] = float("nan")
    result["a NaN"] = refused(prepared(), broken)
    result["not an iterable"] = refused(prepared(), mine if rank == 0 else X)
    of_the_first = dist.new_group([0])
    if rank == 1:
        result["a group of others"] = refused(prepared(), mine, process_group=of_the_first)

    state = folder / "state"
    result["of another"] = []
    for size in (8, 8, 5):
        model = prepared()
        try:
            calibrate(model, parts(X[rank::2], size), state=state)
        except retrofit.RetrofitError as error:
            result["of another"].append(str(error))
        else:
            result["resumed"] = learned(model), len(X), 0.0
    torch.save(result | recalibrations(rank), folder / f"{rank}.pt")
    dist.destroy_process_group()


RECALIBRATED = {
    "at once": {},
    "at once, synchronised": {"norm": nn.SyncBatchNorm},
    "layer by layer": {"layerwise": True},
    "layer by layer, with a prior": {"layerwise": True, "prior": 20},
    "layer by layer, none and all": {"layerwise": True, "cut": 0},
    "at once, all and none": {"cut": 64},
}
X64 = nets.images(64, 3, 12, 12) + torch.arange(64).view(-1, 1, 1, 1) / 32


def with_norms(rank=0, norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 6, 3), norm(6), nn.ReLU(), nn.Conv2d(6, 4, 3), norm(4), nn.ReLU())
    )
    net[1].running_mean += rank  # as training leaves them without SyncBatchNorm
    return net


def recalibrated(rank, cut=40, norm=nn.BatchNorm2d, group=None, **options):
    """Of the process `rank`, or of all data in one: what recalibrate makes, in batches of 8."""
    model = with_norms(0 if "prior" in options else rank, norm)
    data = X64 if group is None else [X64[:cut], X64[cut:]][rank]
    found = retrofit.recalibrate(model, parts(data), process_group=group, progress=False, **options)
    return dict(model.named_buffers()), found.images, found.batches, found.standard_error


def recalibrations(rank):
    """What the tests look at, of one of two processes that recalibrate together."""
    group = dist.group.WORLD
    result = {name: recalibrated(rank, group=group, **o) for name, o in RECALIBRATED.items()}
    for name, model, data, options in (
        ("no data for both", with_norms(), [], {}),
        ("other old statistics", with_norms(rank), parts(X64), {"prior": 8}),
        ("a NaN for both", with_norms(), parts(X64 / (1 - rank)), {}),
        ("another prior", with_norms(), parts(X64), {"prior": rank}),
    ):
        before = {k: v.clone() for k, v in model.named_buffers()}
        with pytest.raises(retrofit.RetrofitError) as caught:
            retrofit.recalibrate(model, data, process_group=group, progress=False, **options)
        assert all(torch.equal(before[k], v) for k, v in model.named_buffers())
        result[name] = type(caught.value).__name__, str(caught.value)
    return result


def start(code, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATH, **variables}
    return subprocess.Popen(
        [sys.executable, *code], env=environment, text=True, stdout=subprocess.PIPE, stderr=-1
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    code = "from pathlib import Path; import sys, test_processes_together as t;"
    code += "t.one_process(int(sys.argv[1]), Path(sys.argv[2]))"
    processes = [start(["-c", code, str(rank), str(folder)]) for rank in range(2)]
    texts = [process.communicate(timeout=120)[1] for process in processes]
    assert [p.returncode for p in processes] == [0, 0], texts
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", [*SPLITS, "in two calls", "resumed"])
def test_moments_are_those_of_one_process_and_alike_in_all_to_the_last_bit(results, name):
    (first, images, error), (second, *_) = (result[name] for result in results)
    assert all(torch.equal(a[k], b[k]) for a, b in zip(first, second, strict=True) for k in a)
    assert images == len(X)
    alone, cut = prepared(), SPLITS.get(name, 0)
    # The same batches: convolutions round one image otherwise than eight.
    report = retrofit.calibrate(alone, [*parts(X[:cut]), *parts(X[cut:])], progress=False)
    assert error in (0.0, pytest.approx(report.standard_error, rel=1e-10))
    observers = [m for m in prepared().modules() if isinstance(m, retrofit.MomentObserver)]
    for observer, ours, theirs in zip(observers, first, learned(alone), strict=True):
        observer.load_state_dict(ours)
        one = observer.moments()
        observer.load_state_dict(theirs)
        other = observer.moments()
        assert torch.equal(one.count, other.count)
        assert ((one.mean - other.mean).abs() <= 1e-10 * other.var.sqrt()).all()
        assert ((one.var - other.var).abs() <= 1e-10 * other.var).all()


@pytest.mark.parametrize("name", RECALIBRATED)
def test_recalibrated_together_all_have_the_statistics_of_all_data_to_the_last_bit(results, name):
    (first, *counts), (second, *others) = (result[name] for result in results)
    assert counts == others
    assert all(torch.equal(first[key], second[key]) for key in first)
    options = RECALIBRATED[name] | {"norm": nn.BatchNorm2d}
    alone, images, batches, error = recalibrated(0, **options)
    assert counts == [images, batches, pytest.approx(error, rel=1e-6)]
    for key, value in alone.items():
        torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-6)
    assert int(first["1.num_batches_tracked"]) == 8


def test_all_stop_together_when_they_have_enough(results):
    (first, used, _), (second, also, _) = (result["tolerance"] for result in results)
    assert used == also
    assert 32 <= used < 400
    assert all(torch.equal(a[k], b[k]) for a, b in zip(first, second, strict=True) for k in a)
    assert int(first[0]["samples"][0]) == used


@pytest.mark.parametrize(
    ("name", "rank", "kind", "words"),
    [
        ("no data", 0, "RetrofitError", "got 0 of the at least 2 images"),
        ("no data", 1, "RetrofitError", "got 0 of the at least 2 images"),
        ("other weights", 0, "PeerError", "process 1 of 2 has different weights at 0.conv.weight"),
        ("other weights", 1, "PeerError", "process 1 of 2 has different weights at 0.conv.weight"),
        ("other options", 0, "PeerError", "a different max_images (30, not 20) than process 0"),
        ("other data before", 1, "PeerError", "process 1 of 2 has different earlier data at 0"),
        ("a NaN", 0, "PeerError", "process 1 of 2 failed: there is a NaN or Inf at 0"),
        ("a NaN", 1, "NonFiniteError", "at 0 for image 17 of the data"),
        ("not an iterable", 0, "PeerError", "process 1 of 2 failed: data is one tensor"),
        ("not an iterable", 1, "RetrofitError", "data is one tensor"),
        ("no data for both", 1, "RetrofitError", "there is no data to recalibrate on"),
        ("other old statistics", 0, "PeerError", "1 of 2 has different weights at 1.running_mean"),
        ("a NaN for both", 0, "PeerError", "process 1 of 2 failed: there is a NaN or Inf at 1"),
        ("a NaN for both", 1, "NonFiniteError", "there is a NaN or Inf at 1 for image 0 of the"),
        ("another prior", 1, "PeerError", "process 1 of 2 has a different prior (1, not 0) than"),
        ("a group of others", 1, "RetrofitError", "not in the process_group that it was given"),
    ],
)
def test_what_fails_in_one_process_is_said_in_all(results, name, rank, kind, words):
    found, text = results[rank][name]
    assert found == kind
    assert words in text


def test_the_state_of_other_batches_is_refused_in_all_processes(results):
    for result in results:
        (message,) = result["of another"]
        assert "begins with another batch" in message


# --- the command -------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    file = tmp_path / "pictures.npy"
    np.save(file, np.random.default_rng(0).integers(0, 255, (6000, 32, 32, 3), dtype=np.uint8))
    return file


def converting(pictures, *options):
    return [
        *("convert", "retrofit.demo:trained_vgg", "--data", str(pictures)),
        *("--crop", "32", "--workers", "0", "--output", str(pictures.parent / "out.safetensors")),
        *options,
    ]


def test_processes_that_cannot_meet_say_so(pictures):
    nowhere = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "none"}
    first = functools.partial(in_environment, nowhere)
    found = Started(pictures.parent, *converting(pictures), first=first).finished()
    assert (found.code, found.out, len(found.err)) == (2, "", 1)
    assert found.err[0].startswith("retrofit: the processes cannot find each other: ")


@pytest.fixture
def two(tmp_path, pictures):
    """Two processes that are in the middle of a long conversion."""
    processes = started(tmp_path, *[converting(pictures, "--images", "6000")] * 2)
    try:
        processes[0].wait_for("calibrate: ")  # the first one says so
        yield processes
    finally:
        for process in processes:
            process.killed()


@pytest.mark.parametrize("killed", [0, 1])
def test_when_one_process_is_killed_the_other_says_so_and_ends(two, pictures, killed):
    two[killed].killed()
    other = two[1 - killed].finished(30)
    assert other.code == 1
    (line,) = other.err
    assert line.startswith(f"retrofit: process {1 - killed} of 2 lost another one")
    assert not (pictures.parent / "out.safetensors").exists()


def test_a_process_that_is_told_to_stop_says_so(two):
    two[1].process.terminate()
    first, second = (process.finished(60) for process in two)
    assert (first.code, second.code) == (1, 1)
    assert any("process 0 of 2 lost another one" in line for line in first.err)
    assert any("retrofit: process 1 of 2 was told to stop" in line for line in second.err)


def test_killed_together_they_go_on_together(pictures):
    folder = pictures.parent
    output, state = folder / "out.safetensors", folder / "state"
    code = converting(pictures, "--images", "600", "--batch-size", "4")
    assert main(code) == 0
    expected = load_file(output)
    output.unlink()
    code += ["--state", str(state)]
    processes = started(folder, code, code)
    while not state.exists():
        assert processes[0].process.is_alive(), processes[0].finished()
        time.sleep(0.01)
    for process in processes:
        assert process.killed().code == -signal.SIGKILL
    assert main(code) == 2  # alone, it is the state of others
    for process in started(folder, code, code):
        finished = process.finished()
        assert finished.code == 0, finished
    assert not state.exists()
    found = load_file(output)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)


def test_torchrun_writes_the_file_that_one_process_writes(pictures):
    images = ("--images", "40", "--batch-size", "4")
    run = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    together = start([*run, "-m", "retrofit", *converting(pictures, *images)])
    output = pictures.parent / "out.safetensors"
    text, problem = together.communicate(timeout=120)
    assert together.returncode == 0, problem
    assert text.count("40 images in") == 1
    ours = load_file(output)
    assert main(converting(pictures, *images, "--overwrite")) == 0
    theirs = load_file(output)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seed", "1"], "process 1 of 2 has a different --seed (1, not 0) than process 0"),
        (["--images", "1"], "2 processes cannot share 1 images: start fewer"),
    ],
)
def test_what_cannot_be_done_together_is_named(pictures, options, words):
    first = options if "--images" in options else []
    commands = converting(pictures, *first), converting(pictures, *options)
    for process in started(pictures.parent, *commands):
        finished = process.finished()
        assert finished.code in (1, 2)
        assert any(words in line for line in finished.err)
        assert "Traceback" not in "".join(finished.err)
