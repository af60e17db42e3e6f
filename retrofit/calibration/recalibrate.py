"""Re-estimate the running statistics of the BatchNorms that a model has."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from typing_extensions import Self

from retrofit.calibration.feeding import Fed, Feed, leaving_after
from retrofit.calibration.processes import Processes, digests
from retrofit.calibration.sample_errors import standard_error
from retrofit.calibration.site_samples import SiteSamples
from retrofit.errors import RetrofitError, warn
from retrofit.numerics.channel_statistics import ChannelStatistics
from retrofit.numerics.tensor_checks import are_statistics
from retrofit.option_checks import check_flags, check_forward_fn, check_models, check_number
from retrofit.running.batch_checks import check_data, nothing_in
from retrofit.running.call_arguments import Arguments, ForwardFn
from retrofit.running.modes import batch_statistics, evaluating
from retrofit.running.nested import first_tensor
from retrofit.running.progress import progress_bar

UNCERTAIN = 0.25  # sigma; some sixteen pictures have less

Norms = Mapping[str, _BatchNorm]
Buffers = dict[str, Tensor]  # the running statistics of a BatchNorm
Measured = dict[str, ChannelStatistics]  # by path of the BatchNorm


class Recalibration:
    """What one call of `recalibrate` did, and the way back.

    As a context manager it goes that way at the end of the block.

    Attributes:
        images, batches: how many the new statistics are of.
        layers: paths of the BatchNorms that have them, in the order of their first calls.
        standard_error: of the new means and standard deviations, as in `Calibration`; with `prior`
            that of the blend, which has a share of it only.
    """

    def __init__(
        self,
        fed: Fed,
        old: Mapping[str, tuple[_BatchNorm, Buffers]],
        standard_error: float,
    ) -> None:
        self.images, self.batches = fed.images, fed.batches
        self.layers = tuple(old)
        self.standard_error = standard_error
        self._old = list(old.values())

    def remove(self) -> None:
        """Give the BatchNorms back the statistics they had, bit for bit. Once is enough."""
        for norm, buffers in self._old:
            _restore(norm, buffers)
        self._old.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return (
            f"Recalibration({len(self.layers)} BatchNorms on {self.images} images "
            f"in {self.batches} batches)"
        )


def recalibrate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    layerwise: bool = False,
    prior: float = 0,
    device: torch.device | str | None = None,
    max_images: int | None = None,
    process_group: distributed.ProcessGroup | None = None,
    forward_fn: ForwardFn | None = None,
    progress: bool = True,
) -> Recalibration:
    """Re-estimate running_mean and running_var of the BatchNorms in `model`, in place.

    This is for statistics that have fallen behind: after fine-tuning, after averaging weights, on
    images of another domain, for which no labels are needed (test-time adaptation). weight and bias
    are kept, num_batches_tracked counts the batches, and all but the BatchNorms is in eval mode.
    BatchNorms under `freeze_statistics` are recalibrated too, and stay frozen. (Those of
    `add_batchnorm` are the identity for the statistics that they came with; new ones move the
    outputs.)

    What a BatchNorm gets depends on those before it, so there are two answers:

    - By default one pass, in which every BatchNorm normalises with the statistics of its batch, as
      in training. The moments of its inputs are pooled exactly over all batches, of whatever
      sizes and in whatever order. But the inputs are those under batch statistics, not those of
      eval mode: the smaller and the less mixed the batches, the further they are apart.
    - `layerwise=True` settles one BatchNorm after another in the order of execution, all in eval
      mode, each fed by those already settled. Afterwards the running statistics of each are the
      moments of its own inputs, however the data comes in batches; without a prior, to
      recalibrate again changes nothing. It takes one whole pass to see the order, and then one for
      each BatchNorm that ends there: with n BatchNorms of equal distances, n / 2 times what the
      default costs. A BatchNorm called several times in a pass feeds itself: it is measured once,
      all calls pooled.

    Args:
        model: any module with BatchNorms. What DataParallel or DistributedDataParallel hold is run
            without them.
        data: batches, as for `calibrate`. With `layerwise` it is gone through many times, and has
            to give the same batches each time: a list or a DataLoader, not a generator.
        layerwise: see above.
        prior: the old statistics count as this many images: with N and n new ones, mean and
            variance become N / (N + n) of the old plus n / (N + n) of the new (Schneider et al.,
            2020, "Improving robustness against common corruptions by covariate shift adaptation").
            For a handful of images, and best with `layerwise`, where each BatchNorm is measured
            behind blended ones. By default the old statistics count nothing.
        device: as for `calibrate`.
        max_images: as for `calibrate`.
        process_group: recalibrate with these processes together, each on data of its own, as for
            `calibrate`. Every process ends with the same statistics, those of all the data, bit for
            bit. In the default pass each normalises with its own batches, SyncBatchNorm too.
        forward_fn: as for `calibrate`.
        progress: as for `calibrate`.

    Returns:
        A handle: `handle.remove()`, or the end of `with recalibrate(...):`, restores the statistics
        that were there before. A warning names BatchNorms that the data never reached; they keep
        their statistics. Another says how uncertain the new statistics are, when 1 % of the
        channels have a standard error of more than a quarter of a standard deviation.

    Raises:
        RetrofitError: no data, or with `layerwise` data that can be gone through once or differs
            between passes; no BatchNorm, or none with running statistics; a batch with a single
            value for each channel; a negative prior, or one for old statistics that are not
            finite; new ones beyond the BatchNorm's dtype. The model is then as it was.
        NonFiniteError: NaN or Inf at a BatchNorm, with its path and the image.
        PeerError: another process failed or died, or has another model or other options.

    Example:
        >>> retrofit.recalibrate(averaged.module, loader, max_images=10_000)
    """
    check_models("recalibrate", model)
    while isinstance(model, (nn.DataParallel, DistributedDataParallel)):
        model = model.module
    processes = Processes(process_group)
    feed = Feed(
        data, device, max_images, forward_fn, progress and processes.rank == 0, "recalibrate"
    )
    with processes.failing_together():
        check_flags(layerwise=layerwise, progress=progress)
        check_forward_fn(forward_fn)
        _refuse_bad_request(data, layerwise, prior)
        norms = _tracking(model)
        old = {path: (norm, _buffers(norm)) for path, norm in norms.items()}
        _agree(processes, model, norms, feed, layerwise, prior)
        try:
            estimate = _layer_by_layer if layerwise else _at_once
            fed, measured = estimate(model, norms, feed, prior, processes)
        except BaseException:
            for norm, buffers in old.values():
                _restore(norm, buffers)
            raise
    error = _share(fed, prior) * standard_error(measured.values(), fed.images)
    if processes.rank == 0:
        _warn(norms, fed, measured, error)
    return Recalibration(fed, {path: old[path] for path in measured}, error)


def _refuse_bad_request(data: Iterable[Any], layerwise: bool, prior: float) -> None:
    check_data(data)
    if layerwise:
        _refuse_iterator(data)
    wanted = "be a number of images from 0 up"
    check_number("prior", prior, wanted, lambda n: 0 <= n < math.inf)


def _agree(
    processes: Processes, model: nn.Module, norms: Norms, feed: Feed, layerwise: bool, prior: float
) -> None:
    """Raise PeerError unless all processes have the same model and options."""
    if processes.size == 1:
        return
    # Old statistics may differ, as those of training do, unless they count.
    old = [] if prior else [t for norm in norms.values() for t in norm.buffers(recurse=False)]
    options = {"layerwise": layerwise, "prior": prior, "max_images": feed.max_images}
    found = {"class": type(model).__name__, "weights": digests(model, but=old)}
    processes.agree(options | found)


def _warn(norms: Norms, fed: Fed, measured: Measured, error: float) -> None:
    if unreached := [path for path in norms if path not in measured]:
        warn(
            f"the data never reached {', '.join(unreached)}: these BatchNorms keep the statistics "
            "they had"
        )
    if measured and error > UNCERTAIN:
        warn(_uncertain(fed, error))


def _at_once(
    model: nn.Module, norms: Norms, feed: Feed, prior: float, processes: Processes
) -> tuple[Fed, Measured]:
    """Measure all BatchNorms in one pass, in which each normalises with its batch."""
    with batch_statistics(model, frozen=True):
        fed, measured = _measured(model, norms, norms, feed)
    fed, measured = _fed_by_all(processes, fed), _measured_by_all(processes, measured)
    _refuse_nothing(fed, feed)
    for path, statistics in measured.items():
        _settle(path, norms[path], statistics, fed, prior)
    return fed, measured


def _fed_by_all(processes: Processes, fed: Fed) -> Fed:
    """Count what all processes were fed."""
    feds = processes.gather(fed)
    images, batches = sum(one.images for one in feds), sum(one.batches for one in feds)
    return Fed(images, batches, max(one.waited for one in feds))


def _measured_by_all(processes: Processes, measured: Measured) -> Measured:
    """Merge what all processes have measured: once, in the first, since processors round apart."""
    if processes.size == 1:
        return measured
    cpu = torch.device("cpu")
    everything = processes.gather({path: one.to(cpu) for path, one in measured.items()})
    merged: Measured = {}
    for found in everything if processes.rank == 0 else ():
        for path, one in found.items():
            merged[path] = merged[path].merge(one) if path in merged else one
    return processes.from_first(merged)


def _layer_by_layer(
    model: nn.Module, norms: Norms, feed: Feed, prior: float, processes: Processes
) -> tuple[Fed, Measured]:
    """Settle one BatchNorm after another, in eval mode, a pass for each."""
    first, quiet = replace(feed, stage="first pass"), replace(feed, progress=False)
    with evaluating(model):
        order = _Order(model, norms)
        with order.noted():
            fed, _ = _measured(model, norms, (), first, call=order)
        total = _fed_by_all(processes, fed)
        _refuse_nothing(total, feed)
        called = dict.fromkeys(path for one in processes.gather(list(order.calls)) for path in one)
        settled: Measured = {}
        with progress_bar(feed.stage, len(called), "layer", shown=feed.progress) as bar:
            for path in called:
                again, measured = _measured(
                    model, norms, [path], quiet, call=partial(order.up_to, path)
                )
                if again != fed:
                    raise RetrofitError(
                        f"data gave {fed.images} images in {fed.batches} batches at first and "
                        f"{again.images} in {again.batches} then: layerwise=True needs the same "
                        "each time"
                    )
                measured = _measured_by_all(processes, measured)
                for statistics in measured.values():
                    _settle(path, norms[path], statistics, total, prior)
                settled |= measured
                bar.update()
    return total, settled


class _Order:
    """Notes in which order and how often a model calls its BatchNorms, to run parts of it then."""

    def __init__(self, model: nn.Module, norms: Norms) -> None:
        self.model, self.norms = model, norms
        self.calls: Counter[str] = Counter()  # in the order of first calls
        self.in_a_pass: dict[str, set[int]] = {path: set() for path in norms}

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Count the calls in the block."""
        with _hooked(self.norms, lambda path, _norm, _x: self.calls.update([path])):
            yield

    def __call__(self, arguments: Arguments) -> None:
        """Run the model, and note how often it calls each BatchNorm."""
        before = self.calls.copy()
        self.model(*arguments.args, **arguments.kwargs)
        for path, counts in self.in_a_pass.items():
            counts.add(self.calls[path] - before[path])

    def up_to(self, path: str, arguments: Arguments) -> None:
        """Run the model until `path` has been called as often as it is in every pass."""
        counts = self.in_a_pass[path]
        calls = next(iter(counts)) if len(counts) == 1 else 0  # 0: never, so run to the end
        with leaving_after(self.norms[path], calls):
            self.model(*arguments.args, **arguments.kwargs)


