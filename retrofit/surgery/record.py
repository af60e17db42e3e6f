"""What a prepared or converted model knows of its own conversion.

Kept on the model as a dict of plain values, so that a pickle of the model loads without retrofit.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from retrofit.errors import RetrofitError
from retrofit.plans import Plan

_ATTRIBUTE = "_retrofit"


@dataclass(frozen=True)
class Record:
    """A plan that was carried out, and how.

    Attributes:
        plan: where the observers or BatchNorms are.
        eps, momentum: of the inserted BatchNorms.
        images: how many are behind their statistics; 0 after `insert`.
        prepared: observers stand in for the BatchNorms.
        training: of a prepared model, the modules that were in training mode.
    """

    plan: Plan
    eps: float = 1e-5
    momentum: float | None = 0.1
    images: int = 0
    prepared: bool = False
    training: tuple[str, ...] = ()


def attach(model: nn.Module, record: Record | None) -> None:
    """Replace the model's record; None removes it."""
    vars(model).pop(_ATTRIBUTE, None)
    kept = {_ATTRIBUTE: {**vars(record), "plan": record.plan.to_json()}} if record else {}
    vars(model).update(kept)
    if isinstance(model, fx.GraphModule):  # whose copies have no attributes but these
        model.meta["_user_preserved_attributes"] = kept


def record_of(model: nn.Module) -> Record | None:
    """Read the model's record; None for a model that is neither prepared nor converted."""
    if not isinstance(model, nn.Module):
        raise RetrofitError(f"expected an nn.Module, not a {type(model).__name__}")
    values = vars(model).get(_ATTRIBUTE)
    if values is None:
        return None
    return Record(**{**values, "plan": Plan.from_json(values["plan"])})


def required_record(model: nn.Module, made_by: str) -> Record:
    """Read the model's record, or raise RetrofitError naming what makes such a model."""
    record = record_of(model)
    if record is None:
        raise RetrofitError(
            f"this {type(model).__name__} carries no plan: expected a model made by {made_by}"
        )
    return record


def plan_of(model: nn.Module) -> Plan | None:
    """Return the plan by which a model was prepared or converted; None for any other model.

    Args:
        model: any module.

    Examples:
        >>> print(retrofit.plan_of(bn_vgg))
    """
    record = record_of(model)
    return record.plan if record else None
