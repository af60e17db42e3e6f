"""Run data through a prepared model, so that its observers learn the moments."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import distributed, nn

from retrofit.calibration.feeding import Fed, Feed
from retrofit.calibration.forward_pass import ForwardPass
from retrofit.calibration.observer import observers_of, prepared_record
from retrofit.calibration.processes import Processes, digest, fingerprint
from retrofit.calibration.rounds import Learned, Rounds
from retrofit.calibration.sample_errors import Calibration, site_samples, standard_error
from retrofit.calibration.site_samples import SiteSamples
from retrofit.calibration.state_file import StateFile, stateful
from retrofit.errors import RetrofitError, warn
from retrofit.numerics.channel_statistics import ChannelStatistics
from retrofit.option_checks import check_flags, check_forward_fn, check_number, check_path
from retrofit.plans import Plan
from retrofit.running.batch_checks import check_data, nothing_in
from retrofit.running.call_arguments import ForwardFn
from retrofit.running.modes import evaluating
from retrofit.running.random_order import in_random_order
from retrofit.sample_sizes import TOLERANCE, UNCERTAIN, default_tolerance
from retrofit.tables import few


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
            Needs data in random order. A warning tells if the data ended before. By default 0.05
            for a DataLoader that shuffles, without `max_images`; else 0, which uses all data.
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
        far the two halves of the sample disagree. A warning is given when they do so by more
        than chance explains (`Calibration.disordered`), when nothing varies at a site, when the
        images are all the same, or when they reach no site.

    Raises:
        RetrofitError: no data or fewer than 2 images, an input without a batch axis, a device
            that cannot be used, a tolerance below 0 or not below 1, max_images below 1, a
            state file of another model, plan or data, or a model that `prepare` did not make.
        NonFiniteError: NaN or Inf at a site, with the site and the image.
        PeerError: another process failed or died, or has another model or other options.
    """
    plan = prepared_record(prepared, "calibrate").plan
    observers = observers_of(prepared)
    if not observers:
        return Calibration(0, 0, 0.0, 0.0, math.inf, ())
    processes = Processes(process_group)
    feed = Feed(data, device, max_images, forward_fn, progress and processes.rank == 0)
    samples = SiteSamples({observer.site: observer.channels for observer in observers})
    with processes.failing_together():
        check_data(data)
        _check_options(tolerance, state, forward_fn, progress)
        enough = tolerance
        if tolerance is None and in_random_order(data):
            enough = default_tolerance(max_images)
        feed = replace(feed, may_end_early=bool(enough))
        rounds, feed = _wrapped(prepared, plan, processes, state, feed, enough or None)
        learned = rounds.begin(Learned(ChannelStatistics.empty(sum(samples.channels.values()))))
        if not learned.ended:
            learned = _run_data(prepared, plan, samples, feed, learned, rounds.after_batch)
        learned = rounds.end(learned)
        if not learned.fed.batches and isinstance(data, Iterator):
            raise RetrofitError(nothing_in(data))
        if learned.fed.images < 2:
            raise RetrofitError(
                f"calibration got {learned.fed.images} of the at least 2 images that a variance "
                "needs (some hundred make a good one)"
            )
    report = _report(samples.channels, learned)
    by_site = samples.split(learned.statistics)
    for observer in observers:
        observer.statistics = observer.statistics.merge(by_site[observer.site])
    if processes.rank == 0:
        _warn(report, tolerance)
    return report


def _check_options(tolerance: object, state: object, forward_fn: object, progress: object) -> None:
    """Raise RetrofitError for values that they cannot have; `Feed` checks the others."""
    if tolerance is not None:
        wanted = "lie between 0 and 1 (0.02: 2 %)"
        check_number("tolerance", tolerance, wanted, lambda t: 0 <= t < 1)
    if state is not None:
        check_path("state", state)
    check_forward_fn(forward_fn)
    check_flags(progress=progress)


