"""A plain VGG gets BatchNorm, and computes what it did."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from retrofit.calibration.calibrate import calibrate
from retrofit.checking.verify import verify
from retrofit.conversion import convert, insert, prepare
from retrofit.demo.accuracy import BATCH, accuracy
from retrofit.demo.trained import trained_vgg
from retrofit.files.checkpoint import load, save
from retrofit.planning.plan import plan
from retrofit.running.progress import progress_bar
from retrofit.surgery.folding import fold
from retrofit.tables import Table


def convert_vgg(
    folder: Path, images: Tensor, test: Tensor, labels: Tensor, *, progress: bool
) -> str:
    """Convert, verify, save, load and fold the VGG; returns what was found."""
    plain = trained_vgg()
    prepared = prepare(plain, plan(plain))
    calibration = calibrate(prepared, images.split(BATCH), progress=progress)
    retrofitted = convert(prepared)
    verification = verify(plain, retrofitted, test[:512].split(BATCH), progress=progress)
    file = folder / "vgg-cifar10-bn.safetensors"
    save(
        retrofitted,
        file,
        name="retrofit.demo:trained_vgg",
        data="1,024 training pictures of CIFAR-10",
        calibration=calibration,
        verification=verification,
        overwrite=True,
    )
    folded = fold(load(file, plain))
    accuracies = _accuracies(plain, retrofitted, folded, test, labels, progress=progress)
    exact = "equal bit for bit" if verification.exact else "NOT equal"
    return (
        f"A plain VGG gets BatchNorm: {len(test):,} test pictures of CIFAR-10 (whole batches where "
        f"statistics are theirs)\n\n"
        f"{accuracies}\n\n"
        f"retrofitted and plain: {exact} on {verification.images:,} pictures, at "
        f"{len(verification.sites)} sites and the output; the same top-1 on "
        f"{verification.top1:.2%}\n"
        f"calibrated on {calibration.images:,} pictures in {calibration.seconds:.1f} s\n"
        f"written: {file}"
    )


def _accuracies(
    plain: nn.Module,
    retrofitted: nn.Module,
    folded: nn.Module,
    test: Tensor,
    labels: Tensor,
    *,
    progress: bool,
) -> str:
    """Make a table of how often each network is right, and one with BatchNorm uncalibrated."""
    running, batchwise = "running", f"of batches of {BATCH}"
    networks = [
        ("plain VGG", "-", plain),
        ("retrofitted", running, retrofitted),
        ("retrofitted, saved, loaded, folded", "-", folded),
        ("retrofitted", batchwise, retrofitted),
        ("BatchNorm without calibration", batchwise, insert(plain)),
    ]
    rows = []
    with progress_bar("accuracy", len(networks), "network", shown=progress) as bar:
        for name, statistics, network in networks:
            right = accuracy(network, test, labels, batchwise=statistics == batchwise)
            rows.append((name, statistics, f"{right:.2%}"))
            bar.update()
    head = ("network", "statistics", "accuracy")
    return str(Table(head, rows, right=head[2:]))
