"""Weights in several files, with an index, and folders as Hugging Face's hub makes them."""

from __future__ import annotations

import json
from pathlib import Path, PureWindowsPath

from retrofit.errors import RetrofitError
from retrofit.tables import few

INDEX = ".index.json"
NAMES = (  # in the order of preference
    "model.safetensors",
    f"model.safetensors{INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{INDEX}",
)


def located(path: Path) -> Path:
    """Find the weights file, or the index of several, in a folder; a file is that already.

    Raises RetrofitError where there is none, or several of other names.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise RetrofitError(f"there is no file {path}")
    usual = [path / name for name in NAMES if (path / name).is_file()]
    # Diffusion models, say, have the same with other names.
    kinds = (
        [f"safetensors{INDEX}"],
        ["safetensors"],
        [f"bin{INDEX}"],
        ["bin", "ckpt", "pth", "pt"],
    )
    files = (sorted(f for kind in same for f in path.glob(f"*.{kind}")) for same in kinds)
    other = next(filter(None, files), [])
    found = usual[:1] or other
    if not found:
        raise RetrofitError(
            f"{path} is a folder without weights: it has none of {', '.join(NAMES)}, and no other "
            ".safetensors, .bin, .ckpt, .pth or .pt file"
        )
    if len(found) > 1:
        raise RetrofitError(
            f"{path} is a folder with several weights files ({few([f.name for f in found])}): "
            "name one of them, or the index that belongs to them"
        )
    return found[0]


def shards(index: Path) -> dict[Path, list[str]]:
    """Read an index: the files beside it, and which tensors are in each.

    Raises RetrofitError for what is no index, for files that are missing, and for names that lead
    out of its folder.
    """
    try:
        places = json.loads(index.read_bytes())["weight_map"]
        names = {name: str(place) for name, place in places.items() if isinstance(place, str)}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise RetrofitError(f"{index} cannot be read as an index of weights: {reason}") from error
    if not names or len(names) < len(places):
        raise RetrofitError(f"{index} is damaged: its weight_map must name a file for each tensor")
    found: dict[Path, list[str]] = {}
    for name, place in names.items():
        shard = PureWindowsPath(place)  # which knows both kinds of separators
        if shard.anchor or ".." in shard.parts or not shard.parts:
            raise RetrofitError(f"{index} names {place!r}, which is not in its own folder")
        found.setdefault(index.parent / place, []).append(name)
    if missing := [file.name for file in found if not file.is_file()]:
        raise RetrofitError(
            f"{index} names {len(found)} files, and {len(missing)} of them do not exist "
            f"({few(missing)})"
        )
    return found
