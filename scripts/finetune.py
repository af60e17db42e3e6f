"""Measure what BatchNorm changes in fine-tuning: learning rates, and what else matters.

    python scripts/finetune.py --data CIFAR10 --output docs/results
    python scripts/finetune.py --data CIFAR10 --output docs/results --study settings
    python scripts/finetune.py --data CIFAR10 --output docs/results --study sample
    python scripts/finetune.py --data CIFAR10 --output docs/results --study folded
    python scripts/finetune.py --data CIFAR10 --output docs/results --study folded-turned

CIFAR10 is a folder with train/<class>/*.jpg and test/<class>/*.jpg. A network of `retrofit demo`,
the plain VGG or the folded ResNet, is fine-tuned on some of the training pictures, inverted or
turned on their side, and tested on such test pictures; `finetune_variants.py` has what the studies
compare. The seed chooses the pictures and their order; a learning rate and a seed are the same task
for every variant. A study is written to OUTPUT/finetune-STUDY.csv run by run, so that one that was
interrupted goes on where it was, and at last as a table (.md) and a figure (.svg).
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from finetune_tables import Protocol, Run, by_learning_rate, draw, usable
from finetune_variants import STUDIES, TASKS, Variant, network, sample
from markdown_table import markdown_table
from pictures import accuracy, augment, normalise, read
from recorded_runs import RecordedRuns
from torch import Tensor, nn
from tqdm import tqdm

import retrofit
from retrofit.demo.restoring import shuffled_batches
from retrofit.files.model_sources import build


@dataclass(frozen=True)
class Task:
    """Pictures to train on and to test on."""

    pictures: Tensor
    labels: Tensor
    test_pictures: Tensor
    test_labels: Tensor


# --- training ----------------------------------------------------------------------------------


def train(
    model: nn.Module,
    variant: Variant,
    protocol: Protocol,
    learning_rate: float,
    pictures: Tensor,
    labels: Tensor,
    device: str,
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
        x = normalise(augment(pictures[index])).to(device)
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


def chosen(task: Task, protocol: Protocol, seed: int) -> tuple[Tensor, Tensor]:
    """Draw the pictures of a seed, with labels; all that is random afterwards follows the seed."""
    torch.manual_seed(seed)
    index = torch.randperm(len(task.pictures))[: protocol.images]
    return task.pictures[index], task.labels[index]


def run(
    task: Task,
    protocol: Protocol,
    name: str,
    variant: Variant,
    learning_rate: float,
    seed: int,
    device: str = "cpu",
) -> Run:
    """Fine-tune the trained network once, and test it at the end."""
    start = time.perf_counter()
    pictures, labels = chosen(task, protocol, seed)
    model = network(variant, protocol, pictures).to(device).to(memory_format=torch.channels_last)
    losses = train(model, variant, protocol, learning_rate, pictures, labels, device)
    model.cpu()
    if variant.recalibrated:
        seen = augment(pictures) if variant.augmented else pictures
        retrofit.recalibrate(model, normalise(seen).split(128), progress=False)
    return Run(
        **asdict(protocol),
        variant=name,
        learning_rate=learning_rate,
        seed=seed,
        accuracy=accuracy(model, task.test_pictures, task.test_labels),
        loss=sum(losses[-20:]) / len(losses[-20:]),
        diverged=not math.isfinite(losses[-1]),
        seconds=round(time.perf_counter() - start, 1),
    )


# --- a study -----------------------------------------------------------------------------------


def study(
    task: Task,
    protocol: Protocol,
    variants: Mapping[str, Variant],
    rates: Sequence[float],
    seeds: int,
    file: Path,
    device: str = "cpu",
) -> list[Run]:
    """Make all runs, seed by seed, except those that are in `file` already."""
    record = RecordedRuns(file, Run, asdict(protocol))
    done = {found.key for found in record.runs}
    wanted = [
        (name, lr, seed)
        for seed in range(seeds)
        for name, variant in variants.items()
        for lr in variant.rates or rates
    ]
    for name, lr, seed in (bar := tqdm([key for key in wanted if key not in done], desc="runs")):
        bar.set_postfix_str(f"{name}, learning rate {lr:g}, seed {seed}")
        record.append(run(task, protocol, name, variants[name], lr, seed, device))
    found = [one for one in record.runs if one.key in wanted]
    return sorted(found, key=lambda one: wanted.index(one.key))


def drifts(task: Task, protocol: Protocol) -> str:
    """Tabulate how many of 2,048 answers batch statistics leave as they were."""
    variants = {
        "uncalibrated BatchNorm": Variant("uncalibrated"),
        "calibrated on upright pictures": Variant(source=True),
        "calibrated on the pictures of the task": Variant(),
    }
    sizes = (4, 8, 16, 32, 64, 128)
    plain = build(protocol.model).eval()
    pictures, _ = chosen(task, protocol, seed=0)
    some = torch.randperm(len(task.test_pictures))[:2048]
    test = normalise(task.test_pictures[some]).split(128)
    lines = []
    for name, variant in variants.items():
        drift = retrofit.drift(plain, network(variant, protocol, pictures), test, sizes)
        lines.append([name, *(f"{row.top1:.1%}" for row in drift.rows)])
    return markdown_table(["same answer in batches of", *map(str, sizes)], lines)


def samples_used(task: Task, protocol: Protocol, seeds: int) -> str:
    """Tabulate how many pictures a tolerance needs."""
    lines = []
    for name, variant in STUDIES["sample"].variants.items():
        counts = []
        for seed in range(seeds):
            pictures, _ = chosen(task, protocol, seed)
            prepared = retrofit.prepare(build(protocol.model).eval())
            batches = sample(variant, pictures)
            tolerance = variant.tolerance
            found = retrofit.calibrate(prepared, batches, tolerance=tolerance, progress=False)
            counts.append(found.images)
        lines.append([name, *(f"{count:,}" for count in counts)])
    return markdown_table(["calibrated on", *(f"seed {seed}" for seed in range(seeds))], lines)


# --- the command -------------------------------------------------------------------------------


def loaded(folder: Path, task: str, test_every: int) -> Task:
    """Read the pictures of a folder, as those of the task; only some of the test pictures."""
    for part in ("train", "test"):
        if not (folder / part).is_dir():
            raise SystemExit(
                f"{folder} has no folder {part}: --data is a folder with train and test"
            )
    pictures, labels = read(folder / "train")
    test_pictures, test_labels = (t[::test_every] for t in read(folder / "test"))
    return Task(TASKS[task](pictures), labels, TASKS[task](test_pictures), test_labels)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with train/<class>/ and test/<class>/")
    add("--output", type=Path, required=True, metavar="FOLDER")
    add("--study", choices=STUDIES, default="rates", help="what is compared")
    add("--quick", action="store_true", help="a few short runs: minutes on a CPU")
    add("--learning-rates", type=float, nargs="+", metavar="RATE")
    add("--seeds", type=int, help="3; if quick 1")
    add("--steps", type=int, help="300, of folded networks 150; if quick 40")
    add("--images", type=int, help="to train on; 5,000; if quick 1,000")
    add("--batch-size", type=int, default=64)
    add("--model", help="as for `retrofit plan`; default: that of the study")
    add("--device", default="cpu")
    arguments = parser.parse_args()
    quick = arguments.quick
    arguments.seeds = arguments.seeds or (1 if quick else 3)
    chosen = STUDIES[arguments.study]
    arguments.model = arguments.model or chosen.model
    arguments.steps = arguments.steps or (40 if quick else chosen.steps)
    arguments.images = arguments.images or (1000 if quick else 5000)
    rates = chosen.rates[:: 2 if quick else 1]
    arguments.learning_rates = arguments.learning_rates or rates
    return arguments


def checked_task(arguments: argparse.Namespace) -> Task:
    """Read the pictures; refuse what cannot be trained with these arguments."""
    images, batch_size = arguments.images, arguments.batch_size
    if images < batch_size:
        raise SystemExit(f"--images {images} is less than --batch-size {batch_size}")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: leave out --device cuda")
    chosen = STUDIES[arguments.study]
    task = loaded(arguments.data, chosen.task, 5 if arguments.quick else chosen.test_every)
    if len(task.pictures) < images:
        raise SystemExit(
            f"{arguments.data / 'train'} has {len(task.pictures)} pictures: too few for "
            f"--images {images}"
        )
    return task


def main() -> None:
    arguments = parsed()
    task = checked_task(arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / f"finetune-{arguments.study}.csv"
    protocol = Protocol(
        arguments.model,
        arguments.images,
        len(task.test_labels),
        arguments.steps,
        arguments.batch_size,
    )
    variants, rates = STUDIES[arguments.study].variants, arguments.learning_rates
    runs = study(task, protocol, variants, rates, arguments.seeds, file, arguments.device)
    table = by_learning_rate(runs)
    if arguments.study not in ("sample", "settings"):
        table += "\n" + usable(runs)
        drawn = [one for one in runs if one.variant in (STUDIES[arguments.study].drawn or variants)]
        draw(drawn).savefig(file.with_suffix(".svg"), metadata={"Date": None})
    elif arguments.study == "sample":
        table += "\n" + samples_used(task, protocol, arguments.seeds)
    else:
        table += "\n" + drifts(task, protocol)
    file.with_suffix(".md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
