"""Killed, full, vanished: what is written is whole, and nothing else is left."""

import functools
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import contents, pictures
from processes import command
from torch import nn

import retrofit
from retrofit.files.model_sources import build

# Does what FAULT says at the AT-th call with a batch; calls 1 to 12 calibrate, later ones verify.
NET = """
import multiprocessing, os, pathlib, shutil, signal, time, torch
from torch import nn

def faulty():
    kind, _, what = os.environ["FAULT"].partition(" ")
    if kind == "signal":
        os.kill(os.getpid(), int(what))
    elif kind == "remove":
        shutil.rmtree(what)
    elif kind == "unlink":
        os.unlink(what)
    elif kind == "cut":
        os.truncate(what, 60)
    elif kind == "truncate":
        for file in pathlib.Path(what).iterdir():
            file.write_bytes(file.read_bytes()[:60])
    elif kind == "workers":
        try:
            for child in multiprocessing.active_children():
                os.kill(child.pid, int(what))
            time.sleep(0.5)  # a signal handler may raise out of this, as of anything
        except RuntimeError:
            pathlib.Path("raised").touch()
            raise
    elif kind == "orphans":
        pids = [str(child.pid) for child in multiprocessing.active_children()]
        pathlib.Path(what).write_text(" ".join(pids))
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "allocate":
        torch.empty(1 << 46)
    elif kind == "memory":
        print("so far", end="")  # not flushed
        raise MemoryError("no more of it")

class Net(nn.Sequential):
    calls = 0
    def forward(self, x):
        if isinstance(x, torch.Tensor) and "AT" in os.environ:
            Net.calls += 1
            late = Net.calls - int(os.environ["AT"])
            if late == 0 or (late > 0 and os.environ["FAULT"] == "allocate"):  # it is tried again
                faulty()
        return super().forward(x)

def make():
    if os.environ.get("AT") == "0":
        faulty()
    torch.manual_seed(0)
    return Net(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU()).eval()
"""
PICTURES = "--data pictures --crop 16 --mean 0.5 --std 0.5 --batch-size 2"
CONVERT = f"convert net.py:make --weights w.pth --output out.pth --overwrite {PICTURES}"
PHASES = {"loading": 0, "calibrating": 3, "verifying": 13}


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    kit = tmp_path_factory.mktemp("kit")
    (kit / "net.py").write_text(NET)
    pictures(kit / "pictures", 24)
    model = build(f"{kit}/net.py:make")
    torch.save(model.state_dict(), kit / "w.pth")
    data = [torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))]
    converted = retrofit.add_batchnorm(model, data, progress=False)
    retrofit.save(converted, kit / "bn.safetensors", name="net.py:make")
    for name in ("out.pth", "out.safetensors", "out.html"):
        (kit / name).write_text("precious")
    return kit


@pytest.fixture
def folder(kit, tmp_path):
    """A copy of the kit, in which files may be lost."""
    return shutil.copytree(kit, tmp_path / "kit")


def fault(at, what):
    os.environ.update(AT=str(at), FAULT=what)


def small_files():
    import matplotlib.font_manager  # noqa: F401, PLC0415 - writes a large cache where there is none

    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))


def killed_at_the_sync(number):
    os.fsync = lambda _: os.kill(os.getpid(), number)


def nowhere():
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def to_a_reader_that_has_left():
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)


# --- signals -----------------------------------------------------------------------------------

