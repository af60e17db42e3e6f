"""Draw the figures of docs/how-it-works.md and README.md, and print the numbers of the former.

    python scripts/figures.py --output docs/figures

They are made from the demo's network and pictures, from a million random variances, and from what
`python scripts/finetune.py --study folded` has written to docs/results/finetune-folded.csv.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from finetune_tables import Run, draw
from recorded_runs import RecordedRuns
from torch import Tensor, nn

import retrofit
from retrofit import demo
from retrofit.numerics.exact_identity import exact_identity, scale_and_shift

EPS = 1e-5
FOLDED = Path(__file__).parent.parent / "docs" / "results" / "finetune-folded.csv"
LAYER = "features.8"  # a BatchNorm in the middle of the demo's network


def values(network: nn.Module, images: Tensor) -> tuple[Tensor, nn.BatchNorm2d]:
    """Return what the BatchNorm of LAYER is given, (N, C, H, W), and that BatchNorm."""
    norm = network.get_submodule(LAYER)
    assert isinstance(norm, nn.BatchNorm2d)
    seen: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        network(images)
    handle.remove()
    return seen[0], norm


def channel(inputs: Tensor, norm: nn.BatchNorm2d, file: Path) -> None:
    """Draw one channel before, inside and after a BatchNorm."""
    assert norm.running_mean is not None
    with torch.no_grad():
        outputs = norm(inputs)
        plain = nn.functional.batch_norm(inputs, norm.running_mean, norm.running_var, eps=norm.eps)
    index = int(norm.running_mean.abs().argmax())
    mean, std = norm.running_mean[index].item(), norm.weight[index].item()
    assert torch.equal(inputs, outputs)
    panels = (
        ("the convolution's outputs", inputs, f"mean {mean:.2f}, sigma {std:.2f}"),
        ("normalised", plain, "mean 0, sigma 1"),
        ("times gamma, plus beta", outputs, "equal bit for bit"),
    )
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.6), sharey=True)
    shown = float(inputs[:, index].abs().max())
    for axis, (title, tensor, note) in zip(axes, panels, strict=True):
        numbers = tensor[:, index].flatten().numpy()
        axis.hist(numbers, bins=80, range=(-shown, shown))
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set(title=title, xlabel=note, yticks=[])
    figure.suptitle(f"What does a BatchNorm do to a channel? (channel {index} of {LAYER})")
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def places(file: Path) -> None:
    """Draw a Sequential that is renumbered, and a convolution that becomes a Sequential."""
    rows = (
        ("VGG", ["0 conv", "1 ReLU", "2 conv", "3 ReLU"]),
        ("as in vgg*_bn", ["0 conv", "1 bn", "2 ReLU", "3 conv", "4 bn", "5 ReLU"]),
        ("any other", ["squeeze", "activation"]),
        ("", ["squeeze.conv", "squeeze.bn", "activation"]),
    )
    figure, axis = plt.subplots(figsize=(9, 2.8))
    for row, (title, names) in enumerate(rows):
        height = -row - 0.35 * (row // 2)
        axis.text(-0.2, height, title, ha="right", va="center")
        for column, name in enumerate(names):
            new = "bn" in name
            box = {"boxstyle": "round,pad=0.4", "fc": "#f7c59f" if new else "white", "ec": "0.4"}
            axis.text(0.6 + 1.35 * column, height, name, ha="center", va="center", bbox=box)
    axis.set(xlim=(-1.6, 8.2), ylim=(-3.9, 0.5))
    axis.axis("off")
    figure.suptitle("Where do the BatchNorms go, and what are they called?")
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def learning_rates(runs: Sequence[Run], file: Path) -> None:
    """Draw what the folded and the restored network learn at each rate, with plain SGD."""
    shown = {"restored": "BatchNorm restored", "folded": "BatchNorm folded away"}
    chosen = [run for variant in shown for run in runs if run.variant == variant]
    figure = draw([replace(run, variant=shown[run.variant]) for run in chosen])
    (axis,) = figure.axes
    axis.axhline(10, color="grey", linewidth=0.8)
    axis.annotate("guessing", (1, 10), (0, 4), textcoords="offset points", ha="right")
    axis.set(title="Does a folded network still learn?", ylim=(0, 90))
    axis.legend(loc=(0.4, 0.35))
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def exactness(count: int) -> str:
    """Count how often gamma = sqrt(var + eps) is exact, and what the other channels get."""
    random = np.random.default_rng(0)
    var = (10 ** random.uniform(-6, 6, count)).astype(np.float32)
    mean = (random.normal(size=count) * np.sqrt(var)).astype(np.float32)
    naive = np.sqrt(var + np.float32(EPS))
    alpha, _ = scale_and_shift(mean, var, naive, mean, EPS)
    found = exact_identity(mean, var, EPS)
    at_once = alpha == 1
    moved = found.var != var
    change = np.abs(found.var / var.astype(np.float64) - 1).max()
    return (
        f"of {count:,} variances between 1e-6 and 1e6, gamma = sqrt(var + eps) is exact for "
        f"{at_once.mean():.1%}, another gamma for {(~at_once & ~moved).mean():.1%}, and for "
        f"{moved.mean():.1%} the variance moves, by {change:.1e} of itself at most"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="for the SVGs")
    folder: Path = parser.parse_args().output
    plt.style.use("retrofit.plots")
    with tempfile.TemporaryDirectory() as pictures:
        demo.unpack(Path(pictures))
        images, _ = demo.labelled(Path(pictures) / "calibration")
    network = retrofit.add_batchnorm(demo.trained_vgg(), images.split(128), progress=False).eval()
    folder.mkdir(parents=True, exist_ok=True)
    channel(*values(network, images), folder / "channel.svg")
    places(folder / "places.svg")
    learning_rates(RecordedRuns(FOLDED, Run).runs, folder / "learning-rates.svg")
    print(exactness(1_000_000))


if __name__ == "__main__":
    main()
