"""Convolutions inside TorchScript: listed, since they are there; skipped, since they are fixed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, cast

import torch
from torch import nn

from retrofit.plans import Options, Site
from retrofit.tracing.operations import CONVOLUTIONS, function_name

# In a graph that torch.jit.freeze made, there are no modules left.
ATEN = [
    "aten::_convolution",
    *(f"aten::conv{t}{d}d" for t in ("", "_transpose") for d in (1, 2, 3)),
]


def scripted_sites(model: nn.Module, options: Options) -> list[Site]:
    """Make a site for each convolution (and Linear layer, where asked for) in TorchScript parts."""
    kinds = CONVOLUTIONS | ({"linear"} if options.linear else set())
    sites: list[Site] = []
    outer = ""
    for path, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule) or (outer and path.startswith(outer)):
            continue
        outer = f"{path}."
        found = [
            _site(inner, path, str(layer.original_name), layer)
            for inner, layer in module.named_modules(prefix=path)
            if str(getattr(layer, "original_name", "")).lower() in kinds
        ]
        sites += found or [
            _site(f"{path}.{name}{f'@{number}' * bool(number)}", path, name)
            for number, name in enumerate(_in_graph(module))
        ]
    return sites


def _site(path: str, part: str, kind: str, layer: Any = None) -> Site:
    digits = [letter for letter in kind if letter in "123"]
    axes = cast("Literal[0, 1, 2, 3]", int(digits[0]) if digits else 0)
    width = getattr(layer, "out_channels", getattr(layer, "out_features", 0))
    reason = f"inside {part}, which is TorchScript: its layers are fixed; use the Python module"
    return Site(path, kind, int(width), axes, 0, "skip", reason)


def _in_graph(module: torch.jit.ScriptModule) -> Iterator[str]:
    """Name the convolutions of a graph without modules."""
    graph: Any = module.inlined_graph
    for kind in ATEN:
        for _ in graph.findAllNodes(kind):
            yield function_name(kind.removeprefix("aten::"))
