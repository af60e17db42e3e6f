"""The result of each restored model of the zoos, and docs/restored-zoo.md, made of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from fold_tables import FoldedBy, folds_section
from markdown_table import markdown_table
from zoo_tables import natural

LIMIT = 5e-6  # of the largest output: a difference of rounding
COLUMNS = ("model", "input", "restored", "kept", "difference", "seconds")

INTRODUCTION = """# Model zoos, folded and restored

Every model of torchvision and timm that has BatchNorm, with random weights and numbers in its
BatchNorms as training would have left them: folded by `retrofit.fold`, and brought back into its
class by `retrofit.restore`. This page is what

    python scripts/restored_zoo.py --folds docs/results/restored-zoo-folds.csv \\
        --results docs/results/restored-zoo.csv --markdown docs/restored-zoo.md

wrote on a CPU, with {versions}.
"""

EVERY_MODEL = """## Every model

Each is folded by `retrofit.fold` and restored from the state dict into a model of the same class
with other weights; the state dict of the result loads strictly into a third, stock one, and this is
compared with the folded network. The data is one batch of two pictures, of the smallest size that
the model accepts and that leaves its feature maps larger than one pixel; another one is compared.

- **restored**: BatchNorms that were folded away, and are back. **kept**: those that folding does
  not reach (they follow no convolution or Linear layer, or eval mode does not call them): they stay
  in the folded network, and are taken over as they are.
- **difference**: the largest of any output, over the largest absolute value of that output. More
  than 5e-6 counts as a failure.
- **seconds**: of one core, for `restore`.
"""

FAILURES = """A network with random weights may magnify rounding. What folding alone changes, which
rounds as restoring does, is beside it.
"""


@dataclass
class Restored:
    """One line of the CSV: what became of a model.

    Attributes:
        name: as `retrofit plan` takes it.
        family: where the model is at home: "torchvision, detection" or "timm, resnet".
        versions: of the packages.
        skipped: why it is not restored, if it is not.
        parameters, batchnorms: how many it has.
        input: the shape of a batch.
        restored: how many BatchNorms came back.
        kept: reason to the paths of the BatchNorms that folding did not reach.
        folding: how far the folded network is from the one with BatchNorm.
        difference: how far the restored network is from the folded one.
        error: what went wrong, in a line.
        seconds: of `restore`.
    """

    name: str
    family: str
    versions: str
    skipped: str = ""
    parameters: int = 0
    batchnorms: int = 0
    input: str = ""
    restored: int = 0
    kept: dict[str, list[str]] = field(default_factory=dict)
    folding: float = 0.0
    difference: float = 0.0
    error: str = ""
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        return not self.skipped and (bool(self.error) or self.difference > LIMIT)

    @property
    def stays(self) -> int:
        """How many BatchNorms folding did not reach."""
        return sum(map(len, self.kept.values()))

    def __str__(self) -> str:
        if self.skipped:
            return f"{self.name}: left out, {self.skipped}"
        verdict = "FAILED" if self.failed else "ok"
        counts = f"{self.restored} restored, {self.stays} kept, {self.difference:.1e} (folding "
        counts += f"{self.folding:.1e}), {self.seconds:.1f} s"
        return f"{verdict:6}  {self.name}: {counts}  {self.error}".rstrip()


def document(
    folds: Sequence[FoldedBy], results: Sequence[Restored], missing: tuple[int, int]
) -> str:
    """Write the page docs/restored-zoo.md.

    Args:
        folds: of the first table.
        results: of all models.
        missing: how many rows of the first table, and how many models, are not there yet.
    """
    versions = "; ".join(sorted({r.versions for r in folds} | {r.versions for r in results}))
    parts = [INTRODUCTION.format(versions=versions)]
    if folds:
        parts.append(folds_section(folds, missing[0]))
    parts += [EVERY_MODEL, summary(results, missing[1])]
    parts += failures([result for result in results if result.failed])
    done = [result for result in results if not (result.skipped or result.failed)]
    for name in sorted({r.family for r in done}, key=lambda name: (name[:4] == "timm", name)):
        group = sorted((r for r in done if r.family == name), key=lambda r: natural(r.name))
        parts += [f"### {name}\n", markdown_table(COLUMNS, map(cells, group), COLUMNS[:2])]
    return "\n".join(parts)


def summary(results: Sequence[Restored], missing: int) -> str:
    """Tabulate the counts over all models."""
    tried = [result for result in results if not result.skipped]
    done = [result for result in tried if not result.failed]
    reasons: Counter[str] = Counter()
    for result in results:
        reasons.update({reason: len(paths) for reason, paths in result.kept.items()})
    skipped = Counter((r.family.partition(",")[0], r.skipped) for r in results if r.skipped)
    counts = {
        "models folded and restored": f"{len(tried):,}",
        "failures among them": f"{len(tried) - len(done):,}",
        "models not tried yet": f"{missing:,}",
        "BatchNorms restored": f"{sum(r.restored for r in done):,}",
        "BatchNorms kept": f"{sum(r.stays for r in done):,}",
        "largest difference": f"{max((r.difference for r in done), default=0.0):.1e}",
        "largest difference of folding": f"{max((r.folding for r in done), default=0.0):.1e}",
        "minutes of one core, for `restore`": f"{sum(r.seconds for r in done) / 60:.0f}",
    }
    if not missing:
        del counts["models not tried yet"]
    counts |= {
        f"BatchNorms that folding keeps: {why}": f"{n:,}" for why, n in reasons.most_common()
    }
    counts |= {
        f"models of {package} left out: {why}": f"{n:,}" for (package, why), n in skipped.items()
    }
    return markdown_table(("", "count"), counts.items())


def failures(failed: Sequence[Restored]) -> list[str]:
    """List the models that were not restored, or not closely enough, and what happened."""
    if not failed:
        return []
    columns = ("model", "what happens", "difference by folding alone")
    rows = [
        (
            result.name.rpartition(":")[2],
            result.error or f"a difference of {result.difference:.1e}",
            f"{result.folding:.1e}",
        )
        for result in sorted(failed, key=lambda result: natural(result.name))
    ]
    return ["### Failures\n", FAILURES, markdown_table(columns, rows, columns[:2])]


def cells(result: Restored) -> Sequence[str]:
    """Write the row of a model, under COLUMNS."""
    return (
        result.name.rpartition(":")[2],
        result.input,
        f"{result.restored:,}",
        f"{result.stays:,}" if result.kept else "",
        f"{result.difference:.1e}",
        f"{result.seconds:,}",
    )
