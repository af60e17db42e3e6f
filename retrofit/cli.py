"""The command line: arguments to calls of the library."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retrofit import (
    Calibration,
    NonFiniteError,
    ParityReport,
    PeerError,
    Plan,
    RetrofitError,
    calibrate,
    convert,
    demo,
    fold,
    load,
    plan,
    prepare,
    recalibrate,
    save,
    verify,
)
from retrofit.arguments import DEFAULT_IMAGES, DRIFT_IMAGES, parser
from retrofit.batches import takes_lists
from retrofit.checkpoint import check_output, parity_facts, provenance
from retrofit.identity import scale_and_shift
from retrofit.images import (
    PictureBatches,
    Transform,
    Transforms,
    preprocessing,
    shuffled,
)
from retrofit.layers import are_channels
from retrofit.plain import to_plain
from retrofit.ranks import Ranks, launched
from retrofit.record import attach, record_of, required_record
from retrofit.report import check_report, measured_drift, write_report
from retrofit.sampling import TOLERANCES
from retrofit.sources import Pictures, open_pictures
from retrofit.tables import one_line, table
from retrofit.weights import read
from retrofit.zoo import build, trained, transforms

# Options that the processes of one conversion may have different values of.
OF_A_PROCESS = {
    "debug",
    "data",
    "output",
    "overwrite",
    "report",
    "weights",
    "workers",
    "device",
    "state",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 1 for a conversion that failed, 2 for a bad request."""
    arguments = parser().parse_args(argv)
    warnings.showwarning = _one_line_warning
    try:
        with _terminable():
            code = COMMANDS[arguments.command](arguments)
        sys.stdout.flush()
    except PeerError as error:
        return _fail(str(error), 1)
    except RetrofitError as error:
        return _fail(str(error), 2)
    except _Terminated:
        return _fail("terminated", 128 + signal.SIGTERM)
    except KeyboardInterrupt:
        return _fail("interrupted", 128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of the output, such as head, has left
        _silence()
        return 128 + signal.SIGPIPE
    except Exception as error:  # the user's model may raise anything
        try:
            sys.stdout.flush()
        except OSError:  # on a full disk, say; Python would try again, and exit with 120
            _silence()
        if arguments.debug:
            raise
        return _fail(f"{type(error).__name__}: {error} (--debug shows where)", 1)
    return code


class _Terminated(KeyboardInterrupt):
    """SIGTERM ends a command as Ctrl-C does: everything is put back on the way out."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # no other may set handlers
        yield
        return

    def stop(*_: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _silence() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# --- commands ----------------------------------------------------------------------------------


def _plan(arguments: argparse.Namespace) -> int:
    model = build(arguments.model)
    example = None
    if arguments.data is not None:
        to_input = _to_input(arguments, transforms(arguments.model, model))
        pictures = open_pictures(arguments.data, skip_bad=arguments.skip_bad_images)
        order = shuffled(len(pictures), arguments.seed)
        example = _example(arguments, model, pictures, order, to_input)
    print(_planned(arguments, model, example))
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    with launched() as ranks:
        try:
            return _convert_together(arguments, ranks)
        except Exception as error:
            ranks.fail(error)
            raise


def _convert_together(arguments: argparse.Namespace, ranks: Ranks) -> int:
    """All processes calibrate, each on its share of the pictures; the first one does the rest."""
    if ranks.rank == 0:
        check_output(arguments.output, overwrite=arguments.overwrite)
        if arguments.report:
            check_report(arguments.report, overwrite=arguments.overwrite)
    if arguments.state and arguments.state.resolve() == arguments.output.resolve():
        raise RetrofitError(f"--state and --output are both {arguments.output}")
    pictures = open_pictures(arguments.data, skip_bad=arguments.skip_bad_images)
    options = vars(arguments).items()
    same = {f"--{key.replace('_', '-')}": str(v) for key, v in options if key not in OF_A_PROCESS}
    ranks.agree({**same, "number of pictures": len(pictures)})
    if len(pictures) < 2:
        raise RetrofitError(
            f"calibration needs at least 2 pictures: {arguments.data} has {len(pictures)}"
        )
    model = trained(arguments.model, arguments.weights)
    to_input = _to_input(arguments, transforms(arguments.model, model, arguments.weights))
    order = shuffled(len(pictures), arguments.seed)
    images = arguments.images or (len(order) if arguments.tolerance else DEFAULT_IMAGES)
    chosen = order[:images]
    if len(chosen) < ranks.size:
        raise RetrofitError(
            f"{ranks.size} processes cannot share {len(chosen)} pictures: start fewer, or use more "
            "pictures (--data, --images)"
        )
    example = _example(arguments, model, pictures, chosen, to_input)
    the_plan = _planned(arguments, model, example)
    if not the_plan.inserted:
        message = "there is nothing to convert, and nothing was written"
        if ranks.rank == 0:
            print(f"{the_plan}\n{message}" if arguments.allow_unchanged else the_plan, flush=True)
        if not arguments.allow_unchanged:
            return _fail(f"{message} (--allow-unchanged exits with 0)", 1)
        return 0

    batches = _batches(arguments, model, pictures, chosen[ranks.rank :: ranks.size], to_input)
    prepared = prepare(model, the_plan)
    with _naming_pictures(batches):
        calibration = calibrate(
            prepared,
            batches,
            device=_own_device(arguments.device),
            tolerance=arguments.tolerance,
            state=arguments.state,
            process_group=ranks.group,
        )
    bad = [name for names in ranks.gather(batches.bad) for name in names]
    if ranks.rank > 0:
        return 0
    used = len(chosen)
    if arguments.tolerance:  # perhaps fewer, but with the rest of what the last round may have had
        read = calibration.images + len(bad)
        used = min(used, read + arguments.batch_size * (ranks.size - 1))
    others = order[used:][:16]
    converted = convert(prepared, copy=False, skip_unused=arguments.skip_unused)
    held_out = others if len(others) == 16 else chosen[:16]
    tests = _batches(arguments, model, pictures, held_out, to_input)
    parity = verify(model, converted, tests)
    if not all(output.finite for output in parity.outputs):
        raise RetrofitError(f"{arguments.model} gives NaN or Inf: check its weights")
    if not parity.exact:
        print(parity, flush=True)
        return _fail("the converted model is not equal to the original: nothing was written", 1)
    drift, no_drift = None, ""
    if arguments.report:
        beyond = order[used:][:DRIFT_IMAGES]
        # A batch that is much of the sample has nearly its statistics, and so too little drift.
        few = beyond if len(beyond) == DRIFT_IMAGES else chosen[: min(used // 4, DRIFT_IMAGES)]
        measured_on = _batches(arguments, model, pictures, few, to_input)
        drift, no_drift = measured_drift(model, converted, measured_on)
    told: dict[str, Any] = {
        "name": arguments.model,
        "data": f"{calibration.images} pictures of {arguments.data}, seed {arguments.seed}",
        "calibration": calibration,
        "parity": parity,
        "drift": drift,
    }
    save(converted, arguments.output, **told, overwrite=arguments.overwrite)
    if arguments.state is not None:
        arguments.state.unlink(missing_ok=True)
    if arguments.report:
        write_report(
            arguments.report,
            arguments.output.name,
            converted.state_dict(),
            provenance(converted, **told),
            no_drift=no_drift,
            overwrite=arguments.overwrite,
        )
    print(_summary(converted))
    _list_bad(pictures, [*bad, *tests.bad])
    print(_facts(arguments, calibration, parity, other=len(others) == 16))
    return 0


def _facts(
    arguments: argparse.Namespace, calibration: Calibration, parity: ParityReport, *, other: bool
) -> str:
    seconds, worst = calibration.seconds, calibration.disagreement
    rate, waited = calibration.images / seconds, calibration.waited / seconds
    needed = (f"{calibration.images_needed(t):,} for {t:.0%}" for t in TOLERANCES)
    facts = [
        ("calibrated on", f"{calibration.images} pictures in {seconds:.1f} s"),
        ("speed", f"{rate:.1f} pictures/s; {waited:.0%} of the time spent waiting for them"),
        ("standard error", _error_of(calibration.standard_error)),
        ("pictures needed", ", ".join(needed)),
        ("two halves of them", f"differ by {worst:.3f} sigma (99 % of channels, worst layer)"),
        ("verified on", f"{parity.images} {'other ' if other else ''}pictures"),
        ("outputs", "equal bit for bit, at every site and at the end"),
        ("written", " and ".join(map(str, filter(None, (arguments.output, arguments.report))))),
    ]
    return "\n".join(f"{what:<20}{fact}" for what, fact in facts)


def _verify(arguments: argparse.Namespace) -> int:
    converted, name, _ = _load(arguments)
    original = trained(name, arguments.weights)
    to_input = _to_input(arguments, transforms(name, original, arguments.weights))
    pictures = open_pictures(arguments.data, skip_bad=arguments.skip_bad_images)
    chosen = shuffled(len(pictures), arguments.seed)[: arguments.images]
    batches = _batches(arguments, original, pictures, chosen, to_input)
    report = verify(original, converted, batches)
    print(report, flush=True)
    _list_bad(pictures, batches.bad)
    passed = report.exact if arguments.tolerance == 0 else report.passed(arguments.tolerance)
    return 0 if passed else _fail(_failure(report, arguments.tolerance), 1)


def _fold(arguments: argparse.Namespace) -> int:
    check_output(arguments.output, overwrite=arguments.overwrite)
    model, name, _ = _load(arguments)
    folded = fold(model)
    before, after = (sum(_is_batchnorm(m) for m in x.modules()) for x in (model, folded))
    if before == after:
        raise RetrofitError(f"{arguments.file} has no BatchNorm that can be folded")
    # What was not converted here is not the plain model after folding: it has new biases.
    plain = name if record_of(model) else None
    save(folded, arguments.output, name=plain, overwrite=arguments.overwrite)
    print(f"{before - after} BatchNorms folded, {after} left; written: {arguments.output}")
    return 0


def _adapt(arguments: argparse.Namespace) -> int:
    check_output(arguments.output, overwrite=arguments.overwrite)
    model, name, told = _load(arguments)
    if not any(_is_batchnorm(m) for m in model.modules()):
        raise RetrofitError(f"{arguments.file} has no BatchNorm to adapt: convert it first")
    to_input = _to_input(arguments, transforms(name, model))
    pictures = open_pictures(arguments.data, skip_bad=arguments.skip_bad_images)
    chosen = shuffled(len(pictures), arguments.seed)[: arguments.images]
    batches = _batches(arguments, model, pictures, chosen, to_input)
    start = time.perf_counter()
    with _naming_pictures(batches):
        found = recalibrate(
            model, batches, layerwise=True, prior=arguments.prior, device=arguments.device
        )
    seconds = time.perf_counter() - start
    if (record := record_of(model)) is not None:
        attach(model, dataclasses.replace(record, images=found.images))
    before = told.get("data")
    done = f"adapted on {found.images} pictures of {arguments.data}, seed {arguments.seed}"
    weighed = f", the old statistics counting as {arguments.prior:g}" if arguments.prior else ""
    save(
        model,
        arguments.output,
        name=name,
        data="; ".join([*([before] if before else []), done + weighed]),
        overwrite=arguments.overwrite,
    )
    _list_bad(pictures, batches.bad)
    facts = [
        ("adapted on", f"{found.images} pictures in {seconds:.1f} s{weighed}"),
        ("BatchNorms", f"{len(found.layers)} of them, one after another"),
        ("standard error", _error_of(found.standard_error)),
        ("written", str(arguments.output)),
    ]
    print("\n".join(f"{what:<20}{fact}" for what, fact in facts))
    return 0


def _error_of(value: float) -> str:
    if math.isinf(value):
        return "not known, from one picture"
    return f"{value:.2%} of sigma (99 % of all channels)"


def _inspect(arguments: argparse.Namespace) -> int:
    tensors, provenance = read(arguments.file)
    long = ("plan", "aliases", "drift")  # `report` shows them
    facts = {key: value for key, value in provenance.items() if key not in long}
    for key, value in facts.items():
        shown = (
            ", ".join(f"{k} {v}" for k, v in value.items() if not isinstance(v, list))
            if isinstance(value, dict)
            else value
        )
        print(f"{one_line(key):<13}{'-' if shown is None else one_line(str(shown))}")
    eps = provenance.get("eps") or 1e-5
    plan_sites = (provenance.get("plan") or {}).get("sites", [])
    order = [f"{site['norm']}.running_var" for site in plan_sites if site["norm"]]
    rest = [key for key in tensors if key not in order]
    print(_norm_table({key: tensors[key] for key in (*order, *rest) if key in tensors}, eps))
    elements = sum(tensor.numel() for tensor in tensors.values())
    print(f"{one_line(str(arguments.file))}: {len(tensors)} tensors, {elements:,} numbers")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    check_report(arguments.output, overwrite=arguments.overwrite)
    tensors, told = read(arguments.file)
    no_drift = ""
    if arguments.data is not None:
        anew, no_drift = _measured_anew(arguments)
        told = {**told, **anew}
    elif arguments.weights is not None:
        raise RetrofitError("--weights needs --data: pictures to compare the networks on")
    write_report(
        arguments.output,
        arguments.file.name,
        tensors,
        told,
        no_drift=no_drift,
        overwrite=arguments.overwrite,
    )
    print(f"written: {arguments.output}")
    return 0


def _measured_anew(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Drift, and with --weights parity, for the provenance; and why there is no drift."""
    converted, name, _ = _load(arguments)
    original = trained(name, arguments.weights) if arguments.weights else converted
    to_input = _to_input(arguments, transforms(name, original, arguments.weights))
    pictures = open_pictures(arguments.data, skip_bad=arguments.skip_bad_images)
    chosen = shuffled(len(pictures), arguments.seed)[: arguments.images]
    batches = _batches(arguments, original, pictures, chosen, to_input)
    # Without the original: under running statistics the file's own network computes the same.
    drift, no_drift = measured_drift(original, converted, batches)
    what = "drift and parity" if arguments.weights else "drift"
    measured = f"{what}, on {len(chosen)} pictures of {arguments.data}, seed {arguments.seed}"
    anew = {"drift": to_plain(drift), "measured": measured}
    if arguments.weights:
        anew["parity"] = parity_facts(verify(original, converted, batches))
    _list_bad(pictures, batches.bad)
    return anew, no_drift


def _demo(arguments: argparse.Namespace) -> int:
    folder: Path = arguments.output
    try:
        folder.mkdir(parents=True, exist_ok=True)
        print(demo.run(folder))
    except OSError as error:
        raise RetrofitError(f"cannot write to {folder}: {error.strerror}") from error
    return 0


# --- what the commands share -------------------------------------------------------------------


def _load(arguments: argparse.Namespace) -> tuple[nn.Module, str, dict[str, Any]]:
    """The model of a file, what it is called, and the file's provenance."""
    provenance = read(arguments.file)[1]
    name = arguments.model or provenance.get("model")
    if not isinstance(name, str):
        raise RetrofitError(f"{arguments.file} does not say what model it is: give --model")
    # Code is imported for what the user typed, never for what a file says.
    return load(arguments.file, build(name) if arguments.model else None), name, provenance


def _to_input(arguments: argparse.Namespace, made: Transforms) -> Transform:
    return preprocessing(
        made,
        resize=arguments.resize,
        crop=arguments.crop,
        mean=arguments.mean,
        std=arguments.std,
    )


def _batches(
    arguments: argparse.Namespace,
    model: nn.Module,
    pictures: Pictures,
    indices: Sequence[int],
    to_input: Transform,
) -> PictureBatches:
    device = getattr(arguments, "device", None)
    return PictureBatches(
        pictures,
        indices,
        to_input,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        lists=takes_lists(model),
        skip_bad=arguments.skip_bad_images,
        pin=device is not None and device.type == "cuda" and torch.cuda.is_available(),
    )


def _example(
    arguments: argparse.Namespace,
    model: nn.Module,
    pictures: Pictures,
    indices: Sequence[int],
    to_input: Transform,
) -> Any:
    """Two pictures, or one, to plan with; None if none can be read."""
    few = {"batch_size": min(arguments.batch_size, 2), "workers": 0}
    arguments = argparse.Namespace(**vars(arguments) | few)
    return next(iter(_batches(arguments, model, pictures, indices, to_input)), None)


def _planned(arguments: argparse.Namespace, model: nn.Module, example: Any) -> Plan:
    return plan(
        model,
        example_inputs=example,
        include=arguments.include,
        exclude=arguments.exclude,
        layout=arguments.layout,
        placement=arguments.placement,
        linear=arguments.linear,
    )


@contextlib.contextmanager
def _naming_pictures(batches: PictureBatches) -> Iterator[None]:
    """Say which picture it was that gave a NaN."""
    try:
        yield
    except NonFiniteError as error:
        name = None if error.image is None else batches.names[error.item]
        raise NonFiniteError(error.site, error.item, error.image, name) from None


def _own_device(device: torch.device | None) -> torch.device | None:
    """Of the GPUs of a machine, each of its processes has one."""
    local = os.environ.get("LOCAL_RANK")
    shared = device is not None and device.type == "cuda" and device.index is None
    if not (shared and local and torch.cuda.is_available()):
        return device
    torch.cuda.set_device(int(local))  # where memory is pinned, and what nccl uses
    return torch.device("cuda", int(local))


def _list_bad(pictures: Pictures, names: Sequence[str]) -> None:
    for shard in pictures.bad:
        print(one_line(f"used in part or not at all: {shard}"), file=sys.stderr)
    if bad := list(dict.fromkeys(names)):
        text = f"left out {len(bad)} unreadable pictures: {', '.join(bad)}"
        print(one_line(text), file=sys.stderr)


def _summary(converted: nn.Module) -> str:
    sites = required_record(converted, "convert").plan.sites
    skipped = [(site.path, site.kind, site.reason) for site in sites if site.decision == "skip"]
    text = _norm_table(converted.state_dict(), 1e-5)
    if skipped:
        text += f"\n\n{table(('left as it is', 'type', 'reason'), skipped)}"
    return text + "\n"


def _norm_table(tensors: dict[str, Tensor], eps: float) -> str:
    """One row for each BatchNorm in a state dict."""
    rows = []
    for key in tensors:
        path, _, last = key.rpartition(".")
        names = [f"{path}.{t}" for t in ("running_mean", "running_var", "weight", "bias")]
        if last != "running_var" or any(name not in tensors for name in names):
            continue
        found = [tensors[name] for name in names]
        if not are_channels(found):
            rows.append((path, "-", "not those of a BatchNorm", "-", "-", "-"))
            continue
        norm = [tensor.detach().cpu() for tensor in found]
        wide = torch.float64 if norm[0].dtype == torch.float64 else torch.float32
        mean, var, weight, bias = (tensor.to(wide).numpy() for tensor in norm)
        with np.errstate(invalid="ignore"):  # a negative variance shows as nan
            alpha, shift = scale_and_shift(mean, var, weight, bias, eps)
            std = np.sqrt(var)
        identity = int(((alpha == 1) & (shift == 0)).sum())
        rows.append(
            (
                path,
                str(len(mean)),
                f"{mean.min():.3g} to {mean.max():.3g}",
                f"{std.min():.3g} to {std.max():.3g}",
                str(int((std == 0).sum())),
                f"{identity}/{len(mean)}",
            )
        )
    head = ("BatchNorm", "channels", "mean", "std", "constant", "exact identity")
    if not rows:
        return "no BatchNorm"
    return table(head, rows, right=",".join(head[1:]))


def _failure(report: ParityReport, tolerance: float) -> str:
    worst = max((*report.sites, *report.outputs), key=lambda d: d.relative)
    return (
        f"the models differ: {worst.name} by {worst.relative:.3g} of its root mean square "
        f"(tolerance {tolerance:g})"
    )


def _is_batchnorm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def _fail(message: str, code: int) -> int:
    print(f"retrofit: {one_line(message)}", file=sys.stderr)
    return code


def _one_line_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"retrofit: warning: {one_line(str(message))}", file=sys.stderr)


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "plan": _plan,
    "convert": _convert,
    "verify": _verify,
    "fold": _fold,
    "adapt": _adapt,
    "inspect": _inspect,
    "report": _report,
    "demo": _demo,
}
