"""Measure what adapting BatchNorm's statistics to corrupted pictures brings.

    python scripts/corruptions.py --data CIFAR10 --output docs/results

CIFAR10 is a folder with test/<class>/*.jpg; the one that `make demo` leaves is large enough. The
network of `retrofit demo` gets BatchNorm, calibrated on the training pictures packed with it. For
each corruption of CIFAR-10-C, severity and seed it is tested on 1,000 corrupted pictures as it is,
after `recalibrate` on others under the same corruption, without their labels, and while `adapting`
follows them one by one. The seed chooses the pictures and draws the corruption. The accuracies are
written to OUTPUT/corruptions.csv one by one, so that a study that was interrupted goes on where it
was, and at last as tables (.md) and figures (.svg).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar10c import CORRUPTIONS, SEVERITIES, Pictures, corrupt
from corruptions_tables import (
    FEW,
    MAIN,
    MANY,
    PRIORS,
    STREAM,
    Adaptation,
    Corruption,
    Row,
    draw_by_corruption,
    draw_by_pictures,
    summary,
)
from numpy.typing import NDArray
from pictures import accuracy, normalise, read
from recalibrated import recalibrated
from recorded_runs import RecordedRuns
from scipy import ndimage
from torch import Tensor, nn
from tqdm import tqdm

import retrofit
from retrofit.demo import labelled, trained_vgg, unpack

COUNTS = (1, 4, FEW, 64, 256, MANY)  # pictures to adapt to


def rounded(x: NDArray[Any]) -> Pictures:
    return x.clip(0, 255).round().astype(np.uint8)


# One line each, and one severity, which is called 0. The first is what the others are compared to.
BY_HAND: Mapping[str, Callable[[Pictures, np.random.Generator], Pictures]] = {
    "none": lambda x, _: x,
    "x * 0.4 + 150": lambda x, _: rounded(0.4 * x + 150),
    "contrast x 0.25": lambda x, _: rounded(x * 0.25 + x.mean((1, 2, 3), keepdims=True) * 0.75),
    "darkened x 0.3": lambda x, _: rounded(x * 0.3),
    "3x3 mean": lambda x, _: ndimage.uniform_filter(x, (0, 3, 3, 0)),
    "noise, sigma 25": lambda x, rng: rounded(x + rng.normal(0, 25, x.shape)),
    "inverted": lambda x, _: 255 - x,
}


@dataclass(frozen=True)
class Task:
    """A retrofitted network, and labelled pictures: some to test it on, others to adapt it to."""

    model: nn.Module
    pictures: Tensor
    labels: Tensor
    test_pictures: int
    target_pictures: int

    def corrupted(self, seed: int, name: str, severity: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return test pictures, their labels, and pictures to adapt to, ready for the network."""
        order = np.random.default_rng(seed).permutation(len(self.pictures))
        chosen = torch.from_numpy(order[: self.test_pictures + self.target_pictures])
        rng = np.random.default_rng([seed, severity, *name.encode()])
        pictures = changed(self.pictures[chosen], name, severity, rng)
        test, target = pictures.split([self.test_pictures, self.target_pictures])
        return test, self.labels[chosen[: self.test_pictures]], normalise(target)


def changed(pictures: Tensor, name: str, severity: int, rng: np.random.Generator) -> Tensor:
    """Corrupt pictures, uint8 (N, 3, H, W), as CIFAR-10-C does, or, with severity 0, by hand."""
    x = pictures.permute(0, 2, 3, 1).numpy()
    y = corrupt(x, name, severity, rng) if severity else BY_HAND[name](x, rng)
    return torch.from_numpy(y).permute(0, 3, 1, 2)


def adapted_accuracy(
    model: nn.Module, target: Tensor, prior: int, test: Tensor, labels: Tensor
) -> float:
    """Measure the accuracy after adapting to `target`; the model is afterwards as it was.

    Beside a prior, layer by layer: each layer is then measured behind statistics that are blended
    already, as it will run behind them.
    """
    if not len(target):
        return accuracy(model, test, labels, batch_size=100)
    with recalibrated(model, [target], layerwise=prior > 0, prior=prior):
        return accuracy(model, test, labels, batch_size=100)


