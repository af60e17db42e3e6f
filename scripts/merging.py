"""Merge two plain VGGs, with and without moment matching.

    python scripts/merging.py --data CIFAR10 --other SECOND.safetensors --output docs/results

CIFAR10 is a folder with train/<class>/ and test/<class>/. The two networks are the one of `retrofit
demo` and one that was trained apart from it, from another seed. Channels of the second are permuted
to those of the first that they resemble most, then the weights of both are averaged. Averaged
channels vary less than those that they are averages of, layer after layer, and the network fails.
`convert(prepared, match=...)` gives them back the moments that they should have (REPAIR, Jordan et
al., 2022). Written are OUTPUT/merging.csv, a table (.md) and a figure (.svg).
"""

from __future__ import annotations

import argparse
import copy
import csv
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from markdown_table import markdown_table
from matplotlib.axes import Axes
from pictures import accuracy, normalise, read
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import retrofit
from retrofit.demo import trained_vgg
from retrofit.files.model_sources import trained

SHARES = tuple(i / 10 for i in range(11))  # of the second network in the average
HALF = 0.5


def network(file: Path) -> nn.Module:
    """Load the weights of a file into the demo's architecture, in eval mode."""
    return trained("retrofit.demo.network:vgg_cifar10", str(file))


def weighted(model: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    """List the layers with weights of a plain chain (a VGG), in their order."""
    return [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Collect what each convolution and its ReLU give: float64, (C, images times pixels)."""
    seen: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda _layer, _x, y: seen.append(y.relu()))
        for layer in weighted(model)[:-1]
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return [y.movedim(1, 0).flatten(1).double() for y in seen]


def correlations(one: nn.Module, other: nn.Module, images: Sequence[Tensor]) -> list[Tensor]:
    """Correlate the channels of `one` with those of `other`: for each convolution (C, C)."""
    zero = torch.zeros((), dtype=torch.float64)
    sums = [(0, zero, zero)] * (len(weighted(one)) - 1)
    for x in images:
        both = [torch.cat(pair) for pair in zip(outputs(one, x), outputs(other, x), strict=True)]
        sums = [
            (n + y.shape[1], total + y.sum(1), products + y @ y.T)
            for (n, total, products), y in zip(sums, both, strict=True)
        ]
    tables = []
    for n, total, products in sums:
        covariance = products / n - torch.outer(total / n, total / n)
        sigma = covariance.diagonal().clamp(min=0).sqrt()
        table = covariance / torch.outer(sigma, sigma).clamp(min=1e-12)  # 0 for a dead channel
        tables.append(table[: len(table) // 2, len(table) // 2 :])
    return tables


def permuted(model: nn.Module, orders: Sequence[Tensor]) -> nn.Module:
    """Put the channels of each convolution into another order; the function stays the same."""
    model = copy.deepcopy(model)
    layers = weighted(model)
    with torch.no_grad():
        for (layer, following), order in zip(pairwise(layers), orders, strict=True):
            for parameter in layer.parameters():
                parameter.copy_(parameter[order])
            following.weight.copy_(following.weight[:, order])
    return model


def aligned(one: nn.Module, other: nn.Module, images: Sequence[Tensor]) -> nn.Module:
    """Permute `other`, each channel to the place where `one` has the one that it resembles most."""
    orders = [
        torch.from_numpy(linear_sum_assignment(table.numpy(), maximize=True)[1])
        for table in correlations(one, other, images)
    ]
    return permuted(other, orders)


def averaged(one: nn.Module, other: nn.Module, share: float = HALF) -> nn.Module:
    """Average the weights of both, `share` of them those of `other`."""
    model = copy.deepcopy(one)
    state = other.state_dict()
    model.load_state_dict({k: v.lerp(state[k], share) for k, v in one.state_dict().items()})
    return model


def matched(
    one: nn.Module, other: nn.Module, images: Sequence[Tensor], share: float = HALF
) -> nn.Module:
    """Average both, and give the channels the moments between theirs: REPAIR.

    Means, and standard deviations, are averaged as the weights are (equation 3 of the paper).
    """
    a, b = (retrofit.channel_moments(calibrated(model, images)) for model in (one, other))
    target = {
        site: (
            a[site].mean.lerp(b[site].mean, share),
            a[site].var.sqrt().lerp(b[site].var.sqrt(), share).square(),
        )
        for site in a
    }
    model = retrofit.convert(calibrated(averaged(one, other, share), images), match=target)
    retrofit.recalibrate(model, images, layerwise=True, progress=False)
    return model


def calibrated(model: nn.Module, images: Sequence[Tensor]) -> nn.Module:
    prepared = retrofit.prepare(model)
    retrofit.calibrate(prepared, images, progress=False)
    return prepared


def curves(
    one: nn.Module,
    other: nn.Module,
    images: Sequence[Tensor],
    test: Callable[[nn.Module], float],
    shares: Sequence[float] = SHARES,
) -> dict[str, list[float]]:
    """Measure the accuracy of the average at each share, made in three ways."""
    near = aligned(one, other, images)
    return {
        "averaged as they are": [test(averaged(one, other, share)) for share in shares],
        "aligned": [test(averaged(one, near, share)) for share in shares],
        "aligned, moments matched": [test(matched(one, near, images, share)) for share in shares],
    }


def table(found: dict[str, list[float]], shares: Sequence[float] = SHARES) -> str:
    """Tabulate the accuracies, and say how much of what averaging lost came back."""
    half = shares.index(HALF)
    first, second = (next(iter(found.values()))[i] for i in (0, -1))
    ends = (first + second) / 2
    accuracies = {"first": first, "second": second}
    accuracies |= {name: values[half] for name, values in found.items()}
    rows = [(name, f"{value:.2%}") for name, value in accuracies.items()]
    merged, repaired = (found[name][half] for name in list(found)[1:])
    back = (repaired - merged) / (ends - merged)
    text = markdown_table(("network", "accuracy"), rows)
    return f"{text}\nMoment matching brings back {back:.0%} of the loss."


def plot(axes: Axes, found: dict[str, list[float]], shares: Sequence[float] = SHARES) -> None:
    """Draw the accuracy over the share of the second network."""
    for name, values in found.items():
        axes.plot(shares, [100 * value for value in values], label=name)
    axes.set(xlabel="share of the second network", ylabel="accuracy, %", ylim=(0, 100))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize="small")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--other", type=Path, required=True, help="weights of the second network")
    parser.add_argument("--output", type=Path, required=True, help="folder")
    parser.add_argument(
        "--images", type=int, default=5000, help="to match on; default: %(default)s"
    )
    arguments = parser.parse_args()
    one, other = trained_vgg(), network(arguments.other)
    pictures, _ = read(arguments.data / "train")
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))
    images = normalise(pictures[order[: arguments.images]]).split(250)
    tests, labels = read(arguments.data / "test")
    found = curves(one, other, images, lambda model: accuracy(model, tests, labels))

    arguments.output.mkdir(parents=True, exist_ok=True)
    with (arguments.output / "merging.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["share", *found])
        writer.writerows(zip(SHARES, *found.values(), strict=True))
    text = table(found)
    (arguments.output / "merging.md").write_text(text + "\n")
    plt.style.use("retrofit.plots")
    figure, axes = plt.subplots()
    plot(axes, found)
    figure.savefig(arguments.output / "merging.svg", metadata={"Date": None})
    print(text)


if __name__ == "__main__":
    main()
