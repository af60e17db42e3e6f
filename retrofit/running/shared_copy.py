"""Copies of a model that share its tensors."""

from __future__ import annotations

import copy
import gc
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from retrofit.errors import RetrofitError

M = TypeVar("M", bound=nn.Module)
# By name, since importing torch.distributed and torch._dynamo takes long.
WRAPPERS = {
    "AveragedModel": "module",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}


def shared_copy(
    model: M, keep: Iterable[object] = (), instead: Mapping[nn.Module, nn.Module] | None = None
) -> M:
    """Copy the modules over the same parameter storage; those in `keep` are not even copied.

    A module in `instead` is replaced by what that maps it to, wherever the model holds it: in a
    list or under another attribute, too.

    Parameters are new objects, or moving the copy would move the original; ties stay ties. Those
    that were made in torch.inference_mode() are cloned, so that they can be trained.
    Buffers are copied, since forward may write to them. Gradients are left behind.

    Raises RetrofitError when the model holds something that cannot be copied, such as a lock, or a
    module that gives itself as its copy; or is, or holds, a wrapper (DataParallel, torch.compile's)
    that hides the modules inside.
    """
    refuse_wrappers(model)
    memo: dict[int, object] = {id(thing): thing for thing in keep}
    memo |= {id(module): other for module, other in (instead or {}).items()}
    for module in model.modules():
        for parameter in module._parameters.values():
            if type(parameter) is nn.Parameter:
                # One of torch.inference_mode() can never be trained; its clone outside of it can.
                inference = parameter.is_inference() and not torch.is_inference_mode_enabled()
                tensor = parameter.clone() if inference else parameter.detach()
                shared = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
                memo.setdefault(id(parameter), shared)
        for name, value in vars(module).items():
            if type(value) in (OrderedDict, dict, set) and not value:
                # A dozen tables of hooks for each module: most of the time that deepcopy takes.
                memo.setdefault(id(value), type(value)())
            elif name not in ("_parameters", "_modules"):
                # What was computed with gradients, which deepcopy refuses: weight_norm's weight,
                # or what a forward pass has cached, in a dict perhaps.
                for tensor in _tensors_in(value):
                    if not tensor.is_leaf:
                        memo.setdefault(id(tensor), tensor.detach())
    known = dict(memo)
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise RetrofitError(
            f"this {type(model).__name__} cannot be copied: {_culprit(model, known)}{error}"
        ) from error
    copies = set(map(id, copied.modules()))
    for path, module in model.named_modules():
        if id(module) in copies:
            what = f"{path} of this {type(model).__name__}" if path else f"a {type(model).__name__}"
            raise RetrofitError(
                f"{what} cannot be copied: its __deepcopy__ gives the module itself, which a "
                "retrofit would change; take it out, or let it copy"
            )
    return copied


def held_tensors(module: nn.Module) -> Iterator[Tensor]:
    """List the tensors that a module itself holds, registered or not."""
    return _tensors_in({n: value for n, value in vars(module).items() if n != "_modules"})


def _tensors_in(value: object) -> Iterator[Tensor]:
    """List the tensors in nested dicts, lists and tuples, and no further: not through a graph."""
    seen, waiting = set(), [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, (dict, list, tuple, deque)) and id(one) not in seen:
            seen.add(id(one))
            waiting += one.values() if isinstance(one, dict) else one


def _culprit(model: nn.Module, known: dict[int, object]) -> str:
    """Name the attribute that does not copy, and what to do; "" if it is none alone."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name == "_modules":
                continue
            try:
                copy.deepcopy(value, dict(known))
            except Exception:  # noqa: BLE001 - any, as it is looked for
                where = f"{path}.{name}".lstrip(".")
                kind = type(value).__name__
                return f"delete its attribute {where}, a {kind}, and set it again after; "
    return ""


def refuse_inference_mode() -> None:
    """Raise RetrofitError in torch.inference_mode(), whose tensors can never be trained."""
    if torch.is_inference_mode_enabled():
        raise RetrofitError(
            "what is made in torch.inference_mode() can never be trained: call this outside of it, "
            "or under torch.no_grad()"
        )


def refuse_lazy(model: nn.Module) -> None:
    """Raise RetrofitError for layers that wait for a first batch to tell their shape."""
    for path, module in model.named_modules():
        if any(map(is_lazy, (*module._parameters.values(), *module._buffers.values()))):
            raise RetrofitError(
                f"{path or 'the model'} is a lazy {type(module).__name__} that has no shape yet: "
                "run one batch through the model first, in its factory if it has one"
            )


def refuse_wrappers(model: nn.Module) -> None:
    """Raise RetrofitError for modules that hide what is inside: see `WRAPPERS`, and TorchScript."""
    for path, module in model.named_modules():
        name = type(module).__name__
        inside = WRAPPERS.get(name) if type(module).__module__.startswith("torch.") else None
        if inside is not None:
            inner = f"{path}.{inside}".lstrip(".")
            where = f"{path} of this {type(model).__name__}" if path else "this model"
            raise RetrofitError(
                f"{where} is a {name} around a {type(getattr(module, inside)).__name__}: pass what "
                f"is inside (model.{inner}), and wrap the result anew"
            )
    if isinstance(model, torch.jit.ScriptModule):
        raise RetrofitError(
            "this model is a TorchScript module, whose layers are fixed: pass the Python model "
            "that it was made from"
        )


@contextmanager
def uncollected() -> Iterator[None]:
    """Hold garbage collection back in the block, or in the function that this decorates.

    A copy or a trace of a network is ten thousands of new objects, none of them garbage. They make
    Python look through all that torch has loaded several times over: 40 % of the time it takes to
    plan a network of 1,000 convolutions.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
