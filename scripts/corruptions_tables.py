"""The rows of the study of corruptions, and the tables and figures made of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from corruption_dots import draw_dots
from markdown_table import markdown_table

Corruption = tuple[str, int]  # name and severity; 0 for those by hand
Adaptation = tuple[int, int]  # pictures and prior
CLEAN: Corruption = ("none", 0)
PLAIN: Adaptation = (0, 0)
FEW, MANY = 16, 500
STREAM = -1  # in the place of a number: to the test pictures themselves, as they come one by one
PRIORS = 16, 64
MAIN: dict[str, Adaptation] = {  # the columns of the tables
    "plain": PLAIN,
    f"adapted on {MANY}": (MANY, 0),
    **{f"on {FEW}, prior {prior}": (FEW, prior) for prior in PRIORS},
    f"streaming, prior {PRIORS[-1]}": (STREAM, PRIORS[-1]),
}


@dataclass(frozen=True)
class Row:
    """One line of the CSV.

    pictures, prior: adapted to so many (or -1, to the test pictures themselves one by one), beside
    a prior of so many; without pictures the accuracy is that of the network as it is.
    """

    folder_pictures: int
    test_pictures: int
    seed: int
    corruption: str
    severity: int
    pictures: int
    prior: int
    accuracy: float

    @property
    def key(self) -> tuple[int, str, int, int, int]:
        return self.seed, self.corruption, self.severity, self.pictures, self.prior


class Results:
    """Accuracies of a study in per cent, means over the seeds."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.by_key = {row.key: row for row in rows}
        corruptions = dict.fromkeys((row.corruption, row.severity) for row in rows)
        self.by_hand = [c for c in corruptions if c[1] == 0]
        self.all = [c for c in corruptions if c[1] > 0]
        self.severities = sorted({severity for _, severity in self.all})
        self.seeds = sorted({row.seed for row in rows})
        self.test_pictures = rows[0].test_pictures

    def counts(self, prior: int) -> list[int]:
        """Return the numbers of pictures to which all corruptions were adapted beside `prior`."""
        rows = self.by_key.values()
        found = {r.pictures for r in rows if r.severity and r.prior == prior and r.pictures > 0}
        return sorted(found)

    def of_seed(
        self, seed: int, corruptions: Iterable[Corruption], adaptation: Adaptation
    ) -> float:
        rows = [self.by_key[(seed, *corruption, *adaptation)] for corruption in corruptions]
        return 100 * statistics.mean(row.accuracy for row in rows)

    def mean(self, corruptions: Iterable[Corruption], adaptation: Adaptation) -> float:
        corruptions = list(corruptions)
        return statistics.mean(self.of_seed(seed, corruptions, adaptation) for seed in self.seeds)

    def spread(self, corruptions: Sequence[Corruption], adaptation: Adaptation) -> str:
        """Write the mean, and half of the range over the seeds."""
        values = [self.of_seed(seed, corruptions, adaptation) for seed in self.seeds]
        half = (max(values) - min(values)) / 2
        return f"{statistics.mean(values):.1f}" + (f" ± {half:.1f}" if len(values) > 1 else "")

    def at(self, severity: int) -> list[Corruption]:
        return [corruption for corruption in self.all if corruption[1] == severity]


# --- tables ------------------------------------------------------------------------------------


def summary(rows: Sequence[Row]) -> str:
    """Write the conclusions and all tables, in Markdown."""
    results = Results(rows)
    parts = conclusions, by_corruption, by_pictures, by_hand
    return "\n".join(part(results) for part in parts)


