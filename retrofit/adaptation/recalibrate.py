"""Re-estimate the running statistics of the BatchNorms that a model has."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import distributed, nn
from typing_extensions import Self

from retrofit.adaptation.layer_by_layer import LayerByLayer
from retrofit.adaptation.norm_inputs import Estimate, fed_by_all, measured, measured_by_all
from retrofit.adaptation.running_statistics import (
    Buffers,
    Norms,
    buffers,
    check_prior,
    restore,
    settle,
    share,
    tracking,
    unwrapped,
)
from retrofit.adaptation.saved_statistics import SavedStatistics
from retrofit.calibration.feeding import Fed, Feed
from retrofit.calibration.processes import Processes, digests
from retrofit.calibration.sample_errors import standard_error
from retrofit.errors import RetrofitError, warn
from retrofit.html_tables import html_table, unfolding_list, view
from retrofit.option_checks import check_flags, check_forward_fn, check_models, check_number
from retrofit.running.batch_checks import check_data, nothing_in
from retrofit.running.call_arguments import ForwardFn
from retrofit.running.freed_memory import kept_memory
from retrofit.running.modes import batch_statistics
from retrofit.running.random_order import in_random_order
from retrofit.sample_sizes import RECALIBRATION_IMAGES, UNCERTAIN_RECALIBRATION
from retrofit.tables import in_short


class Recalibration:
    """What one call of `recalibrate` did, and the way back.

    As a context manager it goes that way at the end of the block.

    Attributes:
        images, batches: how many the new statistics are of.
        layers: paths of the BatchNorms that have them, in the order of their first calls.
        standard_error: of the new means and standard deviations, as in `Calibration`; with `prior`
            that of the blend, which has a share of it only.
        passes: how often the data was gone through.
        held: with `layerwise` the most bytes that waiting batches took, estimated from one image;
            else 0.
    """

    def __init__(
        self,
        found: Estimate,
        norms: Norms,
        old: Mapping[str, Buffers],
        standard_error: float,
    ) -> None:
        self.images, self.batches = found.fed.images, found.fed.batches
        self.layers = tuple(found.measured)
        self.standard_error = standard_error
        self.passes, self.held = found.passes, found.held
        self._old = SavedStatistics({norms[path]: old[path] for path in self.layers})

    def remove(self) -> None:
        """Give the BatchNorms back the statistics they had, bit for bit. Once is enough.

        What a later `recalibrate` gave these BatchNorms is gone as well, and has no way back.
        """
        self._old.give_back()

    def __enter__(self) -> Self:
        if self.layers and not self._old:
            raise RetrofitError("this handle was removed: recalibrate() anew")
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return in_short(self, f"{self._summary()}; {self._state()}")

    def __str__(self) -> str:
        return f"{type(self).__name__}({self._summary()})"

    def _repr_html_(self) -> str:
        """Show itself in a notebook: what was measured, and where."""
        facts = [
            ("images", f"{self.images:,}"),
            ("batches", f"{self.batches:,}"),
            ("passes over the data", f"{self.passes:,}"),
        ]
        if self.held:
            facts.append(("memory of waiting batches", f"{self.held / 2**20:,.1f} MiB"))
        return view(
            html_table(f"Recalibration: {self._summary()}; {self._state()}", (), facts),
            unfolding_list("BatchNorms, in the order of their first calls", self.layers),
        )

    def _summary(self) -> str:
        passes = "" if self.passes == 1 else f", {self.passes} times"
        return (
            f"{len(self.layers)} BatchNorms on {self.images} images in {self.batches} "
            f"batches{passes}"
        )

    def _state(self) -> str:
        if self.layers and not self._old:
            return "removed, the old statistics are back"
        known = math.isfinite(self.standard_error)
        error = f"{self.standard_error:.2%} of sigma" if known else "not known"
        return f"standard error {error}; remove() restores the old statistics"


def recalibrate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    layerwise: bool = False,
    prior: float = 0,
    max_memory: float | None = None,
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
      recalibrate again changes nothing. All batches wait at each BatchNorm until it is settled,
      so that it costs one pass, as the default does, as long as they fit into `max_memory`. A
      BatchNorm called several times in a pass feeds itself: it is measured in a pass of its own,
      all calls pooled.

    Where both cost a pass, take `layerwise=True`: it gives what eval mode computes with, from
    batches of any size.

    Args:
        model: any module with BatchNorms. What DataParallel or DistributedDataParallel hold is run
            without them.
        data: batches, as for `calibrate`. With `layerwise` it may be gone through many times, and
            has to give the same batches each time: a list or a DataLoader, not a generator.
        layerwise: measure each BatchNorm behind those before it, rather than all in one pass.
        prior: the old statistics count as this many images: with N and n new ones, mean and
            variance become N / (N + n) of the old plus n / (N + n) of the new (Schneider et al.,
            2020, "Improving robustness against common corruptions by covariate shift adaptation").
            For a handful of images, and best with `layerwise`, where each BatchNorm is measured
            behind blended ones. By default the old statistics count nothing.
        max_memory: bytes that the activations of waiting batches may take, with `layerwise`; by
            default a quarter of the device's memory. Batches beyond are run anew for each
            BatchNorm, at half a pass each. One batch waits in any case. The handle's `held` and
            `passes` tell what came of it.
        device: where the model runs meanwhile, as torch names it; by default where it is.
        max_images: stop after this many (of each process); by default after 256 of a DataLoader
            that shuffles, else at the end of the data.
        process_group: recalibrate with these processes together, each on data of its own, as for
            `calibrate`. Every process ends with the same statistics, those of all the data, bit for
            bit. In the default pass each normalises with its own batches, SyncBatchNorm too.
        forward_fn: `forward_fn(model, batch)` calls a model that takes more than a batch.
        progress: show a bar.

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

    Examples:
        >>> retrofit.recalibrate(averaged.module, loader, max_images=10_000)
    """
    check_models("recalibrate", model)
    model = unwrapped(model)
    processes = Processes(process_group)
    if max_images is None and in_random_order(data):
        max_images = RECALIBRATION_IMAGES
    feed = Feed(
        data, device, max_images, forward_fn, progress and processes.rank == 0, "recalibrate"
    )
    with processes.failing_together():
        check_flags(layerwise=layerwise, progress=progress)
        check_forward_fn(forward_fn)
        _refuse_bad_request(data, layerwise, prior, max_memory)
        norms = tracking(model)
        old = {path: buffers(norm) for path, norm in norms.items()}
        _agree(processes, model, norms, feed, layerwise, prior)
        try:
            with kept_memory():
                if layerwise:
                    settling = LayerByLayer(model, norms, old, feed, prior, processes, max_memory)
                    found = settling.run()
                else:
                    found = _at_once(model, norms, feed, prior, processes)
            _refuse_nothing(found.fed, feed)
        except BaseException:
            for path, was in old.items():
                restore(norms[path], was)
            raise
    error = share(found.fed.images, prior) * standard_error(
        found.measured.values(), found.fed.images
    )
    if processes.rank == 0:
        _warn(norms, found, error, layerwise=layerwise, prior=prior)
    return Recalibration(found, norms, old, error)


