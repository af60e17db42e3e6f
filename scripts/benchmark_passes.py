"""The passes that `benchmark.py` compares, and how a pass is measured."""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import os
import random
import resource
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar
from unittest.mock import patch

import other_tools
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.profiler import ProfilerActivity, profile

import retrofit
from retrofit.calibration.feeding import leaving_after
from retrofit.files.model_sources import build

T = TypeVar("T")
Pass = Callable[[], object]
Contender = Callable[[nn.Module, list[Tensor]], Pass]
Precision = Literal["float32", "TF32", "bfloat16"]
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}

warnings.filterwarnings("ignore", "the two halves")  # calibrate's, of a few random images


# --- contenders --------------------------------------------------------------------------------


def forward(model: nn.Module, images: list[Tensor]) -> Pass:
    def run() -> None:
        with torch.no_grad():
            for x in images:
                model(x)

    return run


def channels_last_forward(model: nn.Module, images: list[Tensor]) -> Pass:
    def run() -> None:
        with torch.no_grad():
            for x in images:
                model(x.contiguous(memory_format=torch.channels_last))

    return run


def convolutions_forward(model: nn.Module, images: list[Tensor]) -> Pass:
    """Make a pass that ends behind the last convolution: no moments, so what they cost is known."""
    plan = retrofit.plan(model)
    last = next((site for site in plan.inserted if site.path == plan.last), plan.inserted[-1])
    layer = model.get_submodule(last.path)

    def run() -> None:
        for x in images:
            with leaving_after(layer, last.calls), torch.no_grad():
                model(x.contiguous(memory_format=torch.channels_last))

    return run


def bfloat16_forward(model: nn.Module, images: list[Tensor]) -> Pass:
    return in_precision("bfloat16", "cpu", channels_last_forward(model, images))


def ours(model: nn.Module, images: list[Tensor]) -> Pass:
    prepared = retrofit.prepare(model)
    return lambda: retrofit.calibrate(prepared, images, progress=False)


def ours_without(trick: str, model: nn.Module, images: list[Tensor]) -> Pass:
    """Make a calibration in which one of TRICKS is switched off."""
    run = ours(model, images)
    target, replacement = TRICKS[trick]

    def run_without() -> None:
        with patch(f"retrofit.{target}", replacement):
            run()

    return run_without


def no_context(*_: object) -> AbstractContextManager[None]:
    return nullcontext()


def hooked(
    model: nn.Module, images: list[Tensor], observe: Callable[[retrofit.Site, Tensor], None]
) -> Pass:
    """Make a pass with a forward hook on every convolution."""
    sites = retrofit.plan(model).inserted

    def run() -> None:
        with ExitStack() as stack:
            for site in sites:

                def hook(_m: nn.Module, _i: Any, y: Tensor, site: retrofit.Site = site) -> None:
                    observe(site, y)

                conv = model.get_submodule(site.path)
                stack.callback(conv.register_forward_hook(hook).remove)
            forward(model, images)()

    return run


def var_mean_hooks(model: nn.Module, images: list[Tensor]) -> Pass:
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def observe(site: retrofit.Site, y: Tensor) -> None:
        seen[site.path] = torch.var_mean(y, (0, 2, 3))

    return hooked(model, images, observe)


def repvgg_style(model: nn.Module, images: list[Tensor]) -> Pass:
    running: dict[str, tuple[Tensor, Tensor]] = {}

    def observe(site: retrofit.Site, y: Tensor) -> None:
        other_tools.repvgg_moving_average(running, site.path, y)

    return hooked(model, images, observe)


def swa_update_bn(model: nn.Module, images: list[Tensor]) -> Pass:
    inserted = retrofit.insert(model)
    return lambda: torch.optim.swa_utils.update_bn(images, inserted)


def fvcore_update_bn_stats(model: nn.Module, images: list[Tensor]) -> Pass:
    update_bn_stats, inserted = other_tools.fvcore_update_bn_stats(), retrofit.insert(model).train()

    def run() -> None:
        with torch.no_grad():
            update_bn_stats(inserted, images, len(images))

    return run


