"""Folders of tiny pictures, and what a folder holds."""

import hashlib

import numpy as np
from PIL import Image

from retrofit.demo.network import CLASSES


def pictures(folder, count, seed=0):
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for i in range(count):
        pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


def labelled_pictures(folder, **parts):
    """Make `folder`/<part>/<class>/, with so many pictures of each of CIFAR-10's classes."""
    for part, count in parts.items():
        for seed, name in enumerate(CLASSES):
            pictures(folder / part / name, count, seed)


def contents(folder):
    files = sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return [(f, f.is_file() and hashlib.sha256(f.read_bytes()).hexdigest()) for f in files]
