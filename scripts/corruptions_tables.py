"""The tables and figures of the study of corruptions."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from corruptions import Row

Corruption = tuple[str, int]  # name and severity; 0 for those by hand
Adaptation = tuple[int, int]  # pictures and prior
PLAIN: Adaptation = (0, 0)
CLEAN: Corruption = ("none", 0)
FEW = 16


class Results:
    """Accuracies of a study in per cent, means over the seeds."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.by_key = {(r.seed, r.corruption, r.severity, r.pictures, r.prior): r for r in rows}
        corruptions = dict.fromkeys((row.corruption, row.severity) for row in rows)
        self.by_hand = [c for c in corruptions if c[1] == 0]
        self.all = [c for c in corruptions if c[1] > 0]
        self.severities = sorted({severity for _, severity in self.all})
        self.seeds = sorted({row.seed for row in rows})
        self.counts = sorted({row.pictures for row in rows if row.pictures})
        self.prior = max(row.prior for row in rows)
        self.test_pictures = rows[0].test_pictures
        self.main: dict[str, Adaptation] = {
            "plain": PLAIN,
            f"adapted on {self.counts[-1]}": (self.counts[-1], 0),
            f"on {FEW} with a prior": (FEW, self.prior),
        }

    def of_seed(
        self, seed: int, corruptions: Iterable[Corruption], adaptation: Adaptation
    ) -> float:
        rows = [self.by_key[(seed, *corruption, *adaptation)] for corruption in corruptions]
        return 100 * statistics.mean(row.accuracy for row in rows)

    def mean(self, corruptions: Iterable[Corruption], adaptation: Adaptation) -> float:
        corruptions = list(corruptions)
        return statistics.mean(self.of_seed(seed, corruptions, adaptation) for seed in self.seeds)

    def spread(self, corruptions: Sequence[Corruption], adaptation: Adaptation) -> str:
        """With half of the range over the seeds."""
        values = [self.of_seed(seed, corruptions, adaptation) for seed in self.seeds]
        half = (max(values) - min(values)) / 2
        return f"{statistics.mean(values):.1f}" + (f" ± {half:.1f}" if len(values) > 1 else "")

    def at(self, severity: int) -> list[Corruption]:
        return [corruption for corruption in self.all if corruption[1] == severity]


# --- tables ------------------------------------------------------------------------------------


def summary(rows: Sequence[Row]) -> str:
    """Markdown: corruption by corruption, by number of pictures, those by hand, and what of it
    counts."""
    results = Results(rows)
    parts = by_corruption(results), by_pictures(results), by_hand(results), verdict(results)
    return "\n".join(parts)


def by_corruption(results: Results) -> str:
    columns = [(severity, name) for severity in results.severities for name in results.main]
    head = ["corruption", *(f"{name}, severity {severity}" for severity, name in columns)]
    lines = []
    for corruption in dict.fromkeys(name for name, _ in results.all):
        means = [results.mean([(corruption, s)], results.main[name]) for s, name in columns]
        lines.append([corruption, *(f"{mean:.1f}" for mean in means)])
    total = [results.spread(results.at(s), results.main[name]) for s, name in columns]
    return table(head, [*lines, ["**mean**", *(f"**{mean}**" for mean in total)]])


def by_pictures(results: Results) -> str:
    head = ["adapted on", *(f"{count}" for count in results.counts)]
    names = {0: "no prior", results.prior: f"prior of {results.prior}"}
    lines = [
        [name, *(results.spread(results.all, (count, prior)) for count in results.counts)]
        for prior, name in names.items()
    ]
    return table(head, lines)


def by_hand(results: Results) -> str:
    lines = [
        [corruption[0], *(results.spread([corruption], a) for a in results.main.values())]
        for corruption in results.by_hand
    ]
    return table(["by hand", *results.main], lines)


def verdict(results: Results) -> str:
    """The sentences that the tables come to."""
    clean = results.mean([CLEAN], PLAIN)
    plain, many, few = (results.mean(results.all, a) for a in results.main.values())
    gains = {
        c: results.mean([c], results.main[f"on {FEW} with a prior"]) - results.mean([c], PLAIN)
        for c in results.all
    }
    (name, severity), worst = min(gains.items(), key=lambda item: item[1])
    return (
        f"Uncorrupted {clean:.1f} %, corrupted {plain:.1f} %. Adapted on {results.counts[-1]} "
        f"pictures {many:.1f} %, which is {(many - plain) / (clean - plain):.0%} of what was lost; "
        f"on {FEW} with a prior of {results.prior} {few:.1f} % "
        f"({(few - plain) / (clean - plain):.0%}), at worst {worst:+.1f} points "
        f"({name}, severity {severity}). Means over {len(results.seeds)} seeds of "
        f"{results.test_pictures:,} test pictures each, ± half of the range over the seeds.\n"
    )


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in head[1:])]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *lines))


# --- figures -----------------------------------------------------------------------------------


def draw_by_corruption(rows: Sequence[Row], file: Path) -> None:
    """Dots: what each corruption costs, and what adapting gives back."""
    import matplotlib.pyplot as plt  # noqa: PLC0415

    results = Results(rows)
    hardest = results.at(results.severities[-1])
    names = [n for n, _ in sorted(hardest, key=lambda c: results.mean([c], PLAIN), reverse=True)]
    clean = results.mean([CLEAN], PLAIN)
    plt.style.use("retrofit.plots")
    figure, panels = plt.subplots(
        1, len(results.severities), sharey=True, squeeze=False, figsize=(8, 4.4)
    )
    for axes, severity in zip(panels[0], results.severities, strict=True):
        for label, adaptation in results.main.items():
            means = [results.mean([(name, severity)], adaptation) for name in names]
            axes.plot(means, names, linestyle="", markersize=6, label=label)
        axes.axvline(clean, color="black", linewidth=1, label="plain, uncorrupted")
        axes.set(xlabel="accuracy (%)", title=f"severity {severity}", xlim=(0, 100))
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.suptitle("What does each corruption cost, and what does adapting give back?")
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def draw_by_pictures(rows: Sequence[Row], file: Path) -> None:
    """Lines: mean accuracy over all corruptions against the number of pictures."""
    import matplotlib.pyplot as plt  # noqa: PLC0415

    results = Results(rows)
    plt.style.use("retrofit.plots")
    figure, axes = plt.subplots()
    for prior, label in {results.prior: f"prior of {results.prior}", 0: "no prior"}.items():
        lines = [
            [results.of_seed(seed, results.all, (count, prior)) for count in results.counts]
            for seed in results.seeds
        ]
        means = [statistics.mean(values) for values in zip(*lines, strict=True)]
        (line,) = axes.plot(results.counts, means, label=f"adapted, {label}")
        low, high = (list(map(pick, zip(*lines, strict=True))) for pick in (min, max))
        axes.fill_between(results.counts, low, high, color=line.get_color(), alpha=0.2, lw=0)
    axes.axhline(results.mean([CLEAN], PLAIN), color="black", lw=1, label="plain, uncorrupted")
    plain = results.mean(results.all, PLAIN)
    axes.axhline(plain, color="black", lw=1, linestyle=":", label="plain, corrupted")
    axes.set_xscale("log", base=2)
    axes.set_xticks(results.counts, [str(count) for count in results.counts])
    axes.set(
        xlabel="unlabelled pictures adapted to",
        ylabel="mean accuracy (%)",
        title="How many pictures does adapting need?",
    )
    axes.legend()
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
