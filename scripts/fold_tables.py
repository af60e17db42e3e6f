"""Networks as four folders fold them, restored: the first table of docs/restored-zoo.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markdown_table import markdown_table

LIMIT = 5e-6  # of the largest output
TRAINED = 1e-4
COLUMNS = ("model", "folded by", "folded", "module", "state dict", "training", "notes")
WORDS = ("model", "folded by", "notes")

INTRODUCTION = """## However it was folded

Networks folded by four folders: `torch.fx.experimental.optimization.fuse`,
`torch.ao.quantization.fuse_modules`, `torch.nn.utils.fuse_conv_bn_eval`, and `retrofit.fold`. The
second and third get the convolutions whose output goes, in a run, into one BatchNorm that takes no
other. Each folded network is restored from the module, and from its state dict, into a model of the
class with other weights, whose state dict loads strictly into a stock one.

- **folded**: BatchNorms that the folder folded away, of those in the model.
- **module**, **state dict**: the largest difference of an output from the folded network, over the
  largest absolute value of that output, on pictures of another batch. More than 5e-6 is a failure.
- **training**: the same for the restored network in train mode (without dropout), against a copy in
  float64; more than 1e-4 is a failure, and so is a parameter that gets no finite gradient.
"""


@dataclass
class FoldedBy:
    """One line of the CSV: a network that one folder folded, restored.

    Attributes:
        name: of the model and of what folded it: "resnet18, torch.fx".
        versions: of the packages.
        batchnorms: how many the model has.
        folded: how many of them the folder folded away.
        cannot: why the folder cannot fold the model, if it cannot.
        module, state_dict: the differences of what was restored from these.
        training: the difference in train mode from float64.
        gradients: every parameter gets a finite one.
        error: what went wrong, in a line.
    """

    name: str
    versions: str
    batchnorms: int = 0
    folded: int = 0
    cannot: str = ""
    module: float = 0.0
    state_dict: float = 0.0
    training: float = 0.0
    gradients: bool = False
    error: str = ""

    @property
    def failed(self) -> bool:
        far = max(self.module, self.state_dict) > LIMIT or self.training > TRAINED
        return not self.cannot and (bool(self.error) or far or not self.gradients)

    def __str__(self) -> str:
        if self.cannot:
            return f"{self.name} cannot: {self.cannot}"
        verdict = "FAILED" if self.failed else "ok"
        found = f"{self.module:.1e} {self.state_dict:.1e} {self.training:.1e} {self.gradients}"
        counts = f"{self.folded} of {self.batchnorms}"
        return f"{verdict:6}  {self.name}: {counts}, {found} {self.error}".rstrip()


def folds_section(folds: Sequence[FoldedBy], missing: int) -> str:
    """Write the first part of the page."""
    parts = [INTRODUCTION, markdown_table(COLUMNS, map(cells, folds), WORDS)]
    if missing:
        parts.append(f"{missing} of {len(folds) + missing} have not been tried yet.\n")
    return "\n".join(parts)


def cells(result: FoldedBy) -> Sequence[str]:
    """Write the row of a network and a folder, under COLUMNS."""
    name, _, folder = result.name.partition(", ")
    if result.cannot or result.error:
        why = result.cannot.partition(". ")[0]  # torch.fx goes on with advice
        note = f"cannot fold it: {why}" if why else f"**{result.error}**"
        return name, folder, "", "", "", "", note
    return (
        name,
        folder,
        f"{result.folded} of {result.batchnorms}",
        f"{result.module:.1e}",
        f"{result.state_dict:.1e}",
        f"{result.training:.1e}",
        "" if result.gradients else "**a parameter without a finite gradient**",
    )
