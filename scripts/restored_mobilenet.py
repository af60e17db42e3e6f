r"""Restore a trained MobileNetV2 whose BatchNorms were folded away, and compare its answers.

    python scripts/restored_mobilenet.py --weights folded.safetensors --data PICTURES \
        --results restored-mobilenet.csv

The weights are those of an edge model: timm's mobilenetv2_100 with pad_type="same", without its
BatchNorms, every convolution with a bias. PICTURES is a flat folder of which the i-th file by name
shows class i. `retrofit restore` makes weights for timm's class of them, which then load strictly.
Printed are how often both are right and how often they agree, and how far the outputs differ.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from network_checks import difference
from PIL import Image
from recorded_runs import record
from safetensors.torch import load_file
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor
from tqdm import tqdm

from retrofit.cli import main as retrofit

NAME = "mobilenetv2_100"
OPTIONS: dict[str, Any] = {"pad_type": "same"}
FACTORY = f"import timm\n\ndef stock():\n    return timm.create_model({NAME!r}, **{OPTIONS!r})\n"
TRANSFORM = Compose([Resize(256), CenterCrop(224), ToTensor(), Normalize([0.5] * 3, [0.5] * 3)])


@dataclass(frozen=True)
class Answers:
    """What the folded and the restored network say of the same pictures.

    Attributes:
        folded, restored: how often each is right.
        same: how often they agree.
        difference: largest one of an output, over the largest output.
    """

    pictures: int
    folded: int
    restored: int
    same: int
    difference: float

    def __str__(self) -> str:
        return (
            f"right: {self.folded} of {self.pictures} folded, {self.restored} restored; "
            f"the same answer: {self.same}\n"
            f"largest difference over the largest output: {self.difference:.1e}"
        )


def stock() -> nn.Module:
    """Build timm's class, in eval mode."""
    model: nn.Module = timm.create_model(NAME, **OPTIONS)
    return model.eval()


def without_batchnorms(weights: Path) -> nn.Module:
    """Build the network that was folded: a bias in each convolution, activations alone."""
    model = stock()
    for name, module in [*model.named_modules()]:
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, BatchNormAct2d):
            setattr(parent, name.rpartition(".")[2], module.act)
        elif isinstance(module, nn.Conv2d):
            module.bias = nn.Parameter(torch.zeros(module.out_channels))
    model.load_state_dict(load_file(weights))
    return model


def logits(model: nn.Module, files: list[Path]) -> Tensor:
    """Compute what the model says of each picture, (N, classes)."""
    found = []
    for i in tqdm(range(0, len(files), 50), desc="evaluate"):
        pictures = [Image.open(file).convert("RGB") for file in files[i : i + 50]]
        with torch.no_grad():
            found.append(model(torch.stack([TRANSFORM(picture) for picture in pictures])))
    return torch.cat(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--results", type=Path, metavar="FILE", help="CSV file, added to")
    arguments = parser.parse_args()
    files = sorted(arguments.data.iterdir())
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "edge.py").write_text(FACTORY)
        output = Path(folder) / "restored.safetensors"
        words = f"restore {folder}/edge.py:stock --mean 0.5 --std 0.5 --output {output}".split()
        code = retrofit(
            [*words, "--weights", str(arguments.weights), "--data", str(arguments.data)]
        )
        if code:
            return code
        restored = stock()
        restored.load_state_dict(load_file(output), strict=True)
    folded = logits(without_batchnorms(arguments.weights), files)
    actual = logits(restored, files)
    classes = torch.arange(len(files))
    right = [int((one.argmax(1) == classes).sum()) for one in (folded, actual)]
    same = int((folded.argmax(1) == actual.argmax(1)).sum())
    answers = Answers(len(files), right[0], right[1], same, difference([folded], [actual]))
    print(answers)
    record([answers], arguments.results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
