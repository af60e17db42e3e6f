"""BatchNorm absorbed into weight and bias of the layer before it: the inverse of the conversion.

`fold_pairs` finds which layer each BatchNorm follows, `affine_map` what it computes, and
`absorbing` gives it to the layer.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import fx, nn

from retrofit.errors import RetrofitError, warn
from retrofit.plans import Plan
from retrofit.running.shared_copy import (
    refuse_inference_mode,
    refuse_lazy,
    shared_copy,
    uncollected,
)
from retrofit.surgery import graph
from retrofit.surgery.absorbing import absorb, absorb_into_function, function_before
from retrofit.surgery.affine_map import (
    AffineMap,
    UnfoldableError,
    affine_map,
    batchnorms,
    is_batchnorm,
)
from retrofit.surgery.batchnorm import LastAxisBatchNorm
from retrofit.surgery.fold_pairs import find_pairs
from retrofit.surgery.native import find_site, replace, take_out
from retrofit.surgery.record import attach, record_of

M = TypeVar("M", bound=nn.Module)
EARLIER = "it was there before the conversion"
LATER = "it was added after the conversion: fold the folded model again to absorb it"
NAMED = 3  # paths of each kind in a warning


@dataclass(frozen=True)
class Folded(Generic[M]):
    """A folded model, and what is left in it.

    Attributes:
        model: the folded copy.
        folded: how many BatchNorms were absorbed.
        left: paths of the others, and why they stay.
        unknown: arguments of forward whose other values may call other layers.
    """

    model: M
    folded: int
    left: Mapping[str, str]
    unknown: tuple[str, ...] = ()

    @property
    def remarks(self) -> list[str]:
        """Say what the user has to know: what is left unasked, or that nothing was folded."""
        said = []
        if not self.folded or any(reason != EARLIER for reason in self.left.values()):
            said.append(f"{self}; retrofit.unfoldable lists each" if self.left else str(self))
        if self.unknown:
            said.append(
                f"folded as {type(self.model).__name__}.forward is called by default: other values "
                f"of {', '.join(self.unknown)} may call other layers, and torch.fx cannot tell"
            )
        return said

    def __str__(self) -> str:
        total = self.folded + len(self.left)
        if not total:
            return f"this {type(self.model).__name__} has no BatchNorm: nothing was folded"
        kinds: dict[str, list[str]] = {}
        for path, reason in self.left.items():
            kinds.setdefault(reason, []).append(path)
        lines = (f"{_listed(paths)}: {reason}" for reason, paths in kinds.items())
        return f"{len(self.left)} of {total} BatchNorms stay: {'; '.join(lines)}"


def _listed(paths: list[str]) -> str:
    more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
    return f"{', '.join(path or 'the model' for path in paths[:NAMED])}{more}"


def fold(model: M, plan: Plan | None = None, *, example: Any = None) -> M:
    """Absorb the BatchNorms of a copy of `model` into the layers before them.

    The folded network computes, up to rounding, what `model` computes in eval mode. Right after
    the conversion, when each BatchNorm is the identity, the original state dict comes back bit
    for bit. BatchNorms that stay are counted in a warning, with the reasons; `unfoldable` lists
    them.

    Args:
        model: converted by this package, or any other with BatchNorm after convolutions or Linear
            layers; not changed.
        plan: which BatchNorms, and the containers to restore; by default the model's own, so that
            what was there before the conversion stays, even if the conversion added nothing; and
            those of parts of it that were converted on their own. Outside of these every BatchNorm
            is folded that alone follows a layer, in every call that torch.fx can follow, and
            nn.Identity takes its place so that no index moves. Those
            that are not torch's own (timm's BatchNormAct2d, FrozenBatchNorm2d) are tried; their
            dropout and activation stay in their place. Inputs have a batch axis.
        example: for what has no plan, one batch, as for `plan`: the pairs are then read off a run,
            for models that torch.fx cannot follow, and calls that differ from the run are not seen.
            It also tells whether a BatchNorm1d normalises the channels of a Linear layer.

    Raises:
        RetrofitError: the plan does not fit; without one, torch.fx cannot trace the model, or it is
            an exported program or TorchScript. With a plan, where a BatchNorm has no running
            statistics, or some that are no numbers, has a hook, or is not the identity and: comes
            after an activation; its layer feeds several, has a hook, is parametrized other than by
            weight_norm over its output channels, or does not follow its weight and bias linearly
            (weight standardisation); or follows a function whose weight is no parameter of its own.
    """
    result = folded(model, plan, example)
    for remark in result.remarks:
        warn(remark)
    return result.model


def unfoldable(
    model: nn.Module, plan: Plan | None = None, *, example: Any = None
) -> dict[str, str]:
    """List the BatchNorms that `fold`, called alike, leaves in a model, with the reasons.

    Args:
        model: converted by this package, or any other with BatchNorm; not changed.
        plan: which BatchNorms; by default the model's own, or else all.
        example: one batch, for a model that torch.fx cannot trace, as for `fold`.

    Returns:
        Module path to reason.

    Raises:
        RetrofitError: as `fold` does.

    Examples:
        >>> retrofit.unfoldable(torchvision.models.densenet121())["features.norm5"]
        'it follows cat, no convolution or Linear layer'
    """
    return dict(folded(model, plan, example).left)


@uncollected()
def folded(model: M, plan: Plan | None = None, example: Any = None) -> Folded[M]:
    """Fold a copy of `model`, as `fold` does, and list what is left."""
    refuse_inference_mode()
    _refuse_program(model)
    if plan is not None and not isinstance(plan, Plan):
        raise RetrofitError(
            f"plan must be a Plan, not a {type(plan).__name__}: a batch is passed as example="
        )
    plans = _plans_of(model) if plan is None else {"": plan}
    refuse_lazy(model)
    if not plans and isinstance(model, fx.GraphModule) and graph.is_exported(model):
        raise _exported()
    result = shared_copy(model)
    before = batchnorms(result)
    new: dict[nn.Module, nn.Module] = {}
    inserted: set[nn.Module] = set()
    for part, own in [(result.get_submodule(path), plans[path]) for path in plans]:
        norms, gone = _fold_planned(part, own)
        attach(part, None)
        inserted |= norms
        new |= gone
    others = {path: norm for path, norm in before.items() if norm not in inserted}
    left = {path: reason for path in others if (reason := _not_inserted(path, plans))}
    stay, unknown, gone = _fold_all(result, others.keys() - left.keys(), example)
    left = {path: reason for path in others if (reason := left.get(path) or stay.get(path))}
    return Folded(_copied(result, new | gone), len(before) - len(left), left, unknown)


def _plans_of(model: nn.Module) -> dict[str, Plan]:
    """Find the plans by which a model and parts of it were converted, by path, outermost first."""
    records = {"": record_of(model)}
    records |= {path: record_of(module) for path, module in model.named_modules()}
    for path, record in records.items():
        if record is not None and record.prepared:
            name = type(model.get_submodule(path)).__name__
            raise RetrofitError(f"{path or 'this'} {name} is prepared, not converted: convert it")
    return {path: record.plan for path, record in records.items() if record is not None}


def _not_inserted(path: str, plans: Mapping[str, Plan]) -> str | None:
    """Say why a BatchNorm stays that no conversion inserted; None if it is in no part with one."""
    reasons = []
    for part, plan in plans.items():
        if not part or path.startswith(f"{part}."):
            keys = (f"{part}.{key}".lstrip(".") for key in plan.key_map.values())
            known = any(key.startswith(f"{path}.") for key in keys)
            reasons.append(EARLIER if known else LATER)
    return min(reasons, key=[EARLIER, LATER].index, default=None)


def _copied(model: M, new: Mapping[nn.Module, nn.Module]) -> M:
    """Copy `model`, with new modules in place of those it holds other than by registration."""
    memo: dict[int, Any] = {}
    for module, other in new.items():
        memo[id(module)] = copy.deepcopy(other, memo)
    return copy.deepcopy(model, memo)


def _refuse_program(model: object) -> None:
    if type(model).__name__ == "ExportedProgram":
        raise _exported()


def _exported() -> RetrofitError:
    return RetrofitError(
        "this is an exported program, which has functions in place of layers: fold the model that "
        "it was exported from, and export the result"
    )


# --- by a plan: all that it inserted, or none ----------------------------------------------------


def _fold_planned(
    model: nn.Module, plan: Plan
) -> tuple[set[nn.Module], dict[nn.Module, nn.Module]]:
    """Fold and take out, in place, what `plan` inserted.

    A BatchNorm that is the identity asks nothing of what it follows.

    Returns the BatchNorms, and what stands for each module that is gone.
    """
    found = {site.path: (site, *find_site(model, site)) for site in plan.inserted}
    maps = {path: _map_after(norm, path) for path, (_, _, norm) in found.items()}
    changing = [path for path, found_map in maps.items() if not found_map.is_identity]
    for path in changing:
        site, layer, _ = found[path]
        sharing = [p for p, (_, other, _) in found.items() if layer is not None and other is layer]
        if plan.placement == "post_activation":
            activation = f"its activation {site.host}" if site.host else "an activation"
            raise RetrofitError(
                f"the BatchNorm of {path} comes after {activation}: the weights before the "
                "activation cannot absorb it (placement='pre_activation' can be folded)"
            )
        if len(sharing) > 1:
            raise RetrofitError(
                f"one layer feeds the BatchNorms of {' and '.join(sharing)}: its one weight cannot "
                "absorb them"
            )
    for path in changing:
        site, layer, _ = found[path]
        try:
            _absorb_one(model, layer, site.norm, maps[path])
        except UnfoldableError as error:
            raise RetrofitError(error.after(path)) from error
    inserted = {
        norm.bn if isinstance(norm, LastAxisBatchNorm) else norm for _, _, norm in found.values()
    }
    return inserted, take_out(model, plan)


def _map_after(norm: nn.Module, path: str) -> AffineMap:
    """Find what the BatchNorm after the layer at `path` computes; RetrofitError if that is more."""
    inner = norm.bn if isinstance(norm, LastAxisBatchNorm) else norm
    if not is_batchnorm(inner):
        raise RetrofitError(f"after {path} comes a {type(inner).__name__}, not a BatchNorm")
    try:
        found = affine_map(norm)
    except UnfoldableError as error:
        raise RetrofitError(error.after(path)) from error
    if not isinstance(found.rest, nn.Identity):
        raise RetrofitError(
            f"the BatchNorm after {path} has an activation of its own, for which the plain model "
            "has no place"
        )
    return found


# --- without a plan: what can be absorbed --------------------------------------------------------


def _fold_all(
    model: nn.Module, norms: Collection[str], example: Any
) -> tuple[dict[str, str], tuple[str, ...], dict[nn.Module, nn.Module]]:
    """Fold, in place, those of the BatchNorms at `norms` that a layer can absorb.

    Returns reasons of those that stay, what `Folded.unknown` says, and what stands for each
    BatchNorm that is gone.
    """
    if not norms:
        return {}, (), {}
    found = find_pairs(model, example)
    layers: dict[str, nn.Module | None] = {
        norm: model.get_submodule(pair.layer) for norm, pair in found.pairs.items() if norm in norms
    }
    left = {path: reason for path, reason in found.left.items() if path in norms}
    if isinstance(model, fx.GraphModule):  # whose functions' parameters can be changed
        layers |= {path: None for path in left if function_before(model, path) is not None}
    new: dict[nn.Module, nn.Module] = {}
    for path, layer in layers.items():
        norm = model.get_submodule(path)
        try:
            found_map = affine_map(norm)
            if not found_map.is_identity:
                _absorb_one(model, layer, path, found_map)
        except UnfoldableError as error:
            left[path] = error.after("its layer")
        else:
            new[norm] = found_map.rest.train(norm.training)
            left.pop(path, None)
    replace(model, new)
    return left, found.unknown, new


def _absorb_one(model: nn.Module, layer: nn.Module | None, norm: str, found: AffineMap) -> None:
    """Give `layer`, or the function before the BatchNorm at path `norm`, its scale and shift.

    Raises UnfoldableError.
    """
    if layer is not None:
        if isinstance(model, fx.GraphModule) and _is_read(model, layer):
            raise UnfoldableError(
                "the weight of {layer} serves a function too: it cannot absorb the BatchNorm"
            )
        absorb(layer, found.alpha, found.shift)
        return
    node = function_before(model, norm) if isinstance(model, fx.GraphModule) else None
    if not isinstance(model, fx.GraphModule) or node is None:
        raise UnfoldableError("{layer} is a function: there is no layer that could absorb it")
    absorb_into_function(model, node, found.alpha, found.shift)


def _is_read(model: fx.GraphModule, layer: nn.Module) -> bool:
    """Tell whether a graph uses this layer's parameters other than by calling it."""
    own = {id(parameter) for parameter in layer.parameters()}
    names = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in own}
    return any(node.op == "get_attr" and node.target in names for node in model.graph.nodes)
