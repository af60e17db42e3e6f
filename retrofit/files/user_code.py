"""Code that the user names: `package.module:name`, or `path/to/file.py:name`."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from retrofit.errors import RetrofitError
from retrofit.files.model_source import nearest

_PACKAGE = Path(__file__).resolve().parent.parent
_FROM_FILES: dict[tuple[Path, int], ModuleType] = {}  # a model and its data may share a file


def named(spec: str, kind: str, *, called: bool = False) -> Any:
    """Import the code that `spec` names, which runs it, and return what has the name in it.

    Raises RetrofitError, which calls it a `kind`, for what cannot be imported or is not there, or
    cannot be called and is to be.
    """
    source, _, name = spec.rpartition(":")
    module = _from_file(Path(source)) if source.endswith(".py") else _from_import(source)
    if not hasattr(module, name) or (called and not callable(getattr(module, name))):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise RetrofitError(f"{source} has no {kind} {name!r}{nearest(name, names)}")
    return getattr(module, name)


def said(error: BaseException, spec: str) -> str:
    """Say in a line what the code of that name raised, and in which line of it."""
    text = str(error)
    if text.startswith("Caught "):  # by torch's worker, with the text of its traceback
        last = re.split(r"^  .*\n", text, flags=re.MULTILINE)[-1]
        return f"{' '.join(last.split())}{_place(error, spec)}"
    if isinstance(error, SystemExit):
        text = "it ends the process"
    return f"{type(error).__name__}: {text}{_place(error, spec)}"


def _place(error: BaseException, spec: str) -> str:
    """Name the last line of the user's own file that a traceback passes, if there is one."""
    source = spec.rpartition(":")[0]
    module = sys.modules.get(source)
    file = source if source.endswith(".py") else getattr(module, "__file__", None)
    text = "".join(traceback.format_exception(error))
    places = re.findall(r'File "([^"\n]+)", line (\d+)', text)
    own = [line for name, line in places if file and Path(name).resolve() == Path(file).resolve()]
    return f" ({source}, line {own[-1]})" if own else ""


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise RetrofitError(f"there is no file {path}")
    key = path.resolve(), path.stat().st_mtime_ns
    if key in _FROM_FILES:
        return _FROM_FILES[key]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # of a name that ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses and pickles look there
    sys.path.insert(0, str(path.parent.resolve()))  # as for a script: its neighbours are found
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise _not_imported(str(path), error) from error
    _FROM_FILES[key] = module
    return module


def _from_import(name: str) -> ModuleType:
    if "" not in sys.path:  # as python -m does: modules beside the user come first
        sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise _not_imported(name, error) from error


def _not_imported(source: str, error: BaseException) -> RetrofitError:
    if isinstance(error, SystemExit):  # a script, which does its work when it is imported
        text = "it ends the process: put what a script does under if __name__ == '__main__'"
    else:
        text = said(error, f"{source}:")
    return RetrofitError(f"{source} cannot be imported: {text}")
