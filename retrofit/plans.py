"""What happens to every convolution of a model: data, to print and to store."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from retrofit.errors import RetrofitError
from retrofit.html_tables import Bar, html_table, paragraph, view
from retrofit.json_values import from_plain, to_plain
from retrofit.tables import Part, Table, in_full, in_short, one_line, printed, shortened

LayoutName = Literal["native", "graph"]
Placement = Literal["pre_activation", "post_activation"]
LAYOUTS = ("native", "graph")
PLACEMENTS = ("pre_activation", "post_activation")
Patterns = str | Sequence[str] | None
# Begin the reason of a site that no run reaches: of a model that was run, and that was traced.
UNCALLED = ("not called on the example", "not called in eval mode")
ASKED = "asked for, but "  # begins the reason of a site that was asked for and is impossible


@dataclass(frozen=True)
class Options:
    """What the user asked for; see `plan`."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    layout: LayoutName = "native"
    placement: Placement = "pre_activation"
    linear: bool = False


@dataclass(frozen=True)
class Site:
    """One convolution (or Linear layer, where asked for) and what happens to it.

    Attributes:
        path: its module path in the original model; for a function, that of the calling module
            followed by the function's name. Further functions of one name, and in the graph layout
            further calls of one module, are numbered: "block.conv2d@1".
        kind: class or function name.
        channels: output channels, 0 where unknown (a function).
        dims: spatial axes, 0 for a Linear layer.
        calls: calls in one forward pass, of those that were traced or watched.
        decision: "insert" or "skip".
        reason: why, in a few words.
        host: module path in the original model of what the BatchNorm comes after: the layer
            itself or its activation; empty for a function, and for a site that is skipped.
        layer, norm: module paths of the layer and its BatchNorm in the converted model; empty for
            a site that is skipped, and `layer` for a function.
        last_axis: the channels are the last axis, (N, ..., C).
        frozen: the layer's weight requires no gradient, so the BatchNorm's do not either.
        forwarded: attributes of the layer that the model's own code reads (`.stride`), which the
            Sequential in its place then has too.
        seat: module path in the original model of the nn.Identity whose place the BatchNorm takes;
            empty where it gets a place of its own.
    """

    path: str
    kind: str
    channels: int
    dims: Literal[0, 1, 2, 3]
    calls: int
    decision: Literal["insert", "skip"]
    reason: str
    host: str = ""
    layer: str = ""
    norm: str = ""
    last_axis: bool = False
    frozen: bool = False
    forwarded: tuple[str, ...] = ()
    seat: str = ""

    @property
    def batchnorm(self) -> str:
        """Path of the torch BatchNorm itself, which a LastAxisBatchNorm at `norm` has inside."""
        return f"{self.norm}.bn" if self.last_axis and self.norm else self.norm

    def __repr__(self) -> str:
        channels = f" of {self.channels} channels" if self.channels else ""
        norm = f"BatchNorm {shortened(self.norm)}" if self.decision == "insert" else "skipped"
        layer = f"{shortened(self.path)}, {shortened(self.kind)}{channels}"
        return in_short(self, f"{layer}: {norm}; {shortened(self.reason, 80)}")

    def __str__(self) -> str:
        return in_full(self)


@dataclass(frozen=True)
class Plan:
    """Every convolution of a model in the order of execution, and what happens to each.

    Attributes:
        model: class name of the planned model.
        sites: all convolutions, those never called last.
        renumbered: paths of the Sequentials whose children move up to make room; at every other
            place a convolution becomes `nn.Sequential(conv=..., bn=...)`.
        last: path of the inserted site that is called last; None if nothing is inserted, or if the
            order may depend on the input.
        key_map: keys of the original state dict to keys of the converted one.
        layout: "native", the model's own class and containers; or "graph", a torch.fx GraphModule.
        placement: BatchNorms come before ("pre_activation") or after the activations.
    """

    model: str
    sites: tuple[Site, ...]
    renumbered: tuple[str, ...]
    last: str | None
    key_map: dict[str, str]
    layout: LayoutName = "native"
    placement: Placement = "pre_activation"

    @property
    def inserted(self) -> tuple[Site, ...]:
        """The sites that get a BatchNorm."""
        return tuple(site for site in self.sites if site.decision == "insert")

    def __str__(self) -> str:
        return printed(self._parts())

    def _parts(self) -> tuple[Part, ...]:
        """Return what `print` shows."""
        if not self.sites:
            return (self._summary(),)
        rows = [
            (s.path, s.kind, str(s.channels or ""), s.decision, s.norm, s.reason)
            for s in self.sites
        ]
        head = ("layer", "type", "channels", "decision", "BatchNorm", "reason")
        table = Table(
            head,
            rows,
            right=("channels",),
            paths=("layer", "BatchNorm"),
            spare=("BatchNorm", "type", "channels"),
        )
        return table, self._summary()

    def __repr__(self) -> str:
        skipped = f"; skipped: {shortened(self.skipped(), 60)}" if self.skipped() else ""
        more = "; print it for all" if self.sites else ""
        return in_short(self, f"{self._summary(shortened(self.model))}{skipped}{more}")

    def _repr_html_(self) -> str:
        """Show itself in a notebook: how many layers get a BatchNorm, why others do not, each."""
        if not self.sites:
            return view(paragraph(self._summary()))
        layers, inserted = len(self.sites), len(self.inserted)
        counts = [("BatchNorm", inserted, ""), *(("none", n, r) for r, n in self._reasons())]
        shares = [(what, Bar(f"{n:,}", n / layers), reason) for what, n, reason in counts if n]
        head = ("layer", "type", "channels", "BatchNorm", "reason")
        rows = [
            (s.path, s.kind, str(s.channels or ""), s.norm or "none", s.reason) for s in self.sites
        ]
        return view(
            html_table(self._summary(), ("they get", "layers", "because"), shares),
            html_table("In the order of execution", head, rows, right=("channels",)),
        )

    def _summary(self, model: str = "") -> str:
        model = model or one_line(self.model)
        if not self.sites:
            return f"{model} has no convolutions"
        layers = "layers" if any(s.dims == 0 for s in self.sites) else "convolutions"
        frozen = sum(site.frozen for site in self.inserted)
        follow = f"; {frozen} of these follow frozen layers and do not learn" if frozen else ""
        return (
            f"{model}: {len(self.inserted)} of {len(self.sites)} {layers} get a BatchNorm{follow}"
        )

    def _reasons(self) -> list[tuple[str, int]]:
        """List the kinds of reasons for which layers get no BatchNorm, and how many they are."""
        reasons = (site.reason for site in self.sites if site.decision == "skip")
        return Counter(re.split("; include=| by ", reason)[0] for reason in reasons).most_common()

    def skipped(self) -> str:
        """Say in a few words why layers get no BatchNorm, and how many for each reason."""
        found = self._reasons()
        more = f", and {len(found) - 3} more reasons" if len(found) > 3 else ""
        return ", ".join(f"{kind} ({count})" for kind, count in found[:3]) + more

    def to_json(self) -> str:
        """Write the plan for `from_json`."""
        return json.dumps(to_plain(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote; RetrofitError for anything else."""
        try:
            return from_plain(cls, json.loads(text))
        except (ValueError, TypeError, RecursionError) as error:
            raise RetrofitError(f"this is not a plan: {error}") from error
