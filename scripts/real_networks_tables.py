"""The result of each real network, and docs/real-networks.md, which is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from markdown_table import markdown_table
from zoo_tables import reasons

TOLERANCE = 1e-3  # of the output's root mean square; float32, through as many as 90 layers
COLUMNS = (
    "network",
    "package",
    "task",
    "input",
    "convs",
    "BatchNorms",
    "equal",
    "folded",
    "trained",
    "folded after training",
    "seconds",
)
REMARKS = ("network", "package", "left out, and remarks")
WORDS = ("network", "package", "task", "input", "equal", "folded", "trained")

INTRODUCTION = """# Networks of other packages

Networks that are neither torchvision's nor timm's, retrofitted, compared with the original, folded
back, and trained for a step. This page is what

    pip install {packages}
    python scripts/real_networks.py --results docs/results/real-networks.csv \\
        --markdown docs/real-networks.md

wrote on a CPU. The code of each network is its package's own; most are narrower and shallower than
usual. Weights are random, since none are downloaded. "Asked for" means that `include=` asks for
convolutions whose geometry the network's own code reads.

- **input**: the shape of a batch. One batch calibrates and is trained on, another one is compared.
- **convs**: the convolutions in the plan. **BatchNorms**: how many were inserted.
- **equal**: all outputs, and the activations at all inserted BatchNorms, equal those of the
  original bit for bit.
- **folded**: `fold` gave back the original state dict, keys and bits, and the same modules (but for
  the graph layout, which makes modules of its own).
- **trained**: after one step of SGD in train mode, all parameters that require a gradient have a
  finite one, except those that have none in the original either.
- **folded after training**: how far the outputs of the folded network are from the trained one's:
  the largest difference, relative to the root mean square. {tolerance:g} counts as equal.
- **seconds**: of one core, for everything but building the network.
"""


@dataclass
class Result:
    """One line of the CSV: what became of a network.

    Attributes:
        name: class, and what is special about it.
        package: the name under which `pip install` knows it.
        task: what the network is for.
        versions: of torch and of the package; empty if that is not installed.
        input: the shape of a batch.
        convs: how many convolutions are in the plan.
        inserted: how many BatchNorms came.
        left_out: reason to the paths of the convolutions that got none.
        equal: outputs and sites are equal bit for bit.
        folded: `fold` gave back the state dict, keys and bits, and the module tree.
        trained: a step gave finite gradients to all parameters that are to have one.
        difference: between the trained network and the folded one, relative to its output.
        remarks: what a reader should know beside that.
        error: what went wrong, in a line.
        seconds: of everything but building the network.
    """

    name: str
    package: str
    task: str
    versions: str
    input: str = ""
    convs: int = 0
    inserted: int = 0
    left_out: dict[str, list[str]] = field(default_factory=dict)
    equal: bool = False
    folded: bool = False
    trained: bool = False
    difference: float = float("nan")
    remarks: list[str] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        exact = self.equal and self.folded and self.trained
        return bool(self.error) or not exact or not self.difference <= TOLERANCE

    def __str__(self) -> str:
        verdict = "FAILED" if self.failed else "ok"
        counts = f"{self.inserted} of {self.convs} convolutions, {self.seconds:.1f} s"
        return f"{verdict:6}  {self.package}, {self.name}: {counts}  {self.error}".rstrip()


def document(results: Sequence[Result]) -> str:
    """Write the page docs/real-networks.md."""
    packages = " ".join(dict.fromkeys(result.package for result in results))
    versions = dict.fromkeys(part for r in results for part in r.versions.split(", ") if part)
    noted = [(r.name, r.package, notes(r)) for r in results if notes(r)]
    parts = [
        INTRODUCTION.format(packages=packages, tolerance=TOLERANCE),
        markdown_table(COLUMNS, map(cells, results), WORDS),
        summary(results),
        "## What got no BatchNorm, and why\n",
        markdown_table(REMARKS, noted, REMARKS),
        f"Versions: {', '.join(versions)}.\n",
    ]
    return "\n".join(parts)


def summary(results: Sequence[Result]) -> str:
    """Write the counts over all networks."""
    checked = [result for result in results if result.versions]
    failed = sum(result.failed for result in checked)
    return (
        f"{len(checked)} networks, {failed} failures, {len(results) - len(checked)} not installed; "
        f"{sum(r.convs for r in checked):,} convolutions, "
        f"{sum(r.inserted for r in checked):,} BatchNorms.\n"
    )


def cells(result: Result) -> Sequence[str]:
    """Write the row of a network, under COLUMNS."""
    head = (result.name, result.package, result.task)
    if not result.versions:
        return (*head, "not installed", *[""] * (len(COLUMNS) - 4))
    done = (result.equal, result.folded, result.trained)
    return (
        *head,
        result.input,
        f"{result.convs:,}",
        f"{result.inserted:,}",
        *("yes" if one else "**no**" for one in done),
        f"{result.difference:.1g}" if result.difference <= TOLERANCE else "**no**",
        f"{result.seconds:,}",
    )


def notes(result: Result) -> str:
    """Write what went wrong, which convolutions got no BatchNorm, and the remarks."""
    error = [f"**{result.error}**"] if result.error else []
    return "; ".join([*error, *reasons(result.left_out), *result.remarks])
