"""The table and the figure of a fine-tuning study."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finetune import Run

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


def summary(runs: Sequence[Run]) -> str:
    """A Markdown table: a line for each variant, a column for each learning rate."""
    found = accuracies(runs)
    diverged = {(r.variant, r.learning_rate) for r in runs if r.diverged}
    rates = sorted({rate for by_rate in found.values() for rate in by_rate})
    head = ["variant", *(f"{rate:g}" for rate in rates), "best", "highest rate within 10 points"]
    lines = [head, ["---", *("---:" for _ in head[1:])]]
    for variant, by_rate in found.items():
        cells = [
            spread(by_rate[rate]) + (" diverged" if (variant, rate) in diverged else "")
            for rate in rates
        ]
        best = max(by_rate.values(), key=statistics.mean)
        lines.append([variant, *cells, spread(best), f"{highest_usable(by_rate):g}"])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(runs: Sequence[Run], file: Path) -> None:
    """Accuracy against learning rate: means as lines, and the range over the seeds as a band."""
    import matplotlib.pyplot as plt  # noqa: PLC0415

    plt.style.use("retrofit.plots")
    figure, axes = plt.subplots()
    for variant, by_rate in accuracies(runs).items():
        rates = sorted(by_rate)
        (line,) = axes.plot(
            rates, [statistics.mean(by_rate[r]) * 100 for r in rates], label=variant
        )
        low, high = ([pick(by_rate[r]) * 100 for r in rates] for pick in (min, max))
        axes.fill_between(rates, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(
        xscale="log",
        xlabel="highest learning rate (warm-up, then cosine)",
        ylabel="accuracy on test pictures (%)",
        title="Which learning rates can fine-tuning take?",
    )
    axes.legend()
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
