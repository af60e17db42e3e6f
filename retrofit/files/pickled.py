"""Pickled weights files, read without running anything that they name."""

from __future__ import annotations

import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch

from retrofit.errors import RetrofitError
from retrofit.tables import one_line

NUMPY = ("numpy.core", "numpy._core")  # of versions 1 and 2
SCALARS = ("bool_", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8")
# What training scripts put beside the weights, and nobody needs to read those.
HARMLESS = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "decimal.Decimal",
    "fractions.Fraction",
    "uuid.UUID",
    "torch.torch_version.TorchVersion",
    "numpy.dtype",
    "numpy.ndarray",
    "collections.ChainMap",
    *(f"builtins.{name}" for name in ("Ellipsis", "frozenset", "range", "slice")),
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "str", "tuple")),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    *(
        f"{module}.{pure}{system}Path"
        for module in ("pathlib", "pathlib._local")  # of Python 3.13
        for pure in ("", "Pure")
        for system in ("Posix", "Windows")
    ),
    *(f"numpy.{name}" for name in SCALARS),
    *(f"{core}.multiarray.{name}" for core in NUMPY for name in ("scalar", "_reconstruct")),
    *(f"{core}.numeric._frombuffer" for core in NUMPY),
)
# What torch itself takes; only to know which name made it refuse.
TORCHS = ("torch._utils._rebuild", "torch._tensor.")
TAKEN = (
    "_codecs.encode",
    *(f"collections.{name}" for name in ("OrderedDict", "Counter")),
    *(f"builtins.{name}" for name in ("bytearray", "complex", "set")),
)
PROTOCOLS = (2, 3)  # of pickles, that torch reads without running them
ARCHIVE = b"PK\x03\x04"  # begins a zip archive
MAGIC = 0x1950A86A20F9469CFC6C  # with which torch.save began files before torch 1.6


class _Ignored:
    """Stands in for what is beside the weights: nothing of it is built, not even a numpy dtype."""

    def __new__(cls, *_: object, **__: object) -> _Ignored:  # noqa: PYI034 - of many subclasses
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def _named(name: str, stand_in: Any) -> Any:
    stand_in.__module__, _, stand_in.__qualname__ = name.rpartition(".")
    stand_in.__name__ = stand_in.__qualname__
    return stand_in


def _collection(kind: type[Any]) -> Callable[..., Any]:
    """Make what makes the plain `kind`, the only one that torch then fills with items."""
    return lambda *_: kind()


STAND_INS = [
    *(_named(name, type("_", (_Ignored,), {})) for name in HARMLESS),
    _named("collections.defaultdict", _collection(dict)),
    _named("collections.deque", _collection(list)),
]
KNOWN = {f"{stand_in.__module__}.{stand_in.__qualname__}" for stand_in in STAND_INS}


