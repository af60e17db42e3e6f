"""prepare, convert, insert: from a model to the same model with BatchNorm."""

from __future__ import annotations

import copy as copying
import dataclasses
import warnings
from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from retrofit import sites
from retrofit.batches import ForwardFn
from retrofit.calibration import calibrate
from retrofit.copies import shared_copy
from retrofit.errors import RetrofitError
from retrofit.identity import exact_identity
from retrofit.layers import batchnorm_class
from retrofit.moments import MomentObserver
from retrofit.plans import Plan, Site
from retrofit.record import Record, attach, record_of, required_record
from retrofit.rewrite import find_site, put_after_sites, replace
from retrofit.sites import Patterns

M = TypeVar("M", bound=nn.Module)


def prepare(model: M, plan: Plan | None = None) -> M:
    """A copy of `model` with a `MomentObserver` wherever a BatchNorm will be, in eval mode.

    The copy has modules of its own and shares the parameters' storage, so it costs little memory;
    do not train it. The original is not changed.

    Args:
        model: any module that `plan` can plan.
        plan: made by `plan(model)`, which is the default.

    Raises:
        RetrofitError: the plan is not one of this model, or the model is already prepared.
    """
    if _observers(model):
        raise RetrofitError(f"this {type(model).__name__} is already prepared")
    plan = plan or sites.plan(model)
    record = _extended(model, plan)
    prepared = shared_copy(model)
    put_after_sites(prepared, plan, _observer)
    training = tuple(path for path, module in prepared.named_modules() if module.training)
    for module in prepared.modules():
        module.training = False
    attach(prepared, dataclasses.replace(record, training=training))
    return prepared


def convert(
    prepared: M, *, eps: float = 1e-5, momentum: float | None = 0.1, copy: bool = True
) -> M:
    """The prepared model with each observer replaced by a BatchNorm that is the exact identity.

    running_mean and running_var are the calibrated moments, weight is sqrt(running_var + eps)
    and bias is running_mean, so that in eval mode on a CPU the outputs are those of the original
    bit for bit. weight and bias require a gradient if the convolution's weight does. Modules are
    in the mode, train or eval, in which the original was.

    Args:
        prepared: made by `prepare`, after calibration; not changed.
        eps, momentum: of the BatchNorms. eps is not part of a state dict: any other than 1e-5
            has to be set again wherever the weights are loaded.
        copy: False shares the parameters' storage with the original instead of copying it.

    Raises:
        RetrofitError: a site saw no data, or its moments are not finite or leave float32's range.
    """
    record = required_record(prepared, "prepare")
    if eps != 1e-5:
        warnings.warn(
            f"eps={eps:g} is not stored in a state dict: a model with torch's default of 1e-5 "
            "that loads these weights computes something else",
            stacklevel=2,
        )
    batchnorms: dict[nn.Module, nn.Module] = {}
    images = 0
    model = shared_copy(prepared)
    for site in record.plan.inserted if _observers(model) else ():
        conv, observer = find_site(model, site)
        if not isinstance(observer, MomentObserver):
            raise RetrofitError(f"{site.norm} is no observer: convert takes what prepare made")
        moments = observer.moments()
        batchnorm = _batchnorm(site, conv, moments.mean, moments.var, eps, momentum)
        batchnorm.num_batches_tracked = observer.batches.to(_weight(conv).device, copy=True)
        batchnorms[observer] = batchnorm
        images = max(images, int(observer.images) // site.calls)
    replace(model, batchnorms)
    training = set(record.training)
    for path, module in model.named_modules():
        module.training = path in training
    if batchnorms:
        record = Record(record.plan, eps, momentum, images)
    attach(model, dataclasses.replace(record, training=()))
    return copying.deepcopy(model) if copy else model


def insert(
    model: M, plan: Plan | None = None, *, eps: float = 1e-5, momentum: float | None = 0.1
) -> M:
    """A copy of `model` with BatchNorms of mean 0 and variance 1, each the exact identity.

    No data is needed: for loading a checkpoint of a converted model into, and as the uncalibrated
    baseline. In eval mode it computes what `model` computes; in train mode, where batch statistics
    count, it does not.

    Args and errors as for `prepare` and `convert`.
    """
    plan = plan or sites.plan(model)
    record = _extended(model, plan)
    result = shared_copy(model)

    def standard(site: Site, conv: nn.Module) -> nn.Module:
        zero = torch.zeros(site.channels, dtype=torch.float64)
        return _batchnorm(site, conv, zero, zero + 1, eps, momentum)

    put_after_sites(result, plan, standard)
    attach(result, Record(plan, eps, momentum) if plan.inserted else record)
    return copying.deepcopy(result)


def add_batchnorm(
    model: M,
    data: Iterable[Any],
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    renumber: Patterns = None,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    device: torch.device | str | None = None,
    max_images: int | None = None,
    forward_fn: ForwardFn | None = None,
    progress: bool = True,
) -> M:
    """`model` with a calibrated BatchNorm after each convolution, and the same outputs.

    Plan, prepare, calibrate and convert in one call; see those for arguments and errors. The
    original is not changed.

    Example:
        >>> bn_vgg = retrofit.add_batchnorm(vgg, loader, max_images=1024)
    """
    plan = sites.plan(model, include=include, exclude=exclude, renumber=renumber)
    prepared = prepare(model, plan)
    calibrate(
        prepared,
        data,
        device=device,
        max_images=max_images,
        forward_fn=forward_fn,
        progress=progress,
    )
    return convert(prepared, eps=eps, momentum=momentum)


def _observers(model: nn.Module) -> bool:
    return any(isinstance(module, MomentObserver) for module in model.modules())


def _extended(model: nn.Module, plan: Plan) -> Record:
    """The record for `model` once `plan` is carried out: its own if there is nothing to do."""
    earlier = record_of(model)
    if earlier and plan.inserted:
        raise RetrofitError(
            f"this {type(model).__name__} was converted before: fold it, then plan all at once"
        )
    return earlier or Record(plan)


def _observer(site: Site, conv: nn.Module) -> MomentObserver:
    observer = MomentObserver(site.path, site.channels, site.dims, _weight(conv).device)
    observer.training = conv.training
    return observer


def _batchnorm(
    site: Site,
    conv: nn.Module,
    mean: Tensor,
    var: Tensor,
    eps: float,
    momentum: float | None,
) -> _BatchNorm:
    """The BatchNorm that is the identity for channels of these moments."""
    weight = _weight(conv)
    # float32 whatever the network's precision: 16 bits cannot hold the exact identity.
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    batchnorm = batchnorm_class(site.dims)(
        site.channels, eps=eps, momentum=momentum, device=weight.device, dtype=dtype
    )
    numbers = np.float64 if dtype == torch.float64 else np.float32
    try:
        with np.errstate(over="ignore"):
            identity = exact_identity(
                mean.cpu().numpy().astype(numbers), var.cpu().numpy().astype(numbers), eps
            )
    except RetrofitError as error:
        raise RetrofitError(f"{site.path}: {error}") from error
    arrays = zip(("running_mean", "running_var", "weight", "bias"), identity, strict=True)
    batchnorm.load_state_dict(
        {name: torch.from_numpy(array) for name, array in arrays}
        | {"num_batches_tracked": torch.zeros((), dtype=torch.int64)}
    )
    weights = [p for name, p in conv.named_parameters() if not name.endswith("bias")]
    batchnorm.requires_grad_(any(p.requires_grad for p in weights))
    batchnorm.training = conv.training
    return batchnorm


def _weight(conv: nn.Module) -> Tensor:
    return conv.weight  # type: ignore[return-value]