def conclusions(results: Results) -> str:
    clean, plain = results.mean([CLEAN], PLAIN), results.mean(results.all, PLAIN)
    about = (
        f"Accuracy in per cent on {results.test_pictures:,} test pictures, means over "
        f"{len(results.seeds)} seeds, ± half of the range over the seeds. *On 16, prior "
        "64*: adapted on 16 pictures, beside which the old statistics count as 64. *Streaming*: "
        "each test picture is answered by itself, adapted to it and to those before it.\n"
    )
    lines = [about, f"- uncorrupted {clean:.1f} %, corrupted {plain:.1f} %"]
    for name, adaptation in list(MAIN.items())[1:]:
        mean = results.mean(results.all, adaptation)
        gains = {c: results.mean([c], adaptation) - results.mean([c], PLAIN) for c in results.all}
        (worst, severity), gain = min(gains.items(), key=lambda item: item[1])
        share = ""
        if plain < clean:
            share = f", {100 * (mean - plain) / (clean - plain):.0f} % of what was lost"
        at_worst = f"at worst {gain:+.1f} points ({worst}, severity {severity})"
        lines.append(f"- {name}: {mean:.1f} %{share}; {at_worst}")
    return "\n".join(lines) + "\n"


def by_corruption(results: Results) -> str:
    columns = [(severity, name) for severity in results.severities for name in MAIN]
    head = ["corruption, severity", *(f"{severity}: {name}" for severity, name in columns)]
    lines = []
    for corruption in dict.fromkeys(name for name, _ in results.all):
        means = [results.mean([(corruption, s)], MAIN[name]) for s, name in columns]
        lines.append([corruption, *(f"{mean:.1f}" for mean in means)])
    total = [results.spread(results.at(s), MAIN[name]) for s, name in columns]
    return markdown_table(head, [*lines, ["**mean**", *(f"**{mean}**" for mean in total)]])


def by_pictures(results: Results) -> str:
    """Tabulate the means over all corruptions and severities by the number of pictures."""
    counts = results.counts(0)
    lines = []
    for prior in (0, *PRIORS):
        found = [results.spread(results.all, (count, prior)) for count in results.counts(prior)]
        name = f"prior {prior}" if prior else "no prior"
        lines.append([name, *found, *[""] * (len(counts) - len(found))])
    return markdown_table(["mean of all, adapted on", *map(str, counts)], lines)


def by_hand(results: Results) -> str:
    lines = [
        [corruption[0], *(results.spread([corruption], a) for a in MAIN.values())]
        for corruption in results.by_hand
    ]
    return markdown_table(["by hand", *MAIN], lines)


# --- figures -----------------------------------------------------------------------------------


def draw_by_corruption(rows: Sequence[Row], file: Path) -> None:
    """Draw, as dots, what each corruption costs and what adapting gives back."""
    results = Results(rows)
    draw_dots(
        lambda name, severity, way: results.mean([(name, severity)], MAIN[way]),
        [name for name, _ in results.at(results.severities[-1])],
        results.severities,
        list(MAIN),
        results.mean([CLEAN], PLAIN),
        "What does each corruption cost, and what does adapting give back?",
        file,
    )


def draw_by_pictures(rows: Sequence[Row], file: Path) -> None:
    """Draw the mean accuracy over all corruptions against the number of pictures."""
    import matplotlib.pyplot as plt  # noqa: PLC0415

    results = Results(rows)
    plt.style.use("retrofit.plots")
    figure, axes = plt.subplots()
    for prior in (*PRIORS, 0):
        label = f"adapted, prior {prior}" if prior else "adapted, no prior"
        counts = results.counts(prior)
        by_count = [
            [results.of_seed(seed, results.all, (count, prior)) for seed in results.seeds]
            for count in counts
        ]
        (line,) = axes.plot(counts, [statistics.mean(values) for values in by_count], label=label)
        low, high = (list(map(pick, by_count)) for pick in (min, max))
        axes.fill_between(counts, low, high, color=line.get_color(), alpha=0.2, lw=0)
    axes.axhline(results.mean([CLEAN], PLAIN), color="black", lw=1, label="plain, uncorrupted")
    plain = results.mean(results.all, PLAIN)
    axes.axhline(plain, color="black", lw=1, linestyle=":", label="plain, corrupted")
    axes.set_xscale("log", base=2)
    ticks = results.counts(0)
    axes.set_xticks(ticks, [str(count) for count in ticks])
    axes.set(
        xlabel="unlabelled pictures adapted to",
        ylabel="mean accuracy (%)",
        title="How many pictures does adapting need?",
    )
    axes.legend()
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
