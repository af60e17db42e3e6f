"""The running statistics of BatchNorms: which have some, and how they get new ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from weakref import WeakSet

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from retrofit.calibration.feeding import Fed
from retrofit.errors import RetrofitError
from retrofit.numerics.channel_statistics import ChannelStatistics
from retrofit.numerics.moments import Moments
from retrofit.numerics.tensor_checks import are_statistics
from retrofit.option_checks import check_number

Norms = Mapping[str, _BatchNorm]
Buffers = dict[str, Tensor]  # the running statistics of a BatchNorm


def unwrapped(model: nn.Module) -> nn.Module:
    """Take what DataParallel or DistributedDataParallel hold, which have BatchNorms elsewhere."""
    while isinstance(model, (nn.DataParallel, DistributedDataParallel)):
        model = model.module
    return model


def check_prior(prior: object) -> None:
    """Raise RetrofitError for what old statistics cannot count as."""
    wanted = "be a number of images from 0 up"
    check_number("prior", prior, wanted, lambda n: 0 <= n < math.inf)


FOLLOWING: WeakSet[_BatchNorm] = WeakSet()  # a stream: see `adapting`


def tracking(model: nn.Module) -> dict[str, _BatchNorm]:
    """List the BatchNorms that have running statistics, by path; RetrofitError for none.

    And where one follows a stream, or cannot be changed.
    """
    norms = {
        path or type(module).__name__: module
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm)
    }
    if not norms:
        raise RetrofitError(
            f"this {type(model).__name__} has no BatchNorm to recalibrate: add_batchnorm adds some"
        )
    for path, norm in norms.items():
        if norm.running_mean is not None and is_lazy(norm.running_mean):
            raise RetrofitError(
                f"{path} is a lazy {type(norm).__name__} that has no shape yet: run one batch "
                "through the model first, in its factory if it has one"
            )
        if norm.running_mean is not None and norm.running_mean.is_inference():
            raise RetrofitError(
                f"{path} was made in torch.inference_mode(), and cannot be changed outside of it: "
                "recalibrate a copy (copy.deepcopy(model))"
            )
    tracking = {path: norm for path, norm in norms.items() if norm.running_mean is not None}
    if not tracking:
        raise RetrofitError(
            f"{', '.join(norms)} keep no running statistics (track_running_stats=False): they "
            "normalise with those of the batch in eval mode too, so nothing is to recalibrate"
        )
    if following := next((path for path, norm in tracking.items() if norm in FOLLOWING), None):
        raise RetrofitError(f"{following} follows a stream already (adapting): remove() that first")
    return tracking


def buffers(norm: _BatchNorm) -> Buffers:
    """Copy the running statistics."""
    buffers = dict(norm.named_buffers(recurse=False))
    names = ("running_mean", "running_var", "num_batches_tracked")
    return {name: buffers[name].clone() for name in names if name in buffers}


def restore(norm: _BatchNorm, buffers: Buffers) -> None:
    for name, value in buffers.items():
        norm.get_buffer(name).copy_(value)


def settle(
    path: str, norm: _BatchNorm, statistics: ChannelStatistics, fed: Fed, prior: float
) -> None:
    """Give a BatchNorm its new statistics."""
    moments = statistics.moments()
    if bool((moments.count < 2).any()):
        raise RetrofitError(
            f"{path} got a single value for each channel in all the data: a variance needs at "
            "least 2 images"
        )
    if prior:
        refuse_as_prior(path, norm)
    old = dict(norm.named_buffers(recurse=False))
    blend(path, norm, old, moments, share(fed.images, prior))
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.fill_(fed.batches)


def refuse_as_prior(path: str, norm: _BatchNorm) -> None:
    """Raise RetrofitError for statistics that cannot count beside others."""
    if not are_statistics(norm.get_buffer("running_mean"), norm.get_buffer("running_var")):
        raise RetrofitError(
            f"the running statistics of {path} hold a NaN, an Inf or a negative variance: they "
            "cannot count as images: leave the prior out"
        )


def blend(path: str, norm: _BatchNorm, old: Buffers, new: Moments, weight: float) -> None:
    """Let `new` count `weight` and `old` the rest, in the running statistics of a BatchNorm.

    Raises RetrofitError where these leave its dtype.
    """
    for name, tensor in {"running_mean": new.mean, "running_var": new.var}.items():
        buffer = norm.get_buffer(name)
        # Where the old ones do not count, they may be NaN.
        buffer.copy_(tensor if weight == 1 else old[name].to(tensor).lerp(tensor, weight))
        if not bool(buffer.isfinite().all()):
            raise RetrofitError(
                f"the {name} of {path} reaches {float(tensor.abs().max()):.3g}, more than "
                f"{buffer.dtype} holds: keep the BatchNorms in float32"
            )


def share(images: float, prior: float) -> float:
    """Say how much new statistics count beside old ones that count as `prior` images."""
    return images / (images + prior)