def with_batchnorms(model: nn.Module, images: list[Tensor]) -> nn.Module:
    return retrofit.add_batchnorm(model, images[:2], progress=False)


def recalibrated(model: nn.Module, images: list[Tensor], *, layerwise: bool) -> Pass:
    network = with_batchnorms(model, images)

    def run() -> None:
        retrofit.recalibrate(network, images, layerwise=layerwise, progress=False).remove()

    return run


def adapted(model: nn.Module, images: list[Tensor]) -> Pass:
    network = with_batchnorms(model, images)

    def run() -> None:
        with retrofit.adapting(network):
            forward(network, images)()

    return run


def in_train_mode(model: nn.Module, images: list[Tensor]) -> Pass:
    """Make a pass in train mode for each batch size of `drift`: with less it cannot be measured."""
    network = with_batchnorms(model, images).train()

    def run() -> None:
        for size in DRIFT_SIZES:
            forward(network, list(torch.cat(images).split(size)))()

    return run


def drifted(model: nn.Module, images: list[Tensor]) -> Pass:
    network = with_batchnorms(model, images)
    return lambda: retrofit.drift(model, network, images, DRIFT_SIZES)


PLAIN, FLOOR = "plain forward, NCHW", "plain forward, channels_last"
CONVOLUTIONS = "the same up to the last convolution"
BFLOAT16, OURS = "plain forward, channels_last, bfloat16 autocast", "retrofit.calibrate"
HOOKS, FVCORE = "hooks with var_mean", "fvcore update_bn_stats"
PEERS: dict[str, Contender] = {
    HOOKS: var_mean_hooks,
    "RepVGG-style moving average": repvgg_style,
    "torch.optim.swa_utils.update_bn": swa_update_bn,
    FVCORE: fvcore_update_bn_stats,
}
CONTENDERS: dict[str, Contender] = {
    PLAIN: forward,
    FLOOR: channels_last_forward,
    CONVOLUTIONS: convolutions_forward,
    BFLOAT16: bfloat16_forward,
    OURS: ours,
    **PEERS,
}
AT_ONCE, LAYERWISE = "recalibrate, one pass", "recalibrate, layerwise"
ADAPTING = "adapting"
DRIFT_SIZES = 8, 32, 128
DRIFT, TRAIN_MODE = "drift", "train mode"
WITH_BATCHNORM: dict[str, Contender] = {
    AT_ONCE: functools.partial(recalibrated, layerwise=False),
    LAYERWISE: functools.partial(recalibrated, layerwise=True),
    ADAPTING: adapted,
    TRAIN_MODE: in_train_mode,
    DRIFT: drifted,
}

# The tricks of calibrate: what to replace, and by what, to switch one off. All but the early exit
# are for CPUs.
EARLY_EXIT, ONE_THREAD = "early exit", "reductions on one thread"
TRICKS: Mapping[str, tuple[str, object]] = {
    "kept memory": ("calibration.forward_pass.kept_memory", no_context),
    "channels_last": ("calibration.forward_pass.ForwardPass.channels_last", False),
    ONE_THREAD: ("numerics.threads._changeable", lambda: False),
    EARLY_EXIT: ("calibration.forward_pass.leaving_after", no_context),
}
WITHOUT: dict[str, Contender] = {
    f"without {trick}": functools.partial(ours_without, trick) for trick in TRICKS
}
ON_ALL_THREADS = f"without {ONE_THREAD}"


def has_fvcore() -> bool:
    return importlib.util.find_spec("fvcore") is not None


