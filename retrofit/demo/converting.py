"""A plain VGG gets BatchNorm, and computes what it did."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from retrofit.calibration.calibrate import calibrate
from retrofit.calibration.sample_errors import Calibration
from retrofit.checking.verify import Verification, verify
from retrofit.conversion import convert, insert, prepare
from retrofit.demo.accuracy import BATCH, accuracy
from retrofit.demo.trained import trained_vgg
from retrofit.files.checkpoint import load, save
from retrofit.planning.plan import plan
from retrofit.running.progress import progress_bar
from retrofit.surgery.folding import fold
from retrofit.tables import Part, Table


@dataclass(frozen=True)
class Answered:
    """How often a network is right, under running statistics, those of batches, or without any."""

    network: str
    statistics: str
    accuracy: float


@dataclass(frozen=True)
class Converted:
    """What came of the VGG.

    Attributes:
        accuracies: of the networks, on the test pictures.
        tested: how many these are.
        calibration, verification: what these functions found.
        written: the file.
    """

    accuracies: list[Answered]
    tested: int
    calibration: Calibration
    verification: Verification
    written: str

    def _parts(self) -> Iterator[Part]:
        verified, calibrated = self.verification, self.calibration
        exact = "equal bit for bit" if verified.exact else "NOT equal"
        yield (
            f"A plain VGG gets BatchNorm: {self.tested:,} test pictures of CIFAR-10 (whole "
            "batches where statistics are theirs)\n"
        )
        head = ("network", "statistics", "accuracy")
        rows = [(one.network, one.statistics, f"{one.accuracy:.2%}") for one in self.accuracies]
        yield Table(head, rows, right=head[2:])
        yield (
            f"\nretrofitted and plain: {exact} on {verified.images:,} pictures, at "
            f"{len(verified.sites)} sites and the output; the same top-1 on {verified.top1:.2%}\n"
            f"calibrated on {calibrated.images:,} pictures in {calibrated.seconds:.1f} s\n"
            f"written: {self.written}\n"
        )


def convert_vgg(
    folder: Path, images: Tensor, test: Tensor, labels: Tensor, *, progress: bool
) -> Converted:
    """Convert, verify, save, load and fold the VGG."""
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
    return Converted(accuracies, len(test), calibration, verification, str(file))


def _accuracies(
    plain: nn.Module,
    retrofitted: nn.Module,
    folded: nn.Module,
    test: Tensor,
    labels: Tensor,
    *,
    progress: bool,
) -> list[Answered]:
    """Test each network, and one with BatchNorm uncalibrated."""
    running, batchwise = "running", f"of batches of {BATCH}"
    networks = [
        ("plain VGG", "-", plain),
        ("retrofitted", running, retrofitted),
        ("retrofitted, saved, loaded, folded", "-", folded),
        ("retrofitted", batchwise, retrofitted),
        ("BatchNorm without calibration", batchwise, insert(plain)),
    ]
    found = []
    with progress_bar("accuracy", len(networks), "network", shown=progress) as bar:
        for name, statistics, network in networks:
            right = accuracy(network, test, labels, batchwise=statistics == batchwise)
            found.append(Answered(name, statistics, right))
            bar.update()
    return found
