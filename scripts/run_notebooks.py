"""Run the notebooks from top to bottom.

    python scripts/run_notebooks.py                                      # all, in quick mode
    python scripts/run_notebooks.py --full --in-place notebooks/1-retrofit.ipynb

What was run is written to build/notebooks/ or, with --in-place, takes the place of the notebook:
that is how the outputs in the repository are made. They hold no timestamps, paths or progress bars,
so that a second run differs only in what it found. With --full as well, the tables that the results
page quotes are written to docs/results.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

try:
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
except ModuleNotFoundError as missing:
    raise SystemExit(f"{missing.name} is missing: run pip install '.[notebooks]'") from None

ROOT = Path(__file__).resolve().parent.parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
CELL_SECONDS = 3600


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", type=Path, nargs="*", help="default: all of notebooks/")
    parser.add_argument("--full", action="store_true", help="all pictures and steps (minutes)")
    parser.add_argument("--in-place", action="store_true", help="store the outputs in the notebook")
    arguments = parser.parse_args()
    # Passed on to the kernels. Progress bars are for people who watch. Small networks gain little
    # from a second thread: one for each notebook, and as many notebooks at once as there are cores.
    os.environ |= {"QUICK": "" if arguments.full else "1", "TQDM_DISABLE": "1"}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if arguments.full and arguments.in_place:
        os.environ["RESULTS"] = str(ROOT / "docs" / "results")
    build = ROOT / "build" / "notebooks"
    build.mkdir(parents=True, exist_ok=True)
    paths = arguments.notebooks or sorted((ROOT / "notebooks").glob("*.ipynb"))
    outputs = paths if arguments.in_place else [build / path.name for path in paths]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for path, seconds in zip(paths, pool.map(run, paths, outputs), strict=True):
            print(f"{path.name}: {seconds:.0f} s", flush=True)
    return 0


def run(path: Path, output: Path) -> float:
    """Execute the notebook in its own folder, write it to `output`, and return the seconds.

    Raises:
        SystemExit: a cell failed. What ran up to there is in build/notebooks/; `output`, if it is
            another file, is as it was.
    """
    start = time.perf_counter()
    try:
        notebook = nbformat.read(path, as_version=4)
    except (OSError, nbformat.reader.NotJSONError) as error:
        raise SystemExit(f"{path} cannot be read as a notebook: {error}") from None
    started: list[nbformat.NotebookNode] = []
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        coalesce_streams=True,
        on_cell_start=lambda cell, **_: started.append(cell),
    )
    # A message that reaches a kernel which has just ended is no fault of the notebook. Both this
    # process and the kernel report it, and what the kernel says matters only if it died.
    logging.getLogger("tornado.general").setLevel(logging.CRITICAL)
    with tempfile.TemporaryFile("w+", errors="replace") as kernel_said:
        try:
            client.execute(stderr=kernel_said)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            nbformat.write(notebook, ROOT / "build" / "notebooks" / path.name)
            raise SystemExit(f"{path}, {_failure(started, error)}") from None
        except RuntimeError:
            kernel_said.seek(0)
            sys.stderr.write(kernel_said.read())
            raise
    notebook.metadata = nbformat.from_dict(METADATA)
    nbformat.write(notebook, output)
    return time.perf_counter() - start


def _failure(started: list[nbformat.NotebookNode], error: Exception) -> str:
    """Say in one line which cell failed, counted as Jupyter does, and with what message."""
    cells = [cell for cell in started if cell.cell_type == "code" and cell.source.strip()]
    first = cells[-1].source.strip().splitlines()[0]
    said = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, CellExecutionError):
        said = [f"{error.ename}: {' '.join(error.evalue.split())}"]
    return f"cell {len(cells)} ({first}): {said[0]}"


if __name__ == "__main__":
    sys.exit(main())
