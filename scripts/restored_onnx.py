"""Restore torchvision's networks from ONNX files of both exporters.

    python scripts/restored_onnx.py resnet18 mobilenet_v2 efficientnet_b0
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
from pathlib import Path

import torch
import torchvision
from markdown_table import markdown_table
from network_checks import difference, train
from torch import Tensor, nn

import retrofit
from retrofit.files.model_sources import build
from retrofit.files.onnx_weights import run_onnx

CLOSE = 5e-6
SIDE = 96


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


def rows(name: str, folder: Path) -> list[tuple[str, ...]]:
    """Restore one network from four files."""
    images = torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    model = trained(name, images)
    found: list[tuple[str, ...]] = []
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
            found.append((name, exporter, "kept" if kept else "the exporter's", f"{far:.1e}"))
    return found


def row_of(file: Path, spec: str, side: int) -> tuple[str, ...]:
    """Restore the network of a file."""
    images = torch.rand(4, 3, side, side)
    state = restored(build(spec), file, images).state_dict()
    fresh = build(spec).eval()
    fresh.load_state_dict(state, strict=True)
    with torch.no_grad():
        outputs = fresh(images)
    first = outputs[0] if isinstance(outputs, tuple) else outputs
    expected = torch.from_numpy(run_onnx(file, [images.numpy()])[0])
    far = difference([expected], [first])
    return (spec, file.name, "the file's", f"{far:.1e}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of torchvision's networks")
    parser.add_argument("--file", type=Path, help="an ONNX file of your own")
    parser.add_argument("--architecture", help="what it is restored into, as for the command")
    parser.add_argument("--side", type=int, default=320, help="pixels of its input")
    arguments = parser.parse_args()
    found: list[tuple[str, ...]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.names:
            found += rows(name, Path(folder))
    if arguments.file:
        found.append(row_of(arguments.file, arguments.architecture, arguments.side))
    head = ("network", "exporter", "names", "difference")
    print(markdown_table(head, found, words=head[:3], padded=True), end="")
    return 0 if all(float(row[-1]) <= CLOSE for row in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
