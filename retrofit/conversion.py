"""prepare, convert, insert: from a model to the same model with BatchNorm."""

from __future__ import annotations

import copy as copying
import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from retrofit.calibration.calibrate import calibrate
from retrofit.calibration.observer import MomentObserver, observers_of, prepared_record
from retrofit.checking.verify import verify
from retrofit.errors import RetrofitError, warn
from retrofit.numerics.comparison import BRANCH_TOLERANCE
from retrofit.numerics.moments import ChannelMoments
from retrofit.numerics.tensor_checks import are_statistics
from retrofit.option_checks import check_flags, check_models, check_number
from retrofit.planning.plan import plan as planned
from retrofit.planning.plan import without
from retrofit.plans import ASKED, UNCALLED, LayoutName, Patterns, Placement, Plan, Site
from retrofit.running.batch_checks import check_data
from retrofit.running.call_arguments import ForwardFn
from retrofit.running.first_batch import looked_into
from retrofit.running.shared_copy import refuse_inference_mode, shared_copy, uncollected
from retrofit.surgery.batchnorm import matching_batchnorm, weight_of
from retrofit.surgery.native import find_site, put_after_sites, replace, take_out
from retrofit.surgery.record import Record, attach, record_of, required_record
from retrofit.tables import counted, few
from retrofit.tracing.operations import is_norm

M = TypeVar("M", bound=nn.Module)


@uncollected()
def prepare(model: M, plan: Plan | None = None) -> M:
    """Copy `model`, with a `MomentObserver` wherever a BatchNorm will be, in eval mode.

    The copy has modules of its own and shares the parameters' storage, so it costs little memory;
    do not train it. The original is not changed.

    Args:
        model: any module that `plan` can plan.
        plan: made by `plan(model)`, which is the default.

    Raises:
        RetrofitError: the plan is not one of this model, or the model is already prepared.
    """
    refuse_inference_mode()
    check_models("prepare", model)
    if observers_of(model):
        raise RetrofitError(f"this {type(model).__name__} is already prepared")
    plan = _checked_plan("prepare", plan) or planned(model)
    record = _extended(model, plan)
    _warn_of(plan, model)
    copied = shared_copy(model)

    def observer(site: Site, layer: nn.Module | None) -> nn.Module:
        device = weight_of(layer, copied).device
        return MomentObserver(site.path, site.channels, site.dims, device, last_axis=site.last_axis)

    prepared = cast("M", put_after_sites(copied, plan, observer))
    named = prepared.named_modules()
    training = tuple(path for path, module in named if getattr(module, "training", False))
    for module in prepared.modules():
        module.training = False
    attach(prepared, dataclasses.replace(record, prepared=True, training=training))
    return prepared


@uncollected()
def convert(
    prepared: M,
    *,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    match: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    share_storage: bool = False,
    skip_unused: bool = False,
) -> M:
    """Replace each observer of a prepared model by a BatchNorm that is the exact identity.

    running_mean and running_var are the calibrated moments, weight is sqrt(running_var + eps)
    and bias is running_mean, so that in eval mode on a CPU the outputs are those of the original
    bit for bit. weight and bias require a gradient if the convolution's weight does. Modules are
    in the mode, train or eval, in which the original was.

    Args:
        prepared: made by `prepare`, after calibration; not changed.
        eps: of the BatchNorms. It is not part of a state dict: any other than 1e-5 has to be set
            again wherever the weights are loaded.
        momentum: of the BatchNorms; None for a cumulative average.
        match: mean and variance, (C,) each, that the channels shall have instead of their own, by
            path of the convolution. Other sites keep theirs, and so do channels that were constant
            on the sample, which no scale makes vary. weight is sqrt(var + eps) and bias is mean of
            these, while running_mean and running_var stay those of the calibration. With its own
            `channel_moments(prepared)` the network is as it was; with those of others of its
            architecture this is REPAIR (Jordan et al., 2022), once
            `recalibrate(converted, data, layerwise=True)` has measured each layer anew behind those
            that are changed.
        share_storage: let the parameters share their storage with the original's, instead of
            copying it; training either then changes both.
        skip_unused: leave out the sites that saw no data, rather than refuse.

    Raises:
        RetrofitError: `prepare` did not make the model; a site saw no data, its moments are not
            finite or leave float32's range; or `match` does not fit the sites.
    """
    refuse_inference_mode()
    record = prepared_record(prepared, "convert")
    _check_options(eps, momentum)
    check_flags(share_storage=share_storage, skip_unused=skip_unused)
    if eps != 1e-5:
        warn(
            f"eps={eps:g} is not stored in a state dict: a model with torch's default of 1e-5 "
            "that loads these weights computes something else"
        )
    learned = [tensor for observer in observers_of(prepared) for tensor in observer.buffers()]
    model, plan = shared_copy(prepared, keep=learned), record.plan
    targets = _targets(plan, match or {})
    training = set(record.training)
    for path, module in model.named_modules():
        module.training = path in training
    observed = bool(observers_of(model))
    if unused := [site.path for site in plan.inserted if _saw_nothing(model, site)]:
        if not skip_unused:
            raise _unused(unused)
        plan = _leave_out(model, plan, unused)
        if not plan.inserted:
            _warn_of(plan, model)
    if observed:
        found = [(site, targets.get(site.path)) for site in plan.inserted]
        replace(model, dict(_batchnorm_for(model, *one, eps, momentum) for one in found))
        record = Record(plan, eps, momentum, _image_count(prepared, record.plan))
    attach(model, dataclasses.replace(record, prepared=False, training=()))
    return model if share_storage else copying.deepcopy(model)


