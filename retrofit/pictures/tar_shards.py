"""Pictures in tar shards, in the layout of WebDataset."""

from __future__ import annotations

import functools
import io
import logging
import mmap
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from retrofit.errors import RetrofitError
from retrofit.pictures.eight_bits import check_modes
from retrofit.tables import few

EXTENSIONS = {
    ".bmp",
    ".gif",
    ".jfif",
    ".jpeg",
    ".jpg",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
}
# By content, whatever a file is called. Pillow has more, and runs Ghostscript for one of them.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MOST_OPEN = 128  # shards at a time: some systems allow a process 256 files


def open_picture(source: Path | IO[bytes]) -> Image.Image:
    """Open a picture of one of `FORMATS`, not decoded yet; OSError for anything else."""
    try:
        return Image.open(source, formats=_formats())
    except UnidentifiedImageError as error:
        raise OSError(
            "it is no picture, or of a kind that PIL does not read: save TIFFs of many bands, and "
            "of floats in colour, as one .npy"
        ) from error


@functools.cache
def _formats() -> list[str]:
    Image.init()
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # it would print beside its errors
    return [name for name in FORMATS if name in Image.OPEN]  # Pillow can be built without some


class ShardPictures:
    """The pictures in uncompressed tar files, in the order in which they lie there.

    Files in a row with one key, which is the name up to its first dot, are a sample. Its picture is
    KEY.jpg (or .png, ...); of a sample that only has longer extensions, KEY.left.jpg and
    KEY.right.jpg, it is all of them. Everything else is passed over. The bytes of a picture are
    read when it is asked for, through one mapping for each shard and process: that has no position
    which forked processes would share.

    Args:
        shards: the files.
        skip_bad: use what is complete of a damaged shard, instead of raising.

    Attributes:
        bad: the shards that are damaged or hold no pictures, each with what is wrong.
    """

    channels = None

    def __init__(self, shards: Sequence[Path], *, skip_bad: bool = False) -> None:
        self.shards = list(shards)
        self.bad: list[str] = []
        self.names: list[str] = []
        places: list[tuple[int, int, int]] = []
        for number, shard in enumerate(self.shards):
            members, problem = _pictures(shard)
            if problem:
                self.bad.append(f"{shard} {problem}")
                if not skip_bad:
                    advice = "--skip-bad-images uses the rest" if members else "leave it out"
                    raise RetrofitError(f"{self.bad[0]}: {advice}")
            self.names += [f"{shard}/{member.name}" for member in members]
            places += [(number, member.offset_data, member.size) for member in members]
        if not places:
            raise RetrofitError(f"there are no pictures to use: {'; '.join(self.bad)}")
        self.places = np.array(places, dtype=np.int64)
        self._open: dict[int, mmap.mmap] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": {}}

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def read(self, index: int) -> Image.Image:
        number, start, size = self.places[index].tolist()
        mapped = self._mapped(number)
        if mapped.size() < start + size:  # to read what is gone would end the process
            raise OSError(f"{self.shards[number]} has been cut short")
        return open_picture(io.BytesIO(mapped[start : start + size]))

    def check_channels(self, channels: int) -> None:
        check_modes(channels)

    def _mapped(self, number: int) -> mmap.mmap:
        if number not in self._open:
            if len(self._open) == MOST_OPEN:
                del self._open[next(iter(self._open))]
            with self.shards[number].open("rb") as file:
                self._open[number] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._open[number]


def expand(pattern: Path) -> list[Path]:
    """List the shards that train-{000..012}.tar or a plain path stands for; they must exist."""
    webdataset = _webdataset(pattern)
    try:
        shards = [Path(path) for path in webdataset.shardlists.expand_urls(str(pattern))]
    except (ValueError, AssertionError) as error:  # braces without a partner, ${...}
        raise RetrofitError(f"{pattern} is no pattern of shards: {error}") from error
    missing = [str(shard) for shard in shards if not shard.is_file()]
    if missing:
        raise RetrofitError(
            f"{pattern} stands for {len(shards)} shards, and {len(missing)} of them do not exist: "
            f"{few(missing)}"
        )
    return shards


def _pictures(shard: Path) -> tuple[list[tarfile.TarInfo], str]:
    """List the complete pictures of a shard, and say what is wrong with it."""
    members, problem = _members(shard)
    files = ({"fname": m.name, "data": m, "__url__": str(shard)} for m in members)
    pictures: list[tarfile.TarInfo] = []
    webdataset = _webdataset(shard)
    try:
        for sample in webdataset.tariterators.group_by_keys(files):
            found = [ext for ext in sample if f".{ext.rpartition('.')[2]}" in EXTENSIONS]
            plain = [ext for ext in found if "." not in ext]
            pictures += [sample[ext] for ext in plain[:1] or found]
    except ValueError as error:
        problem = f"is refused by webdataset ({str(error.args[0]).partition(' dict_keys')[0]})"
    if not pictures:
        looked_for = f"has no pictures in it (looked for {' '.join(sorted(EXTENSIONS))})"
        problem = problem or looked_for
    return pictures, problem


def _members(shard: Path) -> tuple[list[tarfile.TarInfo], str]:
    """List the files in a tar that are all there, and say what is wrong with it."""
    members: list[tarfile.TarInfo] = []
    problem = "is not an uncompressed tar file"
    try:
        size = shard.stat().st_size
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            problem = "is cut short or damaged"
            for member in tar:
                if member.size < 0:  # after which tarfile reads the same again, without end
                    raise tarfile.ReadError(f"the size of {member.name} is negative")
                if member.isreg() and member.offset_data + member.size <= size:
                    members.append(member)
            # tarfile takes a header that is missing or damaged for the end of the archive.
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("its end mark is missing")
    except (tarfile.TarError, ValueError) as error:  # ValueError: of numbers in extended headers
        return members, f"{problem} ({error})"
    except OSError as error:
        return members, f"cannot be read ({error.strerror})"
    return members, ""


def _webdataset(shards: Path) -> Any:
    try:
        import webdataset.shardlists  # noqa: PLC0415 - an extra
        import webdataset.tariterators  # noqa: PLC0415
    except ImportError as error:
        raise RetrofitError(
            f"webdataset is needed for tar shards such as {shards}: "
            "pip install 'batchnorm-retrofit[webdataset]'"
        ) from error
    return webdataset
