"""Measure how many pictures a tolerance needs, and whether it keeps its promise.

    python scripts/sample_size.py --data path/to/pictures --crop 32 --results sample-size.csv

Calibrates a model on all pictures of a folder, and then for several seeds with `tolerance=`, and
compares: how many pictures were used, and for how many channels the gap to the moments of all
pictures, in mean and in standard deviation, is within the tolerance (one standard error), and
within twice that (two), which is what `tolerance=` promises for 99 % of the channels. Exits with 1
where a sample breaks the promise.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from markdown_table import markdown_table
from recorded_runs import record
from torch import Tensor, nn
from tqdm import tqdm

import retrofit
from retrofit.calibration.sample_errors import PERCENTILE
from retrofit.files.model_sources import build, transforms
from retrofit.pictures.batches import PictureBatches, shuffled
from retrofit.pictures.preprocessing import preprocessing
from retrofit.pictures.sources import open_pictures

HEAD = (
    *("seed", "pictures", "of all", "standard error"),
    *("gap p99", "within tolerance", "within twice"),
)


@dataclass(frozen=True)
class Sample:
    """A calibration that stopped at the tolerance, against all pictures; gaps in sigma.

    Attributes:
        data: name of the folder.
        pictures, whole: used, and there are.
        gap: 99th percentile of the channels' gaps.
        within, within_twice: shares of the channels.
    """

    model: str
    data: str
    tolerance: float
    seed: int
    pictures: int
    whole: int
    channels: int
    standard_error: float
    gap: float
    within: float
    within_twice: float

    @property
    def row(self) -> list[str]:
        shares = (self.standard_error, self.gap, self.within, self.within_twice)
        used = f"{self.pictures / self.whole:.1%}"
        return [str(self.seed), f"{self.pictures:,}", used, *(f"{share:.2%}" for share in shares)]


def text(samples: Sequence[Sample]) -> str:
    """Write the table of samples of one model, folder and tolerance, and what it is of."""
    first = samples[0]
    kept = sum(sample.within_twice >= PERCENTILE for sample in samples)
    return (
        f"{first.model} on {first.whole:,} pictures of {first.data}, "
        f"{first.channels:,} channels, tolerance {first.tolerance:.1%} of sigma\n\n"
        f"{markdown_table(HEAD, [sample.row for sample in samples])}\n"
        f"within {2 * first.tolerance:.1%} of sigma (two standard errors) for "
        f"{PERCENTILE:.0%} of the channels: {kept} of {len(samples)} samples\n"
    )


def moments(model: nn.Module) -> Tensor:
    """Return means and standard deviations of all channels of all sites, (2, channels)."""
    found = retrofit.channel_moments(model).values()
    mean, sigma = zip(*((m.mean, m.var.sqrt()) for m in found), strict=True)
    return torch.stack([torch.cat(mean), torch.cat(sigma)])


def shares_within(sample: Tensor, whole: Tensor, tolerance: float) -> tuple[float, float, float]:
    """Compare the moments of a sample with those of all pictures, in sigma.

    Returns the 99th percentile of the channels' gaps, the share of the channels whose gap is within
    the tolerance, and the share whose gap is within twice that.
    """
    sigma = whole[1]
    live = sigma > 0
    gap = ((sample - whole).abs()[:, live] / sigma[live]).amax(0)
    once, twice = (float((gap <= times * tolerance).double().mean()) for times in (1, 2))
    return float(gap.quantile(PERCENTILE)), once, twice


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder, .npy, or tar shards")
    add("--model", default="retrofit.demo:trained_vgg", help="as for `convert`")
    add("--tolerance", type=float, default=0.02)
    add("--seeds", type=int, default=5)
    add("--batch-size", type=int, default=32)
    add("--crop", type=int, help="pixels; default: as the model was trained")
    add("--workers", type=int, default=2)
    add("--results", type=Path, metavar="FILE", help="CSV file, added to")
    return parser.parse_args()


def main() -> int:
    arguments = parsed()
    tolerance = arguments.tolerance
    model = build(arguments.model).eval()
    pictures = open_pictures(arguments.data)
    to_input = preprocessing(transforms(arguments.model, model), crop=arguments.crop)

    def calibrated(seed: int, tolerance: float | None) -> tuple[retrofit.Calibration, Tensor]:
        prepared = retrofit.prepare(model)
        batches = PictureBatches(
            pictures,
            shuffled(len(pictures), seed),
            to_input,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
        )
        report = retrofit.calibrate(prepared, batches, tolerance=tolerance, progress=False)
        return report, moments(prepared)

    whole, all_moments = calibrated(0, None)
    found = []
    for seed in tqdm(range(1, arguments.seeds + 1), unit="sample"):
        report, sample = calibrated(seed, tolerance)
        what = (arguments.model, arguments.data.name, tolerance, seed)
        sizes = (report.images, whole.images, all_moments.shape[1])
        shares = shares_within(sample, all_moments, tolerance)
        found.append(Sample(*what, *sizes, report.standard_error, *shares))
    print(text(found), end="")
    record(found, arguments.results)
    return int(any(sample.within_twice < PERCENTILE for sample in found))


if __name__ == "__main__":
    sys.exit(main())
