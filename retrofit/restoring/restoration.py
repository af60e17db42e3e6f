"""What `restore` did; kept on the model as plain values, so that a pickle loads without us."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from retrofit.errors import RetrofitError
from retrofit.html_tables import html_table, paragraph, view
from retrofit.tables import Part, Table, counted, few, in_full, in_short, printed, shortened

_ATTRIBUTE = "_retrofit_restored"


@dataclass(frozen=True)
class Seat:
    """One BatchNorm that was folded away, and has come back.

    Attributes:
        layer: path of the layer that had absorbed it.
        norm: path of the BatchNorm.
        channels: how many.
        bias: where the folded bias is now: "layer", or "running_mean" where the architecture's
            layer has none; empty where the folded layer had none.
        relative: largest difference of what the BatchNorm gives for the folded network's own input,
            over the root mean square.
    """

    layer: str
    norm: str
    channels: int
    bias: str
    relative: float

    def __repr__(self) -> str:
        bias = f"folded bias in {shortened(self.bias)}" if self.bias else "no folded bias"
        places = f"{shortened(self.norm)} after {shortened(self.layer)}"
        told = f"{self.channels} channels, {bias}, difference {self.relative:.1e}"
        return in_short(self, f"{places}: {told}")

    def __str__(self) -> str:
        return in_full(self)


@dataclass(frozen=True)
class Restoration:
    """How a model was restored, and how far it is from the folded network.

    Attributes:
        seats: the BatchNorms that came back, in the order of the architecture's modules.
        kept: paths of the BatchNorms that had not been folded, taken over as they are.
        exact: outputs equal those of the folded network bit for bit.
        relative: largest difference of an output, over that output's largest absolute value.
        outputs_jump: the outputs are empty, or differ as much once the last bits of the folded
            network's own layers are others, as where a detector chooses boxes. They tell nothing
            then; the seats do.
        compared: images that both were compared on, those of the first batch.
        images: images behind the statistics.
        standard_error: of the statistics, in standard deviations, as `Calibration` has it.
    """

    seats: tuple[Seat, ...]
    kept: tuple[str, ...]
    exact: bool
    relative: float
    outputs_jump: bool
    compared: int
    images: int
    standard_error: float

    @property
    def worst(self) -> Seat:
        """The seat with the largest difference."""
        return max(self.seats, key=lambda seat: seat.relative)

    def __str__(self) -> str:
        return printed(self._parts())

    def _parts(self) -> tuple[Part, ...]:
        """Return what `print` shows."""
        return self._table(), self._summary()

    def __repr__(self) -> str:
        restored = counted(len(self.seats), "BatchNorm")
        statistics = f"{counted(self.images, 'image')} (standard error {self.standard_error:.1%})"
        return in_short(self, f"{restored} of {statistics}; {self._verdict()}; print it for all")

    def _repr_html_(self) -> str:
        """Show itself in a notebook: the verdict, and each BatchNorm."""
        caption = f"Restoration: {self._summary()}"
        kept = paragraph(f"Taken over as they are: {few(self.kept)}") if self.kept else ""
        table = self._table()
        return view(html_table(caption, table.header, table.rows, table.right), kept)

    def _summary(self) -> str:
        kept = f", {len(self.kept)} taken over as they are" if self.kept else ""
        jump = " (outputs are empty, or jump with the last bit of a layer, and tell nothing)"
        return (
            f"{len(self.seats)} BatchNorms restored{kept}; statistics of {self.images} images "
            f"(standard error {self.standard_error:.1%}); on {self.compared} images "
            f"{self._verdict()}{jump if self.outputs_jump else ''}"
        )

    def _table(self) -> Table:
        head = ("BatchNorm", "layer", "channels", "folded bias", "difference")
        rows = [
            (s.norm, s.layer, str(s.channels), s.bias or "none", f"{s.relative:.1e}")
            for s in self.seats
        ]
        return Table(
            head,
            rows,
            right=("channels", "difference"),
            paths=("BatchNorm", "layer"),
            spare=("folded bias", "layer"),
        )

    def _verdict(self) -> str:
        if self.outputs_jump:
            return f"BatchNorms are equal to {max((s.relative for s in self.seats), default=0):.1e}"
        if self.exact:
            return "outputs are equal bit for bit"
        return f"outputs are equal to {self.relative:.1e} of the largest"


def attach(model: nn.Module, restoration: Restoration) -> None:
    """Keep on the model how it was restored."""
    vars(model)[_ATTRIBUTE] = asdict(restoration)


def restoration_of(model: nn.Module) -> Restoration | None:
    """Return how a model was restored; None for one that `restore` did not make.

    Args:
        model: any module.

    Examples:
        >>> print(retrofit.restoration_of(restored))
    """
    if not isinstance(model, nn.Module):
        raise RetrofitError(f"expected an nn.Module, not a {type(model).__name__}")
    values: dict[str, Any] | None = vars(model).get(_ATTRIBUTE)
    if values is None:
        return None
    seats = tuple(Seat(**seat) for seat in values["seats"])
    return Restoration(**{**values, "seats": seats})