def _wrapped(
    prepared: nn.Module,
    plan: Plan,
    processes: Processes,
    state: str | os.PathLike[str] | None,
    feed: Feed,
    tolerance: float | None,
) -> tuple[Rounds, Feed]:
    """Wrap the calibration for several processes and a state file, where there are such."""
    if state is None and processes.size == 1:
        return Rounds(processes, tolerance), feed
    options = {"max_images": feed.max_images, "tolerance": tolerance}
    described = fingerprint(prepared, plan) | options
    earlier = {o.site: digest(o.get_buffer("mean")) for o in observers_of(prepared)}
    processes.agree(described | {"state": bool(state), "earlier data": earlier})
    if state is None:
        return Rounds(processes, tolerance), feed
    data = stateful(feed.data)
    return Rounds(processes, tolerance, StateFile(state), data, described), replace(feed, data=data)


def _run_data(
    prepared: nn.Module,
    plan: Plan,
    samples: SiteSamples,
    feed: Feed,
    start: Learned,
    after_batch: Callable[[Learned], Learned],
) -> Learned:
    """Add the data of `feed` to what was learned, until it ends or `after_batch` says so."""
    known = start

    def learn() -> None:
        nonlocal known
        known = replace(known, statistics=samples.added_to(known.statistics))

    def needed(fed: Fed) -> float:
        nonlocal known
        learn()  # what a forward_fn has run
        known = after_batch(replace(known, fed=fed))
        # An estimate ends nothing: that is for the next check.
        return fed.images if known.ended else max(known.needed, fed.images + 1)

    run = ForwardPass(prepared, plan, samples, part_done=learn)
    with evaluating(prepared), run, _receiving(prepared, samples):
        fed = feed.run(prepared, samples, call=run, start=start.fed, needed=needed)
    return replace(known, fed=fed)


@contextmanager
def _receiving(prepared: nn.Module, samples: SiteSamples) -> Iterator[None]:
    """Let the observers hand over what they get, instead of learning from it."""
    observers = observers_of(prepared)
    try:
        for observer in observers:
            observer.receive = samples.take
        yield
    finally:
        for observer in observers:
            del observer.receive


def _report(channels: Mapping[str, int], learned: Learned) -> Calibration:
    fed, statistics = learned.fed, learned.statistics
    return Calibration(
        images=fed.images,
        batches=fed.batches,
        seconds=learned.seconds,
        waited=fed.waited,
        standard_error=standard_error([statistics], fed.images),
        sites=site_samples(channels, statistics, fed.images),
    )


def _warn(report: Calibration, tolerance: float | None) -> None:
    """Warn of images in some order, or all alike, of layers that none reached, of a tolerance."""
    if site := report.disordered:
        warn(
            f"the two halves of the {report.images} calibration images differ by "
            f"{site.disagreement:.2f} sigma at {site.site}, which is no chance: shuffle the "
            "images (the usual cause is a folder sorted by class and cut short)"
        )
    if not report.sites:
        warn(
            f"none of the observed layers got any of the {report.images} calibration images: does "
            "the model return before them, or forward_fn run another object than the model that it "
            "is given?"
        )
        return
    if math.isinf(report.standard_error):
        constant, channels = (
            sum(getattr(site, name) for site in report.sites) for name in ("constant", "channels")
        )
        warn(
            f"nothing differs between the {report.images} calibration images at any site, and "
            f"{constant} of {channels} channels are constant: are they one picture over and over, "
            "or is the network dead? The standard error is not known"
        )
        return
    if dead := [site.site for site in report.sites if site.constant == site.channels]:
        warn(
            f"all channels of {few(dead)} are constant on "
            f"the {report.images} calibration images: the network is dead there, and BatchNorm has "
            "nothing to normalise"
        )
    if tolerance and report.standard_error > tolerance:
        warn(
            f"the calibration ended after {report.images} images at a standard error of "
            f"{report.standard_error:.2%}: a tolerance of {tolerance:.2%} needs about "
            f"{report.images_needed(tolerance):,}"
        )
    elif UNCERTAIN < report.standard_error < math.inf:
        warn(
            f"the statistics of {report.images} images are uncertain by "
            f"{report.standard_error:.0%} of a standard deviation: about "
            f"{report.images_needed(TOLERANCE):,} bring that to {TOLERANCE:.0%}"
        )
