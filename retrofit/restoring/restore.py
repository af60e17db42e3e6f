"""restore: from folded weights to their own class, with BatchNorms that have learned the sample."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from retrofit.calibration.calibrate import calibrate
from retrofit.calibration.observer import observers_of
from retrofit.calibration.sample_errors import Calibration
from retrofit.errors import RetrofitError, warn
from retrofit.numerics.moments import Moments
from retrofit.numerics.shifted_identity import shifted_identity
from retrofit.option_checks import check_models
from retrofit.restoring.matching import Match, by_name, by_order
from retrofit.restoring.proof import NEARLY, Proof, Runs, prove, refuse_other_outputs
from retrofit.restoring.restoration import Restoration, Seat, attach
from retrofit.restoring.skeleton import observed
from retrofit.restoring.sources import Source, layers_of, source_of
from retrofit.running.batch_checks import check_data
from retrofit.running.call_arguments import ForwardFn, call_model, images_in
from retrofit.running.first_batch import looked_into
from retrofit.running.modes import evaluating
from retrofit.running.shared_copy import (
    refuse_inference_mode,
    refuse_lazy,
    refuse_wrappers,
    shared_copy,
)
from retrofit.surgery.affine_map import affine_map, batchnorms
from retrofit.surgery.fold_pairs import Pairs, find_pairs
from retrofit.surgery.record import record_of
from retrofit.tracing.operations import channels

M = TypeVar("M", bound=nn.Module)


def restore(
    architecture: M,
    folded: nn.Module | Mapping[str, Any] | str | os.PathLike[str],
    data: Iterable[Any],
    *,
    example: Any = None,
    forward_fn: ForwardFn | None = None,
    device: torch.device | str | None = None,
    max_images: int | None = None,
    tolerance: float | None = None,
    key_map: Mapping[str, str] | None = None,
    weights_key: str | None = None,
    progress: bool = True,
) -> M:
    """Bring a network whose BatchNorms were folded away back into its own class.

    The result is a copy of `architecture`, in the mode that this is in, whose BatchNorms hold the
    statistics of `data`, and which computes in eval mode what the folded network computes; its
    state dict loads strictly into a fresh model of that class. It is equal up to rounding (usually
    a millionth), and not bit for bit: where the class has convolutions without a bias, the folded
    bias has to move into the BatchNorm after them, and is added one rounding later.
    `restoration_of` says how far it is.

    For each BatchNorm that was folded away, running_mean and running_var are the moments of what
    its layer gives on `data`, weight is sqrt(running_var + eps) and bias is running_mean; where a
    folded bias b moves, running_mean is that less b. eps, momentum, class and flags are those of
    the architecture. A BatchNorm that was not folded (DenseNet's first ones) is taken over as it
    is, and so is everything else.

    Args:
        architecture: the network as it was before folding; its weights do not matter. Not changed.
        folded: a module, TorchScript or an exported program; a state dict, of numpy too; or a file,
            as `load` reads them, or ONNX. However it was folded: by `fold`, torch.fx, torch.ao, or
            the tools of an export. Of 16 bits it is taken in the precision of the architecture.
        data: batches, as for `calibrate`, prepared as the network takes them. A folded network
            cannot tell whether that is right.
        example: one batch, for architectures that torch.fx cannot follow; the first of `data` by
            default. On it both networks are compared.
        forward_fn: `forward_fn(model, batch)` calls a model that takes more than a batch.
        device: where it runs while calibrating; by default where it is.
        max_images: calibrate on so many at most.
        tolerance: stop when the standard errors of 99 % of the channels are below so many standard
            deviations; by default 0.05 for data known to be in random order, else 0: use all.
        progress: show a bar.
        key_map: names of tensors in `folded` to their names in the architecture, where they differ
            by more than a prefix. Without it, the layers of a module under other names are matched
            in the order of execution, where all shapes agree.
        weights_key: where the weights are in a file with several, as for `load`.

    Raises:
        RetrofitError: `folded` is of another architecture (with the first place that differs), is
            not folded, lacks weights, or computes something else than the architecture with its
            weights; a BatchNorm cannot come back (it has no weight, or is folded into no layer);
            torch.fx and a run cannot follow the architecture; or the result differs from the
            folded network by more than 1e-5 of its largest output (where a detector's outputs
            jump with the last bit of a layer: of what a BatchNorm gives).
        NonFiniteError: as for `calibrate`.

    Examples:
        >>> restored = retrofit.restore(torchvision.models.resnet50(), "folded.onnx", loader)
        >>> torchvision.models.resnet50().load_state_dict(restored.state_dict())
        <All keys matched successfully>
    """
    refuse_inference_mode()
    _refuse_unusable(architecture)
    check_data(data)
    first, data = looked_into(data)
    example = first if example is None else example
    pairs = find_pairs(shared_copy(architecture), example, forward_fn)
    biases = {f"{pair.layer}.bias" for pair in pairs.pairs.values()}
    source = source_of(folded, architecture, forward_fn)
    source = source.renamed({*architecture.state_dict(), *biases}, key_map or {})
    match = _matched(architecture, pairs, source, example, forward_fn, weights_key)
    runs = Runs(match.seats, example, forward_fn)
    if source.run is not None:
        refuse_other_outputs(source, match.skeleton, runs)
    for path in match.seats:
        _refuse_no_identity(path, architecture.get_submodule(path))
    layers = map(match.skeleton.get_submodule, match.seats.values())
    if not source.exported and all(layer._parameters.get("bias") is None for layer in layers):
        warn(
            f"no layer in {source.name} has the bias that folding gives it: were its BatchNorms "
            "folded, or left out? The result computes what the layers do without them"
        )
    prepared = observed(match.skeleton, match.seats, _axes(match, example, forward_fn))
    calibration = calibrate(
        prepared,
        data,
        device=device,
        max_images=max_images,
        tolerance=tolerance,
        forward_fn=forward_fn,
        progress=progress,
    )
    result = _filled(architecture, match, prepared, calibration)
    proof = prove(match.skeleton, result, runs)
    compared = images_in(result, example, forward_fn)
    attach(result, _told(match, result, proof, calibration, compared))
    return result


def _refuse_unusable(architecture: nn.Module) -> None:
    """Raise RetrofitError for what has no BatchNorm that could come back."""
    check_models("restore", architecture)
    refuse_wrappers(architecture)
    refuse_lazy(architecture)
    kind = type(architecture).__name__
    if record_of(architecture) is not None:
        raise RetrofitError(f"this {kind} was converted: restore takes the class as it was trained")
    if not batchnorms(architecture):
        raise RetrofitError(
            f"this {kind} has no BatchNorm to restore: add_batchnorm puts some into a network that "
            "never had any"
        )
    for name, tensor in architecture.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and tensor.is_meta:
            raise RetrofitError(f"{name} is on the meta device: pass a model that has its tensors")


def _matched(
    architecture: nn.Module,
    pairs: Pairs,
    source: Source,
    example: Any,
    forward_fn: ForwardFn | None,
    weights_key: str | None,
) -> Match:
    """Find what belongs where, by names, else by the order in which the layers run."""
    match = by_name(architecture, pairs, source, weights_key)
    if match is None:
        assert source.layers is not None
        own = layers_of(architecture, example, forward_fn)
        match = by_order(architecture, pairs, source, source.layers(example), own)
    return match


def _axes(match: Match, example: Any, forward_fn: ForwardFn | None) -> dict[str, int]:
    """Count the spatial axes of what reaches each seat, on the example."""
    found: dict[str, int] = {}
    tried = shared_copy(match.skeleton)
    handles = []
    for norm in match.seats:

        def look(_m: nn.Module, inputs: tuple[Any, ...], path: str = norm) -> None:
            found[path] = inputs[0].dim() - 2

        handles.append(tried.get_submodule(norm).register_forward_pre_hook(look))
    with evaluating(tried), torch.no_grad():
        call_model(tried, example, forward_fn)
    if idle := [norm for norm in match.seats if norm not in found]:
        raise RetrofitError(
            f"no data reaches {idle[0]}, which was folded away: pass an example that does"
        )
    return found


def _filled(architecture: M, match: Match, prepared: nn.Module, calibration: Calibration) -> M:
    """Copy the architecture, with the folded network's weights and the BatchNorms' moments."""
    result = copy.deepcopy(shared_copy(architecture))
    state = result.state_dict()  # with the versions that some modules ask for (MNASNet)
    own = set(state)
    state.update({name: t for name, t in match.skeleton.state_dict().items() if name in own})
    moments = {observer.site: observer.moments() for observer in observers_of(prepared)}
    for norm, layer in match.seats.items():
        bias = match.skeleton.get_submodule(layer)._parameters.get("bias")
        moved = None if f"{layer}.bias" in own else bias
        module = result.get_submodule(norm)
        tensors = _tensors(module, norm, moments[layer], moved)
        if f"{norm}.num_batches_tracked" in own:
            tensors["num_batches_tracked"] = torch.tensor(calibration.batches, device="cpu")
        state.update({f"{norm}.{name}": tensor for name, tensor in tensors.items()})
    result.load_state_dict(state)
    return result


def _refuse_no_identity(path: str, norm: nn.Module) -> None:
    """Raise RetrofitError for a BatchNorm that no numbers make the identity."""
    lacks = [name for name in ("weight", "bias") if getattr(norm, name, None) is None]
    if lacks:
        raise RetrofitError(
            f"{path} has no {lacks[0]} (affine=False, or bias=False): it cannot give back what it "
            "was folded into"
        )
    if not isinstance(getattr(norm, "eps", None), (int, float)):
        raise RetrofitError(
            f"{path}, a {type(norm).__name__}, has no eps that could be read: which weight makes "
            "it the identity is not known"
        )
    var = norm.running_var
    if isinstance(var, Tensor) and var.dtype not in (torch.float32, torch.float64):
        raise RetrofitError(
            f"{path} is in {var.dtype}, too coarse for a BatchNorm that changes nothing: pass the "
            "architecture in float32 (.float())"
        )
    _refuse_more_than_affine(path, norm)


def _refuse_more_than_affine(path: str, norm: nn.Module) -> None:
    """Raise RetrofitError for a subclass that computes something else than its numbers say."""
    tried = copy.deepcopy(norm)
    numbers = {
        "running_mean": 0.0,
        "running_var": 1.0,
        "weight": math.sqrt(1 + float(tried.eps)),  # type: ignore[arg-type]
        "bias": 0.0,
    }
    for name, number in numbers.items():
        getattr(tried, name).data.fill_(number)
    found = affine_map(tried)
    if not ((found.alpha - 1).abs().max() <= NEARLY and found.shift.abs().max() <= NEARLY):
        raise RetrofitError(
            f"{path}, a {type(norm).__name__}, does not compute (x - running_mean) / "
            "sqrt(running_var + eps) * weight + bias: which numbers make it the identity is not "
            "known"
        )


def _tensors(
    norm: nn.Module, path: str, moments: Moments, moved: Tensor | None
) -> dict[str, Tensor]:
    """Make the tensors of a BatchNorm that adds the moved bias, and nothing else."""
    var = norm.running_var
    assert isinstance(var, Tensor)
    wide = var.dtype
    mean, variance = (t.detach().cpu().to(wide).numpy() for t in (moments.mean, moments.var))
    shift = None if moved is None else moved.detach().cpu().to(wide).numpy()
    try:
        found = shifted_identity(mean, variance, shift, float(norm.eps))  # type: ignore[arg-type]
    except RetrofitError as error:
        raise RetrofitError(f"{path}: {error}") from error
    arrays = {
        "running_mean": found.mean,
        "running_var": found.var,
        "weight": found.weight,
        "bias": found.bias,
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _told(
    match: Match, result: nn.Module, proof: Proof, calibration: Calibration, compared: int
) -> Restoration:
    """Summarise what came back, and how far it is from the folded network."""
    own = result.state_dict()
    seats = tuple(
        Seat(
            layer,
            norm,
            channels(match.skeleton.get_submodule(layer)),
            _place_of_bias(match.skeleton.get_submodule(layer), f"{layer}.bias" in own),
            proof.at[norm],
        )
        for norm, layer in match.seats.items()
    )
    return Restoration(
        seats,
        kept=tuple(path for path in batchnorms(result) if path not in match.seats),
        exact=proof.relative == 0,
        relative=proof.relative,
        outputs_jump=proof.outputs_jump,
        compared=compared,
        images=calibration.images,
        standard_error=calibration.standard_error,
    )


def _place_of_bias(layer: nn.Module, kept: bool) -> str:
    if layer._parameters.get("bias") is None:
        return ""
    return "layer" if kept else "running_mean"
