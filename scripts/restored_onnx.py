"""Restore torchvision's networks from ONNX files of both exporters.

    python scripts/restored_onnx.py resnet18 mobilenet_v2 efficientnet_b0 --results r.csv
    python scripts/restored_onnx.py --file 320n.onnx --architecture ultralytics:yolov8n-18.yaml

Each network gets random weights and numbers in its BatchNorms as training leaves them. Once it is
folded before the export, which then keeps the names of its layers; once the exporter folds it, and
renames what it folds. Restored, it has to load strictly into a fresh network. Printed is the
largest difference of an output from that of the network before folding, over the largest output;
of a file of your own, from its own output in onnxruntime. Exits with 1 above 5e-6.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from markdown_table import markdown_table
from network_checks import difference, train
from recorded_runs import record
from torch import Tensor, nn

import retrofit
from retrofit.files.model_sources import build
from retrofit.files.onnx_weights import run_onnx

CLOSE = 5e-6
SIDE = 96
HEAD = ("network", "exporter", "names", "difference")


@dataclass(frozen=True)
class Restored:
    """A network that came back from a file.

    Attributes:
        exporter: of the file, or the file's name.
        names: whose names the layers have in the file.
        difference: largest one of an output, over the largest output.
    """

    network: str
    exporter: str
    names: str
    difference: float


def table(found: Iterable[Restored]) -> str:
    rows = [(one.network, one.exporter, one.names, f"{one.difference:.1e}") for one in found]
    return markdown_table(HEAD, rows, words=HEAD[:3], padded=True)


def trained(name: str, images: Tensor) -> nn.Module:
    """Build a network, with numbers in its BatchNorms as training leaves them."""
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.get_model(name).eval()
    train(model, images)
    return model


def exported(model: nn.Module, images: Tensor, file: Path, *, dynamo: bool) -> None:
    """Export a model by either exporter."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the age of the older one
        torch.onnx.export(model, (images,), file, dynamo=dynamo, verbose=False)


def restored(architecture: nn.Module, file: Path, images: Tensor) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a few images are few
        return retrofit.restore(architecture, file, [images], progress=False)


def from_four_files(name: str, folder: Path) -> list[Restored]:
    """Restore one network from the files of both exporters, folded by either tool."""
    images = torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    model = trained(name, images)
    found = []
    for dynamo in (False, True):
        for kept in (True, False):
            file = folder / "folded.onnx"
            exported(retrofit.fold(model) if kept else model, images, file, dynamo=dynamo)
            state = restored(torchvision.models.get_model(name), file, images).state_dict()
            fresh = torchvision.models.get_model(name).eval()
            fresh.load_state_dict(state, strict=True)
            with torch.no_grad():
                far = difference([model(images)], [fresh(images)])
            exporter = "dynamo" if dynamo else "TorchScript"
            names = "kept" if kept else "the exporter's"
            found.append(Restored(name, exporter, names, far))
    return found


def from_file(file: Path, spec: str, side: int) -> Restored:
    """Restore the network of a file."""
    images = torch.rand(4, 3, side, side)
    state = restored(build(spec), file, images).state_dict()
    fresh = build(spec).eval()
    fresh.load_state_dict(state, strict=True)
    with torch.no_grad():
        outputs = fresh(images)
    first = outputs[0] if isinstance(outputs, tuple) else outputs
    expected = torch.from_numpy(run_onnx(file, [images.numpy()])[0])
    return Restored(spec, file.name, "the file's", difference([expected], [first]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of torchvision's networks")
    parser.add_argument("--file", type=Path, help="an ONNX file of your own")
    parser.add_argument("--architecture", help="what it is restored into, as for the command")
    parser.add_argument("--side", type=int, default=320, help="pixels of its input")
    parser.add_argument("--results", type=Path, metavar="FILE", help="CSV file, added to")
    arguments = parser.parse_args()
    found: list[Restored] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.names:
            found += from_four_files(name, Path(folder))
    if arguments.file:
        found.append(from_file(arguments.file, arguments.architecture, arguments.side))
    print(table(found), end="")
    record(found, arguments.results)
    return 0 if all(one.difference <= CLOSE for one in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
