"""A ResNet whose BatchNorms were folded away gets them back, and learns with them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrofit.demo.accuracy import accuracy
from retrofit.demo.network import resnet_cifar10
from retrofit.demo.pictures import inverted
from retrofit.demo.trained import folded_resnet
from retrofit.files.checkpoint import save
from retrofit.finetuning import param_groups
from retrofit.restoring.restoration import Restoration, restoration_of
from retrofit.restoring.restore import restore
from retrofit.running.progress import progress_bar
from retrofit.tables import Part, Table

STEPS, EVERY = 100, 25  # steps, and after how many the network is tested
RATE, BATCH = 0.03, 64


@dataclass(frozen=True)
class Restored:
    """What came of the ResNet.

    Attributes:
        accuracies: on the test pictures, of each network, every 25 steps from the first.
        trained, tested: on how many pictures.
        restoration: what `restore` found.
        written: the file.
    """

    accuracies: dict[str, list[float]]
    trained: int
    tested: int
    restoration: Restoration
    written: str

    def _parts(self) -> Iterator[Part]:
        yield (
            "A ResNet whose BatchNorms were folded away gets them back, in its own class. Both "
            f"learn {self.trained:,} inverted pictures (SGD, rate {RATE:g}, batches of {BATCH}); "
            f"right of {self.tested:,} others\n"
        )
        head = ("ResNet", *(f"step {step}" for step in range(0, STEPS + 1, EVERY)))
        rows = [
            (name, *(f"{share:.1%}" for share in shares))
            for name, shares in self.accuracies.items()
        ]
        yield Table(head, rows, right=head[1:])
        found, apart = self.restoration, "are equal bit for bit"
        if not found.exact:
            apart = f"differ by {found.relative:.1e} of the largest"
        yield (
            f"\n{len(found.seats)} BatchNorms restored; before they learn, the outputs {apart}\n"
            f"written: {self.written}\n"
        )


def restore_resnet(
    folder: Path,
    images: Tensor,
    labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    progress: bool,
) -> Restored:
    """Restore the folded ResNet, and fine-tune both on inverted pictures.

    Tested on every fourth of the test pictures.
    """
    folded = folded_resnet()
    images, test, test_labels = inverted(images), inverted(test[::4]), test_labels[::4]
    architecture = resnet_cifar10().eval()
    restored = restore(architecture, folded, images.split(BATCH), progress=progress)
    found = restoration_of(restored)
    assert found is not None
    file = folder / "resnet-cifar10.safetensors"
    save(restored, file, name="retrofit.demo:resnet_cifar10", overwrite=True)
    accuracies = {}
    with progress_bar("fine-tune", 2 * STEPS, "step", shown=progress) as bar:
        for name, network in (("folded", folded), ("restored", restored)):
            accuracies[name] = fine_tuned(network, images, labels, test, test_labels, bar.update)
    return Restored(accuracies, len(images), len(test), found, str(file))


def fine_tuned(
    model: nn.Module,
    pictures: Tensor,
    labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    after_step: Callable[[], object],
) -> list[float]:
    """Train a network in place by SGD with momentum, at one rate after a short warm-up.

    Returns the share of right answers to the test pictures, at the start and every 25 steps.
    """
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(param_groups(model, 5e-4), lr=RATE, momentum=0.9)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=STEPS // 10)
    shares = [accuracy(model, test, test_labels)]
    batches = shuffled_batches(len(pictures), BATCH, torch.Generator().manual_seed(0))
    model.train()
    for step, index in enumerate(itertools.islice(batches, STEPS), 1):
        loss = F.cross_entropy(model(pictures[index]), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warm_up.step()
        after_step()
        if step % EVERY == 0:
            shares.append(accuracy(model, test, test_labels))
    return shares


def shuffled_batches(
    count: int, size: int, generator: torch.Generator | None = None
) -> Iterator[Tensor]:
    """Yield the indices of whole batches, in a new order for each epoch, without end."""
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count // size * size].view(-1, size)
