"""Stopping a run so that nothing is lost: finish the step, save, and leave."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class GracefulStop:
    """While active, the first Ctrl-C (or SIGTERM) only asks for a stop; the second one interrupts at once.

    Args:
        say: told what will happen, once.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.is_requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.is_requested:
            raise KeyboardInterrupt
        self.is_requested = True
        self.say("Stopping after this step, with a checkpoint. Interrupt again to stop at once.")
