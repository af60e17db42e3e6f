"""Every model of torchvision and every convolutional model without BatchNorm of timm, converted.

    python scripts/zoo.py --results zoo.jsonl --jobs 2

Each is built with random weights, retrofitted, compared with the original bit for bit and folded
back, in a process of its own. Results are kept, one line of JSON a model, so that an interrupted
run goes on where it stopped; docs/zoo.md is written from them. Needs timm.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

import retrofit
import retrofit.files.model_sources
from retrofit.surgery.record import record_of

# Models whose BatchNorm is folded away for deployment: they come after that.
MERGED = ("repvgg_a0", "mobileone_s0", "fastvit_t8")
# torchvision's models that are not converted, and why: pattern to reason.
LEFT_OUT = {
    "quantized_*": "integer arithmetic, into which a BatchNorm is folded before it is quantised",
}
# Detectors show a few boxes however low they score: with random weights none would pass the
# threshold, and outputs without boxes are always equal. And they scale pictures to 192 pixels, not
# to 800; SSD has a size of its own.
BOXES: dict[str, Any] = {"topk_candidates": 20, "score_thresh": 0.0, "detections_per_img": 5}
RCNN_BOXES: dict[str, Any] = {
    "rpn_post_nms_top_n_test": 20,
    "box_score_thresh": 0.0,
    "box_detections_per_img": 5,
}
SCALE: dict[str, Any] = {"min_size": 192, "max_size": 192}
COLUMNS = ("model", "input", "convs", "BatchNorms", "left out", "equal", "folded", "seconds")
NORMALISED = "already normalised"
SIZES = (32, 48, 64, 96, 128, 160, 192, 224, 256, 300, 320, 384, 448, 512)
FRAMES = 16


INTRODUCTION = """# Whole model zoos

Every model of torchvision that is not quantised, and every model of timm that has at least four
convolutions and no BatchNorm, built with random weights, retrofitted, compared with the original
and folded back. This page is what

    python scripts/zoo.py --results zoo.jsonl --jobs 2 --markdown docs/zoo.md

wrote on a CPU, with {versions}.

- **input**: the shape of a batch, of the smallest pictures that the model accepts and that leave
  its feature maps larger than one pixel. One batch calibrates, another one is compared.
- **convs**: convolution modules. **BatchNorms**: how many were inserted. **left out**:
  convolutions that got none, with the reason and, unless a norm is there already, the place.
- **equal**: all outputs, and the activations at all inserted BatchNorms, equal those of the
  original bit for bit.
- **folded**: `fold` gave back the original state dict, keys and bits, and the same modules.
- **seconds**: of one core, for everything but building the model.

