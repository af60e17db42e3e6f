"""Fine-tune a network on pictures: what studies and notebooks have in common."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from finetune_tables import Key, Protocol, Run
from finetune_variants import Variant
from pictures import accuracy, augment, normalise, read
from recorded_runs import RecordedRuns
from torch import Tensor, nn
from tqdm import tqdm

import retrofit
from retrofit.demo.restoring import shuffled_batches

R = TypeVar("R", bound=Run)


@dataclass(frozen=True)
class Task:
    """Pictures to train on and to test on, uint8, and what the network takes of such pictures."""

    pictures: Tensor
    labels: Tensor
    test_pictures: Tensor
    test_labels: Tensor
    inputs: Callable[[Tensor], Tensor] = normalise

    def accuracy(self, model: nn.Module) -> float:
        return accuracy(model, self.test_pictures, self.test_labels, inputs=self.inputs)


def read_task(
    folder: Path,
    images: int,
    batch_size: int,
    test_every: int,
    change: Callable[[Tensor], Tensor] = lambda pictures: pictures,
) -> Task:
    """Read train/<class>/ and test/<class>/ of a folder, of the latter every so many-th picture.

    Args:
        images, batch_size: how many will be trained on, and at once.
        change: what the pictures of the task are, of those in the folder.

    Raises:
        SystemExit: the folder has other classes, or too few pictures.
    """
    if images < batch_size:
        raise SystemExit(f"--images {images} is less than --batch-size {batch_size}")
    for part in ("train", "test"):
        if not (folder / part).is_dir():
            raise SystemExit(
                f"{folder} has no folder {part}: --data is a folder with train and test"
            )
    pictures, labels = read(folder / "train")
    test_pictures, test_labels = (t[::test_every] for t in read(folder / "test"))
    if len(pictures) < images:
        raise SystemExit(
            f"{folder / 'train'} has {len(pictures)} pictures: too few for --images {images}"
        )
    return Task(change(pictures), labels, change(test_pictures), test_labels)


def chosen(task: Task, protocol: Protocol, seed: int) -> tuple[Tensor, Tensor]:
    """Draw the pictures of a seed, with labels; all that is random afterwards follows the seed."""
    torch.manual_seed(seed)
    index = torch.randperm(len(task.pictures))[: protocol.images]
    return task.pictures[index], task.labels[index]


def train(
    model: nn.Module,
    variant: Variant,
    protocol: Protocol,
    learning_rate: float,
    pictures: Tensor,
    labels: Tensor,
    device: str = "cpu",
    inputs: Callable[[Tensor], Tensor] = normalise,
) -> list[float]:
    """Train with torch's one-cycle schedule (30 % warm-up, then a cosine); SGD has momentum 0.9.

    Returns the losses; training ends after one that is not finite.
    """
    groups = retrofit.param_groups(model, variant.weight_decay)
    if variant.decay_all:
        groups = [group | {"weight_decay": variant.weight_decay} for group in groups]
    optimizer: torch.optim.Optimizer
    if variant.optimizer == "SGD":
        optimizer = torch.optim.SGD(groups, lr=learning_rate, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(groups, lr=learning_rate)
    steps = protocol.steps * variant.longer
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=learning_rate, total_steps=steps, cycle_momentum=False
    )
    thaw = round(variant.frozen * steps)
    if thaw:
        retrofit.freeze_statistics(model)
    losses: list[float] = []
    batches = shuffled_batches(len(pictures), protocol.batch_size)
    model.train()
    for step, index in enumerate(itertools.islice(batches, steps)):
        if step == thaw:
            retrofit.unfreeze_statistics(model)
        x = inputs(augment(pictures[index])).to(device)
        loss = F.cross_entropy(model(x), labels[index].to(device))
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        optimizer.zero_grad()
        loss.backward()
        if variant.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), variant.clip)
        optimizer.step()
        schedule.step()
    return losses


def completed(
    record: RecordedRuns[R], wanted: Sequence[Key], make: Callable[[str, float, int], R]
) -> list[R]:
    """Make the runs with these keys, except those that are recorded already; returns all of them.

    Args:
        make: of a variant, a learning rate and a seed.
    """
    done = {found.key for found in record.runs}
    for name, lr, seed in (bar := tqdm([key for key in wanted if key not in done], desc="runs")):
        bar.set_postfix_str(f"{name}, learning rate {lr:g}, seed {seed}")
        record.append(make(name, lr, seed))
    found = [one for one in record.runs if one.key in wanted]
    return sorted(found, key=lambda one: wanted.index(one.key))
