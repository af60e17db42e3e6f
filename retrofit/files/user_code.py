"""Code that the user names: `package.module:name`, or `path/to/file.py:name`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from retrofit.errors import RetrofitError
from retrofit.files.model_source import nearest


def named(spec: str, kind: str) -> Any:
    """Import the code that `spec` names, which runs it, and return what has the name in it.

    Raises RetrofitError, which calls it a `kind`, for what cannot be imported or is not there.
    """
    source, _, name = spec.rpartition(":")
    module = _from_file(Path(source)) if source.endswith(".py") else _from_import(source)
    if not hasattr(module, name):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise RetrofitError(f"{source} has no {kind} {name!r}{nearest(name, names)}")
    return getattr(module, name)


def said(error: BaseException) -> str:
    """Say in a line what the user's code raised."""
    if isinstance(error, SystemExit):  # a script, which does its work when it is imported
        return "it ends the process: put what a script does under if __name__ == '__main__'"
    return f"{type(error).__name__}: {error}"


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise RetrofitError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # of a name that ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses and pickles look there
    sys.path.insert(0, str(path.parent.resolve()))  # as for a script: its neighbours are found
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise RetrofitError(f"{path} cannot be imported: {said(error)}") from error
    return module


def _from_import(name: str) -> ModuleType:
    if "" not in sys.path:  # as python -m does: modules beside the user come first
        sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise RetrofitError(f"{name} cannot be imported: {said(error)}") from error
