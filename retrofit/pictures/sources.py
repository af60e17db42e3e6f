"""Where pictures come from: folders, arrays, tar shards."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from PIL import Image

from retrofit.errors import RetrofitError
from retrofit.pictures.arrays import ArrayPictures
from retrofit.pictures.eight_bits import Source, check_modes
from retrofit.pictures.tar_shards import EXTENSIONS, ShardPictures, expand, open_picture


class Pictures(Protocol):
    """Pictures by index, with a name for each."""

    @property
    def bad(self) -> Sequence[str]:
        """What was left out of the source when it was opened."""
        ...

    @property
    def channels(self) -> int | None:
        """How many all of them have; None for files, which become what is asked for."""
        ...

    def __len__(self) -> int: ...
    def name(self, index: int) -> str:
        """Name a picture, for messages."""
        ...

    def read(self, index: int) -> Source:
        """Open a picture with PIL, which need not be decoded yet; or an array (H, W, C)."""
        ...

    def check_channels(self, channels: int) -> None:
        """Raise RetrofitError if the pictures cannot be given with so many channels."""
        ...


class FilePictures:
    """Pictures in files of their own."""

    bad: Sequence[str] = ()
    channels = None

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

    def check_channels(self, channels: int) -> None:
        check_modes(channels)


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
    if path.suffix.lower() in EXTENSIONS:
        raise RetrofitError(f"{path} is one picture: name the folder that it is in")
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