def _measured(
    model: nn.Module,
    norms: Norms,
    paths: Collection[str],
    feed: Feed,
    call: Callable[[Arguments], object] | None = None,
) -> tuple[Fed, Measured]:
    """Run the data; measure what is fed to the BatchNorms at `paths`, over all their calls.

    Those that were never called are left out; the others are in the order of their first calls.
    """
    samples = SiteSamples({path: norms[path].num_features for path in paths})
    statistics = ChannelStatistics.empty(sum(samples.channels.values()))
    called: dict[str, None] = {}

    def measure(path: str, norm: _BatchNorm, x: Tensor) -> None:
        samples.length = samples.length or len(x)
        if not x.numel() or path not in paths:
            return
        if norm.training and x.numel() == norm.num_features:
            raise RetrofitError(
                f"{path} got a single value for each channel, and one value has no variance: make "
                "all batches larger (drop_last=True), or pass layerwise=True"
            )
        called[path] = None
        samples.take(path, x.detach())

    def learn(_: Fed) -> bool:
        nonlocal statistics
        statistics = samples.added_to(statistics)
        return False

    with _hooked(norms, measure):
        fed = feed.run(model, samples, call=call, until=learn)
    by_path = samples.split(statistics)
    return fed, {path: by_path[path] for path in called}


