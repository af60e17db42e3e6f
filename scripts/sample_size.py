"""Measure how many pictures a tolerance needs, and whether it keeps its promise.

    python scripts/sample_size.py --data path/to/pictures --crop 32

Calibrates a model on all pictures of a folder, and then for several seeds with `tolerance=`, and
compares: how many pictures were used, and for how many channels the gap to the moments of all
pictures, in mean and in standard deviation, is within the tolerance (one standard error), and
within twice that (two), which is what `tolerance=` promises for 99 % of the channels. Exits with 1
where a sample breaks the promise.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from markdown_table import markdown_table
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
    rows = []
    kept = 0
    for seed in tqdm(range(1, arguments.seeds + 1), unit="sample"):
        report, sample = calibrated(seed, tolerance)
        gap, once, twice = shares_within(sample, all_moments, tolerance)
        kept += twice >= PERCENTILE
        used = f"{report.images / whole.images:.1%}"
        errors = (f"{share:.2%}" for share in (report.standard_error, gap, once, twice))
        rows.append((str(seed), f"{report.images:,}", used, *errors))
    print(
        f"{arguments.model} on {whole.images:,} pictures of {arguments.data.name}, "
        f"{all_moments.shape[1]:,} channels, tolerance {tolerance:.1%} of sigma\n"
    )
    print(markdown_table(HEAD, rows))
    print(
        f"within {2 * tolerance:.1%} of sigma (two standard errors) for "
        f"{PERCENTILE:.0%} of the channels: {kept} of {arguments.seeds} samples"
    )
    return int(kept < arguments.seeds)


if __name__ == "__main__":
    sys.exit(main())
