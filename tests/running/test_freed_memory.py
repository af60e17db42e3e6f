"""Freed memory is reused in a block, and goes back to the system when asked to or afterwards."""

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import nets
import pytest
import torch
from torch import nn

import retrofit
from retrofit.running import freed_memory
from retrofit.running.freed_memory import give_back, kept_memory

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc")


def faults(size=48):
    """Pages that the system fills for the second and later of five tensors of so many MiB."""
    counts = []
    for _ in range(5):
        torch.empty(size << 18).fill_(1)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return counts[-1] - counts[0]


def in_a_process_of_its_own(function, **environment):
    """Call it where no other test has left a large hole in the heap, which would be used first."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent)])
    subprocess.run(
        [sys.executable, "-c", f"import test_freed_memory as t; t.{function.__name__}()"],
        check=True,
        env={**os.environ, **environment, "PYTHONPATH": path},
    )


def assert_reused_in_the_block():
    before = faults()
    with kept_memory():
        for _ in range(3):  # the heap settles: how soon, hangs on what the process has loaded
            faults()
        inside = faults()
    assert inside <= before / 2
    assert faults(200) > before / 2  # more than what is left in the heap


@glibc
@pytest.mark.parametrize("layerwise", [None, False, True])
def test_calibrate_and_recalibrate_run_in_the_block(layerwise):
    kept = set()

    def forward(model, batch):
        kept.add(len(freed_memory._blocks))
        return model(batch)

    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)]
    net = nn.Sequential(*layers).eval()
    options = {"forward_fn": forward, "progress": False}
    if layerwise is None:
        retrofit.calibrate(retrofit.prepare(net), nets.images(64, 3, 9, 9).split(8), **options)
    else:
        data = nets.images(64, 3, 9, 9).split(8)
        retrofit.recalibrate(net, data, layerwise=layerwise, **options)
    assert kept == {1}
    assert freed_memory._blocks == set()


@pytest.mark.slow
@glibc
def test_only_in_the_block_is_memory_reused():
    in_a_process_of_its_own(assert_reused_in_the_block)


def assert_given_back_in_a_fork():
    torch.set_num_threads(1)  # those of the parent are not in a fork
    with kept_memory(), kept_memory():
        child = os.fork()
        if not child:
            with kept_memory():  # one of its own is another matter, and ends
                faults()
            before = resident()
            torch.empty(256 << 18).fill_(1)
            os._exit(resident() > before + (100 << 20))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        before = faults()
    assert faults(200) > before


@pytest.mark.slow
@glibc
def test_a_process_that_is_forked_in_the_block_gives_memory_back():
    """As the workers of a DataLoader are."""
    in_a_process_of_its_own(assert_given_back_in_a_fork)


def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def filled_and_failed():
    before = resident()
    torch.empty(256 << 18).fill_(1)
    assert resident() > before + (200 << 20)
    raise KeyError


@glibc
def test_memory_goes_back_to_the_system_at_the_end_and_after_an_error():
    before = resident()
    with pytest.raises(KeyError), kept_memory():
        filled_and_failed()
    assert resident() < before + (100 << 20)


@glibc
def test_what_lies_between_tensors_that_live_goes_back_too():
    torch.empty(16 << 18).fill_(1)  # from now on what is smaller has no mapping of its own
    tensors = [torch.ones(1 << 18) for _ in range(200)]
    del tensors[:199]
    before = resident()
    give_back()
    assert resident() < before - (100 << 20)


@glibc
@pytest.mark.parametrize(
    "chosen", [{"MALLOC_MMAP_THRESHOLD_": "65536"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}]
)
@pytest.mark.slow
def test_thresholds_chosen_in_the_environment_are_left_alone(chosen):
    in_a_process_of_its_own(assert_nothing_changes, **chosen)


def assert_nothing_changes():
    before = faults()
    with kept_memory():
        assert faults() > before / 2