def _batchnorm_for(
    model: nn.Module,
    site: Site,
    target: ChannelMoments | None,
    eps: float,
    momentum: float | None,
) -> tuple[nn.Module, nn.Module]:
    """Return the observer at `site`, and the BatchNorm in its place."""
    layer, observer = find_site(model, site)
    if not isinstance(observer, MomentObserver):
        raise RetrofitError(f"{site.norm} is no observer: convert takes what prepare made")
    moments = observer.moments()
    own = ChannelMoments(moments.mean, moments.var)
    if target is not None:  # no scale makes a constant channel vary
        pairs = zip(own, target, strict=True)
        target = ChannelMoments(*(a.where(moments.constant, b.cpu()) for a, b in pairs))
    batches = int(observer.statistics.batches[0])
    batchnorm = matching_batchnorm(
        site, layer, model, own, target, eps=eps, momentum=momentum, batches=batches
    )
    return observer, batchnorm.train(observer.training)


def _image_count(prepared: nn.Module, plan: Plan) -> int:
    """Count the images behind the statistics: a shared layer has several samples of each."""
    for site in plan.inserted:
        observer = find_site(prepared, site)[1]
        if isinstance(observer, MomentObserver) and observer.seen:
            return observer.seen // max(site.calls, 1)
    return 0


def _unused(paths: list[str]) -> RetrofitError:
    return RetrofitError(
        f"{few(paths)} saw no data: run "
        "calibration data through the prepared model; if that was done, the data does not "
        "reach these layers: exclude them, or pass skip_unused=True (--skip-unused)"
    )


def insert(
    model: M, plan: Plan | None = None, *, eps: float = 1e-5, momentum: float | None = 0.1
) -> M:
    """Copy `model`, with BatchNorms of mean 0 and variance 1, each the exact identity.

    No data is needed: for loading a checkpoint of a converted model into, and as the uncalibrated
    baseline. In eval mode it computes what `model` computes; in train mode, where batch statistics
    count, it does not.

    Args:
        model: any module; not changed.
        plan: which layers get a BatchNorm; by default `plan(model)`.
        eps: of the BatchNorms.
        momentum: of the BatchNorms; None for a cumulative average.

    Raises:
        RetrofitError: as for `prepare`.
    """
    refuse_inference_mode()
    check_models("insert", model)
    _check_options(eps, momentum)
    plan = _checked_plan("insert", plan) or planned(model)
    _warn_of(plan, model)
    return inserted(model, plan, eps=eps, momentum=momentum)


def inserted(model: M, plan: Plan, *, eps: float = 1e-5, momentum: float | None = 0.1) -> M:
    """Do what `insert` does, for a plan that its caller knows."""
    record = _extended(model, plan)
    copied = shared_copy(model)

    def standard(site: Site, layer: nn.Module | None) -> nn.Module:
        zero = torch.zeros(site.channels, dtype=torch.float64, device="cpu")
        own = ChannelMoments(zero, zero + 1)
        return matching_batchnorm(site, layer, copied, own, eps=eps, momentum=momentum)

    result = cast("M", put_after_sites(copied, plan, standard))
    attach(result, Record(plan, eps, momentum) if plan.inserted else record)
    return copying.deepcopy(result)


