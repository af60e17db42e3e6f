"""What happens to every convolution of a model: data, to print and to store."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from retrofit.errors import RetrofitError
from retrofit.tables import table


@dataclass(frozen=True)
class Site:
    """One convolution and what happens to it.

    Attributes:
        path: its module path in the original model; for a function, that of the calling module
            followed by the function's name.
        kind: class or function name.
        channels: output channels, 0 where unknown (a function).
        dims: spatial axes.
        calls: calls in one forward pass.
        decision: "insert" or "skip".
        reason: why, in a few words.
        conv, norm: module paths of the convolution and its BatchNorm in the converted model;
            empty for a site that is skipped.
    """

    path: str
    kind: str
    channels: int
    dims: int
    calls: int
    decision: Literal["insert", "skip"]
    reason: str
    conv: str = ""
    norm: str = ""


@dataclass(frozen=True)
class Plan:
    """Every convolution of a model in the order of execution, and what happens to each.

    Attributes:
        model: class name of the planned model.
        sites: all convolutions, those never called last.
        renumbered: paths of the Sequentials whose children move up to make room; at every other
            place a convolution becomes `nn.Sequential(conv=..., bn=...)`.
        last: path of the inserted site that is called last, None if nothing is inserted.
        key_map: keys of the original state dict to keys of the converted one.
    """

    model: str
    sites: tuple[Site, ...]
    renumbered: tuple[str, ...]
    last: str | None
    key_map: dict[str, str]

    @property
    def inserted(self) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if site.decision == "insert")

    def __str__(self) -> str:
        rows = [
            (s.path, s.kind, str(s.channels or ""), s.decision, s.norm or "", s.reason)
            for s in self.sites
        ]
        head = ("layer", "type", "channels", "decision", "BatchNorm", "reason")
        summary = f"{len(self.inserted)} of {len(self.sites)} convolutions get a BatchNorm"
        if not rows:
            return f"{self.model} has no convolutions"
        return f"{table(head, rows, right='channels')}\n{self.model}: {summary}"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote; RetrofitError for anything else."""
        try:
            raw: dict[str, Any] = json.loads(text)
            sites = tuple(_checked(Site(**site)) for site in raw.pop("sites"))
            renumbered = tuple(map(str, raw.pop("renumbered")))
            return cls(sites=sites, renumbered=renumbered, **raw)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise RetrofitError(f"this is not a plan: {error}") from error


def _checked(site: Site) -> Site:
    """`site`, if its values have the types they should; else TypeError."""
    for field in fields(Site):
        value = getattr(site, field.name)
        if not isinstance(value, int if field.name in ("channels", "dims", "calls") else str):
            raise TypeError(f"the {field.name} of a site is {value!r}")
    if site.decision not in ("insert", "skip") or site.dims not in (1, 2, 3):
        raise TypeError(f"{site.path} is to be {site.decision} with {site.dims} spatial axes")
    return site
