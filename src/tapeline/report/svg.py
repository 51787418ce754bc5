"""Bars as numbers: where pieces and lines go. The templates draw them, so that all text is escaped in one place.

Positions across are percents of the width, positions down are pixels: a chart is as wide as its page, and the text in it is
of the same size on a phone and on paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tapeline.planner.forecast import BlockPlacement
from tapeline.units import format_bytes

_NUM_COLOURS = 8
_SPARE = 1.03
_ROOM = 4.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A part of a stacked bar."""

    number: int
    """Of its row in the table below, from 1."""
    label: str
    num_bytes: int
    left: float
    width: float

    @property
    def colour(self) -> int:
        """Number of its colour, from 1."""
        return (self.number - 1) % _NUM_COLOURS + 1

    @property
    def middle(self) -> float:
        """Where its number stands."""
        return round(self.left + self.width / 2, 3)

    @property
    def has_room(self) -> bool:
        """Whether its number can be read inside."""
        return self.width >= _ROOM


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """An upright line at some bytes."""

    at: float
    label: str

    @property
    def is_late(self) -> bool:
        """Whether there is more room on its left."""
        return self.at > 50


def line(at: float, name: str, num_bytes: int) -> Line:
    """A line named after the bytes that it stands for."""
    return Line(at=at, label=f"{name} {format_bytes(num_bytes)}")


def width_for(*sizes: int | None) -> float:
    """Bytes of the width of a bar that shows the largest of `sizes`, with a little to spare."""
    return max([1, *(size or 0 for size in sizes)]) * _SPARE


def pieces(sizes: Mapping[str, int], most: float) -> tuple[Piece, ...]:
    """A stacked bar.

    Args:
        sizes: bytes by kind, in order.
        most: bytes of the whole width.
    """
    found, left = [], 0.0
    for number, (label, size) in enumerate(sizes.items(), 1):
        width = percent(size, most)
        if width > 0:
            found.append(Piece(number=number, label=label, num_bytes=size, left=round(left, 3), width=width))
        left += width
    return tuple(found)


def placed(blocks: Sequence[BlockPlacement]) -> list[tuple[float, float]]:
    """Percents of a bar that are kept and moved, for each group of blocks, to one scale."""
    most = width_for(*(block.kept_bytes + block.moved_bytes for block in blocks))
    return [(percent(block.kept_bytes, most), percent(block.moved_bytes, most)) for block in blocks]


def percent(size: float, most: float) -> float:
    """Share of the width that some bytes take; nothing takes less than none."""
    return round(100 * max(0.0, size) / most, 3)
