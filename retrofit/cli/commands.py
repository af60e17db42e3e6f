"""The commands, one function each: from a request to calls of the library; `convert` has a file.

Each tells the terminal what it found, and returns the exit code: 0, or 1 for a conversion or
comparison that failed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import retrofit
from retrofit import RetrofitError, Verification, demo
from retrofit.cli.convert import planned, run_convert
from retrofit.cli.data_sources import check_device, refuse_without_data, sample_for
from retrofit.cli.norm_table import norm_rows, norm_table
from retrofit.cli.requests import (
    AdaptRequest,
    ConvertRequest,
    DemoRequest,
    FoldRequest,
    InspectRequest,
    PictureOptions,
    PlanRequest,
    ReportRequest,
    Request,
    RestoreRequest,
    VerifyRequest,
)
from retrofit.cli.restore import run_restore
from retrofit.cli.sample import naming
from retrofit.cli.terminal import Terminal, if_stopped
from retrofit.cli.text import error_in_words
from retrofit.files.checkpoint import check_output, load_opened
from retrofit.files.model_args import ModelArgs, as_option
from retrofit.files.model_sources import build, is_torchvision, trained
from retrofit.files.onnx_files import is_onnx
from retrofit.files.provenance import Provenance
from retrofit.files.weights import WeightsFile, open_weights
from retrofit.json_values import to_plain
from retrofit.pictures.preparation import Preparation
from retrofit.report import check_report, measured_drift, write_report
from retrofit.running.input_channels import input_dtype
from retrofit.surgery.folding import folded
from retrofit.surgery.record import attach, record_of
from retrofit.tables import Facts, one_line


def carry_out(request: Request, terminal: Terminal) -> int:
    """Do what is asked for; returns the exit code."""
    return HANDLERS[type(request)](request, terminal)


def run_plan(request: PlanRequest, terminal: Terminal) -> int:
    """Print the plan of a model, whose weights do not matter."""
    refuse_without_data(request.pictures)
    model = build(request.model, request.model_args)
    example = _example(model, request.model, request.pictures, terminal)
    plan = planned(model, example, request.plan)
    terminal.show(*plan._parts())
    terminal.tell(plan=plan)
    return 0


def _example(
    model: nn.Module,
    name: str,
    pictures: PictureOptions,
    terminal: Terminal,
    told: Preparation | None = None,
) -> Any:
    """Read two pictures to see what the model calls; None without data."""
    if pictures.data is None:
        return None
    sample = sample_for(model, name, pictures, told=told)
    example = sample.example()
    sample.list_bad(terminal, [])
    return example


def run_verify(request: VerifyRequest, terminal: Terminal) -> int:
    """Compare the model of a file with the original; 1 where they differ by more than allowed."""
    if is_onnx(request.file):
        if not request.model:
            raise _nameless(request.file)
        converted, called = build(str(request.file)), Called(request.model, request.model_args)
    else:
        converted, called = _load(_without_key(request.file), request)
    original = _original(called, request, converted)
    sample = sample_for(
        original, called.name, request.pictures, request.weights, told=called.preparation
    )
    sample.announce(terminal)
    batches = sample.batches()
    found = retrofit.verify(original, converted, batches, progress=terminal.progress)
    terminal.show(*sample.worded(found._parts()))
    dtype = str(input_dtype(converted)).removeprefix("torch.")
    if dtype != "float32":
        terminal.show(f"compared in {dtype}, the precision of {request.file}")
    sample.list_bad(terminal, batches.bad)
    passed = found.exact if request.tolerance == 0 else found.passed(request.tolerance)
    terminal.tell(passed=passed, tolerance=request.tolerance, dtype=dtype, **found.summary())
    terminal.tell(sites=found.sites, outputs=found.outputs)
    if passed:
        return 0
    hint = f" (without --weights, {called.name} is as built: random?)"
    known = request.weights or is_onnx(called.name)  # such a file brings its own
    return terminal.fail(f"{_failure(found, request.tolerance)}{'' if known else hint}", 1)


def run_fold(request: FoldRequest, terminal: Terminal) -> int:
    """Fold the model of a file, and save it."""
    refuse_without_data(request.pictures)
    check_output(request.output, overwrite=request.overwrite)
    model, called = _load(open_weights(request.file), request, request.weights_key)
    example = _example(model, called.name, request.pictures, terminal, called.preparation)
    result = folded(model, example=example)
    if not result.folded:
        reasons = f": {result}" if result.left else ""
        raise RetrofitError(f"{request.file} has no BatchNorm that can be folded{reasons}")
    # What was not converted here is not the plain model after folding: it has new biases.
    told = called.told if record_of(model) else {}
    terminal.say(f"writing {request.output}")
    retrofit.save(result.model, request.output, **told, overwrite=request.overwrite)
    for line in result.remarks:
        terminal.warn(line)
    terminal.show(
        f"{result.folded} BatchNorms folded, {len(result.left)} left; written: {request.output}"
    )
    terminal.tell(folded=result.folded, left=result.left, written=str(request.output))
    return 0


def run_adapt(request: AdaptRequest, terminal: Terminal) -> int:
    """Recalibrate the model of a file layer by layer, and save it."""
    check_output(request.output, overwrite=request.overwrite)
    check_device(request.pictures)
    file = open_weights(request.file)
    model, called = _load(file, request, request.weights_key)
    if not _batchnorms(model):
        raise RetrofitError(f"{request.file} has no BatchNorm to adapt: convert it first")
    sample = sample_for(
        model, called.name, request.pictures, called.built_for, told=called.preparation
    )
    sample.announce(terminal)
    batches = sample.batches()
    start = time.perf_counter()
    with naming(batches), if_stopped(f"{request.output} is not written"):
        found = retrofit.recalibrate(
            model,
            batches,
            layerwise=True,
            prior=request.prior,
            device=request.pictures.device,
            max_images=request.pictures.images,
            progress=terminal.progress,
        )
    seconds = time.perf_counter() - start
    if (record := record_of(model)) is not None:
        attach(model, dataclasses.replace(record, images=found.images))
    weighed = f", the old statistics counting as {request.prior:g}" if request.prior else ""
    done = f"adapted on {found.images} {sample.kind} of {sample.source}{weighed}"
    data = "; ".join(filter(None, (file.provenance.data, done)))
    terminal.say(f"writing {request.output}")
    called = dataclasses.replace(called, preparation=sample.preparation or called.preparation)
    retrofit.save(model, request.output, **called.told, data=data, overwrite=request.overwrite)
    sample.list_bad(terminal, batches.bad)
    sample.warn_of_guess(terminal)
    terminal.show(
        Facts(
            (
                ("adapted on", f"{found.images} {sample.kind} in {seconds:.1f} s{weighed}"),
                ("BatchNorms", f"{len(found.layers)} of them, one after another"),
                *([("passes", f"{found.passes} over {sample.word}")] if found.passes > 1 else []),
                ("standard error", error_in_words(found.standard_error)),
                ("written", str(request.output)),
            )
        )
    )
    terminal.tell(
        images=found.images,
        seconds=seconds,
        prior=request.prior,
        batchnorms=found.layers,
        passes=found.passes,
        standard_error=found.standard_error,
        written=str(request.output),
    )
    return 0


def run_inspect(request: InspectRequest, terminal: Terminal) -> int:
    """Print where a file comes from, and a table of its BatchNorms."""
    file = open_weights(request.file)
    tensors, provenance = file.tensors(request.weights_key), file.provenance
    described = _described(provenance)
    if described:
        facts = described.items()
        terminal.show(Facts(tuple((one_line(name), one_line(str(fact))) for name, fact in facts)))
    sites = provenance.plan.inserted if provenance.plan else ()
    rows = norm_rows(tensors, provenance.eps or 1e-5, [site.batchnorm for site in sites])
    numbers = sum(tensor.numel() for tensor in tensors.values())
    terminal.show(
        norm_table(rows),
        f"{one_line(str(request.file))}: {len(tensors)} tensors, {numbers:,} numbers",
    )
    terminal.tell(
        provenance=provenance.to_json(), batchnorms=rows, tensors=len(tensors), numbers=numbers
    )
    return 0


def run_report(request: ReportRequest, terminal: Terminal) -> int:
    """Write a page about a file, with drift and comparison measured anew where asked for."""
    check_report(request.output, overwrite=request.overwrite)
    if request.weights is None and request.weights_key is not None:
        raise RetrofitError("--weights-key needs --weights: it is a place in that file")
    if request.weights is not None and request.pictures.data is None:
        raise RetrofitError("--weights needs --data: pictures to compare the networks on")
    refuse_without_data(request.pictures)
    file = _without_key(request.file)
    provenance, no_drift = file.provenance, ""
    if request.pictures.data is not None:
        provenance, no_drift = _measured_anew(request, file, terminal)
    terminal.say(f"writing {request.output}")
    write_report(
        request.output,
        request.file.name,
        file.tensors(),
        provenance,
        no_drift=no_drift,
        overwrite=request.overwrite,
    )
    terminal.show(f"written: {request.output}")
    terminal.tell(written=str(request.output), drift=provenance.drift, no_drift=no_drift)
    return 0


def run_demo(request: DemoRequest, terminal: Terminal) -> int:
    """Run the demo in a folder."""
    folder = request.output
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = demo.run(folder, progress=terminal.progress)
    except OSError as error:
        raise RetrofitError(f"cannot write to {folder}: {error.strerror}") from error
    terminal.show(*found._parts())
    terminal.tell(
        written=str(folder), demo=found, verification=found.converted.verification.summary()
    )
    return 0


HANDLERS: dict[type[Any], Callable[[Any, Terminal], int]] = {
    PlanRequest: run_plan,
    ConvertRequest: run_convert,
    VerifyRequest: run_verify,
    FoldRequest: run_fold,
    AdaptRequest: run_adapt,
    RestoreRequest: run_restore,
    InspectRequest: run_inspect,
    ReportRequest: run_report,
    DemoRequest: run_demo,
}


def _without_key(path: Path) -> WeightsFile:
    """Open the FILE of a command whose --weights-key is a place in another one."""
    option = "load(weights_key=) in Python, and save it in a file of its own"
    return dataclasses.replace(open_weights(path), option=option)


@dataclass(frozen=True)
class Called:
    """How the model of a file is built: as given, or as the file says."""

    name: str
    model_args: ModelArgs
    built_for: str | None = None
    preparation: Preparation | None = None

    @property
    def told(self) -> dict[str, Any]:
        """What `save` is told."""
        return {
            "name": self.name,
            "model_args": self.model_args,
            "weights": self.built_for,
            "preparation": self.preparation,
        }


def _load(
    file: WeightsFile,
    request: VerifyRequest | FoldRequest | AdaptRequest | ReportRequest,
    key: str | None = None,
) -> tuple[nn.Module, Called]:
    """Load the model of a file."""
    told = file.provenance
    name = request.model or told.model
    if name is None:
        raise _nameless(file.path)
    called = Called(name, request.model_args, preparation=told.preparation)
    if name == told.model:
        called = dataclasses.replace(called, built_for=told.weights)
        if is_torchvision(name) and not request.model_args:
            called = dataclasses.replace(called, model_args=told.model_args or {})
            return load_opened(file, None, key), called
    # Code is imported, and called with arguments, as the user typed it, never as a file says.
    typed = is_torchvision(name) or request.model
    if not typed or (told.model_args and not request.model_args):
        option = f"--model {name}" if name == told.model else ""
        arguments = as_option(told.model_args) if told.model_args else ""
        raise RetrofitError(
            f"{file.path} is of {told.call}, and that is not built unless it is typed: "
            f"{' '.join(filter(None, (option, arguments)))}"
        )
    return load_opened(file, build(name, called.model_args, called.built_for), key), called


def _original(
    called: Called, request: VerifyRequest | ReportRequest, converted: nn.Module
) -> nn.Module:
    """Build the original, in the precision of what came of it."""
    dtype = input_dtype(converted)
    return trained(
        called.name, request.weights, request.weights_key, dtype, model_args=called.model_args
    )


def _nameless(path: Path) -> RetrofitError:
    return RetrofitError(f"{path} does not say what model it is: give --model")


def _measured_anew(
    request: ReportRequest, file: WeightsFile, terminal: Terminal
) -> tuple[Provenance, str]:
    """Measure drift, and with --weights how the outputs compare; and why there is no drift."""
    converted, called = _load(file, request)
    original = converted
    if request.weights:
        original = _original(called, request, converted)
    sample = sample_for(
        original, called.name, request.pictures, request.weights, told=called.preparation
    )
    sample.announce(terminal)
    batches = sample.batches()
    # Without the original: under running statistics the file's own network computes the same.
    drift, no_drift = measured_drift(original, converted, batches, progress=terminal.progress)
    what = "drift and parity" if request.weights else "drift"
    measured = f"{what}, on {sample.amount()} of {sample.source}"
    found = dataclasses.replace(file.provenance, drift=drift, measured=measured)
    if request.weights:
        verification = retrofit.verify(original, converted, batches, progress=terminal.progress)
        found = dataclasses.replace(found, verification=verification)
    sample.list_bad(terminal, batches.bad)
    sample.warn_of_guess(terminal)
    return found, no_drift


def _described(provenance: Provenance) -> dict[str, Any]:
    """List the facts of a file that fit a line each; `report` shows the others."""
    if provenance == Provenance():
        return {}
    facts = {
        k: v
        for k, v in provenance.to_json().items()
        if k not in ("model_args", "plan", "drift", "measured")
    }
    facts["model"] = provenance.call
    facts["preparation"] = provenance.preparation
    for key in ("calibration", "verification"):
        found = getattr(provenance, key)
        values = found.summary() if isinstance(found, Verification) else to_plain(found) or {}
        told = {k: v for k, v in values.items() if not isinstance(v, list)}
        texts = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in told.items())
        facts[key] = None if found is None else ", ".join(texts)
    return {key: fact for key, fact in facts.items() if fact is not None}


def _failure(found: Verification, tolerance: float) -> str:
    return (
        f"the models differ: {found.worst.name} by {found.worst.relative:.3g} of its root mean "
        f"square (tolerance {tolerance:g})"
    )


def _batchnorms(model: nn.Module) -> int:
    """Count the BatchNorms of a model."""
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