@contextmanager
def _hooked(norms: Norms, look: Callable[[str, _BatchNorm, Tensor], None]) -> Iterator[None]:
    """Call `look(path, norm, x)` before each call of a BatchNorm with something that it takes."""
    handles = []
    try:
        for path, norm in norms.items():

            def hook(norm: Any, args: Any, kwargs: Any, path: str = path) -> None:
                x = first_tensor((args, kwargs))
                if x is not None and x.dim() > 1 and x.shape[1] == norm.num_features:
                    look(path, norm, x)

            handles.append(norm.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tracking(model: nn.Module) -> dict[str, _BatchNorm]:
    """List the BatchNorms that have running statistics, by path; RetrofitError for none."""
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
                "through the model first"
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
    return tracking


def _buffers(norm: _BatchNorm) -> Buffers:
    """Copy the running statistics."""
    buffers = dict(norm.named_buffers(recurse=False))
    names = ("running_mean", "running_var", "num_batches_tracked")
    return {name: buffers[name].clone() for name in names if name in buffers}


def _restore(norm: _BatchNorm, buffers: Buffers) -> None:
    for name, value in buffers.items():
        norm.get_buffer(name).copy_(value)


def _settle(
    path: str, norm: _BatchNorm, statistics: ChannelStatistics, fed: Fed, prior: float
) -> None:
    """Give a BatchNorm its new statistics."""
    moments = statistics.moments()
    if bool((moments.count < 2).any()):
        raise RetrofitError(
            f"{path} got a single value for each channel in all the data: a variance needs at "
            "least 2 images"
        )
    if prior and not are_statistics(
        norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    ):
        raise RetrofitError(
            f"the running statistics of {path} hold a NaN, an Inf or a negative variance: they "
            "cannot count as images: leave the prior out"
        )
    for name, new in {"running_mean": moments.mean, "running_var": moments.var}.items():
        buffer = norm.get_buffer(name)
        if prior:
            new = buffer.to(new).lerp(new, _share(fed, prior))  # noqa: PLW2901
        buffer.copy_(new)
        if not bool(buffer.isfinite().all()):
            raise RetrofitError(
                f"the {name} of {path} reaches {float(new.abs().max()):.3g}, more than "
                f"{buffer.dtype} holds: keep the BatchNorms in float32"
            )
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.fill_(fed.batches)


def _share(fed: Fed, prior: float) -> float:
    """Say how much the new statistics count beside the old ones."""
    return fed.images / (fed.images + prior)


def _uncertain(fed: Fed, error: float) -> str:
    if math.isinf(error):
        return (
            "the statistics are those of one image, or of some that do not differ, which cannot "
            "tell how uncertain they are"
        )
    return (
        f"the statistics of {fed.images} images are uncertain: 1 % of the channels have a standard "
        f"error of more than {error:.2f} of their standard deviation; use more images, or let the "
        "old statistics count as some, layer by layer (layerwise=True, prior=64; --prior 64)"
    )


def _refuse_nothing(fed: Fed, feed: Feed) -> None:
    if not fed.images:
        used_up = isinstance(feed.data, Iterator)
        raise RetrofitError(
            nothing_in(feed.data) if used_up else "there is no data to recalibrate on"
        )


def _refuse_iterator(data: Iterable[Any]) -> None:
    if isinstance(data, Iterator):
        raise RetrofitError(
            f"data is a {type(data).__name__}, which can be gone through once, and layerwise=True "
            "goes through it once for each BatchNorm: pass a list or a DataLoader"
        )
