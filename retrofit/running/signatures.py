"""What a model's `forward` takes: its arguments by name, and what the first one is annotated as."""

from __future__ import annotations

import ast
import inspect
import re
import types
import typing
from collections import deque
from collections.abc import Collection, Iterable, Mapping, MutableSequence, Sequence
from typing import Any, Literal, Union

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import TreeSpec, tree_unflatten

Kind = Literal["tensor", "list", "tuple", "mapping"]
_LISTS = (list, Sequence, Iterable, Collection, MutableSequence, deque)
_NAMES: dict[str, Kind] = {
    "Tensor": "tensor",
    "tuple": "tuple",
    **dict.fromkeys(("dict", "Mapping", "OrderedDict", "MutableMapping"), "mapping"),
    **{one.__name__: "list" for one in _LISTS},
}
_COMMENT = re.compile(r"#\s*type:\s*\((.+?)\)\s*->")


def signature_of(model: nn.Module) -> tuple[nn.Module, dict[str, inspect.Parameter]]:
    """Find what `forward` takes by name; of a wrapper, such as DataParallel, what is inside."""
    try:
        parameters = inspect.signature(model.forward).parameters
    except ValueError:  # a traced TorchScript module
        return model, {}
    named = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    if (example := _exported_with(model)) is not None:
        named = {
            name: p.replace(kind=p.KEYWORD_ONLY if name in example[1] else p.POSITIONAL_ONLY)
            for name, p in named.items()
        }
    for name in () if named else ("module", "_orig_mod"):
        if isinstance(inside := getattr(model, name, None), nn.Module):
            return signature_of(inside)
    return model, named


def takes_lists(model: nn.Module) -> bool:
    """Tell whether `model` is annotated to take a list of images, as torchvision's detectors."""
    kinds = first_kinds(model)
    return "list" in kinds and "tensor" not in kinds


def first_kinds(model: nn.Module) -> set[Kind]:
    """Tell what the first argument is annotated as: several for a union, none for anything else."""
    if (example := _exported_with(model)) is not None:
        return _kinds(type(next(iter((*example[0], *example[1].values())), None)))
    model, named = signature_of(model)
    parameter = next(iter(named), "")
    raw = getattr(named.get(parameter), "annotation", None)
    try:
        hint = typing.get_type_hints(model.forward).get(parameter)
    except Exception:  # noqa: BLE001 - it may be any text, and is evaluated: of names unknown here
        hint = raw if isinstance(raw, str) else None
    return _kinds(_commented(model) if hint is None else hint)


def sample_axes(model: nn.Module) -> int:
    """Count the axes of one sample, without the batch: 3 of a picture, for a model of Conv2d."""
    conv = _first(model, _ConvNd)
    if conv is None:
        return 1 if _first(model, nn.Linear) else 3
    return len(vars(conv)["kernel_size"]) + 1


def first_channels(model: nn.Module) -> int:
    """Count the channels that the convolution takes which was registered first; 0 without."""
    conv = _first(model, _ConvNd)
    return 0 if conv is None else int(vars(conv)["in_channels"])


def _first(model: nn.Module, kind: type[nn.Module]) -> nn.Module | None:
    """Find the first layer of a kind. Its attributes are read by `vars`: to trace a model, what
    its code reads in the usual way is watched.
    """
    return next((module for module in model.modules() if isinstance(module, kind)), None)


def _exported_with(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Find the arguments that torch.export was given, with None for tensors; None without.

    Its program takes by place, and by name, what was given so, and in no other way.
    """
    spec = vars(model).get("_in_spec")
    if not isinstance(spec, TreeSpec):
        return None
    found = tree_unflatten([None] * spec.num_leaves, spec)
    if isinstance(found, tuple) and [type(part) for part in found] == [tuple, dict]:
        return found
    return None  # what torch.fx makes of concrete_args


def _commented(model: nn.Module) -> str:
    """Find the types in a comment, as TorchScript took them and torchvision's RetinaNet has."""
    try:
        found = _COMMENT.search(inspect.getsource(model.forward))
    except (OSError, TypeError):
        return ""
    return f"First[{found[1]}]" if found else ""


def _kinds(hint: Any) -> set[Kind]:
    if isinstance(hint, str):
        try:
            return _kinds_of_text(ast.parse(hint, mode="eval").body)
        except SyntaxError:
            return set()
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        return {kind for one in typing.get_args(hint) for kind in _kinds(one)}
    found = origin or hint
    if found in _LISTS:
        return {"list"}
    if not isinstance(found, type) or hasattr(found, "_fields"):
        return set()
    families: tuple[tuple[type, Kind], ...] = (
        (Tensor, "tensor"),
        (Mapping, "mapping"),
        (tuple, "tuple"),
        (list, "list"),
    )
    return {kind for family, kind in families if issubclass(found, family)}


def _kinds_of_text(node: ast.expr) -> set[Kind]:
    """Read an annotation that cannot be evaluated, or a comment's, which `First[...]` holds."""
    if isinstance(node, ast.BinOp):
        return _kinds_of_text(node.left) | _kinds_of_text(node.right)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _kinds(node.value)
    if not isinstance(node, ast.Subscript):
        name = ast.unparse(node).rpartition(".")[2]
        return {_NAMES[key] for key in {name, name.lower()} if key in _NAMES}
    inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    outer = ast.unparse(node.value).rpartition(".")[2]
    if outer in ("First", "Annotated", "Optional"):
        return _kinds_of_text(inner[0])
    if outer == "Union":
        return {kind for one in inner for kind in _kinds_of_text(one)}
    return _kinds_of_text(node.value)