def _refuse_bad_request(
    data: Iterable[Any], layerwise: bool, prior: float, max_memory: float | None
) -> None:
    check_data(data)
    if layerwise:
        _refuse_iterator(data)
    check_prior(prior)
    if max_memory is not None:
        wanted = "be a number of bytes from 0 up"
        check_number("max_memory", max_memory, wanted, lambda n: n >= 0)


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


def _warn(norms: Norms, found: Estimate, error: float, *, layerwise: bool, prior: float) -> None:
    if unreached := [path for path in norms if path not in found.measured]:
        warn(
            f"the data never reached {', '.join(unreached)}: these BatchNorms keep the statistics "
            "they had"
        )
    if found.measured and error > UNCERTAIN_RECALIBRATION:
        warn(_uncertain(found.fed, error, layerwise=layerwise, prior=prior))


def _at_once(
    model: nn.Module, norms: Norms, feed: Feed, prior: float, processes: Processes
) -> Estimate:
    """Measure all BatchNorms in one pass, in which each normalises with its batch."""
    with batch_statistics(model, frozen=True):
        fed, found = measured(model, norms, norms, feed)
    fed, found = fed_by_all(processes, fed), measured_by_all(processes, found)
    for path, statistics in found.items():
        settle(path, norms[path], statistics, fed, prior)
    return Estimate(fed, found)


def _uncertain(fed: Fed, error: float, *, layerwise: bool, prior: float) -> str:
    if math.isinf(error):
        return (
            "the statistics are those of one image, or of some that do not differ, which cannot "
            "tell how uncertain they are"
        )
    if prior:
        others = ""
    elif layerwise:
        others = ", or let the old statistics count as some (prior=64; --prior 64)"
    else:
        others = (
            ", or let the old statistics count as some, layer by layer (layerwise=True, prior=64)"
        )
    return (
        f"the statistics of {fed.images} images are uncertain: 1 % of the channels have a standard "
        f"error of more than {error:.2f} of their standard deviation; use more images{others}"
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
