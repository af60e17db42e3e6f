"""Where pictures come from: folders, arrays, tar shards."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from retrofit.errors import RetrofitError
from retrofit.pictures.tar_shards import EXTENSIONS, ShardPictures, expand, open_picture


class Pictures(Protocol):
    """Pictures by index, with a name for each."""

    @property
    def bad(self) -> Sequence[str]:
        """What was left out of the source when it was opened."""
        ...

    def __len__(self) -> int: ...
    def name(self, index: int) -> str:
        """Name a picture, for messages."""
        ...

    def read(self, index: int) -> Image.Image:
        """Open a picture with PIL; it need not be decoded yet."""
        ...


class FilePictures:
    """Pictures in files of their own."""

    bad: Sequence[str] = ()

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(self.files[index])

    def read(self, index: int) -> Image.Image:
        file = self.files[index]
        if not file.is_file():  # to open a pipe would be to wait for whoever writes to it
            raise OSError("it is no file")
        return open_picture(file)


class ArrayPictures:
    """A .npy or .npz of uint8 pictures, (N, H, W, 3) or (N, H, W, 1); a .npy stays on disk."""

    bad: Sequence[str] = ()

    def __init__(self, file: Path) -> None:
        try:
            arrays = _arrays(file)
        except MemoryError:
            raise
        except Exception as error:  # a damaged file can make numpy raise anything
            raise RetrofitError(f"{file} cannot be read as arrays of plain numbers") from error
        usable = {
            key: array
            for key, array in arrays.items()
            if array.dtype == np.uint8
            and array.ndim == 4
            and array.shape[3] in (1, 3)
            and 0 not in array.shape[1:]
        }
        if len(usable) != 1:
            found = ", ".join(f"{k} {a.dtype} {a.shape}".strip() for k, a in arrays.items())
            raise RetrofitError(
                f"{file} must hold one uint8 array of shape (N, H, W, 3) or (N, H, W, 1); it has: "
                f"{found or 'nothing'}"
            )
        (self.array,) = usable.values()
        self.file = file

    def __reduce__(self) -> tuple[type[ArrayPictures], tuple[Path]]:
        return type(self), (self.file,)  # a memory map would be pickled as all its numbers

    def __len__(self) -> int:
        return len(self.array)

    def name(self, index: int) -> str:
        return f"{self.file}[{index}]"

    def read(self, index: int) -> Image.Image:
        if isinstance(self.array, np.memmap):  # to read what is gone would end the process
            needed = self.array.offset + self.array.nbytes
            if self.file.exists() and self.file.stat().st_size < needed:
                raise OSError("the file has been cut short")
        array = np.asarray(self.array[index])
        return Image.fromarray(array.repeat(3, axis=2) if array.shape[2] == 1 else array)


def _arrays(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        if opened.read(2) == b"PK":  # a .npz is a zip
            opened.seek(0)
            with np.load(opened, allow_pickle=False) as arrays:
                return dict(arrays)
    return {"": np.load(file, mmap_mode="r", allow_pickle=False)}


def open_pictures(path: Path, *, skip_bad: bool = False) -> Pictures:
    """Open the pictures at `path`; RetrofitError when there are none.

    Args:
        path: a folder of pictures or of tar shards, with its subfolders but without hidden files,
            sorted by path; a .tar or a pattern of several, train-{000..012}.tar; a .npy or .npz.
        skip_bad: use what is complete of a damaged shard, and list it in `bad`.
    """
    if path.is_dir():
        return _in_folder(path, skip_bad=skip_bad)
    if not path.exists() and "{" not in str(path):
        raise RetrofitError(f"there is no folder or file {path}")
    if path.suffix == ".tar":
        return ShardPictures([path] if path.exists() else expand(path), skip_bad=skip_bad)
    if path.suffix not in (".npy", ".npz"):
        raise RetrofitError(
            f"{path} is neither a folder of pictures nor a .npy, .npz or (uncompressed) .tar file"
        )
    return ArrayPictures(path)


def _files(folder: Path) -> Iterator[Path]:
    """List the files of a folder and its subfolders, linked ones too but no hidden ones, once."""
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        place = Path(root).stat()
        if (place.st_dev, place.st_ino) in seen:  # a link that leads up, say
            folders.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(root, name) for name in names)


def _in_folder(folder: Path, *, skip_bad: bool) -> Pictures:
    files = [file for file in _files(folder) if not file.name.startswith(".")]
    pictures = sorted(file for file in files if file.suffix.lower() in EXTENSIONS)
    shards = sorted(file for file in files if file.suffix == ".tar")
    if pictures and shards:
        raise RetrofitError(
            f"{folder} has both pictures ({pictures[0]}, ...) and tar shards ({shards[0]}, ...): "
            "name a folder that has one kind, or the shards by a pattern (train-{000..012}.tar)"
        )
    if shards:
        return ShardPictures(shards, skip_bad=skip_bad)
    if not pictures:
        extensions = " ".join(sorted(EXTENSIONS))
        raise RetrofitError(f"{folder} has no pictures in it (looked for {extensions}, and .tar)")
    return FilePictures(pictures)