ENDS = {
    signal.SIGINT: (130, ["retrofit: interrupted"]),
    signal.SIGTERM: (143, ["retrofit: terminated"]),
    signal.SIGKILL: (-9, []),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", ENDS, ids=lambda number: number.name)
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_leaves_nothing_behind(folder, phase, number, workers):
    before = contents(folder)
    first = functools.partial(fault, PHASES[phase], f"signal {int(number)}")
    found = command(folder, *CONVERT.split(), "--workers", workers, first=first)
    code, err = ENDS[number]
    assert (found.code, found.err) == (code, [f"{line}: out.pth is not written" for line in err])
    assert contents(folder) == before


def test_a_signal_tells_of_the_state_that_is_kept(folder):
    words = [*CONVERT.split(), "--workers", 0, "--state", "state"]
    found = command(folder, *words, first=functools.partial(fault, 0, "signal 15"))
    assert found.err == ["retrofit: terminated: out.pth is not written"]  # nothing is kept yet
    found = command(folder, *words, first=functools.partial(fault, 6, "signal 15"))
    kept = "state is kept, and the same command goes on from it"
    assert found.err == [f"retrofit: terminated: out.pth is not written; {kept}"]
    assert command(folder, *words).code == 0
    assert not (folder / "state").exists()


@pytest.mark.parametrize("number", ENDS, ids=lambda number: number.name)
@pytest.mark.parametrize(
    "words",
    [
        CONVERT,
        CONVERT.replace("out.pth", "out.safetensors"),
        "fold bn.safetensors --model net.py:make --output out.pth --overwrite",
        "report bn.safetensors --output out.html --overwrite",
        f"{CONVERT} --state state",
    ],
)
def test_a_signal_while_writing_leaves_nothing_behind(folder, words, number):
    before = contents(folder)
    first = functools.partial(killed_at_the_sync, number)
    found = command(folder, *words.split(), first=first)
    said = [line.removesuffix(": out.pth is not written") for line in found.err]  # of the state
    assert (found.code, said) == ENDS[number]
    assert contents(folder) == before


@pytest.mark.slow
def test_workers_end_with_a_process_that_is_killed(folder):
    first = functools.partial(fault, 3, "orphans pids")
    assert command(folder, *CONVERT.split(), "--workers", 2, first=first).code == -signal.SIGKILL
    pids = (folder / "pids").read_text().split()
    assert len(pids) == 2
    deadline = time.monotonic() + 60
    while any(running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def running(pid):
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- disks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "file"),
    [
        (CONVERT, "out.pth"),
        (CONVERT.replace("out.pth", "out.safetensors"), "out.safetensors"),
        (f"{CONVERT} --state state", "state"),
        ("fold bn.safetensors --model net.py:make --output out.pth --overwrite", "out.pth"),
        (
            f"adapt bn.safetensors --model net.py:make --output out.pth --overwrite {PICTURES}",
            "out.pth",
        ),
        ("report bn.safetensors --output out.html --overwrite", "out.html"),
    ],
)
def test_a_file_that_cannot_be_written_to_its_end_leaves_nothing(folder, words, file):
    before = contents(folder)
    found = command(folder, *words.split(), first=small_files)
    assert found.code in (1, 2)
    assert len(found.err) == 1
    assert file in found.err[0]
    assert contents(folder) == before


@pytest.fixture
def small_disk(folder):
    """A file system of 64 KiB, where one may be mounted."""
    (folder / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder / "disk")]
    if (
        not shutil.which("mount")
        or subprocess.run(mount, capture_output=True, check=False).returncode
    ):
        pytest.skip("this user may not mount a file system")
    yield folder / "disk"
    subprocess.run(["umount", str(folder / "disk")], check=True)  # noqa: S607


def test_a_full_disk_leaves_nothing(folder, small_disk):
    for output in ("disk/out.pth", "disk/out.safetensors"):
        found = command(folder, *CONVERT.split(), "--output", output)
        assert found.code == 1
        assert len(found.err) == 1
        assert "No space left on device" in found.err[0]
        assert output in found.err[0]
        assert list(small_disk.iterdir()) == []


def test_a_disk_that_may_not_be_written_to_is_found_out_at_once(folder, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)  # noqa: S607
    found = command(folder, *CONVERT.split(), "--output", "disk/out.pth")
    assert found.code == 2
    assert found.err == ["retrofit: cannot write to disk: Read-only file system"]


def test_output_that_nobody_takes(folder):
    found = command(folder, *CONVERT.split(), first=nowhere)
    assert found.code == 1
    assert len(found.err) == 1
    assert "No space left on device" in found.err[0]
    assert retrofit.load(folder / "out.pth", build(f"{folder}/net.py:make"))


def failing_where_nobody_takes_output():
    nowhere()
    sys.stdout.reconfigure(write_through=False)  # also where PYTHONUNBUFFERED is set
    fault(3, "memory")


def test_what_fails_where_nobody_takes_output_is_told_and_exits_1(folder):
    found = command(folder, *CONVERT.split(), first=failing_where_nobody_takes_output)
    assert (found.code, len(found.err)) == (1, 1)
    assert "MemoryError: no more of it" in found.err[0]


@pytest.mark.parametrize(
    "words", [CONVERT, f"verify bn.safetensors --model net.py:make --weights other.pth {PICTURES}"]
)
def test_output_whose_reader_has_left(folder, words):
    """As of any command before `| head`: quiet, whole, and never the exit code of a success."""
    other = {key: tensor + 1 for key, tensor in torch.load(folder / "w.pth").items()}
    torch.save(other, folder / "other.pth")
    found = command(folder, *words.split(), first=to_a_reader_that_has_left)
    assert (found.code, found.err) == (128 + signal.SIGPIPE, [])
    if words == CONVERT:
        assert retrofit.load(folder / "out.pth", build(f"{folder}/net.py:make"))


# --- what vanishes, and what dies --------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("what", ["remove pictures", "truncate pictures"])
def test_pictures_that_change_while_they_are_read(folder, what, workers):
    first = functools.partial(fault, 1, what)
    options = ("--workers", workers, "--batch-size", 1)
    found = command(folder, *CONVERT.split(), *options, first=first)
    assert found.code == 2
    assert len(found.err) == 1
    assert "cannot be read" in found.err[0]
    assert "pictures/" in found.err[0]
    assert (folder / "out.pth").read_text() == "precious"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["p.npy", "p.tar"])
