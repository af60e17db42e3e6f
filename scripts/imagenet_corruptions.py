r"""Measure what adapting to corrupted pictures brings networks that were trained on ImageNet.

    pip install imagecorruptions-imaug
    python scripts/imagenet_corruptions.py --network squeezenet1_1 --data PICTURES \
        --weights squeezenet1_1.safetensors --output docs/results
    python scripts/imagenet_corruptions.py --network mobilenetv2_100-folded --data PICTURES \
        --weights mobilenetv2_100-folded.safetensors --output docs/results

PICTURES is a flat folder of which the i-th picture by name shows class i of ImageNet. Half of them,
chosen at random, are tested. On the others, uncorrupted, the network's new BatchNorms are
calibrated; to them, corrupted and without labels, it adapts. The corruptions are those of
ImageNet-C (Hendrycks and Dietterich, 2019), by its authors' program. Answers are written to
OUTPUT/corruptions-NETWORK.csv as they are found, so that a study that was interrupted goes on where
it was, and at last as a table (.md) and a figure (.svg).
"""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from imagenet_corruptions_tables import (
    ADAPTED,
    CLEAN,
    FEW,
    ON_FEW,
    PRIOR,
    STREAMING,
    WAYS,
    Cell,
    Row,
    as_hexadecimal,
    draw,
    summary,
)
from imagenet_networks import NETWORKS, Network, add_arguments, read_pictures
from recalibrated import recalibrated
from recorded_runs import RecordedRuns
from torch import Tensor, nn
from tqdm import tqdm

import retrofit
from retrofit.running.modes import evaluating

CORRUPTIONS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
BATCH = 50


@dataclass(frozen=True)
class Task:
    """A network with BatchNorm, and pictures: some to test it on, others to adapt it to."""

    network: Network
    model: nn.Module
    test: Tensor
    labels: Tensor
    others: Tensor

    def answers(self, cell: Cell, way: str, test: Tensor, others: Tensor) -> Tensor:
        """Say of each test picture whether the answer is right, (N,), adapted in one of WAYS."""
        size = 1 if way == STREAMING else BATCH
        found = []
        with adapted(self.model, way, self.network.normalised(others)), evaluating(self.model):
            for pictures in tqdm(test.split(size), desc=f"{cell[0]} {cell[1]}, {way}", leave=False):
                with torch.no_grad():
                    found.append(self.model(self.network.normalised(pictures)).argmax(1))
        return torch.cat(found) == self.labels


def adapted(model: nn.Module, way: str, others: Tensor) -> AbstractContextManager[object]:
    """Adapt the model for the length of a block."""
    if way == STREAMING:
        return retrofit.adapting(model, prior=PRIOR)
    if way == ADAPTED:
        return recalibrated(model, others.split(BATCH), layerwise=True, prior=0)
    if way == ON_FEW:
        return recalibrated(model, others[:FEW].split(BATCH), layerwise=True, prior=PRIOR)
    return nullcontext()


def corrupted(pictures: Tensor, cell: Cell, seed: int) -> Tensor:
    """Corrupt pictures, uint8 (N, 3, H, W); the same seed draws the same corruptions."""
    if cell == CLEAN:
        return pictures
    from imagecorruptions import corrupt  # type: ignore[import-not-found] # noqa: PLC0415 - the tables need none

    name, severity = cell
    np.random.seed([seed, severity, *name.encode()])  # noqa: NPY002 - what the program draws from
    arrays = pictures.permute(0, 2, 3, 1).numpy()
    found = [corrupt(x, severity=severity, corruption_name=name) for x in arrays]
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)


def study(name: str, task: Task, cells: list[Cell], file: Path) -> list[Row]:
    """Find all answers, except those that are in `file` already."""
    settings = {"network": name, "test_pictures": len(task.test)}
    record = RecordedRuns(file, Row, settings)
    done = {row.key for row in record.runs}
    for cell in tqdm(cells, unit="corruption"):
        missing = [way for way in WAYS if (*cell, way) not in done]
        if not missing:
            continue
        test, others = (corrupted(x, cell, i) for i, x in enumerate((task.test, task.others)))
        for way in missing:
            right = task.answers(cell, way, test, others)
            share, bits = float(right.float().mean()), as_hexadecimal(right.tolist())
            record.append(Row(name, len(task.test), *cell, way, share, bits))
    wanted = {(*cell, way) for cell in cells for way in WAYS}
    return [row for row in record.runs if row.key in wanted]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="FOLDER", help="for CSV, table, figure")
    add("--severities", type=int, nargs="+", choices=range(1, 6), default=[3, 5])
    arguments = parser.parse_args()
    network = NETWORKS[arguments.network]
    pictures, labels = read_pictures(arguments.data)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(pictures)))
    test, others = order.chunk(2)
    clean = [network.normalised(x) for x in pictures[others].split(BATCH)]
    model = network.batchnorm(network.plain(arguments.weights), clean)
    task = Task(network, model, pictures[test], labels[test], pictures[others])
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / f"corruptions-{arguments.network}.csv"
    severe = [(name, severity) for severity in arguments.severities for name in CORRUPTIONS]
    rows = study(arguments.network, task, [CLEAN, *severe], file)
    text = summary(rows)
    print(text)
    file.with_suffix(".md").write_text(text)
    draw(rows, file.with_suffix(".svg"))


if __name__ == "__main__":
    main()
