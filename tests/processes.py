"""The real command line in processes of its own, which need not import torch each."""

import functools
import itertools
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import NamedTuple

from retrofit.cli import main

CONTEXT = multiprocessing.get_context("forkserver")  # conftest.py says what its server imports
NUMBERS = itertools.count()  # of the files that hold what they print


class Finished(NamedTuple):
    """A process that has ended; `code` is negative for a signal; `err` is `without_bars`."""

    code: int
    out: str
    err: list[str]


class Started:
    """`retrofit ARGV` in `folder`; `first()` is called in the process before it."""

    def __init__(self, folder, *argv, first=None):
        self.files = [Path(f"{folder}.{next(NUMBERS)}.{name}") for name in ("out", "err")]
        arguments = (str(folder), [str(a) for a in argv], list(map(str, self.files)), first)
        self.process = CONTEXT.Process(target=_run, args=arguments)
        self.process.start()

    def wait_for(self, text):
        """Until stderr has the text; fails if the process ends without."""
        deadline = time.monotonic() + 120
        while text not in (said := _text(self.files[1])):
            assert self.process.is_alive(), said
            assert time.monotonic() < deadline, said
            self.process.join(0.02)

    def killed(self):
        self.process.kill()
        return self.finished()

    def finished(self, timeout=120):
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            raise TimeoutError(_text(self.files[1]))
        out, err = map(_text, self.files)
        return Finished(self.process.exitcode, out, without_bars(err))


def command(folder, *argv, first=None):
    return Started(folder, *argv, first=first).finished()


def started(folder, *commands):
    """Two processes as torchrun starts them, but nothing that watches them."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    meet = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    processes = []
    for rank, argv in enumerate(commands):
        variables = meet | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(Started(folder, *argv, first=functools.partial(in_environment, variables)))
    return processes


def in_environment(variables):
    os.environ.update(variables)


def without_bars(err):
    """The lines of stderr but for what is being done, and for a warning that few pictures bring."""
    return [
        line
        for line in err.splitlines()
        if not line.endswith(" ...") and "warning: the two halves" not in line
    ]


def _text(file):
    return file.read_text() if file.exists() else ""


def _run(folder, argv, files, first):
    os.chdir(folder)
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    if first is not None:
        first()
    # As in a process that a user starts: Ctrl-C reaches it, also where the tests run unattended,
    # and its readers of pictures are forks that need not import.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method("fork", force=True)
    sys.argv = ["retrofit", *argv]
    sys.exit(main(argv))
