"""The result of each model of the zoos, and docs/zoo.md, which is made of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from markdown_table import markdown_table

COLUMNS = ("model", "input", "convs", "BatchNorms", "left out", "equal", "folded", "seconds")
WORDS = ("model", "input", "left out", "equal", "folded")
NORMALISED = "already normalised"

INTRODUCTION = """# Whole model zoos

Every model of torchvision that is not quantised, and every model of timm that has at least four
convolutions and no BatchNorm, built with random weights, retrofitted, compared with the original
and folded back. This page is what

    python scripts/zoo.py --results docs/results/zoo.csv --jobs 2 --markdown docs/zoo.md

wrote on a CPU, with {versions}.

- **input**: the shape of a batch, of the smallest pictures that the model accepts and that leave
  its feature maps larger than one pixel. One batch calibrates, another one is compared.
- **convs**: convolution modules. **BatchNorms**: how many were inserted. **left out**:
  convolutions that got none, with the reason and, unless a norm is there already, the place.
- **equal**: all outputs, and the activations at all inserted BatchNorms, equal those of the
  original bit for bit.
- **folded**: `fold` gave back the original state dict, keys and bits, and the same modules.
- **seconds**: of one core, for everything but building the model.

The reparameterised models of timm had BatchNorm until `timm.utils.reparameterize_model` merged it
into their convolutions.
"""


@dataclass
class Result:
    """One line of the CSV: what became of a model.

    Attributes:
        name: as `retrofit plan` takes it.
        family: where the model is at home: "torchvision, detection" or "timm, convnext".
        versions: of the packages.
        skipped: why it is not converted, if it is not.
        input: the shape of a batch.
        convs: how many convolution modules there are.
        inserted: how many BatchNorms came.
        left_out: reason to the paths of the convolutions that got none.
        equal: outputs and sites are equal bit for bit.
        folded: `fold` gave back the state dict, keys and bits, and the module tree.
        error: what went wrong otherwise, in a line.
        seconds: of everything but building the model.
    """

    name: str
    family: str
    versions: str
    skipped: str = ""
    input: str = ""
    convs: int = 0
    inserted: int = 0
    left_out: dict[str, list[str]] = field(default_factory=dict)
    equal: bool = False
    folded: bool = False
    error: str = ""
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        return not self.skipped and (bool(self.error) or not (self.equal and self.folded))

    def __str__(self) -> str:
        if self.skipped:
            return f"{self.name}: left out, {self.skipped}"
        verdict = "FAILED" if self.failed else "ok"
        counts = f"{self.inserted} of {self.convs} convolutions, {self.seconds:.1f} s"
        return f"{verdict:6}  {self.name}: {counts}  {self.error}".rstrip()


def document(results: Sequence[Result]) -> str:
    """Write the page docs/zoo.md."""
    checked = [result for result in results if not result.skipped]
    versions = "; ".join(sorted({result.versions for result in checked}))
    parts = [INTRODUCTION.format(versions=versions), "## Summary\n", summary(results)]
    for name in sorted({r.family for r in checked}, key=lambda name: (name[:4] == "timm", name)):
        group = sorted((r for r in checked if r.family == name), key=lambda r: natural(r.name))
        parts += [f"## {name}\n", markdown_table(COLUMNS, map(cells, group), WORDS)]
    return "\n".join(parts)


def summary(results: Sequence[Result]) -> str:
    """Tabulate the counts over all models."""
    checked = [result for result in results if not result.skipped]
    reasons: Counter[str] = Counter()
    for result in checked:
        reasons.update({reason: len(paths) for reason, paths in result.left_out.items()})
    skipped = Counter((r.family.partition(",")[0], r.skipped) for r in results if r.skipped)
    counts = {
        "models planned, compared and folded back": len(checked),
        "failures among them": sum(r.failed for r in checked),
        "nothing to insert": sum(not (r.inserted or r.failed) for r in checked),
        "convolutions": sum(r.convs for r in checked),
        "BatchNorms inserted": sum(r.inserted for r in checked),
        **{f"convolutions left out: {why}": n for why, n in reasons.most_common()},
        **{f"models of {package} left out: {why}": n for (package, why), n in skipped.items()},
        "minutes of one core": round(sum(r.seconds for r in checked) / 60),
    }
    return markdown_table(("", "count"), [(name, f"{n:,}") for name, n in counts.items()])


def cells(result: Result) -> Sequence[str]:
    """Write the row of a model, under COLUMNS."""
    notes = [result.error] if result.error else []
    if not (result.inserted or result.failed):
        notes.append("nothing to do")
    notes += reasons(result.left_out)
    return (
        result.name.rpartition(":")[2],
        result.input,
        f"{result.convs:,}",
        f"{result.inserted:,}",
        "; ".join(notes),
        *("yes" if done else "**no**" for done in (result.equal, result.folded)),
        f"{result.seconds:,}",
    )


def reasons(left_out: Mapping[str, Sequence[str]]) -> list[str]:
    """Write why convolutions got no BatchNorm, how many, and where."""
    notes = []
    for reason, paths in left_out.items():
        where = "" if reason == NORMALISED else f" ({places(paths)})"
        notes.append(f"{len(paths)} x {reason.partition(':')[0]}{where}")
    return notes


def places(paths: Sequence[str]) -> str:
    """Write at most three module paths, with numbers as * where that covers several."""
    alike: dict[str, list[str]] = {}
    for path in paths:
        alike.setdefault(re.sub(r"\d+(?=\.|$)", "*", path), []).append(path)
    shown = [group[0] if len(group) == 1 else pattern for pattern, group in alike.items()]
    return f"`{'`, `'.join(shown[:3])}`{', ...' if len(shown) > 3 else ''}"


def natural(name: str) -> list[str]:
    """Return a key that sorts resnet18 before resnet101."""
    return [part.zfill(5) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