def add_batchnorm(
    model: M,
    data: Iterable[Any],
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    renumber: Patterns = None,
    layout: LayoutName = "native",
    placement: Placement = "pre_activation",
    linear: bool = False,
    skip_unused: bool = False,
    inplace: bool = False,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    device: torch.device | str | None = None,
    max_images: int | None = None,
    tolerance: float | None = None,
    forward_fn: ForwardFn | None = None,
    progress: bool = True,
) -> M:
    """Put a calibrated BatchNorm after each convolution of `model`; its outputs stay the same.

    Plan (with the first batch as the example), prepare, calibrate and convert in one call. The
    original is not changed, unless it is asked for.

    Args:
        model: any module, in train or eval mode.
        data: batches like those of the training: tensors (N, ...), tuples, lists or dicts of them,
            of which what `forward` does not take (labels) is left out; see `calibrate`.
        include: glob pattern or patterns of module paths; only these, output heads too.
        exclude: glob pattern or patterns of module paths; not these.
        renumber: paths of Sequentials whose children move up for BatchNorm, as in vgg*_bn; by
            default `features` of torchvision's VGG.
        layout: "native", the model's own class; "graph", a GraphModule, after functions too.
        placement: BatchNorm "pre_activation" or "post_activation".
        linear: after nn.Linear, too.
        skip_unused: leave out layers that no data reached, rather than raise.
        eps: of the BatchNorms.
        momentum: of the BatchNorms; None for a cumulative average.
        device: where the model runs while calibrating; by default where it is.
        max_images: stop after so many.
        tolerance: stop when the standard errors of 99 % of the channels are below so many standard
            deviations; by default 0.05 for data known to be in random order, else 0: use all.
        forward_fn: `forward_fn(model, batch)` calls the model, where it takes more than a batch.
        progress: show a bar.
        inplace: put the BatchNorms into `model` itself and return it, once everything else is
            done. All references to it, and to the modules and parameters in it, stay valid; an
            optimizer has to be told of the new parameters. So a submodule of a bigger model, or a
            model held by a trainer, is converted where it is.

    Returns:
        The converted model, in the mode of `model`.

    Raises:
        RetrofitError: as for these four; also `inplace` with the graph layout, or a graph that
            does not compute what the model does.
        NonFiniteError: as for `calibrate`.

    Examples:
        >>> bn_vgg = retrofit.add_batchnorm(vgg, loader, max_images=1024)
        >>> retrofit.add_batchnorm(detector, loader, include="backbone.*", inplace=True)
    """
    if inplace and layout == "graph":
        raise RetrofitError("the graph layout makes a new module: it cannot be done in place")
    check_models("add_batchnorm", model)
    check_data(data)
    _check_options(eps, momentum)
    check_flags(inplace=inplace, skip_unused=skip_unused)
    first, data = looked_into(data)
    plan = planned(
        model,
        example=first,
        forward_fn=forward_fn,
        include=include,
        exclude=exclude,
        renumber=renumber,
        layout=layout,
        placement=placement,
        linear=linear,
    )
    prepared = prepare(model, plan)
    calibrate(
        prepared,
        data,
        device=device,
        max_images=max_images,
        tolerance=tolerance,
        forward_fn=forward_fn,
        progress=progress,
    )
    converted = convert(
        prepared, eps=eps, momentum=momentum, share_storage=True, skip_unused=skip_unused
    )
    # Into the model, or a copy of it, that has not seen the data: forward may count or cache.
    target = model if inplace else copying.deepcopy(shared_copy(model))
    result = _transplanted(target, converted)
    if layout == "graph":
        _refuse_other_graph(model, result, first, forward_fn)
    _warn_of_uncalled(plan, model)
    return result


def _warn_of_uncalled(plan: Plan, model: nn.Module) -> None:
    """Warn of layers that the first batch did not reach: nobody has seen this plan."""
    left = [
        site.path
        for site in plan.sites
        if site.reason.startswith(UNCALLED) and not _has_norm_beside(model, site.path)
    ]
    if plan.inserted and left:
        warn(
            f"{counted(len(left), 'layer')} of {plan.model} got no BatchNorm, as the first batch, "
            f"in eval mode, does not reach {'it' if len(left) == 1 else 'them'} ({few(left)}): "
            "for training alone, for other batches, or for nothing"
        )


def _has_norm_beside(model: nn.Module, path: str) -> bool:
    """Tell whether a layer is followed by a norm of its own, as far as its neighbour tells."""
    parent, _, name = path.rpartition(".")
    children = list(model.get_submodule(parent).named_children())
    names = [child for child, _ in children]
    if name not in names or name == names[-1]:
        return False
    return is_norm(children[names.index(name) + 1][1])


def _checked_plan(function: str, plan: object) -> Plan | None:
    """Return the plan; RetrofitError for something else, data for instance."""
    if plan is None or isinstance(plan, Plan):
        return plan
    raise RetrofitError(
        f"the second argument of {function} is a plan, as plan(model) makes it, not a "
        f"{type(plan).__name__}; data goes to calibrate(prepared, data)"
    )


def _check_options(eps: object, momentum: object) -> None:
    """Raise RetrofitError for what no BatchNorm can have."""
    check_number("eps", eps, "be positive", lambda e: 0 < e < math.inf)
    if momentum is not None:
        wanted = "lie between 0 and 1, or be None for a cumulative average"
        check_number("momentum", momentum, wanted, lambda m: 0 <= m <= 1)