def read_pickled(path: Path) -> Any:
    """Read what torch.save wrote: containers, numbers, texts and tensors, on the CPU.

    Of what is harmless beside weights (arguments, paths, dates, numpy's numbers) only a stand-in
    comes back. Raises RetrofitError for everything else, naming it.
    """
    _refuse_other_archives(path)
    _refuse_plain_pickles(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(STAND_INS):
            warnings.simplefilter("ignore")  # what torch finds odd ends in an error or is harmless
            with path.open("rb") as file:  # by name, torch would judge by the suffix
                return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make it raise anything
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if isinstance(error, pickle.UnpicklingError):
            reason = _refused(path) or "it is damaged, or no file of torch.save"
        raise RetrofitError(f"{path} cannot be read as a state dict: {reason}") from error


def is_pickle(path: Path) -> bool:
    """Tell whether a file begins with a whole pickle, of any protocol."""
    with suppress(Exception), path.open("rb") as file:
        return sum(1 for _ in pickletools.genops(file)) > 1
    return False


def _is_legacy(path: Path) -> bool:
    """Tell whether a pickle is the first of a file of torch.save before torch 1.6."""
    with path.open("rb") as file:
        return any(argument == MAGIC for _, argument, _ in pickletools.genops(file))


def _protocol(path: Path) -> int:
    """Read which protocol a file's pickle says it has; those before 2 say nothing."""
    with suppress(Exception):
        for stream in _streams(path):
            operation, argument, _ = next(pickletools.genops(stream))
            return int(argument or 0) if operation.name == "PROTO" else 0
    return PROTOCOLS[0]


def _refused(path: Path) -> str:
    """Say which type torch refused, and what to do; empty where it named none."""
    names = [name for name in _globals(path) if name not in KNOWN and not _is_torchs(name)]
    if modules := [name for name in names if name.startswith("torch.nn.modules.")]:
        name = next((n for n in names if not n.startswith("torch.")), modules[0])
        if name.startswith("ultralytics."):
            network = f"ultralytics.YOLO('{path}').model"
        else:
            network = f"torch.load('{path}', weights_only=False)"
        return (
            f"it holds a whole pickled model ({_shown(name)}), which only its code can read; run "
            f"where you trust the file: model = {network}; torch.save(model.state_dict(), "
            "'weights.pth') (a model in a dict is to be taken out of it first: model['model'])"
        )
    if names:
        return (
            f"it holds a {_shown(names[0])}, which only its code can read; where you trust the "
            f"file, save the weights alone: torch.save(torch.load('{path}', weights_only=False)"
            "['state_dict'], 'weights.pth') (or under whatever key they are)"
        )
    if (protocol := _protocol(path)) not in PROTOCOLS:
        return (
            f"it is a pickle of protocol {protocol}, which only Python itself reads, running what "
            f"it names; where you trust the file: import torch; torch.save(torch.load('{path}', "
            "weights_only=False), 'weights.pth')"
        )
    return ""


def _shown(name: str) -> str:
    return one_line(name)[:100]


def _is_torchs(name: str) -> bool:
    """Tell whether torch takes this name: also its dtypes and storages, straight under `torch`."""
    module, _, last = name.rpartition(".")
    taken = ("torch", "torch.storage", "torch.serialization", "torch.nn.parameter")
    return name in TAKEN or name.startswith(TORCHS) or (module in taken and bool(last))


def _globals(path: Path) -> list[str]:
    """List the names that a pickle asks for, in their order, up to where it is damaged."""
    names: dict[str, None] = {}
    texts, memo = ["", ""], list[str]()
    with suppress(Exception):
        for stream in _streams(path):
            for operation, argument, _ in pickletools.genops(stream):
                if operation.name == "GLOBAL":
                    names[str(argument).replace(" ", ".")] = None
                elif operation.name == "STACK_GLOBAL":  # of protocol 4, from texts on the stack
                    names[".".join(texts)] = None
                elif operation.name == "MEMOIZE":
                    memo.append(texts[1])
                elif isinstance(argument, str):
                    texts = [texts[1], argument]
                elif operation.name in ("BINGET", "LONG_BINGET") and memo:
                    texts = [texts[1], memo[int(argument or 0)]]
    return [name.replace("__builtin__.", "builtins.") for name in names]


def _streams(path: Path) -> Iterator[IO[bytes]]:
    """Open each pickle of a file of torch.save: one in a zip archive, before torch 1.6 several."""
    if not _is_archive(path):
        with path.open("rb") as file:
            while True:
                yield file
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith("data.pkl"):
                with archive.open(name) as member:
                    yield member


def _is_archive(path: Path) -> bool:
    """Tell whether a file is a zip archive, a damaged one too."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # of several disks, it says of itself
        return True


def _refuse_other_archives(path: Path) -> None:
    """Raise RetrofitError for a zip archive that holds a program, or is not of torch.save."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.rpartition("/")[2] for name in archive.namelist()}
    except (OSError, ValueError, NotImplementedError):
        return
    except zipfile.BadZipFile:
        with path.open("rb") as file:
            if file.read(4) != ARCHIVE:
                return
        raise RetrofitError(
            f"{path} cannot be read as a state dict: it is cut short or damaged; copy or download "
            "it again"
        ) from None
    if names and all(name.endswith(".npy") for name in names):
        raise RetrofitError(
            f"{path} cannot be read as a state dict: it is numpy's .npz; save its arrays as "
            f"tensors: torch.save({{k: torch.from_numpy(v) for k, v in numpy.load('{path}')"
            ".items()}, 'weights.pth')"
        )
    exported = any("exported_program" in name or name == "archive_format" for name in names)
    if not exported and names & {"constants.pkl", "model.json"}:  # the latter before torch 1.0
        raise RetrofitError(
            f"{path} is a TorchScript archive, a program: where you trust it, save its weights "
            f"alone: torch.save(torch.jit.load('{path}').state_dict(), 'weights.pth')"
        )
    if exported:
        raise RetrofitError(
            f"{path} is a program that torch.export saved: where you trust it, save its weights "
            f"alone: torch.save(torch.export.load('{path}').state_dict, 'weights.pth')"
        )
    if "data.pkl" not in names:
        raise RetrofitError(
            f"{path} cannot be read as a state dict: it is a zip archive, but not of torch.save"
        )


def _refuse_plain_pickles(path: Path) -> None:
    """Raise RetrofitError for a pickle that Python's own module wrote, in place of torch.save."""
    if not _is_archive(path) and is_pickle(path) and not _is_legacy(path):
        raise RetrofitError(
            f"{path} cannot be read as a state dict: it is a pickle of protocol {_protocol(path)}, "
            "not a file of torch.save, and reading it would run what it names; where you trust it: "
            f"import pathlib, pickle, torch; state = pickle.loads(pathlib.Path('{path}')"
            ".read_bytes()); torch.save({k: torch.as_tensor(v) for k, v in state.items()}, "
            "'weights.pth') (take the state dict out of it first, if it is in something)"
        )
