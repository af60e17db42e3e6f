"""Pictures in a .npy or .npz."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrofit.errors import RetrofitError
from retrofit.pictures.eight_bits import counted

SHAPES = "(N, H, W, C), or (N, H, W) if they are grey, of uint8, uint16, or floats from 0 to 1"
LOOKED_AT = 32  # pictures that tell whether an array uses its 16 bits
NARROW = 4  # an axis of at most so many numbers may be that of the channels


class ArrayPictures:
    """The pictures in an array: (N, H, W, C), or (N, H, W) if they are grey.

    They are of uint8 or bool, of uint16 where 65535 is white, or of floats from 0 to 1; see
    `eight_bits`. A .npy stays on disk. Of several arrays in a .npz one is taken if it alone is of
    uint8 with one or three channels, or if it alone has a shape and a dtype as above.

    Attributes:
        channels: how many they have.
    """

    bad: Sequence[str] = ()

    def __init__(self, file: Path) -> None:
        try:
            arrays = _arrays(file)
        except MemoryError:
            raise
        except Exception as error:  # a damaged file can make numpy raise anything
            raise RetrofitError(f"{file} cannot be read as arrays of plain numbers") from error
        key, self.array = _chosen(file, arrays)
        self.file = file
        self.place = f"{key} in {file}" if key else str(file)
        shape = self.array.shape
        self.channels = shape[3] if len(shape) == 4 else 1
        if len(shape) == 3 and shape[2] <= NARROW:
            raise _without_axis(self.place, shape)
        if _is_of_8_bits(self.array):
            raise RetrofitError(
                f"the numbers of {self.place} are uint16, where 65535 is white, and all below 256: "
                "save them with .astype('uint8')"
            )

    def __reduce__(self) -> tuple[type[ArrayPictures], tuple[Path]]:
        return type(self), (self.file,)  # a memory map would be pickled as all its numbers

    def __len__(self) -> int:
        return len(self.array)

    def name(self, index: int) -> str:
        return f"{self.file}[{index}]"

    def read(self, index: int) -> NDArray[Any]:
        """Read a picture, (H, W, C) of the dtype that the file has."""
        if isinstance(self.array, np.memmap):  # to read what is gone would end the process
            needed = self.array.offset + self.array.nbytes
            if self.file.exists() and self.file.stat().st_size < needed:
                raise OSError("the file has been cut short")
        array = np.asarray(self.array[index])
        return array[:, :, None] if array.ndim == 2 else array

    def check_channels(self, channels: int) -> None:
        """Raise RetrofitError unless they have so many channels, or one that is repeated to 3."""
        shape = self.array.shape
        if len(shape) == 3 and channels > 1 and channels in (shape[0], shape[2]):
            raise _without_axis(self.place, shape)
        if self.channels == channels or (self.channels, channels) == (1, 3):
            return
        channel_first = len(shape) == 4 and shape[1] in ((1, 3) if channels == 3 else (channels,))
        raise RetrofitError(
            f"the network takes {counted(channels)}, the pictures in {self.place} have "
            f"{self.channels} (the last axis of {shape}): "
            + (
                "save array.transpose(0, 2, 3, 1)"
                if channel_first
                else "give it an array of those that it was trained on"
            )
        )


def _arrays(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        if opened.read(2) == b"PK":  # a .npz is a zip
            opened.seek(0)
            with np.load(opened, allow_pickle=False) as arrays:
                return dict(arrays)
    return {"": np.load(file, mmap_mode="r", allow_pickle=False)}


def _chosen(file: Path, arrays: Mapping[str, Any]) -> tuple[str, NDArray[Any]]:
    """Choose the array that pictures are in, the likeliest kind first."""
    for kind in (_is_usual, _is_pictures, _is_grey_pictures):
        found = [(key, array) for key, array in arrays.items() if kind(array)]
        if len(found) == 1:
            return found[0]
        if found:
            break
    listed = ", ".join(f"{k} {a.dtype} {a.shape}".strip() for k, a in arrays.items())
    raise RetrofitError(
        f"{file} must hold one array of pictures, {SHAPES}; it has: {listed or 'nothing'}"
        f"{_advice(list(arrays.values()))}"
    )


def _advice(arrays: Sequence[NDArray[Any]]) -> str:
    if any(a.dtype.kind in "iu" and a.dtype.itemsize > 1 and a.ndim in (3, 4) for a in arrays):
        return " (save integers with .astype('uint8') if they are from 0 to 255)"
    if any(_is_readable(a) and a.ndim == 2 for a in arrays):
        return " (a picture alone needs a batch axis: save array[None])"
    return ""


def _is_readable(array: NDArray[Any]) -> bool:
    known = array.dtype.kind in "bf" or array.dtype.newbyteorder("=") in (np.uint8, np.uint16)
    return known and 0 not in array.shape[1:]


def _is_usual(array: NDArray[Any]) -> bool:
    return _is_pictures(array) and array.dtype == np.uint8 and array.shape[3] in (1, 3)


def _is_pictures(array: NDArray[Any]) -> bool:
    return _is_readable(array) and array.ndim == 4


def _is_grey_pictures(array: NDArray[Any]) -> bool:
    return _is_readable(array) and array.ndim == 3


def _is_of_8_bits(array: NDArray[Any]) -> bool:
    """Tell whether numbers of 16 bits need only 8, by some of the pictures."""
    if array.dtype.newbyteorder("=") != np.uint16 or len(array) == 0:
        return False
    some = array[:: max(1, len(array) // LOOKED_AT)][:LOOKED_AT]
    return bool(0 < some.max() < 256)


def _without_axis(place: str, shape: tuple[int, ...]) -> RetrofitError:
    return RetrofitError(
        f"{place} is {shape}, without a batch axis or a channel axis: of one picture save "
        "array[None], of grey pictures array[..., None]"
    )
