"""What a calibration pass costs, beside the plain forward pass and other ways to do it.

    python scripts/benchmark.py --model vgg16

All contenders see the same images in the same process, one after another in each repetition, so
that ratios hold on a machine whose speed drifts. Peak memory is that of a process of its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import retrofit
from retrofit.zoo import build

Pass = Callable[[], None]
PLAIN, FLOOR, OURS = "plain forward, NCHW", "plain forward, channels_last", "retrofit.calibrate"


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


def ours(model: nn.Module, images: list[Tensor]) -> Pass:
    prepared = retrofit.prepare(model)
    return lambda: void(retrofit.calibrate(prepared, images, progress=False))


def void(_: object) -> None: ...


def hooked(
    model: nn.Module, images: list[Tensor], observe: Callable[[retrofit.Site, Tensor], None]
) -> Pass:
    """A pass with a forward hook on every convolution."""
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
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def observe(site: retrofit.Site, y: Tensor) -> None:
        seen.setdefault(site.path, []).append(torch.var_mean(y, (0, 2, 3)))

    return hooked(model, images, observe)


def repvgg_style(model: nn.Module, images: list[Tensor]) -> Pass:
    """As RepVGG's insert_bn: mean, then mean squared difference, in a moving average."""
    running: dict[str, tuple[Tensor, Tensor]] = {}

    def observe(site: retrofit.Site, y: Tensor) -> None:
        mean = y.mean((0, 2, 3))
        var = (y - mean.view(1, -1, 1, 1)).square().mean((0, 2, 3))
        old_mean, old_var = running.get(site.path, (mean, var))
        running[site.path] = (0.9 * old_mean + 0.1 * mean, 0.9 * old_var + 0.1 * var)

    return hooked(model, images, observe)


def swa_update_bn(model: nn.Module, images: list[Tensor]) -> Pass:
    inserted = retrofit.insert(model)
    return lambda: torch.optim.swa_utils.update_bn(images, inserted)


def fvcore_update_bn_stats(model: nn.Module, images: list[Tensor]) -> Pass:
    from fvcore.nn import update_bn_stats  # noqa: PLC0415

    inserted = retrofit.insert(model).train()

    def run() -> None:
        with torch.no_grad():
            update_bn_stats(inserted, images, len(images))

    return run


CONTENDERS: dict[str, Callable[[nn.Module, list[Tensor]], Pass]] = {
    PLAIN: forward,
    FLOOR: channels_last_forward,
    OURS: ours,
    "hooks with var_mean": var_mean_hooks,
    "RepVGG-style moving average": repvgg_style,
    "torch.optim.swa_utils.update_bn": swa_update_bn,
    "fvcore update_bn_stats": fvcore_update_bn_stats,
}


def inputs(arguments: argparse.Namespace) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = build(arguments.model).eval()
    shape = (arguments.batches, arguments.batch_size, 3, arguments.size, arguments.size)
    return model, list(torch.randn(shape))


def measure(arguments: argparse.Namespace, names: list[str]) -> dict[str, list[float]]:
    """Seconds of each contender in each repetition, after one that does not count."""
    model, images = inputs(arguments)
    passes = {name: CONTENDERS[name](model, images) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(arguments.repeat + 1):
        for name, run in passes.items():
            start = time.perf_counter()
            run()
            if repetition:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_memory(arguments: argparse.Namespace, name: str) -> float:
    """Peak resident memory, in MiB, of a process that does nothing else."""
    options = ["--model", arguments.model, "--only", name]
    for option in ("size", "batch_size", "batches", "threads"):
        options += [f"--{option.replace('_', '-')}", str(getattr(arguments, option))]
    done = subprocess.run(  # noqa: S603
        [sys.executable, __file__, *options], check=True, capture_output=True, text=True
    )
    return float(done.stdout)


def own_peak() -> float:
    """Peak resident memory of this process in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would count the parent's memory at the fork
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20) if sys.platform == "darwin" else peak / 1024


def import_seconds(repeat: int) -> tuple[float, float]:
    """Median time to import torch and torchvision, and what importing retrofit adds to it."""
    code = (
        "import time; a = time.perf_counter(); import torch, torchvision; b = time.perf_counter();"
        "import retrofit; print(b - a, time.perf_counter() - b)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)  # noqa: S603
        for _ in range(repeat)
    ]
    pairs = [tuple(map(float, run.stdout.split())) for run in runs]
    return statistics.median(p[0] for p in pairs), statistics.median(p[1] for p in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vgg16", help="as for `retrofit plan`")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    if arguments.only:
        model, images = inputs(arguments)
        CONTENDERS[arguments.only](model, images)()
        print(own_peak())
        return

    names = [name for name in CONTENDERS if "fvcore" not in name or has("fvcore")]
    seconds = measure(arguments, names)
    memory = {name: peak_memory(arguments, name) for name in names}
    base, added = import_seconds(5)
    print(
        f"{arguments.model}, {arguments.batches} batches of {arguments.batch_size} x 3 x "
        f"{arguments.size} x {arguments.size}, float32, {arguments.threads} threads, "
        f"{arguments.repeat} repetitions\n"
        f"{processor()}, torch {torch.__version__}, torchvision {torchvision.__version__}\n"
    )
    print(
        "| pass over the same images | time / plain | min - max | seconds | peak memory / plain |"
    )
    print("| --- | --- | --- | --- | --- |")
    rows = {}
    for name in names:
        ratios = [a / b for a, b in zip(seconds[name], seconds[PLAIN], strict=True)]
        rows[name] = {
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "seconds": statistics.median(seconds[name]),
            "peak_MiB": memory[name],
        }
        print(
            f"| {name} | **{rows[name]['ratio']:.3f}** | {min(ratios):.3f} - {max(ratios):.3f} | "
            f"{rows[name]['seconds']:.2f} | {memory[name] / memory[PLAIN]:.3f} |"
        )
    floor = [a / b for a, b in zip(seconds[OURS], seconds[FLOOR], strict=True)]
    print(f"\nretrofit.calibrate / channels_last forward: {statistics.median(floor):.3f}")
    print(f"import torch, torchvision: {base:.2f} s; import retrofit adds {added:.2f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps({"import_seconds": added, "passes": rows}, indent=2))


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def processor() -> str:
    """The CPU's name where Linux tells it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.processor() or platform.machine())


if __name__ == "__main__":
    main()
