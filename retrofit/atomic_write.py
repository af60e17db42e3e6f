"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file that gets its name when it is complete and synced.

    Until then the file has none, so that a process that is killed leaves nothing (in the
    instant of the naming perhaps a hidden file that is complete). Where the system
    has no such files (they are Linux's, on most of its file systems) it is a hidden one beside
    `path`.

    Raises:
        OSError: it cannot be written; `path` is as it was.
    """
    path = path.absolute()
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    nameless = _nameless(path.parent)
    try:
        with nameless or part.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            if nameless:
                _link(file, part)  # which cannot replace, as a rename can
        part.replace(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        # A full disk does not tell of which file; torch.save hides it behind an error of its own.
        found = error if isinstance(error, OSError) else error.__context__
        if isinstance(found, OSError):
            raise OSError(found.errno, found.strerror, str(path)) from error
        raise


def _nameless(folder: Path) -> BinaryIO | None:
    """Open a file without a name: see open(2), O_TMPFILE. None where there are no such files."""
    if not Path("/proc/self/fd").is_dir():  # by which it will get its name
        return None
    try:
        return os.fdopen(os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666), "w+b")
    except (AttributeError, OSError):
        return None


def _link(file: BinaryIO, path: Path) -> None:
    """Give a nameless file the name `path`."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:  # with a folder's number Python calls linkat, which goes where the link in /proc leads
        os.link(f"/proc/self/fd/{file.fileno()}", path.name, dst_dir_fd=folder)
    finally:
        os.close(folder)
