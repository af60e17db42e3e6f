"""The runs of a fine-tuning study, and the tables and the figure made of them."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from markdown_table import markdown_table
from typing_extensions import Self

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Key = tuple[str, float, int]  # of a run: variant, learning rate, seed
NEAR = 0.1  # a learning rate is usable whose mean accuracy is within 10 points of the best


@dataclass(frozen=True)
class Protocol:
    """What all runs of a study have in common."""

    model: str
    images: int  # to train on
    test_images: int
    steps: int
    batch_size: int


@dataclass(frozen=True)
class Run(Protocol):
    """One line of the CSV: accuracy on the test pictures, mean loss of the last 20 steps."""

    variant: str = ""
    learning_rate: float = 0.0
    seed: int = 0
    accuracy: float = 0.0
    loss: float = 0.0
    diverged: bool = False
    seconds: float = 0.0

    @property
    def key(self) -> Key:
        return self.variant, self.learning_rate, self.seed

    @classmethod
    def ended(
        cls, protocol: Protocol, key: Key, accuracy: float, losses: Sequence[float], seconds: float
    ) -> Self:
        """Put together what there is to tell of a run with this key."""
        variant, learning_rate, seed = key
        return cls(
            **asdict(protocol),
            variant=variant,
            learning_rate=learning_rate,
            seed=seed,
            accuracy=accuracy,
            loss=sum(losses[-20:]) / len(losses[-20:]),
            diverged=not math.isfinite(losses[-1]),
            seconds=round(seconds, 1),
        )


def accuracies(runs: Sequence[Run]) -> dict[str, dict[float, list[float]]]:
    """Group the accuracies of all seeds by variant and learning rate."""
    found: dict[str, dict[float, list[float]]] = {}
    for run in runs:
        found.setdefault(run.variant, {}).setdefault(run.learning_rate, []).append(run.accuracy)
    return found


def highest_usable(by_rate: dict[float, list[float]]) -> float:
    """Return the highest learning rate whose mean accuracy is within 10 points of the best."""
    means = {rate: statistics.mean(values) for rate, values in by_rate.items()}
    return max(rate for rate, mean in means.items() if mean >= max(means.values()) - NEAR)


def spread(values: Sequence[float]) -> str:
    """Write the mean and half of the range over the seeds, in per cent."""
    half = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):.1%}" + (f" ± {half * 100:.1f}" if len(values) > 1 else "")


def by_learning_rate(runs: Sequence[Run]) -> str:
    """Tabulate accuracies: a line for each variant, a column for each learning rate."""
    diverged = Counter((run.variant, run.learning_rate) for run in runs if run.diverged)
    rates = sorted({run.learning_rate for run in runs})
    lines = []
    for name, found in accuracies(runs).items():
        cells = []
        for rate in rates:
            lost = diverged[name, rate]
            cell = spread(found[rate]) if rate in found else ""
            cells.append(cell + f" ({lost} diverged)" * (lost > 0))
        lines.append([name, *cells])
    return markdown_table(["variant", *(f"{rate:g}" for rate in rates)], lines)


def usable(runs: Sequence[Run]) -> str:
    """Tabulate what each variant reaches, and up to which learning rate it is near that."""
    lines = []
    for name, found in accuracies(runs).items():
        best = max(found, key=lambda rate: statistics.mean(found[rate]))
        lines.append([name, spread(found[best]), f"{best:g}", f"{highest_usable(found):g}"])
    head = ["variant", "best accuracy", "at rate", "highest rate within 10 points of it"]
    return markdown_table(head, lines)


QUESTION = "Which learning rates does the network take?"


def draw(runs: Sequence[Run]) -> Figure:
    """Draw accuracy against learning rate: means as lines, ranges over the seeds as bands."""
    import matplotlib.pyplot as plt  # noqa: PLC0415

    plt.style.use("retrofit.plots")
    figure, axes = plt.subplots()
    _curves(axes, runs, accuracies(runs))
    axes.set(ylabel="accuracy on test pictures (%)", title=QUESTION)
    axes.legend()
    return figure


def draw_panels(panels: Mapping[str, Sequence[Run]]) -> Figure:
    """Draw the runs under each title as `draw` does, in panels side by side."""
    import matplotlib.pyplot as plt  # noqa: PLC0415

    plt.style.use("retrofit.plots")
    variants = accuracies([run for runs in panels.values() for run in runs])
    size = (3.2 * len(panels) + 0.4, 4.0)
    figure, places = plt.subplots(1, len(panels), sharey=True, squeeze=False, figsize=size)
    for axes, (title, runs) in zip(places[0], panels.items(), strict=True):
        _curves(axes, runs, variants)
        axes.set_title(title)
    places[0, 0].set_ylabel("accuracy on test pictures (%)")
    labelled = {line.get_label(): line for axes in places[0] for line in axes.get_lines()}
    shown = [labelled[variant] for variant in variants]
    figure.legend(shown, variants, loc="outside lower center", ncols=5)
    figure.suptitle(QUESTION)
    return figure


def _curves(axes: Axes, runs: Sequence[Run], variants: Iterable[str]) -> None:
    """Draw the runs; a variant has the style of its place among `variants`."""
    from matplotlib import rcParams  # noqa: PLC0415

    styles = dict(zip(variants, itertools.cycle(rcParams["axes.prop_cycle"]), strict=False))
    for variant, by_rate in accuracies(runs).items():
        rates = sorted(by_rate)
        means = [statistics.mean(by_rate[rate]) * 100 for rate in rates]
        (line,) = axes.plot(rates, means, label=variant, **styles[variant])
        low, high = ([pick(by_rate[rate]) * 100 for rate in rates] for pick in (min, max))
        axes.fill_between(rates, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    ticks = sorted({run.learning_rate for run in runs})
    axes.set(xscale="log", xlabel="learning rate at the top of the schedule")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
