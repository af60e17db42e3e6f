"""What a source gives, of any depth and mode, to pictures of 8 bits and a number of channels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from retrofit.errors import RetrofitError

# What PIL turns the pictures in files into, by number of channels.
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# Modes of more than 8 bits, which PIL's convert cuts off at 255: of 16 bits, 32 bits, and floats.
DEEP = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
IN_TWO_STEPS = {"LAB": "RGB", "La": "LA", "RGBa": "RGBA"}  # the first step: PIL knows no other
OF_16_BITS = ("PNG", "PPM")  # formats that have no deeper pictures, whatever the mode
WHITE = 65535  # of 16 bits
ROUNDING = 1e-6  # by which floats may miss 0 to 1
BITS, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF

Source = Image.Image | NDArray[Any]  # a picture in PIL, or an array (H, W, C)
Picture = Image.Image | Tensor  # what transforms take: uint8 (C, H, W), where it is a tensor


def eight_bits(source: Source, channels: int = 3) -> Picture:
    """Turn what a source gives into a picture of 8 bits with so many channels.

    - Of 16 bits 65535 is white, of 12 bits in a TIFF 4095, of floats 1.
    - A picture in PIL becomes grey, RGB, or RGBA. 16-bit colours have lost their low bytes when PIL
      opened them.
    - An array keeps its channels, except that one is repeated to three. It becomes a picture in PIL
      if it has one or three, else a tensor: the fourth channel need not be an alpha.

    Raises ValueError for NaN, for numbers whose white cannot be told, and for channels that the
    picture does not have.
    """
    if isinstance(source, Image.Image):
        return _converted(source, channels)
    pixels = _scaled(source)
    if pixels.shape[2] == 1 and channels == 3:
        pixels = pixels.repeat(3, axis=2)
    if pixels.shape[2] != channels:
        raise ValueError(f"it has {counted(pixels.shape[2])}, and the network takes {channels}")
    if channels == 1:
        return Image.fromarray(np.ascontiguousarray(pixels[:, :, 0]))
    if channels == 3:
        return Image.fromarray(pixels)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def _converted(picture: Image.Image, channels: int) -> Image.Image:
    mode = MODES.get(channels)
    deep = picture.mode in DEEP
    alpha = picture.mode in WITH_ALPHA or ("transparency" in picture.info and not deep)
    if mode is None or (mode == "RGBA" and not alpha):
        raise ValueError(
            f"it is {picture.mode}, without alpha, and the network takes {counted(channels)}"
        )
    if deep:
        picture = _eight_bit_grey(picture)
    elif picture.mode in IN_TWO_STEPS:
        picture = picture.convert(IN_TWO_STEPS[picture.mode])
    return picture if picture.mode == mode else picture.convert(mode)


def _eight_bit_grey(picture: Image.Image) -> Image.Image:
    tags = getattr(picture, "tag_v2", {})  # of a TIFF
    (bits, *_) = tags.get(BITS, (16,))
    values = np.asarray(picture)
    if picture.mode == "I" and picture.format in OF_16_BITS:
        values = values.astype(np.uint16)
    pixels = _scaled(values, white=min(2**bits - 1, WHITE))
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # which PIL heeds for 8 bits only
        pixels = 255 - pixels
    return Image.fromarray(pixels)


def _scaled(values: NDArray[Any], white: int = WHITE) -> NDArray[np.uint8]:
    """Scale numbers to 0 to 255: floats from 0 to 1, integers of more than 8 bits from 0 to white.

    Integers of 32 bits count as 16 bits; ValueError if they cannot be, or might be 8 bits.
    """
    if values.dtype == np.uint8:
        return np.asarray(values)
    if values.dtype.kind == "b":
        return np.where(values, np.uint8(255), np.uint8(0))
    low, high = values.min().item(), values.max().item()
    if values.dtype.kind == "f":
        if not np.isfinite([low, high]).all():
            raise ValueError("it has NaN or Inf among its floats")
        if low < -ROUNDING or high > 1 + ROUNDING:
            raise ValueError(
                f"its floats are from {low:g} to {high:g}: scale them to 0 (black) to 1 (white)"
            )
        scaled: NDArray[np.uint8] = np.rint(values.astype(np.float64) * 255).astype(np.uint8)
        return scaled
    if low < 0 or high > white or (values.dtype.itemsize > 2 and 0 < high < 256):
        raise ValueError(
            f"its integers are from {low} to {high}, and what is white cannot be told: save it "
            "with 8 bits, or with 16 of which 65535 is white"
        )
    return ((values.astype(np.int64) * 255 + white // 2) // white).astype(np.uint8)


def check_modes(channels: int) -> None:
    """Raise RetrofitError if no picture in a file has so many channels."""
    if channels not in MODES:
        raise RetrofitError(
            f"the network takes {counted(channels)}, and pictures in files have 1, 3, or 4 with an "
            f"alpha: give it a .npy of (N, H, W, {channels})"
        )


def counted(channels: int) -> str:
    """Say how many channels there are."""
    return f"{channels} channel{'' if channels == 1 else 's'}"