# --- workloads ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """One contender's pass over some images."""

    contender: str
    model: str
    device: str
    precision: Precision
    images: int
    batch_size: int
    size: int
    threads: int

    def ready(self) -> Pass:
        """Make the pass.

        On a GPU all but the NCHW forward are given model and images in channels_last; on a CPU
        calibrate has to see to it by itself.
        """
        nchw = self.device == "cpu" or self.contender == PLAIN
        memory_format = "NCHW" if nchw else "channels_last"
        run = {**CONTENDERS, **WITHOUT, **WITH_BATCHNORM}[self.contender](
            network(self.model, self.device, memory_format),
            pictures(self.device, self.images, self.batch_size, self.size, memory_format),
        )
        return in_precision(self.precision, self.device, run)


@functools.lru_cache(maxsize=2)
def network(model: str, device: str, memory_format: str = "NCHW") -> nn.Module:
    """Build the model with random weights, always the same. It is shared: do not change it."""
    torch.manual_seed(0)
    built = build(model).eval().to(device)
    if any(isinstance(module, _BatchNorm) for module in built.modules()):
        built = retrofit.fold(built)
    return built.to(memory_format=FORMATS[memory_format])


def pictures(
    device: str, count: int, batch_size: int, size: int, memory_format: str = "NCHW"
) -> list[Tensor]:
    """Draw batches of random ones, always the same."""
    images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    images = images.to(device, memory_format=FORMATS[memory_format])
    return list(images.split(batch_size))


def in_precision(precision: Precision, device: str, run: Callable[[], T]) -> Callable[[], T]:
    """Make `run` run in this precision; bfloat16 is that of autocast."""

    def precisely() -> T:
        torch.backends.cudnn.allow_tf32 = precision == "TF32"
        torch.backends.cuda.matmul.allow_tf32 = precision == "TF32"
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            return run()

    return precisely


# --- measuring ---------------------------------------------------------------------------------


def now(device: str) -> float:
    """Read the clock when the device has done all it was told."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(passes: Mapping[str, Pass], repeat: int, device: str) -> dict[str, list[float]]:
    """Measure the seconds of each pass in each repetition, after one that does not count.

    The order is drawn anew in each, so that what a pass leaves behind favours no other.
    """
    shuffler = random.Random(0)  # noqa: S311
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for run in passes.values():
        run()
    for _ in range(repeat):
        for name in shuffler.sample(list(passes), len(passes)):
            start = now(device)
            passes[name]()
            seconds[name].append(now(device) - start)
    return seconds


# A new process each time, forked from one that has imported what takes seconds.
PROCESSES = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
if sys.platform != "win32":
    PROCESSES.set_forkserver_preload(["torch", "torchvision", "retrofit.cli.commands"])


@dataclass(frozen=True)
class Alone:
    """Figures of a pass in a process that does nothing else.

    Attributes:
        peak: memory in MiB; what torch allocated on a GPU, or what was resident.
        besides_convolution: the share of a pass's time in which torch.profiler sees none.
    """

    peak: float
    besides_convolution: float


def alone(workload: Workload) -> Alone:
    os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler tells of its every start
    with ProcessPoolExecutor(1, PROCESSES) as pool:
        return pool.submit(_measured, workload).result()


def _measured(workload: Workload) -> Alone:
    torch.set_num_threads(workload.threads)
    run = workload.ready()
    run()
    peak = own_peak(workload.device)
    return Alone(peak, besides_convolution(run, workload.device))


def own_peak(device: str) -> float:
    """Return the peak memory of this process in MiB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / (1 << 20)
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would count the parent's memory at the fork
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20) if sys.platform == "darwin" else peak / 1024


def besides_convolution(run: Pass, device: str) -> float:
    """Measure the share of a pass's time in which torch.profiler sees no convolution."""
    cuda = device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        start = now(device)
        run()
        whole = now(device) - start
    convolutions = [  # the operators, not the kernels that they launch
        float(event.self_device_time_total if cuda else event.self_cpu_time_total)
        for event in profiler.key_averages()
        if event.device_type.name == "CPU" and "conv" in event.key
    ]
    return 1 - sum(convolutions) / 1e6 / whole