The reparameterised models of timm had BatchNorm until `timm.utils.reparameterize_model` merged it
into their convolutions.
"""


@dataclass
class Result:
    """What became of one model.

    Attributes:
        name: as `retrofit plan` takes it.
        family: where the model is at home: "torchvision, detection" or "timm, convnext".
        versions: of the packages.
        skipped: why it is not converted, if it is not.
        input: the shape of a batch.
        convs: how many convolution modules there are.
        inserted: how many BatchNorms came.
        left_out: reason to the paths of the convolutions that got none.
        equal: outputs and sites are equal bit for bit.
        folded: `fold` gave back the state dict, keys and bits, and the module tree.
        error: what went wrong otherwise, in a line.
        seconds: of everything but building the model.
    """

    name: str
    family: str
    versions: str
    skipped: str = ""
    input: str = ""
    convs: int = 0
    inserted: int = 0
    left_out: dict[str, list[str]] = field(default_factory=dict)
    equal: bool = False
    folded: bool = False
    error: str = ""
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        return not self.skipped and (bool(self.error) or not (self.equal and self.folded))

    def __str__(self) -> str:
        if self.skipped:
            return f"{self.name}: left out, {self.skipped}"
        verdict = "FAILED" if self.failed else "ok"
        counts = f"{self.inserted} of {self.convs} convolutions, {self.seconds:.1f} s"
        return f"{verdict:6}  {self.name}: {counts}  {self.error}".rstrip()


# --- models and their inputs -------------------------------------------------------------------


def family(name: str) -> str:
    """The package, and the task (torchvision) or the file (timm) that the model comes from."""
    source, _, entry = name.rpartition(":")
    if source == "timm":
        return f"timm, {timm.models.model_entrypoint(entry).__module__.rpartition('.')[2]}"
    if source:
        return "timm, reparameterised"
    module = torchvision.models.get_model_builder(name).__module__.split(".")
    return f"torchvision, {module[2].replace('_', ' ') if len(module) > 3 else 'classification'}"


def fresh(name: str) -> nn.Module:
    """The model with the weights of its own initialisation."""
    if family(name) != "torchvision, detection":
        return retrofit.files.model_sources.build(name)
    options = RCNN_BOXES if "rcnn" in name else BOXES
    if "ssd" not in name:
        options = options | SCALE
    detector: nn.Module = torchvision.models.get_model(
        name, weights=None, weights_backbone=None, **options
    )
    return detector


def build(name: str) -> nn.Module:
    """The model with random weights, in eval mode.

    Parameters that start out constant get noise: gates and layer scales that begin at zero would
    keep whole branches out of the comparison.
    """
    torch.manual_seed(0)
    model = fresh(name).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and parameter.amin() == parameter.amax():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def batch(name: str, size: int, seed: int) -> Any:
    """Two pictures, clips or pairs of pictures of this size."""
    generator = torch.Generator().manual_seed(seed)
    match family(name):
        case "torchvision, detection":
            return list(torch.rand(2, 3, size, size, generator=generator))
        case "torchvision, optical flow":
            return tuple(torch.randn(2, 2, 3, size, size, generator=generator))
        case "torchvision, video":
            return torch.randn(2, 3, FRAMES, size, size, generator=generator)
    return torch.randn(2, 3, size, size, generator=generator)


def size_for(model: nn.Module, name: str) -> int:
    """The smallest size that the model accepts and that keeps its feature maps above one pixel.

    On maps of one pixel a BatchNorm cannot be trained, so that convolutions would be left out that
    get one in practice. Where every size gives some, the smallest that is accepted.
    """
    config = getattr(model, "pretrained_cfg", {})  # timm's
    sizes: Sequence[int] = (config["input_size"][-1],) if config.get("fixed_input_size") else SIZES
    if family(name) == "torchvision, detection":
        sizes = model.transform.min_size  # type: ignore[union-attr, assignment]
    accepted, refusal = 0, ""
    for size in sizes:
        try:
            vanishing = vanishes(model, batch(name, size, 0))
        except Exception as error:  # noqa: BLE001 - models refuse a size in every way there is
            refusal = one_line(error)
            continue
        if not vanishing:
            return size
        accepted = accepted or size
    if not accepted:
        raise ValueError(f"it runs at none of the sizes {sizes}: {refusal}")
    return accepted


def vanishes(model: nn.Module, inputs: Any) -> bool:
    """Whether a convolution with a kernel wider than a pixel gives maps of one pixel."""
    found = False

    def look(conv: nn.Module, _: Any, y: Tensor) -> None:
        nonlocal found
        kernel: tuple[int, ...] = conv.kernel_size  # type: ignore[assignment]
        found |= max(kernel) > 1 and y.shape[-len(kernel) :].numel() == 1

    hooks = [conv.register_forward_hook(look) for conv in convolutions(model)]
    try:
        call(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def call(model: nn.Module, inputs: Any) -> list[Tensor]:
    """All tensors in the output."""
    with torch.no_grad():
        output = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def convolutions(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, _ConvNd)]


def batchnorms(model: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


# --- one model ---------------------------------------------------------------------------------


def check(name: str) -> Result:
    """Build, convert, compare and fold back one model."""
    result = Result(name, family(name), versions())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            examine(result)
    except Exception as error:  # noqa: BLE001 - a result like any other
        result.error = one_line(error)
    return result


def examine(result: Result) -> None:
    """Calibrate on one batch, compare on another, fold; all that is found goes into `result`."""
    model = build(result.name)
    start = time.perf_counter()
    size = size_for(model, result.name)
    first, second = batch(result.name, size, 1), batch(result.name, size, 2)
    bits, tree, norms = fingerprint(model), str(model), batchnorms(model)
    result.input = described(first)
    result.convs = len(convolutions(model))

    converted = retrofit.add_batchnorm(model, [first], progress=False)
    record = record_of(converted)
    assert record is not None
    plan = record.plan
    for site in plan.sites:
        if site.decision == "skip":
            reason = re.sub(f"{NORMALISED} by .*", NORMALISED, site.reason)
            result.left_out.setdefault(reason, []).append(site.path)
    result.inserted = batchnorms(converted) - norms
    if result.inserted != len(plan.inserted):
        result.error = f"the plan promised {len(plan.inserted)} BatchNorms"
    if (planned := sum(site.channels > 0 for site in plan.sites)) != result.convs:  # 0: functions
        result.error = f"the plan decides on {planned} convolutions"

    expected, actual = call(model, second), call(converted, second)
    exact = retrofit.verify(model, converted, [second]).exact
    result.equal = exact and same(expected, actual) and fingerprint(model) == bits
    if not informative(expected):
        result.error = "the outputs are constant or not finite: comparing them says nothing"

    del model  # the largest would not fit three times
    folded = retrofit.fold(converted)
    result.folded = str(folded) == tree and [*fingerprint(folded).items()] == [*bits.items()]
    result.seconds = round(time.perf_counter() - start, 1)


def same(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> bool:
    """Equal bit for bit, where NaN equals NaN and 0 equals -0."""
    return len(expected) == len(actual) and all(
        a.shape == b.shape
        and a.dtype == b.dtype
        and bool(((a == b) | (a.isnan() & b.isnan())).all())
        for a, b in zip(expected, actual, strict=True)
    )


def informative(outputs: Sequence[Tensor]) -> bool:
    """Whether the outputs hold different numbers, and nothing but numbers."""
    floats = [y for y in outputs if y.is_floating_point() and y.numel()]
    finite = all(bool(y.isfinite().all()) for y in floats)
    return finite and any(bool(y.amin() < y.amax()) for y in floats)


def fingerprint(model: nn.Module) -> dict[str, str]:
    """A digest of each tensor in the state dict, for there is no room for copies of the largest."""

    def digest(tensor: Tensor) -> str:
        raw = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data
        return f"{tuple(tensor.shape)} {tensor.dtype} {hashlib.sha256(raw).hexdigest()}"

    return {key: digest(tensor) for key, tensor in model.state_dict().items()}


def described(inputs: Any) -> str:
    if isinstance(inputs, Tensor):
        return " x ".join(map(str, inputs.shape))
    return f"{len(inputs)} of {described(inputs[0])}"


def one_line(error: BaseException) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}"[:400]


def versions() -> str:
    packages = (torch, torchvision, timm, retrofit)
    return ", ".join(f"{package.__name__} {package.__version__}" for package in packages)


# --- all models --------------------------------------------------------------------------------


def names(only: str) -> list[str]:
    """All models of both packages that the glob pattern matches."""
    models = [
        *torchvision.models.list_models(),
        *(f"timm:{entry}" for entry in timm.list_models()),
        *(f"timm-reparameterized:{entry}" for entry in MERGED),
    ]
    return [name for name in models if fnmatchcase(name, only)]


def outlook(name: str) -> tuple[str, float]:
    """Why the model is not converted, empty if it is; and the memory in GB that its check takes:
    the weights twice, and what torch itself needs."""
    if not name.startswith("timm"):
        skipped = next((why for p, why in LEFT_OUT.items() if fnmatchcase(name, p)), "")
        weights = torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"]
        return skipped, 8e-9 * weights + 1
    with torch.device("meta"):  # costs neither time nor memory
        built = fresh(name)
    skipped = ""
    if name.startswith("timm:"):
        skipped = "fewer than four convolutions" if len(convolutions(built)) < 4 else ""
        skipped = "BatchNorm" if batchnorms(built) else skipped
    return skipped, 8e-9 * sum(p.numel() for p in built.parameters()) + 1


@dataclass
class Worker:
    """A process that checks one model."""

    name: str
    process: BaseProcess
    deadline: float


def work(name: str, threads: int, results: Connection) -> None:
    torch.set_num_threads(threads)
    results.send(check(name))


def sweep(
    needs: dict[str, float], jobs: int, threads: int, memory: float, limit: float
) -> Iterator[Result]:
    """Check models, each in a process of its own, `jobs` at a time and the largest first.

    Args:
        needs: name of the model to the memory that its check takes; none starts beside others
            while all of these together take more than `memory`.
        limit: seconds after which a check is given up.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm", "torchvision", "retrofit"])
    waiting = sorted(needs, key=lambda name: needs[name], reverse=True)
    running: dict[Connection, Worker] = {}
    try:
        while waiting or running:
            free = memory - sum(needs[worker.name] for worker in running.values())
            name = next((n for n in waiting if needs[n] <= free or not running), None)
            if name is not None and len(running) < jobs:
                waiting.remove(name)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=work, args=(name, threads, sender), daemon=True)
                process.start()
                sender.close()
                running[receiver] = Worker(name, process, time.monotonic() + limit)
                continue
            ready = wait(list(running), timeout=1)
            for receiver, worker in list(running.items()):
                late = time.monotonic() > worker.deadline
                if receiver in ready or late:
                    yield finished(worker, receiver, late=late and receiver not in ready)
                    del running[receiver]
    finally:
        for worker in running.values():
            worker.process.kill()


