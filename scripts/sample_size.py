"""How many pictures a tolerance needs, and whether it keeps its promise.

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
from torch import Tensor

import retrofit
from retrofit.pictures.batches import PictureBatches, preprocessing, shuffled
from retrofit.calibration.sample_errors import PERCENTILE
from retrofit.pictures.sources import open_pictures
from retrofit.files.model_sources import build, transforms


def moments(model: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of all channels of all sites."""
    found = retrofit.channel_moments(model).values()
    return torch.cat([m.mean for m in found]), torch.cat([m.var.sqrt() for m in found])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder, .npy, or tar shards")
    parser.add_argument("--model", default="retrofit.demo:trained_vgg", help="as for `convert`")
    parser.add_argument("--tolerance", type=float, default=0.02)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--crop", type=int, help="pixels; default: as the model was trained")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    model = build(arguments.model).eval()
    pictures = open_pictures(arguments.data)
    to_input = preprocessing(transforms(arguments.model, model), crop=arguments.crop)

    def calibrated(seed: int, tolerance: float | None) -> tuple[retrofit.Calibration, Tensor]:
        prepared = retrofit.prepare(model)
        report = retrofit.calibrate(
            prepared,
            PictureBatches(
                pictures,
                shuffled(len(pictures), seed),
                to_input,
                batch_size=arguments.batch_size,
                workers=arguments.workers,
            ),
            tolerance=tolerance,
            progress=False,
        )
        return report, torch.stack(moments(prepared))

    whole, (mean, sigma) = calibrated(0, None)
    print(
        f"{arguments.model} on {whole.images:,} pictures of {arguments.data.name}, "
        f"{len(mean):,} channels, tolerance {arguments.tolerance:.1%} of sigma\n"
    )
    print(
        "| seed | pictures | of all | standard error | gap p99 | within tolerance | within twice |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    live = sigma > 0
    kept = 0
    for seed in range(1, arguments.seeds + 1):
        report, sample = calibrated(seed, arguments.tolerance)
        gaps = (sample - torch.stack([mean, sigma])).abs()[:, live] / sigma[live]
        gap = gaps.amax(0)
        within = [float((gap <= times * arguments.tolerance).double().mean()) for times in (1, 2)]
        kept += within[1] >= PERCENTILE
        print(
            f"| {seed} | {report.images:,} | {report.images / whole.images:.1%} | "
            f"{report.standard_error:.2%} | {gap.quantile(PERCENTILE):.2%} | "
            f"{within[0]:.2%} | {within[1]:.2%} |",
            flush=True,
        )
    print(
        f"\nwithin {2 * arguments.tolerance:.1%} of sigma (two standard errors) for "
        f"{PERCENTILE:.0%} of the channels: {kept} of {arguments.seeds} samples"
    )
    return int(kept < arguments.seeds)


if __name__ == "__main__":
    sys.exit(main())
