"""The command `convert`: a sample, calibrated, checked, written; by one process or several."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import retrofit
from retrofit import Calibration, Plan, RetrofitError, Verification
from retrofit.atomic_write import write_whole
from retrofit.calibration.processes import Processes, launched
from retrofit.calibration.sample_errors import TOLERANCES
from retrofit.cli.data_sources import check_device, counted, open_data, sample_for
from retrofit.cli.norm_table import NormRow, norm_rows, norm_table
from retrofit.cli.requests import (
    BATCH_SIZE,
    ConvertRequest,
    PictureOptions,
    PlanOptions,
    may_end_early,
    tolerance_of,
)
from retrofit.cli.sample import Sample, naming
from retrofit.cli.terminal import Terminal, if_stopped
from retrofit.cli.text import error_in_words
from retrofit.conversion import has_linear
from retrofit.errors import UnfinishedError
from retrofit.files.checkpoint import check_output
from retrofit.files.model_sources import preparation_in, trained, weights_name
from retrofit.files.onnx_batchnorms import Agreement, agreement, with_batchnorms
from retrofit.files.onnx_files import SUFFIX as ONNX
from retrofit.files.onnx_files import is_onnx
from retrofit.files.provenance import provenance_of
from retrofit.files.suffixes import SUFFIXES
from retrofit.json_values import to_plain
from retrofit.report import check_report, measured_drift, write_report
from retrofit.running.call_arguments import arguments_of
from retrofit.tables import Facts, Part, Table

# Options that the processes of one conversion may have different values of.
OF_A_PROCESS = {"data", "output", "overwrite", "report", "state", "weights", "weights_key"}
OF_A_PROCESS |= {"workers", "device"}
DEFAULTS = {"seed": 0, "batch_size": BATCH_SIZE}  # of a process that was not given them


@dataclass(frozen=True)
class Calibrated:
    """A prepared model that has learned its moments.

    Attributes:
        model, prepared, plan: the original, its prepared copy, and the plan between them.
        report: what `calibrate` found.
        used: how many pictures or samples that took.
        bad: names of pictures that could not be read.
    """

    model: nn.Module
    prepared: nn.Module
    plan: Plan
    report: Calibration
    used: int
    bad: list[str]


@dataclass(frozen=True)
class Checked:
    """A converted model that was compared with the original.

    Attributes:
        converted: the model with BatchNorm.
        verification: how it compares.
        which: what it was compared on, in words.
        bad: names of pictures that could not be read.
        onnx: of an ONNX file, where that was asked for, the content, and how it compares.
    """

    converted: nn.Module
    verification: Verification
    which: str
    bad: list[str]
    onnx: tuple[bytes, Agreement] | None = None


def run_convert(request: ConvertRequest, terminal: Terminal) -> int:
    """Calibrate, all processes together, each on its share of the pictures; the first one saves."""
    with launched() as processes, processes.failing_together():
        _refuse_bad_files(request, processes)
        unwritten = f"{request.output} is not written"
        with if_stopped(unwritten):
            sample = _sample(request, processes)
            by = f", by {processes.size} processes" if processes.group else ""
            by += f"; what is done is kept in {request.state}" if request.state else ""
            sample.announce(terminal, by, at_most=may_end_early(request))
            plan = planned(sample.model, sample.example(), request.plan)
            if not plan.inserted:
                if processes.rank > 0:
                    return 1
                terminal.show(*plan._parts())
                terminal.tell(plan=plan)
                return terminal.fail(_nothing_to_convert(sample.model, plan, request.plan), 1)
        with if_stopped(unwritten, request.state):
            calibrated = _calibrated(request, sample, plan, processes, terminal)
            if processes.rank > 0:
                return 0
            checked = _checked(request, sample, calibrated, terminal)
            if problem := _inequality(checked, terminal):
                return terminal.fail(f"{problem}: nothing was written", 1)
        told = _saved(request, sample, calibrated, checked, terminal)
        _tell(request, sample, calibrated, checked, terminal)
        if request.report:
            _write_report(request.report, request, sample, calibrated, checked, told, terminal)
        return 0


def _nothing_to_convert(model: nn.Module, plan: Plan, options: PlanOptions) -> str:
    asked = options.linear or plan.sites
    hint = "" if asked or not has_linear(model) else " (Linear layers get BatchNorms with --linear)"
    return f"there is nothing to convert, and nothing was written{hint}"


def planned(model: nn.Module, example: Any, options: PlanOptions) -> Plan:
    """Plan as the command was asked to."""
    return retrofit.plan(
        model,
        example=example,
        include=options.include,
        exclude=options.exclude,
        layout=options.layout,
        placement=options.placement,
        linear=options.linear,
    )


def _refuse_bad_files(request: ConvertRequest, processes: Processes) -> None:
    """Raise RetrofitError for files that could not be written, before the work is done."""
    if processes.rank == 0:
        suffixes = (*SUFFIXES, ONNX) if is_onnx(request.model) else SUFFIXES
        check_output(request.output, overwrite=request.overwrite, suffixes=suffixes)
        if request.report:
            check_report(request.report, overwrite=request.overwrite)
    if is_onnx(request.output) and request.weights is not None:
        raise RetrofitError(
            f"{request.output} would have the weights of {request.model}, not those of --weights: "
            "save as .safetensors"
        )
    if request.state and request.state.resolve() == request.output.resolve():
        raise RetrofitError(f"--state and --output are both {request.output}")


def _sample(request: ConvertRequest, processes: Processes) -> Sample:
    """Open the pictures and build the model; all processes must be asked for the same."""
    options = request.pictures
    data = open_data(options)
    word, number = counted(data)
    processes.agree({**_alike(request), f"number of {word}": number})
    if number is not None and number < 2:
        raise RetrofitError(f"calibration needs at least 2 {word}: {options.data} has {number}")
    options = replace(options, device=_own_device(options.device))
    check_device(options)
    told = preparation_in(request.weights)
    model = trained(
        request.model, request.weights, request.weights_key, model_args=request.model_args
    )
    sample = sample_for(model, request.model, options, request.weights, data, told)
    sample.refuse_processes(processes.size)
    if request.report:
        sample.refuse_once_only("--report")
    return sample


def _alike(request: ConvertRequest | PlanOptions | PictureOptions) -> dict[str, str]:
    """List the options that all processes must have the same values of."""
    found: dict[str, str] = {}
    for field in fields(request):
        value = getattr(request, field.name)
        if is_dataclass(value):
            found |= _alike(value)  # type: ignore[arg-type]
        elif field.name not in OF_A_PROCESS:
            chosen = DEFAULTS.get(field.name) if value is None else value
            found[f"--{field.name.replace('_', '-')}"] = str(chosen)
    return found


def _own_device(device: str | None) -> str | None:
    """Choose the GPU of this process: of those of a machine, each has one."""
    local = os.environ.get("LOCAL_RANK")
    if not (device == "cuda" and local and torch.cuda.is_available()):
        return device
    torch.cuda.set_device(int(local))  # where memory is pinned, and what nccl uses
    return f"cuda:{local}"


def _calibrated(
    request: ConvertRequest,
    sample: Sample,
    plan: Plan,
    processes: Processes,
    terminal: Terminal,
) -> Calibrated:
    batches = sample.batches(processes.rank, processes.size)
    prepared = retrofit.prepare(sample.model, plan)
    with naming(batches):
        report = retrofit.calibrate(
            prepared,
            batches,
            device=sample.options.device,
            max_images=sample.options.images,
            tolerance=request.tolerance,
            state=request.state,
            process_group=processes.group,
            progress=terminal.progress,
        )
    bad = [name for names in processes.gather(batches.bad) for name in names]
    # It may have ended early, and each process be a batch ahead of the count.
    ahead = sample.batch_size * (processes.size - 1)
    return Calibrated(sample.model, prepared, plan, report, report.images + len(bad) + ahead, bad)


def _checked(
    request: ConvertRequest, sample: Sample, calibrated: Calibrated, terminal: Terminal
) -> Checked:
    """Convert and compare, on pictures that were not calibrated on if there are enough."""
    converted = retrofit.convert(
        calibrated.prepared, share_storage=True, skip_unused=request.skip_unused
    )
    tests, which = sample.tests(calibrated.used)
    verification = retrofit.verify(calibrated.model, converted, tests, progress=terminal.progress)
    if not all(output.finite for output in verification.outputs):
        raise RetrofitError(f"{request.model} gives NaN or Inf: check its weights")
    onnx = None
    if is_onnx(request.output):
        terminal.say("verifying in onnxruntime")
        content = with_batchnorms(request.model, converted)
        inputs = [arguments_of(sample.model, batch).args for batch in tests]
        onnx = content, agreement(request.model, content, inputs)
    return Checked(converted, verification, which, tests.bad, onnx)


def _inequality(checked: Checked, terminal: Terminal) -> str:
    """Say in what the converted model differs from the original, and print it; "" if in nothing."""
    if not checked.verification.exact:
        terminal.show(*checked.verification._parts())
        terminal.tell(verification=checked.verification)
        return "the converted model is not equal to the original"
    if checked.onnx and not checked.onnx[1].exact:
        differs = f"{checked.onnx[1].relative:.3g} of its root mean square"
        return f"in onnxruntime an output differs by {differs}"
    return ""


def _saved(
    request: ConvertRequest,
    sample: Sample,
    calibrated: Calibrated,
    checked: Checked,
    terminal: Terminal,
) -> dict[str, Any]:
    """Save the model, before anything else that was asked for; return what is told of it."""
    told: dict[str, Any] = {
        "name": request.model,
        "model_args": request.model_args,
        "weights": weights_name(request.model, request.weights),
        "data": f"{calibrated.report.images} {sample.kind} of {sample.source}",
        "preparation": sample.preparation,
        "calibration": calibrated.report,
        "verification": checked.verification,
    }
    terminal.say(f"writing {request.output}")
    if checked.onnx:
        content, output = checked.onnx[0], request.output.resolve()
        write_whole(output, lambda file: file.write(content))
    else:
        retrofit.save(checked.converted, request.output, **told, overwrite=request.overwrite)
    if request.state is not None:
        request.state.unlink(missing_ok=True)
    return told


def _write_report(
    path: Path,
    request: ConvertRequest,
    sample: Sample,
    calibrated: Calibrated,
    checked: Checked,
    told: dict[str, Any],
    terminal: Terminal,
) -> None:
    """Measure drift, and write a page about the saved model; UnfinishedError where that fails."""
    unfinished = f"{request.output} is written, but not the report"
    again = (
        f"retrofit report {request.output} --output {path} tries again (--data measures the drift)"
    )
    try:
        with if_stopped(f"{unfinished}; {again}"):
            data, device = sample.for_drift(calibrated.used), sample.options.device
            drift, no_drift = measured_drift(
                calibrated.model, checked.converted, data, device, progress=terminal.progress
            )
            terminal.say(f"writing {path}")
            write_report(
                path,
                request.output.name,
                checked.converted.state_dict(),
                provenance_of(checked.converted, **told, drift=drift),
                no_drift=no_drift,
                overwrite=request.overwrite,
            )
    except Exception as error:
        kind = "" if isinstance(error, RetrofitError) else f"{type(error).__name__}: "
        raise UnfinishedError(f"{unfinished}: {kind}{error}; {again}") from error
    terminal.show(Facts((("report", str(path)),)))
    terminal.tell(report=str(path), drift=drift, no_drift=no_drift)


def _tell(
    request: ConvertRequest,
    sample: Sample,
    calibrated: Calibrated,
    checked: Checked,
    terminal: Terminal,
) -> None:
    """Tell what was converted, how it compares, and where it is."""
    sites = (retrofit.plan_of(checked.converted) or calibrated.plan).sites
    left = {s.path: (s.kind, s.reason) for s in sites if s.decision == "skip"}
    order = [site.batchnorm for site in sites if site.decision == "insert"]
    rows = norm_rows(checked.converted.state_dict(), 1e-5, order)
    terminal.show(*_summary(rows, left))
    sample.list_bad(terminal, [*calibrated.bad, *checked.bad])
    sample.warn_of_guess(terminal)
    terminal.show(_facts(request, sample, calibrated.report, checked))
    calibration = calibrated.report
    terminal.tell(
        model=request.model,
        batchnorms=rows,
        left_as_it_is={path: reason for path, (_, reason) in left.items()},
        calibration={
            "data": f"{calibration.images} {sample.kind} of {sample.source}",
            **to_plain(calibration),
            "disagreement": calibration.disagreement,
            "images_needed": {f"{t:g}": calibration.images_needed(t) for t in TOLERANCES},
        },
        verification={**checked.verification.summary(), "which": checked.which},
        onnxruntime=checked.onnx and checked.onnx[1],
        written=str(request.output),
    )


def _summary(rows: Sequence[NormRow], left: dict[str, tuple[str, str]]) -> Iterator[Part]:
    yield norm_table(rows)
    if left:
        head = ("left as it is", "type", "reason")
        cells = [(path, *why) for path, why in left.items()]
        yield ""
        yield Table(head, cells, paths=head[:1], spare=("type",))
    yield ""


def _facts(
    request: ConvertRequest, sample: Sample, calibration: Calibration, checked: Checked
) -> Facts:
    seconds, worst = calibration.seconds, calibration.disagreement
    rate, waited = calibration.images / seconds, calibration.waited / seconds
    chance = "and not by chance" if calibration.disordered else "as chance has it"
    needed = (f"{calibration.images_needed(t):,} for {t:.0%}" for t in TOLERANCES)
    return Facts(
        (
            ("calibrated on", f"{calibration.images} {sample.kind} in {seconds:.1f} s"),
            (
                "speed",
                f"{rate:.1f} {sample.word}/s; {waited:.0%} of the time spent waiting for them",
            ),
            ("standard error", _error(request, sample, calibration)),
            (f"{sample.word} needed", ", ".join(needed)),
            (
                "two halves of them",
                f"differ by {worst:.3f} sigma (99 % of channels, worst layer), {chance}",
            ),
            ("verified on", f"{checked.verification.images} {checked.which}"),
            ("outputs", "equal bit for bit, at every site and at the end"),
            *_in_onnxruntime(checked),
            ("written", str(request.output)),
        )
    )


def _error(request: ConvertRequest, sample: Sample, calibration: Calibration) -> str:
    error, wanted = error_in_words(calibration.standard_error), tolerance_of(request)
    if calibration.standard_error <= wanted or not wanted:
        return error
    why = "--images allows" if request.pictures.images else "there are"
    return f"{error}; {wanted:.1%} was wanted, and {why} no more {sample.word}"


def _in_onnxruntime(checked: Checked) -> Iterator[tuple[str, str]]:
    if checked.onnx:
        merged = f"{checked.onnx[1].optimised:.1g} of the root mean square"
        yield "in onnxruntime", f"equal bit for bit; where it merges BatchNorms, to {merged}"