def finished(worker: Worker, results: Connection, *, late: bool) -> Result:
    """What a process found, or how it ended."""
    result = Result(worker.name, family(worker.name), versions())
    if late:
        worker.process.kill()
        result.error = "not done within the time limit"
    else:
        try:
            result = results.recv()
        except EOFError:
            worker.process.join()
            result.error = f"the process ended with exit code {worker.process.exitcode}"
    worker.process.join()
    results.close()
    return result


# --- the document ------------------------------------------------------------------------------


def document(results: Sequence[Result]) -> str:
    """docs/zoo.md."""
    checked = [result for result in results if not result.skipped]
    reasons: Counter[str] = Counter()
    for result in checked:
        reasons.update({reason: len(paths) for reason, paths in result.left_out.items()})
    skipped = Counter((r.family.partition(",")[0], r.skipped) for r in results if r.skipped)
    parts = [
        INTRODUCTION.format(versions="; ".join(sorted({r.versions for r in checked}))),
        "## Summary\n",
        markdown(
            ("", "count"),
            [
                ("models planned, compared and folded back", len(checked)),
                ("failures among them", sum(r.failed for r in checked)),
                ("nothing to insert", sum(not (r.inserted or r.failed) for r in checked)),
                ("convolutions", sum(r.convs for r in checked)),
                ("BatchNorms inserted", sum(r.inserted for r in checked)),
                *((f"convolutions left out: {why}", n) for why, n in reasons.most_common()),
                *(
                    (f"models of {package} left out: {why}", n)
                    for (package, why), n in skipped.items()
                ),
                ("minutes of one core", round(sum(r.seconds for r in checked) / 60)),
            ],
        ),
    ]
    for name in sorted({r.family for r in checked}, key=lambda name: (name[:4] == "timm", name)):
        group = sorted((r for r in checked if r.family == name), key=lambda r: natural(r.name))
        parts += [f"## {name}\n", markdown(COLUMNS, map(cells, group))]
    return "\n".join(parts)


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table, numbers flush right."""
    rows = [header, *rows]
    right = [isinstance(cell, (int, float)) for cell in rows[-1]]
    rows.insert(1, ["---:" if flush else "---" for flush in right])
    lines = [[f"{c:,}" if isinstance(c, (int, float)) else str(c) for c in row] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cells(result: Result) -> tuple[object, ...]:
    """A row of the table, under COLUMNS."""
    notes = [result.error] if result.error else []
    if not (result.inserted or result.failed):
        notes.append("nothing to do")
    for reason, paths in result.left_out.items():
        where = "" if reason == NORMALISED else f" ({places(paths)})"
        notes.append(f"{len(paths)} x {reason.partition(':')[0]}{where}")
    verdicts = ("yes" if done else "**no**" for done in (result.equal, result.folded))
    name, text = result.name.rpartition(":")[2], "; ".join(notes).replace("|", "\\|")
    return (name, result.input, result.convs, result.inserted, text, *verdicts, result.seconds)


def places(paths: Sequence[str]) -> str:
    """Module paths, at most three, numbers as * where that covers several."""
    alike: dict[str, list[str]] = {}
    for path in paths:
        alike.setdefault(re.sub(r"\d+(?=\.|$)", "*", path), []).append(path)
    shown = [group[0] if len(group) == 1 else pattern for pattern, group in alike.items()]
    return f"`{'`, `'.join(shown[:3])}`{', ...' if len(shown) > 3 else ''}"


def natural(name: str) -> list[str]:
    """Sorts resnet18 before resnet101."""
    return [part.zfill(5) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


# --- the command -------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Result]:
    """Results of earlier runs, the last of each model."""
    if not path.exists():
        return {}
    results = [Result(**json.loads(line)) for line in path.read_text().splitlines()]
    return {result.name: result for result in results}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="file of results, added to")
    parser.add_argument("--markdown", type=Path, help="write the document there")
    parser.add_argument("--only", default="*", metavar="GLOB", help="these models: 'timm:nfnet_*'")
    parser.add_argument("--retry", action="store_true", help="check again what failed before")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each")
    parser.add_argument("--memory", type=float, default=10.0, metavar="GB", help="for all jobs")
    parser.add_argument("--limit-seconds", type=float, default=900.0, help="for each model")
    arguments = parser.parse_args()

    chosen = names(arguments.only)
    known = read(arguments.results)
    results = {n: known[n] for n in chosen if n in known}
    if arguments.retry:
        results = {name: result for name, result in results.items() if not result.failed}
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    with arguments.results.open("a") as file:

        def keep(result: Result) -> None:
            results[result.name] = result
            print(json.dumps(asdict(result)), file=file, flush=True)

        needs = {}
        for name in chosen:
            if name not in results:
                skipped, needs[name] = outlook(name)
                if skipped:
                    keep(Result(name, family(name), versions(), skipped))
                    del needs[name]
        limits = (arguments.jobs, arguments.threads, arguments.memory, arguments.limit_seconds)
        for result in sweep(needs, *limits):
            keep(result)
            print(result, flush=True)
    if arguments.markdown:
        arguments.markdown.parent.mkdir(parents=True, exist_ok=True)
        arguments.markdown.write_text(document(list(results.values())))
    failures = sum(result.failed for result in results.values())
    checked = sum(not result.skipped for result in results.values())
    print(f"{checked} models, {failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
