"""The whole pipeline on a small VGG trained on CIFAR-10, and on pictures that come with it."""

from __future__ import annotations

import tarfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from retrofit.calibration.calibrate import calibrate
from retrofit.checking.verify import verify
from retrofit.conversion import convert, insert, prepare
from retrofit.demo.network import CLASSES, MEAN, STD, resnet_cifar10, vgg_cifar10
from retrofit.files.checkpoint import load, save
from retrofit.files.fitting import load_weights
from retrofit.files.weights import read_weights
from retrofit.pictures.batches import PictureBatches, shuffled
from retrofit.pictures.preprocessing import preprocessing
from retrofit.pictures.sources import open_pictures
from retrofit.planning.plan import plan
from retrofit.running.modes import batch_statistics, evaluating
from retrofit.running.progress import progress_bar
from retrofit.surgery.folding import fold
from retrofit.tables import table

HERE = Path(__file__).parent
WEIGHTS = HERE / "vgg-cifar10.safetensors"
FOLDED = HERE / "resnet-cifar10-folded.safetensors"
PICTURES = HERE / "cifar10-sample.tar.xz"
BATCH = 128


def trained_vgg() -> nn.Module:
    """Load the demo's plain VGG with its trained weights, in eval mode."""
    model: nn.Module = vgg_cifar10()
    tensors, _ = read_weights(WEIGHTS)
    load_weights(model, tensors, str(WEIGHTS))
    model.eval()
    return model


def folded_resnet() -> nn.Module:
    """Load the demo's ResNet-20, whose BatchNorms were folded away after training, in eval mode.

    It has a bias in each convolution, and an Identity in the place of each BatchNorm.
    """
    model: nn.Module = fold(resnet_cifar10().eval())
    tensors, _ = read_weights(FOLDED)
    load_weights(model, tensors, str(FOLDED))
    return model


def run(folder: Path, *, progress: bool = True) -> str:
    """Convert, verify, save, load and fold the demo network in `folder`; returns the summary."""
    start = time.perf_counter()
    unpack(folder)
    plain = trained_vgg()
    images, _ = labelled(folder / "calibration")
    test, labels = labelled(folder / "test")

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
        f"{len(test):,} test pictures of CIFAR-10 (whole batches where statistics are theirs)\n\n"
        f"{accuracies}\n\n"
        f"retrofitted and plain: {exact} on {verification.images:,} pictures, at "
        f"{len(verification.sites)} sites and the output; the same top-1 on "
        f"{verification.top1:.2%}\n"
        f"calibrated on {calibration.images:,} pictures in {calibration.seconds:.1f} s; "
        f"{time.perf_counter() - start:.1f} s in all\nwritten: {file}"
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
    return table(head, rows, right=head[2])


def unpack(folder: Path) -> None:
    """Write the pictures to `folder`/calibration/*.jpg and `folder`/test/<class>/*.jpg."""
    with tarfile.open(PICTURES) as tar:
        for member in tar:
            content = tar.extractfile(member)
            if content is not None:
                file = folder / member.name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content.read())


def labelled(folder: Path) -> tuple[Tensor, Tensor]:
    """Read all pictures of a folder, in an order that mixes the classes, and their labels.

    The pictures are ready for the network; the label of one that lies in no folder with the name of
    a class is -1.
    """
    pictures = open_pictures(folder)
    transform = preprocessing(resize=32, crop=32, mean=MEAN, std=STD)
    order = shuffled(len(pictures), seed=0)
    batches = PictureBatches(pictures, order, transform, batch_size=BATCH, workers=0)
    names = [Path(pictures.name(i)).parent.name for i in order]
    labels = [CLASSES.index(name) if name in CLASSES else -1 for name in names]
    images = torch.cat(list(batches)).contiguous(memory_format=torch.channels_last)
    return images, torch.tensor(labels)


def accuracy(model: nn.Module, x: Tensor, labels: Tensor, *, batchwise: bool = False) -> float:
    """Compute the share of right answers, under running statistics or those of whole batches."""
    if batchwise:
        x = x[: len(x) // BATCH * BATCH]
    with batch_statistics(model) if batchwise else evaluating(model), torch.no_grad():
        answers = torch.cat([model(batch).argmax(1) for batch in x.split(BATCH)])
    return float((answers == labels[: len(x)]).float().mean())
