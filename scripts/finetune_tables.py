"""The table and the figure of a fine-tuning study."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from studies import markdown

if TYPE_CHECKING:
    from finetune import Run
    from matplotlib.figure import Figure

NEAR = 0.1  # a learning rate is usable whose mean accuracy is within 10 points of the best


def accuracies(runs: Sequence[Run]) -> dict[str, dict[float, list[float]]]:
    """By variant and learning rate: the accuracies of all seeds."""
    found: dict[str, dict[float, list[float]]] = {}
    for run in runs:
        found.setdefault(run.variant, {}).setdefault(run.learning_rate, []).append(run.accuracy)
    return found


def highest_usable(by_rate: dict[float, list[float]]) -> float:
    """The highest learning rate whose mean accuracy is within 10 points of the best mean."""
    means = {rate: statistics.mean(values) for rate, values in by_rate.items()}
    return max(rate for rate, mean in means.items() if mean >= max(means.values()) - NEAR)


def spread(values: Sequence[float]) -> str:
    """Mean and half of the range over the seeds, in per cent."""
    half = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):.1%}" + (f" ± {half * 100:.1f}" if len(values) > 1 else "")


def by_learning_rate(runs: Sequence[Run]) -> str:
    """A Markdown table of accuracies: a line for each variant, a column for each learning rate."""
    diverged = Counter((run.variant, run.learning_rate) for run in runs if run.diverged)
    rates = sorted({run.learning_rate for run in runs})
    lines = []
    for name, found in accuracies(runs).items():
        lost = {rate: diverged[name, rate] for rate in rates}
        cells = [spread(found[r]) + f" ({lost[r]} diverged)" * (lost[r] > 0) for r in rates]
        lines.append([name, *cells])
    return markdown(["variant", *(f"{rate:g}" for rate in rates)], lines)


def usable(runs: Sequence[Run]) -> str:
    """A Markdown table: what each variant reaches, and up to which learning rate it is near."""
    lines = []
    for name, found in accuracies(runs).items():
        best = max(found, key=lambda rate: statistics.mean(found[rate]))
        lines.append([name, spread(found[best]), f"{best:g}", f"{highest_usable(found):g}"])
    head = ["variant", "best accuracy", "at rate", "highest rate within 10 points of it"]
    return markdown(head, lines)


def draw(runs: Sequence[Run]) -> Figure:
    """Accuracy against learning rate: means as lines, and the range over the seeds as a band."""
    import matplotlib.pyplot as plt  # noqa: PLC0415

    plt.style.use("retrofit.plots")
    figure, axes = plt.subplots()
    for variant, by_rate in accuracies(runs).items():
        rates = sorted(by_rate)
        means = [statistics.mean(by_rate[rate]) * 100 for rate in rates]
        (line,) = axes.plot(rates, means, label=variant)
        low, high = ([pick(by_rate[rate]) * 100 for rate in rates] for pick in (min, max))
        axes.fill_between(rates, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    ticks = sorted({run.learning_rate for run in runs})
    axes.set(
        xscale="log",
        xlabel="learning rate at the top of the schedule",
        ylabel="accuracy on test pictures (%)",
        title="Which learning rates does the network take?",
    )
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend()
    return figure
