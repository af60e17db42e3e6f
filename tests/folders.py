"""Folders of tiny pictures, and what a folder holds."""

import hashlib

import numpy as np
from PIL import Image


def pictures(folder, count):
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for i in range(count):
        pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


def contents(folder):
    files = sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return [(f, f.is_file() and hashlib.sha256(f.read_bytes()).hexdigest()) for f in files]
