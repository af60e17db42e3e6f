"""Bring fused YOLOs of ultralytics back into their class, train them for a step, fuse them again.

    pip install ultralytics
    python scripts/restored_yolo.py yolov8n yolo11n --results restored-yolo.csv

Each is built from its YAML file with random weights, and its BatchNorms get numbers as training
leaves them; then ultralytics fuses it, and `restore` brings it back. Nothing is downloaded. Exits
with 1 where the result is not what docs/yolo.md says.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from markdown_table import markdown_table
from network_checks import difference as of_outputs
from recorded_runs import record
from torch import Tensor, nn

import retrofit

CLOSE = 1e-5  # of the largest output
HEAD = ("network", "BatchNorms", "difference", "loads", "fused loads", "learn", "fused again")


@dataclass(frozen=True)
class Outcome:
    """What became of one network.

    Attributes:
        name: of its YAML file.
        norms: BatchNorms of the class, those that came back, and those that take part in
            a step of training.
        restored: largest difference from the fused network, over its largest output.
        tensors: those of the class, those that `load` takes from the restored network, and those
            that it takes from the fused one.
        fused: as `restored`, once ultralytics has fused the restored network again.
        tuned: the same after the step, fused again against not fused.
    """

    name: str
    norms: tuple[int, int, int]
    restored: float
    tensors: tuple[int, int, int]
    fused: float
    tuned: float

    @property
    def good(self) -> bool:
        close = max(self.restored, self.fused, self.tuned) <= CLOSE
        return close and len(set(self.norms)) == 1 and self.tensors[0] == self.tensors[1]

    @property
    def row(self) -> list[str]:
        norms, back, learned = map(str, self.norms)
        every, own, fused = map(str, self.tensors)
        return [
            *(self.name, f"{back} of {norms}", f"{self.restored:.1e}", f"{own} of {every}"),
            *(f"{fused} of {every}", f"{learned} of {norms}"),
            f"{self.fused:.1e}, trained {self.tuned:.1e}",
        ]


def table(outcomes: Iterable[Outcome]) -> str:
    return markdown_table(HEAD, [one.row for one in outcomes], padded=True)


def yolo(name: str) -> nn.Module:
    """Build a detector of 80 classes."""
    tasks = import_module("ultralytics.nn.tasks")
    model: nn.Module = tasks.DetectionModel(f"{name}.yaml", verbose=False)
    model.args = import_module("ultralytics.cfg").get_cfg()  # type: ignore[assignment] # of its loss
    return model


def trained(model: nn.Module, images: list[Tensor]) -> nn.Module:
    """Give the BatchNorms a weight and a bias, and the statistics of what then reaches them."""
    momenta = {norm: norm.momentum for norm in norms(model)}
    for norm in momenta:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.3)
        norm.momentum = 0.3
    with torch.no_grad():
        for batch in images:
            model.train()(batch)
    for norm, momentum in momenta.items():
        norm.momentum = momentum
    return model.eval()


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def fused(model: nn.Module) -> nn.Module:
    """Copy the network as ultralytics fuses it: without `bn`, and with another `forward`."""
    result: nn.Module = copy.deepcopy(model).eval().fuse(verbose=False)  # type: ignore[operator]
    return result


@torch.no_grad()
def difference(expected: nn.Module, actual: nn.Module, batch: Tensor) -> float:
    """Compare the boxes, and the classes, each over the largest that is expected."""
    return of_outputs(*(model.eval()(batch)[0].split([4, 80], 1) for model in (expected, actual)))


def loaded(name: str, source: nn.Module) -> int:
    """Count the tensors that ultralytics' own `load` takes over into a fresh network."""
    fresh = yolo(name)
    fresh.load(source, verbose=False)  # type: ignore[operator]
    own = source.state_dict()
    return sum(key in own and torch.equal(own[key], t) for key, t in fresh.state_dict().items())


def learned(model: nn.Module, images: Tensor) -> int:
    """Train a step with ultralytics' own loss; count the BatchNorms all of which takes part.

    That is: their running statistics move, and weight and bias get a gradient.
    """
    before = [copy.deepcopy(norm.state_dict()) for norm in norms(model)]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss, _ = model.train().loss(labelled(images))  # type: ignore[operator]
    loss.sum().backward()
    optimizer.step()
    return sum(
        not torch.equal(old["running_mean"], norm.state_dict()["running_mean"])
        and all(p.grad is not None and bool(p.grad.any()) for p in (norm.weight, norm.bias))
        for old, norm in zip(before, norms(model), strict=True)
    )


def labelled(images: Tensor) -> dict[str, Tensor]:
    """Draw boxes of all sizes, so that each of the heads gets some, as a batch of ultralytics."""
    picture = torch.arange(len(images)).repeat_interleave(20)
    count = len(picture)
    size = 0.05 * 18 ** torch.rand(count, 1)
    place = size / 2 + torch.rand(count, 2) * (1 - size)
    return {
        "img": images,
        "batch_idx": picture,
        "cls": torch.randint(80, (count, 1)).float(),
        "bboxes": torch.cat([place, size, size], 1),
    }


def study(name: str) -> Outcome:
    torch.manual_seed(0)
    images = [torch.rand(8, 3, 128, 128) for _ in range(12)]
    folded = fused(trained(yolo(name), images))
    architecture = yolo(name)
    restored = retrofit.restore(architecture, folded, images, progress=False)
    yolo(name).load_state_dict(restored.state_dict())  # strictly
    made = retrofit.restoration_of(restored)
    assert made is not None
    apart = difference(folded, restored, images[0])
    again = difference(folded, fused(restored), images[0])
    tensors = (len(architecture.state_dict()), loaded(name, restored), loaded(name, folded))
    changed = learned(restored, images[0])
    tuned = difference(restored, fused(restored), images[0])
    counts = (len(norms(architecture)), len(made.seats), changed)
    return Outcome(name, counts, apart, tensors, again, tuned)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=["yolov8n", "yolo11n"], help="YAML files")
    parser.add_argument("--results", type=Path, metavar="FILE", help="CSV file, added to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    outcomes = [study(name) for name in arguments.names]
    print(table(outcomes), end="")
    record(outcomes, arguments.results)
    return int(not all(one.good for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
