r"""Fine-tune networks that were trained on ImageNet, with a new head, on CIFAR-10.

    python scripts/finetune_heads.py --data CIFAR10 --weights WEIGHTS --output docs/results

CIFAR10 is a folder with train/<class>/*.jpg and test/<class>/*.jpg. WEIGHTS has
NETWORK.safetensors of each: MobileNetV2 whose BatchNorm was folded away, SqueezeNet 1.1 and the
thirteen convolutions of VGG16, which never had any. Each is fine-tuned as it is and with calibrated
BatchNorms, both with gradients clipped to norm 1 as well, and, where it was folded, restored. The
head is one Linear after global average pooling, of zeros at the start; it divides the averages by
their usual size (8 in SqueezeNet, 12 in VGG16, 1 in MobileNetV2).

A run is short, so that it takes less than a minute of one core: 2,000 training pictures, shifted
and mirrored, in batches of 32, and SGD as in finetune.py. MobileNetV2 sees the pictures at 64
pixels, resized bilinearly, for 60 steps, SqueezeNet for 100, and VGG16 at their 32, for 40.
BatchNorm is calibrated on 256 of the training pictures. Every twentieth test picture is tested. The
seed chooses the pictures and their order, which are the same for every variant.

The study is written to OUTPUT/finetune-heads.csv run by run, so that one that was interrupted goes
on where it was, and at last as a table (.md) and a figure (.svg).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from finetune_heads_networks import SUBJECTS, Subject
from finetune_tables import Protocol, Run, by_learning_rate, draw_panels, usable
from finetune_training import Task, chosen, completed, read_task, train
from recorded_runs import RecordedRuns

CALIBRATED = 256  # pictures


@dataclass(frozen=True)
class HeadProtocol(Protocol):
    """What all runs of a network have in common."""

    pixels: int


@dataclass(frozen=True)
class HeadRun(Run):
    """One line of the CSV."""

    pixels: int = 0


@dataclass(frozen=True)
class Study:
    """A network, and its task.

    Attributes:
        weights: its file.
        task: takes pictures in the size of the protocol.
    """

    subject: Subject
    weights: Path
    task: Task
    protocol: HeadProtocol

    def run(self, name: str, learning_rate: float, seed: int) -> HeadRun:
        """Fine-tune the network once, and test it at the end."""
        start = time.perf_counter()
        variant = self.subject.variants[name]
        pictures, labels = chosen(self.task, self.protocol, seed)
        batches = self.task.inputs(pictures[:CALIBRATED]).split(64)
        model = self.subject.built(variant, self.weights, batches)
        torch.manual_seed(seed)  # again: not all variants have drawn as many numbers by now
        losses = train(
            model, variant, self.protocol, learning_rate, pictures, labels, inputs=self.task.inputs
        )
        return HeadRun.ended(
            self.protocol,
            (name, learning_rate, seed),
            self.task.accuracy(model),
            losses,
            time.perf_counter() - start,
        )

    def runs(self, file: Path, rates: Sequence[float], seeds: int) -> list[HeadRun]:
        """Make all runs, seed by seed, except those that are in `file` already."""
        record = RecordedRuns(file, HeadRun, asdict(self.protocol), study="model")
        wanted = [
            (name, lr, seed)
            for seed in range(seeds)
            for lr in rates or self.subject.rates
            for name in self.subject.variants
        ]
        return completed(record, wanted, self.run)


def summary(runs: Mapping[str, Sequence[HeadRun]]) -> str:
    """Write what was found of each network."""
    parts = []
    for name, found in runs.items():
        one = found[0]
        parts.append(
            f"{name}: {one.steps} steps of {one.batch_size}, {one.images:,} pictures of "
            f"{one.pixels} pixels, tested on {one.test_images:,}\n\n"
            f"{by_learning_rate(found)}\n{usable(found)}"
        )
    return "\n".join(parts)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with train/<class>/ and test/<class>/")
    add("--weights", type=Path, required=True, metavar="FOLDER", help="with NETWORK.safetensors")
    add("--output", type=Path, required=True, metavar="FOLDER")
    add("--network", choices=SUBJECTS, nargs="+", default=[*SUBJECTS], help="default: all")
    add("--quick", action="store_true", help="a few short runs: minutes on a CPU")
    add("--learning-rates", type=float, nargs="+", metavar="RATE", default=[])
    add("--seeds", type=int, help="2; if quick 1")
    add("--steps", type=int, help="default: those of the network; if quick 20")
    add("--images", type=int, help="to train on; 2,000; if quick 640")
    add("--batch-size", type=int, default=32)
    add("--pixels", type=int, help="a side of the pictures; default: that of the network")
    arguments = parser.parse_args()
    quick = arguments.quick
    arguments.seeds = arguments.seeds or (1 if quick else 2)
    arguments.steps = arguments.steps or (20 if quick else None)
    arguments.images = arguments.images or (640 if quick else 2000)
    return arguments


def studies(arguments: argparse.Namespace) -> dict[str, Study]:
    """Put together what is studied of each network."""
    files = {name: arguments.weights / f"{name}.safetensors" for name in arguments.network}
    for name, file in files.items():
        if not file.is_file():
            raise SystemExit(f"there is no {file}: put it there, or leave {name} out of --network")
    test_every = 50 if arguments.quick else 20
    task = read_task(arguments.data, arguments.images, arguments.batch_size, test_every)
    found = {}
    for name, file in files.items():
        subject = SUBJECTS[name]
        protocol = HeadProtocol(
            name,
            arguments.images,
            len(task.test_labels),
            arguments.steps or subject.steps,
            arguments.batch_size,
            arguments.pixels or subject.pixels,
        )
        inputs = partial(subject.inputs, pixels=protocol.pixels)
        found[name] = Study(subject, file, replace(task, inputs=inputs), protocol)
    return found


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(1)
    wanted = studies(arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "finetune-heads.csv"
    runs = {}
    for seeds in range(1, arguments.seeds + 1):  # a seed of every network before the next one
        for name, study in wanted.items():
            runs[name] = study.runs(file, arguments.learning_rates, seeds)
    table = summary(runs)
    draw_panels(runs).savefig(file.with_suffix(".svg"), metadata={"Date": None})
    file.with_suffix(".md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
