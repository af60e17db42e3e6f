"""Checks of models, each in a process of its own: one that crashes or hangs stops no other."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Generic, Protocol, TypeVar

import torch


class Checked(Protocol):
    """What a check gives: among other things why there is nothing else."""

    error: str


R = TypeVar("R", bound=Checked)


@dataclass
class Worker:
    """A process that checks one model."""

    name: str
    process: BaseProcess
    deadline: float


@dataclass(frozen=True)
class Sweep(Generic[R]):
    """How models are checked.

    Attributes:
        check: finds out about the model of that name, in a process of its own.
        blank: makes the result for a name of which nothing is known yet.
        jobs: models at a time.
        threads: of each.
        memory: for all jobs; no model starts beside others where they need more together.
        limit: seconds after which a check is given up.
    """

    check: Callable[[str], R]
    blank: Callable[[str], R]
    jobs: int
    threads: int
    memory: float
    limit: float

    def over(self, needs: Mapping[str, float]) -> Iterator[R]:
        """Check models in their order, as far as memory allows that.

        Args:
            needs: name of the model to the memory that its check takes.
        """
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["timm", "torchvision", "retrofit.cli.commands"])
        waiting = list(needs)
        running: dict[Connection, Worker] = {}
        try:
            while waiting or running:
                free = self.memory - sum(needs[worker.name] for worker in running.values())
                name = next((n for n in waiting if needs[n] <= free or not running), None)
                if name is not None and len(running) < self.jobs:
                    waiting.remove(name)
                    receiver, sender = context.Pipe(duplex=False)
                    process = context.Process(target=self._work, args=(name, sender), daemon=True)
                    process.start()
                    sender.close()
                    running[receiver] = Worker(name, process, time.monotonic() + self.limit)
                    continue
                ready = wait(list(running), timeout=1)
                for receiver, worker in list(running.items()):
                    late = time.monotonic() > worker.deadline
                    if receiver in ready or late:
                        yield self._finished(worker, receiver, late and receiver not in ready)
                        del running[receiver]
        finally:
            for worker in running.values():
                worker.process.kill()

    def _work(self, name: str, results: Connection) -> None:
        torch.set_num_threads(self.threads)
        results.send(self.check(name))

    def _finished(self, worker: Worker, results: Connection, late: bool) -> R:
        """Return what a process found, or how it ended."""
        result = self.blank(worker.name)
        if late:
            worker.process.kill()
            result.error = "not done within the time limit"
        else:
            try:
                result = results.recv()
            except EOFError:
                worker.process.join()
                result.error = f"the process ended with exit code {worker.process.exitcode}"
        worker.process.join()
        results.close()
        return result
