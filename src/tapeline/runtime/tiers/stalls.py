"""How long compute has waited for copies, and for which."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tapeline.runtime.tiers.streams import Event, Machine

_MAX_PENDING = 256


@dataclass(slots=True)
class Stall:
    """Waits in one place."""

    count: int = 0
    seconds: float = 0.0


class Stalls:
    """Counts and times waits. An accelerator's are known once it has come to their end."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._table: dict[str, Stall] = {}
        self._pending: list[tuple[str, Any, Any]] = []

    @contextmanager
    def noted(self, event: Event, where: str) -> Iterator[None]:
        """The compute stream waits inside for `event`; an event that is over is no stall."""
        if event.is_done():
            yield
            return
        begin = self._machine.mark()
        yield
        self._pending.append((where, begin, self._machine.mark()))
        if len(self._pending) >= _MAX_PENDING:
            self._settle()

    def table(self) -> dict[str, Stall]:
        """Waits so far, by place, the longest first; those of copies that are still to end are left out."""
        self._settle()
        return dict(sorted(self._table.items(), key=lambda row: -row[1].seconds))

    @property
    def count(self) -> int:
        """How often compute has waited."""
        return sum(stall.count for stall in self.table().values()) + len(self._pending)

    def _settle(self) -> None:
        left = []
        for where, begin, end in self._pending:
            seconds = self._machine.seconds(begin, end)
            if seconds is None:
                left.append((where, begin, end))
                continue
            stall = self._table.setdefault(where, Stall())
            stall.count += 1
            stall.seconds += seconds
        self._pending = left
