r"""Convert real networks that are neither torchvision's nor timm's, and train them for a step.

    pip install segmentation-models-pytorch transformers monai dynamic-network-architectures \
        ultralytics facenet-pytorch kornia spandrel diffusers lpips encodec torchaudio \
        pytorch-tcn onnx2torch
    python scripts/real_networks.py --results docs/results/real-networks.csv \
        --markdown docs/real-networks.md

Each is built with random weights, retrofitted, compared with the original bit for bit, folded back,
trained for a step and folded again, one after the other. Results are kept in a CSV file, a line a
network; what failed or was not installed is tried again by the next run. A network whose package is
not installed has a row that says so, and the exit code is 1 as after a failure.
"""

from __future__ import annotations

import argparse
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from real_networks_checks import check
from real_networks_models import NETWORKS, Network
from real_networks_tables import Result, document, summary
from recorded_runs import RecordedRuns


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--results", type=Path, required=True, help="CSV file of results, added to")
    add("--markdown", type=Path, help="write the document there")
    add("--only", default="*", metavar="GLOB", help="these networks: 'diffusers, *'")
    return parser.parse_args()


def study(networks: list[Network], file: Path) -> list[Result]:
    """Check all networks, except those that have a good result already."""
    file.parent.mkdir(parents=True, exist_ok=True)
    record = RecordedRuns(file, Result)
    good = {(run.package, run.name): run for run in record.runs if not run.failed}
    results = []
    for network in networks:
        result = good.get((network.package, network.name))
        if result is None:
            result = check(network)
            record.append(result)
        results.append(result)
        print(result, flush=True)
    return results


def main() -> int:
    arguments = parsed()
    torch.set_num_threads(1)
    chosen = [n for n in NETWORKS if fnmatchcase(f"{n.package}, {n.name}", arguments.only)]
    if not chosen:
        raise SystemExit(f"--only {arguments.only!r} matches no network: give a glob of names")
    results = study(chosen, arguments.results)
    if arguments.markdown:
        arguments.markdown.parent.mkdir(parents=True, exist_ok=True)
        arguments.markdown.write_text(document(results))
    print(summary(results), end="")
    return int(any(result.failed for result in results))


if __name__ == "__main__":
    sys.exit(main())
