r"""Train the networks of `retrofit demo` and pack the pictures it shows.

    python scripts/train_demo.py --data CIFAR10 --weights retrofit/demo/vgg-cifar10.safetensors \
        --pictures retrofit/demo/cifar10-sample.tar.xz
    python scripts/train_demo.py --data CIFAR10 --seed 1 \
        --weights notebooks/vgg-cifar10-1.safetensors
    python scripts/train_demo.py --data CIFAR10 --network resnet --epochs 15 --lr 0.2 \
        --weights notebooks/resnet-cifar10.safetensors \
        --folded retrofit/demo/resnet-cifar10-folded.safetensors

CIFAR10 is a folder with train/<class>/*.jpg and test/<class>/*.jpg. The weights are stored in
float16; the accuracy of the weights as stored, on the whole test set, stands in the metadata. The
pictures are some for calibration (from train, flat) and some for the test (by class). The ResNet's
weights are stored as they are trained, and once more with the BatchNorms folded away by torch.fx.
"""

from __future__ import annotations

import argparse
import datetime
import io
import tarfile
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from pictures import accuracy, augment, normalise, read
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from tqdm import tqdm

from retrofit.demo.network import CLASSES, resnet_cifar10, vgg_cifar10

NETWORKS = {"vgg": vgg_cifar10, "resnet": resnet_cifar10}


def train(model: nn.Module, pictures: Tensor, labels: Tensor, epochs: int, lr: float) -> None:
    steps = len(pictures) // 128
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=lr, total_steps=epochs * steps, pct_start=0.2
    )
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(len(pictures))[: steps * 128].view(steps, 128)
        bar = tqdm(order, desc=f"epoch {epoch + 1}/{epochs}", mininterval=30)
        for index in bar:
            loss = F.cross_entropy(model(normalise(augment(pictures[index]))), labels[index])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 2.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def pack(data: Path, file: Path, calibration: int, test: int) -> None:
    """Write evenly spaced pictures of each class, with no trace of who packed them when."""
    with tarfile.open(file, "w:xz", preset=9) as tar:
        for split, total in (("calibration", calibration), ("test", test)):
            for label, name in enumerate(CLASSES):
                folder = data / ("train" if split == "calibration" else "test") / name
                pictures = sorted(folder.glob("*.jpg"))
                count = total // 10 + (label < total % 10)
                for i in range(count):
                    picture = pictures[i * len(pictures) // count]
                    stem = f"{name}-" if split == "calibration" else f"{name}/"
                    entry = tarfile.TarInfo(f"{split}/{stem}{picture.name}")
                    content = picture.read_bytes()
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))


def store(model: nn.Module, file: Path, data: Path, training: str) -> None:
    """Write a network's weights, in float16; test what the file will hold."""
    stored = {
        name: t.half().contiguous() if t.is_floating_point() else t
        for name, t in model.state_dict().items()
    }
    model.load_state_dict(stored)
    result = accuracy(model, *read(data / "test"))
    metadata = {
        "format": "pt",
        "test_accuracy": f"{result:.4f}",
        "test_pictures": "10000",
        "training": training,
        "versions": f"torch {torch.__version__}, torchvision {torchvision.__version__}",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    save_file(stored, file, metadata)
    print(f"{file}: {result:.2%} right of 10,000 test pictures, weights in float16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--network", choices=NETWORKS, default="vgg")
    parser.add_argument("--weights", type=Path, help="file to write; default: no training")
    parser.add_argument("--folded", type=Path, help="file to write, without BatchNorm")
    parser.add_argument("--pictures", type=Path, help="file to write; default: none")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calibration", type=int, default=1024, help="pictures packed")
    parser.add_argument("--test", type=int, default=2000, help="pictures packed")
    args = parser.parse_args()

    if args.pictures:
        pack(args.data, args.pictures, args.calibration, args.test)
    if not args.weights:
        return
    torch.manual_seed(args.seed)
    model = NETWORKS[args.network]().to(memory_format=torch.channels_last)
    train(model, *read(args.data / "train"), args.epochs, args.lr)
    training = f"{args.epochs} epochs, SGD one-cycle to {args.lr}, seed {args.seed}"
    store(model, args.weights, args.data, training)
    if args.folded:
        store(fuse(model.eval()), args.folded, args.data, training)


if __name__ == "__main__":
    main()