def test_an_archive_of_pictures_that_is_cut_short_while_it_is_read(folder, name, workers):
    """It is mapped into memory: to read what is gone would end the process by a signal."""
    if name == "p.npy":
        np.save(folder / name, np.zeros((400, 64, 64, 3), np.uint8))
    else:
        with tarfile.open(folder / name, "w") as tar:
            for number in range(400):
                tar.add(folder / "pictures" / "7.png", f"{number}.png")
    first = functools.partial(fault, 1, f"cut {name}")
    options = ("--data", name, "--workers", workers, "--batch-size", 1)
    found = command(folder, *CONVERT.split(), *options, first=first)
    assert (found.code, len(found.err)) == (2, 1), found
    assert "has been cut short" in found.err[0]


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("what", ["unlink", "cut"])
@pytest.mark.parametrize("phase", PHASES)
def test_weights_that_change_after_they_were_read(folder, phase, what, suffix):
    if suffix == "safetensors":
        retrofit.save(build(f"{folder}/net.py:make"), folder / "w.safetensors")
    words = CONVERT.replace("w.pth", f"w.{suffix}").split()
    first = functools.partial(fault, PHASES[phase], f"{what} w.{suffix}")
    found = command(folder, *words, first=first)
    assert (found.code, found.err) == (0, [])
    plain, images = build(f"{folder}/net.py:make"), torch.randn(2, 3, 16, 16)
    converted = retrofit.load(folder / "out.pth", build(f"{folder}/net.py:make"))
    assert torch.equal(converted(images), plain(images))


@pytest.mark.parametrize("phase", ["calibrating", "verifying"])
def test_an_output_folder_that_vanishes(folder, phase):
    (folder / "there").mkdir()
    before = contents(folder / "pictures")
    words = CONVERT.replace("out.pth", "there/out.pth").split()
    first = functools.partial(fault, PHASES[phase], "remove there")
    found = command(folder, *words, first=first)
    assert (found.code, len(found.err)) == (2, 1), found
    assert found.err[0].endswith("there does not exist")
    assert not (folder / "there").exists()
    assert contents(folder / "pictures") == before


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (f"workers {int(signal.SIGKILL)}", "a process that reads pictures is gone"),
        ("allocate", "can't allocate memory"),
        ("memory", "MemoryError: no more of it"),
    ],
)
def test_what_ends_a_conversion_is_one_line_and_exit_1(folder, what, message):
    before = contents(folder)
    first = functools.partial(fault, 3, what)
    options = ("--workers", "2", "--batch-size", "1")
    found = command(folder, *CONVERT.split(), *options, first=first)
    assert (found.code, len(found.err)) == (1, 1), found
    assert message in found.err[0]
    assert contents(folder) == before


# --- in Python ---------------------------------------------------------------------------------


def model_and_data():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
    return model.train(), [torch.randn(4, 3, 8, 8) for _ in range(3)]


def everything(model):
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return (
        [(name, id(t), t.tolist(), t.requires_grad) for name, t in tensors],
        [(n, id(m), m.training, *map(len, hooks(m))) for n, m in model.named_modules()],
        torch.is_grad_enabled(),
    )


def hooks(module):
    return module._forward_hooks, module._forward_pre_hooks


def breaking(data, error):
    yield data[0]
    raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError])
@pytest.mark.parametrize("task", ["add", "add in place", "recalibrate", "verify", "drift"])
def test_an_error_of_the_data_leaves_the_model_as_it_was(task, error):
    model, data = model_and_data()
    converted = retrofit.add_batchnorm(model, data, progress=False)
    before = everything(model), everything(converted)
    tasks = {
        "add": lambda x: retrofit.add_batchnorm(model, x, progress=False),
        "add in place": lambda x: retrofit.add_batchnorm(model, x, inplace=True, progress=False),
        "recalibrate": lambda x: retrofit.recalibrate(converted, x, progress=False),
        "verify": lambda x: retrofit.verify(model, converted, x),
        "drift": lambda x: retrofit.drift(model, converted, x),
    }
    with pytest.raises(error):
        tasks[task](breaking(data, error))
    assert (everything(model), everything(converted)) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("at", [0, 1, 4])
def test_an_error_in_the_model_leaves_it_as_it_was(at, error):
    model, data = model_and_data()
    calls = []

    def broken(*_):
        calls.append(None)
        if len(calls) > at:
            raise error

    handle = model[2].register_forward_hook(broken)
    before = everything(model)
    try:
        # What fails on the example that the plan needs is refused with the reason.
        with pytest.raises((error, retrofit.RetrofitError)):
            retrofit.verify(model, retrofit.add_batchnorm(model, data, inplace=False), data)
        assert everything(model) == before
    finally:
        handle.remove()
