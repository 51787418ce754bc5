"""When what was moved may come back: as early as the device has room for it through everything until its need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_MOST_BLOCKS = 4


def ahead_bytes(
    backward: Sequence[tuple[str | None, int]], sizes: Mapping[str, Sequence[int]], limit: int
) -> dict[str, int]:
    """Bytes of later needs that may be on their way when the backward of each block begins.

    Args:
        backward: the stretches of a backward in order: the block, ``None`` for what lies between blocks, and the bytes on the
            device while it runs when everything is fetched at its need.
        sizes: the bytes that each block has moved, in the order of need.
        limit: what the device has room for.

    Returns:
        By block, those that have any.
    """
    there = [size for _, size in backward]
    begins = [place for place, (block, _) in enumerate(backward) if block is not None]
    fetches: list[tuple[int, int, int]] = []
    first = 0
    for number, need in enumerate(begins):
        earliest = begins[max(0, number - _MOST_BLOCKS)]
        for size in sizes.get(backward[need][0] or "", ()):
            start = max(first, earliest)
            short = [place for place in range(start, need) if there[place] + size > limit]
            start = short[-1] + 1 if short else start
            start = next((place for place in begins if place >= start), need)  # it begins with the backward of a block
            first = start
            for place in range(start, need):
                there[place] += size
            fetches.append((start, need, size))
    found = {block: sum(s for start, need, s in fetches if start <= at < need) for at, block in _blocks(backward)}
    return {block: size for block, size in found.items() if size}


def _blocks(backward: Sequence[tuple[str | None, int]]) -> list[tuple[int, str]]:
    return [(place, block) for place, (block, _) in enumerate(backward) if block is not None]