def _refuse_other_graph(
    model: nn.Module, converted: nn.Module, batch: Any, forward_fn: ForwardFn | None
) -> None:
    """Raise RetrofitError where torch.fx took another branch than a run does."""
    tried = shared_copy(model), shared_copy(converted)  # forward may count or cache
    if not verify(*tried, [batch], forward_fn=forward_fn).passed(BRANCH_TOLERANCE):
        raise RetrofitError(
            f"the graph that torch.fx makes of {type(model).__name__} computes something else than "
            "the model (its code may ask for types): use the native layout"
        )


def _transplanted(model: M, converted: nn.Module) -> M:
    """Give `model` itself (but for the graph layout) the BatchNorms of its converted copy."""
    record = required_record(converted, "convert")
    norms = {site.path: find_site(converted, site)[1] for site in record.plan.inserted}
    result: nn.Module = model
    if record_of(model) is None:  # else it was converted before, and nothing came to it
        result = put_after_sites(model, record.plan, lambda site, _layer: norms[site.path])
    attach(result, record)
    return cast("M", result)


def _extended(model: nn.Module, plan: Plan) -> Record:
    """Make the record for `model` once `plan` is carried out: its own if there is nothing to do."""
    earlier = record_of(model)
    if earlier and plan.inserted:
        raise RetrofitError(
            f"this {type(model).__name__} was converted before: fold it, then plan all at once"
        )
    return earlier or Record(plan)


def has_linear(model: nn.Module) -> bool:
    """Tell whether a model has Linear layers, which `linear=True` is for."""
    return any(isinstance(module, nn.Linear) for module in model.modules())


def _warn_of(plan: Plan, model: nn.Module) -> None:
    """Warn of a plan that does nothing, or whose BatchNorms cannot learn."""
    frozen = [site.path for site in plan.inserted if site.frozen]
    if not plan.sites:
        hint = ", and Linear layers get some with linear=True" if has_linear(model) else ""
        warn(f"no BatchNorm is added to {plan.model}: it has no convolutions{hint}")
    elif not plan.inserted:
        warn(
            f"no BatchNorm is added to {plan.model}: {len(plan.sites)} layers are skipped: "
            f"{plan.skipped()}; print the plan to see each"
        )
    if plan.inserted and (refused := [s for s in plan.sites if s.reason.startswith(ASKED)]):
        more = f"; and {len(refused) - 3} more" if len(refused) > 3 else ""
        texts = (f"{site.path}: {site.reason.removeprefix(ASKED)}" for site in refused[:3])
        warn(f"no BatchNorm is possible where it was asked for: {'; '.join(texts)}{more}")
    if frozen:
        which = f"{frozen[0]}{', ...' if len(frozen) > 1 else ''}"
        warn(
            f"{len(frozen)} of {len(plan.inserted)} BatchNorms follow frozen layers ({which}: "
            "requires_grad=False): they are frozen too and will not learn; unless that is meant, "
            "call requires_grad_(True) on the model first"
        )


def _leave_out(prepared: nn.Module, plan: Plan, paths: Collection[str]) -> Plan:
    """Take the observers of these sites out of a prepared model; return the plan without them."""
    observers = {site.path: find_site(prepared, site)[1] for site in plan.inserted}
    take_out(prepared, plan)
    plan = without(prepared, plan, paths)
    put_after_sites(prepared, plan, lambda site, _layer: observers[site.path])
    return plan


def _saw_nothing(model: nn.Module, site: Site) -> bool:
    observer = find_site(model, site)[1]
    return isinstance(observer, MomentObserver) and not observer.seen


def _targets(plan: Plan, match: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, ChannelMoments]:
    """Check and unpack the argument of `convert`; RetrofitError for another architecture's."""
    if not isinstance(match, Mapping):
        raise RetrofitError(
            f"match must be what channel_moments gives, not a {type(match).__name__}"
        )
    channels = {site.path: site.channels for site in plan.inserted}
    wrong, targets = [], {}
    for path, pair in match.items():
        try:
            mean, var = (torch.as_tensor(tensor).double() for tensor in pair)
        except (TypeError, ValueError, RuntimeError):
            wrong.append(f"{path} has no pair of a mean and a variance")
            continue
        expected = channels.get(path)
        if expected is None:
            wrong.append(f"{path} gets no BatchNorm")
        elif mean.shape != (expected,) or var.shape != (expected,):
            shapes = f"{tuple(mean.shape)} and {tuple(var.shape)}"
            wrong.append(f"{path} has {expected} channels, its mean and variance {shapes}")
        elif not are_statistics(mean, var):
            wrong.append(f"{path} has a NaN, an Inf or a negative variance")
        targets[path] = ChannelMoments(mean, var)
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise RetrofitError(f"match does not fit this network: {'; '.join(wrong[:3])}{more}")
    return targets
