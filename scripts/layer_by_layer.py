"""Compare `recalibrate(layerwise=True)` with a pass over all data for each BatchNorm.

    python scripts/layer_by_layer.py --network squeezenet1_1 --weights squeezenet1_1.safetensors \
        --data path/to/imagenet-sample --results docs/results/layer-by-layer.csv

The reference is written here: for each BatchNorm, in the order of their first calls, it runs all
batches, and takes the moments of what that BatchNorm gets in float64, in two passes. It is asked
twice. Step by step: what should a BatchNorm get where those before it have the statistics of
`recalibrate`? And as a whole, each behind the reference's own statistics: in float32 these differ
in the last bit, and a deep network makes more of that, as it does of batches of another size.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from imagenet_networks import NETWORKS, add_arguments, read_pictures
from markdown_table import markdown_table
from recalibrated import recalibrated
from recorded_runs import record
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

IMAGES, PRIOR = 64, 64
BATCHES = (16, 7, 1)
HEAD = ("network", "batches of", "prior", "step by step", "as a whole", "reference, other batches")
BUDGETS = ("budget: passes", "budget: difference")

Statistics = dict[str, tuple[Tensor, Tensor]]  # mean and variance by path


@dataclass(frozen=True)
class Compared:
    """Statistics of one way to feed the pictures; distances are the largest, in sigma.

    Attributes:
        network: "…, shared" where two of its BatchNorms were made one.
        step: from the reference behind the same statistics.
        whole: from the reference.
        itself: of the reference from the reference in the first batch size.
        passes: with a budget of memory that half of the pictures exceed.
        budget: of the statistics then from those without.
    """

    network: str
    batch_size: int
    prior: int
    step: float
    whole: float
    itself: float
    passes: int
    budget: float

    @property
    def row(self) -> list[str]:
        distances = [f"{d:.1e}" for d in (self.step, self.whole, self.itself)]
        found = [self.network, str(self.batch_size), str(self.prior), *distances]
        return [*found, str(self.passes), f"{self.budget:.1e}"]


def table(compared: Sequence[Compared]) -> str:
    return markdown_table([*HEAD, *BUDGETS], [one.row for one in compared])


def norms(model: nn.Module) -> dict[str, Any]:
    """List the BatchNorms; one that has two places under the first."""
    return {path: m for path, m in model.named_modules() if isinstance(m, _BatchNorm)}


def statistics(model: nn.Module) -> Statistics:
    return {p: (n.running_mean.clone(), n.running_var.clone()) for p, n in norms(model).items()}


def give(norm: Any, mean: Tensor, var: Tensor) -> None:
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)


@contextmanager
def watched(model: nn.Module, seen: dict[str, list[Tensor]], only: str = "") -> Iterator[None]:
    """Keep what BatchNorms get, as float64 rows of channels; of one alone if that is named."""

    def hook(path: str) -> Any:
        def look(_norm: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.setdefault(path, []).append(args[0].double().transpose(0, 1).flatten(1))

        return look

    chosen = {path: norm for path, norm in norms(model).items() if only in ("", path)}
    handles = [norm.register_forward_pre_hook(hook(path)) for path, norm in chosen.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def reference(
    model: nn.Module, batches: Sequence[Tensor], prior: int, behind: Statistics | None = None
) -> Statistics:
    """Settle one BatchNorm after another, each in a pass; return what that gives.

    Args:
        behind: statistics that a BatchNorm has once it was measured; by default those found.
    """
    order: dict[str, list[Tensor]] = {}
    with watched(model, order):
        model(batches[0])
    share = IMAGES / (IMAGES + prior)
    found: Statistics = {}
    for path in order:
        seen: dict[str, list[Tensor]] = {}
        with watched(model, seen, path):
            for batch in batches:
                model(batch)
        inputs, norm = torch.cat(seen[path], 1), norms(model)[path]
        mean = norm.running_mean.double().lerp(inputs.mean(1), share)
        var = norm.running_var.double().lerp(inputs.var(1), share)
        found[path] = mean.float(), var.float()
        give(norm, *(found if behind is None else behind)[path])
    return found


def distance(one: Statistics, other: Mapping[str, tuple[Tensor, Tensor]]) -> float:
    """Find the largest difference in mean and in standard deviation, in those of `other`."""
    largest = 0.0
    for path, (mean, var) in other.items():
        sigma = (var + 1e-5).sqrt()
        gaps = (one[path][0] - mean, (one[path][1] + 1e-5).sqrt() - sigma)
        largest = max(largest, *(float((gap.abs() / sigma).max()) for gap in gaps))
    return largest


def tie(model: nn.Module) -> None:
    """Put a BatchNorm where a later one of as many channels is, too: it is called twice then."""
    widths: dict[int, tuple[str, Any]] = {}
    for path, norm in norms(model).items():
        width = norm.num_features
        if width in widths:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, widths[width][1])
            return
        widths[width] = path, norm


def compared(name: str, model: nn.Module, images: Tensor) -> Iterator[Compared]:
    for prior in (0, PRIOR):
        first: Statistics | None = None
        for size in BATCHES:
            batches = images.split(size)
            ours, theirs, again = (copy.deepcopy(model) for _ in range(3))
            with recalibrated(ours, batches, layerwise=True, prior=prior) as handle:
                found, half = statistics(ours), handle.held / 2
            step = distance(found, reference(copy.deepcopy(model), batches, prior, found))
            whole = reference(theirs, batches, prior)
            first = first or whole
            with recalibrated(
                again, batches, layerwise=True, prior=prior, max_memory=half
            ) as handle:
                budget = distance(statistics(again), found)
            yield Compared(
                name, size, prior, step, distance(found, whole), distance(whole, first),
                handle.passes, budget,
            )  # fmt: skip


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--pixels", type=int, default=64, help="height and width of the pictures")
    parser.add_argument("--results", type=Path, metavar="FILE", help="CSV file, added to")
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    network = NETWORKS[arguments.network]
    pictures = read_pictures(arguments.data)[0][: 2 * IMAGES].float()
    small = interpolate(pictures, (arguments.pixels,) * 2, mode="area")
    of_training, later = network.normalised(small).split(IMAGES)
    model = network.batchnorm(network.plain(arguments.weights), list(of_training.split(16)))
    shared = copy.deepcopy(model)
    tie(shared)
    faded = later * 0.4 + 0.5
    models = {arguments.network: model, f"{arguments.network}, shared": shared}
    steps = tqdm(total=len(models) * len(BATCHES) * 2, unit="comparison")
    found = []
    for name, one in models.items():
        for row in compared(name, one, faded):
            found.append(row)
            steps.update()
    steps.close()
    print(table(found), end="")
    record(found, arguments.results)


if __name__ == "__main__":
    main()
