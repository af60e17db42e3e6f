"""What the studies of `finetune.py` compare: a network's BatchNorms, and how it is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from finetune_tables import Protocol
from pictures import normalise
from torch import Tensor, nn

import retrofit
from retrofit.files.model_sources import build, trained

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


class Origin(NamedTuple):
    """What a folded network was before: its class, and the weights that it had there."""

    architecture: str
    weights: Path


ORIGINS: Mapping[str, Origin] = {
    "retrofit.demo:folded_resnet": Origin(
        "retrofit.demo:resnet_cifar10", NOTEBOOKS / "resnet-cifar10.safetensors"
    )
}

# What the pictures of the task are, of those that the network was trained on: uint8, (N, 3, H, W).
TASKS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "inverted": lambda pictures: 255 - pictures,
    "turned": lambda pictures: pictures.rot90(1, (2, 3)),
}


@dataclass(frozen=True)
class Variant:
    """A network, and how it is trained.

    batchnorm: none, as the network is; new ones that are uncalibrated or calibrated; restored,
        those that were folded away; original, as it was before they were.
    source: calibrated on upright pictures, such as the network was trained on.
    tolerance: of the calibration; by default it uses all pictures.
    frozen: share of the steps, from the first, under frozen statistics.
    decay_all: weight decay on BatchNorm and biases too.
    recalibrated: after the last step, on the pictures of the training.
    augmented: these, shifted and mirrored as in training.
    clip: the largest norm of a gradient; longer ones are scaled to it.
    longer: so many times the steps.
    rates: learning rates of its own, instead of those of the study.
    """

    batchnorm: Literal["none", "uncalibrated", "calibrated", "restored", "original"] = "calibrated"
    source: bool = False
    tolerance: float | None = None
    momentum: float = 0.1
    frozen: float = 0.0
    optimizer: Literal["SGD", "AdamW"] = "SGD"
    weight_decay: float = 5e-4
    decay_all: bool = False
    recalibrated: bool = False
    augmented: bool = False
    clip: float | None = None
    longer: int = 1
    rates: tuple[float, ...] = ()


@dataclass(frozen=True)
class Study:
    """What is compared on which task; all but the variants are defaults of the command."""

    variants: Mapping[str, Variant]
    rates: tuple[float, ...]
    model: str = "retrofit.demo:trained_vgg"
    task: str = "inverted"
    steps: int = 300
    test_every: int = 1  # of the 10,000 test pictures, every so many-th
    drawn: tuple[str, ...] = ()  # variants in the figure; by default all


FOLDED, RESTORED = Variant("none"), Variant("restored", tolerance=0.05)
ADAMW_RATES = 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1


def with_adamw(variant: Variant) -> Variant:
    return replace(variant, optimizer="AdamW", weight_decay=0.01, rates=ADAMW_RATES)


OF_FOLDED = Study(
    {
        "folded": FOLDED,
        "folded, clipped": replace(FOLDED, clip=1.0),
        "folded, three times as long": replace(FOLDED, longer=3, rates=(0.001, 0.003, 0.01)),
        "folded, AdamW": with_adamw(FOLDED),
        "new BatchNorm, uncalibrated": Variant("uncalibrated"),
        "add_batchnorm": Variant(tolerance=0.05),
        "restored": RESTORED,
        "restored, clipped": replace(RESTORED, clip=1.0),
        "restored, AdamW": with_adamw(RESTORED),
        "original": Variant("original"),
    },
    (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    model="retrofit.demo:folded_resnet",
    steps=150,
    test_every=5,
    drawn=("folded", "folded, clipped", "folded, AdamW", "restored", "original"),
)
STUDIES: Mapping[str, Study] = {
    "rates": Study(
        {
            "plain": Variant("none"),
            "naive": Variant("uncalibrated"),
            "retrofitted": Variant(),
            "frozen first": Variant(frozen=0.25),
        },
        (0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    ),
    "settings": Study(
        {
            "default": Variant(),
            "calibrated on upright pictures": Variant(source=True),
            "momentum 0.01": Variant(momentum=0.01),
            "momentum 0.01, recalibrated": Variant(momentum=0.01, recalibrated=True),
            "momentum 0.01, recalibrated, augmented": Variant(
                momentum=0.01, recalibrated=True, augmented=True
            ),
            "momentum 0.5": Variant(momentum=0.5),
            "frozen for a quarter": Variant(frozen=0.25),
            "frozen throughout": Variant(frozen=1.0),
            "decay 5e-4 on everything": Variant(decay_all=True),
            "decay 5e-3": Variant(weight_decay=5e-3),
            "decay 5e-3 on everything": Variant(weight_decay=5e-3, decay_all=True),
        },
        (0.1,),
    ),
    "sample": Study(
        {
            "all pictures": Variant(),
            # 1 % takes more than the 5,000 pictures that there are.
            **{f"tolerance {t:.0%}": Variant(tolerance=t) for t in (0.02, 0.03, 0.05, 0.1)},
        },
        (0.03, 0.1),
    ),
    "folded": OF_FOLDED,
    "folded-turned": replace(OF_FOLDED, task="turned"),
}


def network(variant: Variant, protocol: Protocol, pictures: Tensor) -> nn.Module:
    """Build the trained network with the variant's BatchNorm, calibrated on these pictures."""
    if variant.batchnorm == "original":
        before = ORIGINS[protocol.model]
        return trained(before.architecture, str(before.weights))
    model = build(protocol.model).eval()
    if variant.batchnorm == "uncalibrated":
        return retrofit.insert(model, momentum=variant.momentum)
    if variant.batchnorm == "calibrated":
        return retrofit.add_batchnorm(
            model,
            sample(variant, pictures),
            momentum=variant.momentum,
            tolerance=variant.tolerance,
            progress=False,
        )
    if variant.batchnorm == "restored":
        return retrofit.restore(
            build(ORIGINS[protocol.model].architecture).eval(),
            model,
            sample(variant, pictures),
            tolerance=variant.tolerance,
            progress=False,
        )
    return model


def sample(variant: Variant, pictures: Tensor) -> tuple[Tensor, ...]:
    """Make batches to calibrate on, small where the calibration may stop after any."""
    x = normalise(255 - pictures if variant.source else pictures)
    batches: tuple[Tensor, ...] = x.split(16 if variant.tolerance else 128)
    return batches
