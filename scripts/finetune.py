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
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from finetune_tables import Protocol, Run, by_learning_rate, draw, usable
from finetune_training import Task, chosen, completed, read_task, train
from finetune_variants import STUDIES, TASKS, Variant, network, sample
from markdown_table import markdown_table
from pictures import augment, normalise
from recorded_runs import RecordedRuns

import retrofit
from retrofit.files.model_sources import build


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
    return Run.ended(
        protocol,
        (name, learning_rate, seed),
        task.accuracy(model),
        losses,
        time.perf_counter() - start,
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
    wanted = [
        (name, lr, seed)
        for seed in range(seeds)
        for name, variant in variants.items()
        for lr in variant.rates or rates
    ]
    return completed(
        record,
        wanted,
        lambda name, lr, seed: run(task, protocol, name, variants[name], lr, seed, device),
    )


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
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: leave out --device cuda")
    chosen = STUDIES[arguments.study]
    return read_task(
        arguments.data,
        arguments.images,
        arguments.batch_size,
        5 if arguments.quick else chosen.test_every,
        TASKS[chosen.task],
    )


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
