"""Places in one stretch of bytes, given out and taken back; no place is written before its last user is done."""

from __future__ import annotations

from bisect import insort

from tapeline.runtime.tiers.streams import Event


class Regions:
    """First fit, in order of addresses; neighbours that are free become one.

    Args:
        num_bytes: length of the stretch.
        alignment: places begin at multiples of it, and are rounded up to it.
    """

    def __init__(self, num_bytes: int, alignment: int) -> None:
        self.num_bytes, self.alignment = num_bytes, alignment
        self.used = self.most_used = 0
        """Bytes given out, rounded up, now and at most."""
        self.most_end = 0
        """End of the stretch that has been in use."""
        self._free: list[tuple[int, int, tuple[Event, ...]]] = [(0, num_bytes, ())]
        """Begin, end, and what may still use a part of it."""

    def take(self, num_bytes: int) -> tuple[int, list[Event]] | None:
        """Give out a place; ``None`` if there is none.

        Returns:
            Where it begins, and the events before which nothing may be written there.
        """
        size = self._rounded(num_bytes)
        for number, (begin, end, events) in enumerate(self._free):
            if end - begin >= size:
                waiting = tuple(event for event in events if not event.is_done())
                if end - begin == size:
                    del self._free[number]
                else:
                    self._free[number] = begin + size, end, waiting
                self.used += size
                self.most_used = max(self.most_used, self.used)
                self.most_end = max(self.most_end, begin + size)
                return begin, list(waiting)
        return None

    def give_back(self, begin: int, num_bytes: int, busy: list[Event]) -> None:
        """Take a place back; whoever gets it waits for `busy`."""
        size = self._rounded(num_bytes)
        insort(self._free, (begin, begin + size, tuple(busy)), key=lambda place: place[0])
        self.used -= size
        joined: list[tuple[int, int, tuple[Event, ...]]] = []
        for first, last, events in self._free:
            if joined and joined[-1][1] == first:
                before = joined.pop()
                joined.append((before[0], last, (*before[2], *events)))
            else:
                joined.append((first, last, events))
        self._free = joined

    def _rounded(self, num_bytes: int) -> int:
        return max(1, -(-num_bytes // self.alignment)) * self.alignment
