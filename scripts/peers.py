r"""Compare retrofit with other tools that give a trained network BatchNorms.

    pip install fvcore onnxsim
    taskset -c 0 python scripts/peers.py --network squeezenet1_1 --data PICTURES \
        --weights squeezenet1_1.safetensors --results docs/results/peers.csv
    taskset -c 0 python scripts/peers.py --network mobilenetv2_100-folded --data PICTURES \
        --weights mobilenetv2_100-folded.safetensors --results docs/results/peers.csv

PICTURES is a flat folder of which the i-th picture by name shows class i of ImageNet. Of these,
chosen at random, some calibrate, and others are tested. A tool that is not installed, or raises,
has a row that says so, and is tried again by the next run; TinyNeuralNetwork (tinynn), which is not
on PyPI, is found where its repository is importable. Everything runs on one thread; onnxsim starts
as many as there are cores, so that `taskset` has to leave it one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision
from imagenet_networks import NETWORKS, add_arguments, read_pictures
from network_checks import difference, one_line
from peers_contenders import CONTENDERS, Contender, Subject
from peers_outcomes import Answer, Moments, Outcome, forward, two_passes
from peers_tables import Row, table
from recorded_runs import RecordedRuns
from restored_mobilenet import stock
from torch import Tensor, nn

import retrofit

BATCH = 32
INSERTED = "retrofit.insert(plain)"
CLOSE = 1e-6  # what a class computes with weights that belong to it, of the largest output


# The class that each network's weights were published for.
STOCK: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "squeezenet1_1": ("torchvision's squeezenet1_1", torchvision.models.squeezenet1_1),
    "mobilenetv2_100-folded": ("timm's mobilenetv2_100", stock),
}


@dataclass(frozen=True)
class Trial:
    """A network, and what its results are compared with.

    Attributes:
        batches, labels: of pictures that are not those of `subject`.
        moments: of the pictures of `subject`.
    """

    subject: Subject
    batches: list[Tensor]
    labels: Tensor
    moments: dict[str, Moments]

    def outputs(self, answer: Answer) -> Tensor:
        return torch.cat([answer(x) for x in self.batches])

    def accuracy(self, outputs: Tensor) -> float:
        return int((outputs.argmax(1) == self.labels).sum()) / len(self.labels)

    def measured(self, contender: Contender) -> dict[str, float | str]:
        """Run a tool, and fill in the fields of a Row by their names."""
        torch.manual_seed(0)  # of the dropout, where a tool runs in train mode
        ready = contender.ready(self.subject)
        before = seconds(self.plain_pass)
        start = time.process_time()
        done = ready()
        taken = time.process_time() - start
        after = seconds(self.plain_pass)
        plain, outputs = (self.outputs(f) for f in (done.outcome.plain, done.outcome.answer))
        left = outputs if done.left is None else self.outputs(done.left().answer)
        found = done.outcome.moments(self.subject.plain, self.batches[0][:2])
        return {
            "batchnorms": len(found),
            "off": difference([plain], [outputs]),
            "plain_accuracy": self.accuracy(plain),
            "accuracy": self.accuracy(outputs),
            "left": self.accuracy(left),
            **errors(found, self.moments),
            "seconds": taken,
            "plain_seconds": (before + after) / 2,
            "loads": loads_into(done.outcome, self.subject, self.batches[0]),
        }

    def plain_pass(self) -> None:
        for x in self.subject.batches:
            forward(self.subject.plain)(x)


def seconds(run: Callable[[], None]) -> float:
    """Measure the processor's: what other programs do meanwhile does not count."""
    start = time.process_time()
    run()
    return time.process_time() - start


def errors(found: dict[str, Moments], true: dict[str, Moments]) -> dict[str, float]:
    """Summarise how far the moments are from the true ones, in all channels that vary."""
    sigma = torch.cat([true[path].std for path in found])
    varies = sigma > 0
    summary: dict[str, float] = {"constant": int((~varies).sum())}
    for name in ("mean", "std"):
        pairs = ((getattr(m, name), getattr(true[path], name)) for path, m in found.items())
        off = (torch.cat([(a - b).abs() for a, b in pairs]) / sigma)[varies]
        summary |= {f"{name}_worst": float(off.max()), f"{name}_most": float(off.quantile(0.99))}
    return summary


def loads_into(outcome: Outcome, subject: Subject, x: Tensor) -> str:
    """Name the class that takes the weights strictly, and computes the same with them."""
    classes: dict[str, Callable[[], nn.Module]] = {
        subject.label: subject.stock,
        INSERTED: partial(retrofit.insert, subject.plain),
    }
    state, expected = outcome.state(), outcome.answer(x)
    for label, build in classes.items():
        model = build().eval()
        try:
            model.load_state_dict(state, strict=True)
        except RuntimeError:  # says which names are missing, unexpected, or of other shapes
            continue
        if difference([expected], [forward(model)(x)]) < CLOSE:
            return label
    return outcome.elsewhere


def study(name: str, trial: Trial, record: RecordedRuns[Row]) -> None:
    """Measure all tools, except those that the record has a good row of."""
    done = {row.peer for row in record.runs if row.network == name and not row.error}
    pictures = sum(map(len, trial.subject.batches)), len(trial.labels)
    for peer, contender in CONTENDERS.items():
        if peer in done or (contender.folded and not trial.subject.folded):
            continue
        missing = contender.missing()
        version = "" if missing else contender.version()
        fields: dict[str, float | str] = {"error": missing}
        if not missing:
            try:
                fields = trial.measured(contender)
            except Exception as error:  # noqa: BLE001 - a result like any other
                fields = {"error": one_line(error)}
        row = Row(name, peer, version, *pictures, **fields)  # type: ignore[arg-type]
        record.append(row)
        print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    add = parser.add_argument
    add("--results", type=Path, required=True, metavar="FILE", help="CSV file, added to")
    add("--markdown", type=Path, metavar="FILE", help="write the table there")
    add("--calibrate", type=int, default=256, metavar="N", help="pictures to calibrate on")
    add("--test", type=int, default=500, metavar="N", help="other pictures, to test")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    network = NETWORKS[arguments.network]
    label, build = STOCK[arguments.network]
    pictures, labels = read_pictures(arguments.data)
    wanted = arguments.calibrate + arguments.test
    if wanted > len(pictures):
        raise SystemExit(
            f"{arguments.data} has {len(pictures)} pictures, and {wanted} are wanted: give smaller "
            "--calibrate and --test, or another folder"
        )
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(pictures)))
    calibrating, tested = order[:wanted].split([arguments.calibrate, arguments.test])
    batches, others = (
        [network.normalised(x) for x in pictures[chosen].split(BATCH)]
        for chosen in (calibrating, tested)
    )
    plain = network.plain(arguments.weights)
    folded = any(isinstance(m, nn.BatchNorm2d) for m in build().modules())
    subject = Subject(plain, batches, build, label, folded)
    settings = {"calibration_pictures": arguments.calibrate, "test_pictures": arguments.test}
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    record = RecordedRuns(arguments.results, Row, settings)
    trial = Trial(subject, others, labels[tested], two_passes(plain, batches))
    study(arguments.network, trial, record)
    text = table(record.runs)
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text)


if __name__ == "__main__":
    main()
