"""The real command line in processes of its own, which need not import torch each."""

import multiprocessing
import os
import sys
from pathlib import Path
from typing import NamedTuple

from retrofit.cli import main

# Its server imports retrofit once; each process is a fork of it.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["retrofit.cli", "processes", "pytest"])


class Finished(NamedTuple):
    """A process that has ended; `code` is negative for a signal. `err` has no progress bars."""

    code: int
    out: str
    err: list[str]


def command(folder, *argv, first=None, timeout=120):
    """`retrofit ARGV` in `folder`; `first()` is called in the process before it."""
    files = tuple(Path(f"{folder}.{name}") for name in ("out", "err"))
    arguments = (str(folder), [str(a) for a in argv], list(map(str, files)), first)
    process = CONTEXT.Process(target=_run, args=arguments)
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(files[1].read_text())
    out, err = (file.read_text() for file in files)
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip()]
    bars = ("img", "layer/s", "s/layer", "warning: the two halves")
    return Finished(process.exitcode, out, [x for x in lines if not any(b in x for b in bars)])


def _run(folder, argv, files, first):
    os.chdir(folder)
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    if first is not None:
        first()
    # As in a process that a user starts, whose readers of pictures are forks that need not import.
    multiprocessing.set_start_method("fork", force=True)
    sys.argv = ["retrofit", *argv]
    sys.exit(main(argv))