def streaming_accuracy(model: nn.Module, prior: int, test: Tensor, labels: Tensor) -> float:
    """Measure the accuracy of answers that are given one by one, adapted to what came so far."""
    with retrofit.adapting(model, prior=prior):
        return accuracy(model, test, labels, batch_size=1)


def demo_network() -> nn.Module:
    """Return the demo's VGG with BatchNorm, calibrated on the pictures packed with it."""
    with tempfile.TemporaryDirectory() as folder:
        unpack(Path(folder))
        images, _ = labelled(Path(folder) / "calibration")
    return retrofit.add_batchnorm(trained_vgg(), images.split(128), progress=False)


# --- the study ---------------------------------------------------------------------------------


def study(
    task: Task,
    plan: Mapping[Corruption, Iterable[Adaptation]],
    seeds: int,
    file: Path,
) -> list[Row]:
    """Measure all accuracies, seed by seed, except those that are in `file` already."""
    settings = {"folder_pictures": len(task.pictures), "test_pictures": task.test_pictures}
    record = RecordedRuns(file, Row, settings)
    wanted = {
        (seed, *corruption, *adaptation)
        for seed in range(seeds)
        for corruption, adaptations in plan.items()
        for adaptation in adaptations
    }
    missing = wanted - {row.key for row in record.runs}
    cells = [(seed, *corruption) for seed in range(seeds) for corruption in plan]
    for cell in (bar := tqdm(cells, unit="corruption")):
        keys = sorted(key for key in missing if key[:3] == cell)
        if not keys:
            continue
        bar.set_postfix_str("{1} {2}, seed {0}".format(*cell))
        test, labels, target = task.corrupted(*cell)
        for key in keys:
            count, prior = key[3:]
            if count == STREAM:
                right = streaming_accuracy(task.model, prior, test, labels)
            else:
                right = adapted_accuracy(task.model, target[:count], prior, test, labels)
            record.append(Row(len(task.pictures), task.test_pictures, *key, right))
    return [row for row in record.runs if row.key in wanted]


# --- the command -------------------------------------------------------------------------------


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="FOLDER", help="with test/<class>/")
    add("--output", type=Path, required=True, metavar="FOLDER", help="for CSV, tables, figures")
    add("--severities", type=int, nargs="+", choices=SEVERITIES, default=[3, 5])
    add("--seeds", type=int, default=3)
    add("--quick", action="store_true", help="severity 5, one seed, 200 test pictures: a minute")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.severities, arguments.seeds = [5], 1
    return arguments


def main() -> None:
    arguments = parsed()
    counts = (FEW, MANY) if arguments.quick else COUNTS
    tested, targets = 200 if arguments.quick else 1000, MANY
    pictures, labels = read(arguments.data / "test")
    if len(pictures) < tested + targets:
        raise SystemExit(
            f"{arguments.data / 'test'} has {len(pictures):,} pictures, and {tested + targets:,} "
            f"are needed: {tested:,} to test and {targets} to adapt to"
        )
    task = Task(demo_network(), pictures, labels, tested, targets)
    briefly = list(MAIN.values())
    fully = {*briefly, *((count, 0) for count in counts)}
    fully |= {(count, prior) for count in counts if count <= 64 for prior in PRIORS}
    plan: dict[Corruption, Iterable[Adaptation]] = {(name, 0): briefly for name in BY_HAND}
    plan |= {(name, severity): fully for severity in arguments.severities for name in CORRUPTIONS}
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "corruptions.csv"
    rows = study(task, plan, arguments.seeds, file)
    text = summary(rows)
    print(text)
    file.with_suffix(".md").write_text(text)
    draw_by_corruption(rows, file.with_suffix(".svg"))
    draw_by_pictures(rows, file.with_name("corruptions-pictures.svg"))


if __name__ == "__main__":
    main()
