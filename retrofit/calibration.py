"""Feed data through a prepared model."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed, nn

from retrofit.batches import ForwardFn, refuse_single_tensor
from retrofit.errors import RetrofitError
from retrofit.feeding import Fed, feed
from retrofit.fingerprint import digest, fingerprint
from retrofit.modes import evaluating
from retrofit.observer import MomentObserver
from retrofit.one_pass import OnePass
from retrofit.packing import packed
from retrofit.ranks import Ranks
from retrofit.record import required_record
from retrofit.resuming import StateFile, stateful
from retrofit.rounds import Rounds
from retrofit.sampling import Calibration, channel_errors, site_sample, standard_error

# On the demo's network the halves of well-mixed samples of 256 pictures differ by 0.2, seldom more
# than 0.3, of more pictures by less; those of samples sorted by class by 0.6 to 1.4.
DISAGREEMENT = 0.3


def calibrate(
    prepared: nn.Module,
    data: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    max_images: int | None = None,
    tolerance: float | None = None,
    state: str | os.PathLike[str] | None = None,
    process_group: distributed.ProcessGroup | None = None,
    forward_fn: ForwardFn | None = None,
    progress: bool = True,
) -> Calibration:
    """Run data through a prepared model, once, in eval mode and without gradients.

    Only the observers learn; device, modes and parameters are afterwards as they were, and the
    observers too when an error is raised. A loop of your own, `for x, _ in loader: prepared(x)`
    under `torch.no_grad()`, gives the same moments up to rounding; this one reads the activations
    in the faster memory format and leaves each forward pass after the last site.

    Args:
        prepared: made by `prepare`; calling again adds more data.
        data: batches as DataLoaders yield them: tensors of shape (N, C, ...), or tuples, lists or
            dicts that hold them. As many items as the model's `forward` requires are passed to it,
            of a dict those that it names; a detector gets its list of pictures.
        device: where to run; by default where the model is. A GPU whose memory is too small for a
            batch gets it in halves, with a warning.
        max_images: stop after this many (of each process); by default at the end of the data.
        tolerance: stop as soon as 99 % of all channels have standard errors, of their mean and of
            their standard deviation, below this many of their standard deviations: 0.02 for 2 %.
            What to expect is two standard errors: moments within 4 % of those of all the data.
            Needs data in random order. A warning tells if the data ended before.
        state: a file to which the observers and the place in the data are written now and then,
            and always at the end; if it is there, the calibration goes on from it, and ends with
            the moments that it would have had. The data has to come again in the same batches;
            data with `state_dict` and `load_state_dict`, such as torchdata's StatefulDataLoader, is
            set to its place, other data is passed over up to there. With several processes the
            first writes it for all. One file for one call.
        process_group: calibrate with these processes together, each on data of its own (without
            duplicates: no DistributedSampler that pads; none at all is fine), for instance
            `torch.distributed.group.WORLD`. Every process ends with the same moments, those of all
            the data, bit for bit, and with the same report. By default this process works alone.
        forward_fn: `forward_fn(model, batch)` for any other way of calling the model. It sees the
            batch as it comes, uncut, and the model runs to its end.
        progress: show a progress bar with images/s and the share of time spent waiting for data.

    Returns:
        A `Calibration`: the standard errors reached, how many images others would need, and how
        far the two halves of the sample disagree. A warning is given when that is more than 0.3
        sigma for more than 1 % of a site's channels.

    Raises:
        RetrofitError: no data or fewer than 2 images, an input without a batch axis, a device
            that cannot be used, a tolerance that is not between 0 and 1, max_images below 1, a
            state file of another model, plan or data, or a model that `prepare` did not make.
        NonFiniteError: NaN or Inf at a site, with the site and the image.
        PeerError: another process failed or died, or has another model or other options.
    """
    ranks = Ranks(process_group)
    plan = required_record(prepared, "prepare").plan
    observers = [m for m in prepared.modules() if isinstance(m, MomentObserver)]
    if not observers:
        return Calibration(0, 0, 0.0, 0.0, math.inf, ())
    earlier = {o.site: digest(o.mean) for o in observers} if ranks.size > 1 else {}
    with _all_or_nothing(observers, ranks):
        refuse_single_tensor(data)
        if tolerance is not None and not 0 < tolerance < 1:
            raise RetrofitError(f"tolerance must lie between 0 and 1 (0.02: 2 %), not {tolerance}")
        described: dict[str, Any] = {}
        if state is not None or ranks.size > 1:
            options = {"max_images": max_images, "tolerance": tolerance}
            described = fingerprint(prepared, plan) | options
            ranks.agree(described | {"state": bool(state), "earlier data": earlier})
        rounds = Rounds(
            ranks,
            observers,
            data if state is None else stateful(data),
            tolerance,
            None if state is None else StateFile(state),
            described,
        )
        fed = rounds.resumed()
        if not rounds.ended:
            one_pass = OnePass(prepared, plan, observers)
            with evaluating(prepared), packed(prepared), one_pass:
                fed = feed(
                    prepared,
                    rounds.data,
                    {observer.site: observer for observer in observers},
                    call=one_pass,
                    device=device,
                    max_images=max_images,
                    forward_fn=forward_fn,
                    progress=progress and ranks.rank == 0,
                    start=fed,
                    until=rounds.until,
                )
        fed = rounds.finish(fed)
        if fed.images < 2:
            raise RetrofitError(
                f"calibration got {fed.images} of the at least 2 images that a variance needs "
                "(some hundred make a good one)"
            )
        report = _report(observers, fed, rounds.seconds)
    if ranks.rank == 0:
        _warn(report, tolerance)
    return report


@contextmanager
def _all_or_nothing(observers: list[MomentObserver], ranks: Ranks) -> Iterator[None]:
    """Observers begin empty, and end with what they knew before and what they have learned.

    After an error they know what they knew before, and the other processes know of the error.
    """
    before = [observer.state() for observer in observers]
    try:
        for observer in observers:
            observer.clear()
        yield
    except BaseException as error:
        for observer, known in zip(observers, before, strict=True):
            observer.restore(known)
        if isinstance(error, Exception):
            ranks.fail(error)
        raise
    for observer, known in zip(observers, before, strict=True):
        if known["images"]:
            observer.take_together([known, observer.state()])


def _report(observers: list[MomentObserver], fed: Fed, seconds: float) -> Calibration:
    errors = [channel_errors(observer, fed.images) for observer in observers]
    samples = map(site_sample, observers, errors)
    return Calibration(
        images=fed.images,
        batches=fed.batches,
        seconds=seconds,
        waited=fed.waited,
        standard_error=standard_error(errors),
        sites=tuple(sample for sample in samples if sample is not None),
    )


def _warn(report: Calibration, tolerance: float | None) -> None:
    if report.disagreement > DISAGREEMENT:
        warnings.warn(
            f"the two halves of the {report.images} calibration images disagree by "
            f"{report.disagreement:.2f} sigma: use more images, and shuffle them (the usual "
            "cause is a folder sorted by class and cut short)",
            stacklevel=3,
        )
    if tolerance is not None and report.standard_error > tolerance:
        warnings.warn(
            f"the calibration ended after {report.images} images at a standard error of "
            f"{report.standard_error:.2%}: a tolerance of {tolerance:.2%} needs about "
            f"{report.images_needed(tolerance):,}",
            stacklevel=3,
        )
