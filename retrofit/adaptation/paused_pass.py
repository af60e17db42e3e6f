"""A forward pass that stops in the middle, and goes on from there later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from greenlet import getcurrent, greenlet

DEVICES = ("cpu", "cuda")


class PausedPass:
    """Runs a function that may stop: many of them take turns in one thread.

    In a thread of its own each would have a pool of workers in torch, and none of the settings of
    the thread that is asked for it; so they are greenlets.

    Args:
        run: a function without arguments, in which `pause` may be called.
    """

    def __init__(self, run: Callable[[], object]) -> None:
        self._greenlet = greenlet(run)
        self._settings = Settings.current()
        self._outside: torch.inference_mode | None = None  # while it is paused in the other mode

    def resume(self) -> Any:
        """Go on to the next pause, and return what was given there; None at the end.

        What `run` raises is raised here.
        """
        outside, inference = Settings.current(), torch.is_inference_mode_enabled()
        self._return()
        self._settings.replace(Settings.current())
        try:
            found = self._greenlet.switch()
        finally:
            self._settings = Settings.current()
            if torch.is_inference_mode_enabled() != inference:
                self._outside = torch.inference_mode(inference)
                self._outside.__enter__()
            outside.replace(Settings.current())
        return None if self._greenlet.dead else found

    def leave(self) -> None:
        """End it where it is, as an exception would that nothing catches."""
        outside = Settings.current()
        self._return()
        try:
            if not self._greenlet.dead:
                self._greenlet.throw()
        finally:
            outside.replace(Settings.current())

    def _return(self) -> None:
        """Go back to the inference mode in which it was paused, as its own block will end that."""
        if self._outside is not None:
            self._outside.__exit__(None, None, None)
            self._outside = None


def pause(value: object) -> None:
    """Stop the pass that this is called in, and give a value to who resumed it.

    Raises RuntimeError in another thread than that of who resumed it.
    """
    outside = getcurrent().parent
    if outside is None:
        raise RuntimeError("a pass can only be paused in the thread in which it was begun")
    outside.switch(value)


class Settings(NamedTuple):
    """What a forward pass may have switched for a while: gradients, the default type, autocast."""

    gradients: bool
    dtype: torch.dtype
    autocast: tuple[tuple[bool, torch.dtype], ...]

    @classmethod
    def current(cls) -> Settings:
        """Read those that hold now."""
        found = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in DEVICES]
        return cls(torch.is_grad_enabled(), torch.get_default_dtype(), tuple(found))

    def replace(self, present: Settings) -> None:
        """Let these hold instead of those; most often they are the same."""
        if self == present:
            return
        torch.set_grad_enabled(self.gradients)
        if self.dtype != present.dtype:
            torch.set_default_dtype(self.dtype)
        for device, (enabled, dtype) in zip(DEVICES, self.autocast, strict=True):
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
