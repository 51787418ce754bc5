"""What one step did, as data: bytes at every point in time, operations, and facts about the blocks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from tapeline.planner.chain import Chain, Option

Key = tuple[str, str | None, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A stretch of the step in one phase and block."""

    phase: str
    """``forward``, ``backward``, ``optimizer`` or ``outside``."""
    block: str | None
    """Block that runs; ``None`` for the head, the loss and everything else outside blocks."""
    start_bytes: int
    """Live bytes when it begins."""
    peak_bytes: int
    """Largest number of live bytes within it."""
    end_bytes: int
    """Live bytes when it ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockFacts:
    """What one block did in a step."""

    recompute_flops: int
    """Operations that recomputing it took."""
    num_calls: int
    """Calls in which autograd recorded something."""
    num_chained: int
    """Calls whose input was the output of the block called before."""
    fixed_reason: str = ""
    """Why it must not be recomputed; empty if it may."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepProfile:
    """Bytes and operations of one optimizer step."""

    peak_bytes: int
    """Largest number of live bytes."""
    flops: int
    """Floating-point operations, recomputation included."""
    memory: dict[str, int]
    """What was alive at the peak, bytes by kind."""
    points: tuple[Point, ...]
    """The step in order of time."""
    blocks: dict[str, BlockFacts]
    """Facts by block name."""


def held_bytes(profile: StepProfile, baseline: StepProfile) -> Counter[str]:
    """Bytes that each block holds between forward and backward in `profile` beyond `baseline`."""
    held: Counter[str] = Counter()
    growth = {key: point.end_bytes - point.start_bytes for key, point in _keyed(baseline).items()}
    for key, point in _keyed(profile).items():
        if point.phase == "forward" and point.block is not None and key in growth:
            held[point.block] += point.end_bytes - point.start_bytes - growth[key]
    return held


def build_chain(kept: StepProfile, recomputed: StepProfile, names: list[str]) -> Chain:
    """Compose the choice problem from two runs: everything kept, and everything recomputed that can be.

    What a kept block holds is added to every point between its forward and its backward; inside its own
    points the peaks come from the run in which it took that option.
    """
    keyed = _keyed(recomputed)
    other = _keyed(kept)
    order = {key: index for index, key in enumerate(keyed)}
    spans = _lifetimes(list(keyed))
    base = [point.start_bytes if point.block in names else point.peak_bytes for point in keyed.values()]
    options = []
    for index, name in enumerate(names):
        own = [key for key in keyed if key[1] == name]
        local = {order[key]: keyed[key].peak_bytes - keyed[key].start_bytes for key in own}
        facts = recomputed.blocks[name]
        if facts.num_calls and not facts.fixed_reason:
            options.append(Option(block=index, kind="recompute", flops=facts.recompute_flops, added_bytes=local))
        options.append(
            Option(block=index, kind="keep", flops=0, added_bytes=_kept_bytes(name, keyed, other, order, spans))
        )
    return Chain(base_bytes=tuple(base), num_blocks=len(names), options=tuple(options))


def _kept_bytes(
    name: str, keyed: dict[Key, Point], other: dict[Key, Point], order: dict[Key, int], spans: dict[Key, Key | None]
) -> dict[int, int]:
    """Bytes that keeping block `name` adds at each point."""
    added: Counter[int] = Counter()
    num_points = len(keyed)
    for forward, backward in spans.items():
        if forward[1] != name:
            continue
        recomputed, kept = keyed[forward], other.get(forward, keyed[forward])
        held = (kept.end_bytes - kept.start_bytes) - (recomputed.end_bytes - recomputed.start_bytes)
        end = order[backward] if backward is not None else num_points
        for point in range(order[forward] + 1, end):
            added[point] += held
        added[order[forward]] += kept.peak_bytes - kept.start_bytes
        if backward is not None:
            here = other.get(backward, keyed[backward])
            added[end] += here.peak_bytes - here.start_bytes + held
    return dict(added)


def _lifetimes(keys: list[Key]) -> dict[Key, Key | None]:
    """The backward of each forward: the last call's backward comes first, within each micro-batch."""
    open_calls: dict[str, list[Key]] = {}
    spans: dict[Key, Key | None] = {}
    for key in keys:
        phase, block, _ = key
        if block is None:
            continue
        if phase == "forward":
            open_calls.setdefault(block, []).append(key)
            spans[key] = None
        elif phase == "backward" and open_calls.get(block):
            spans[open_calls[block].pop()] = key
    return spans


def _keyed(profile: StepProfile) -> dict[Key, Point]:
    """Points by phase, block and how often that pair has occurred, so that two runs can be compared."""
    seen: Counter[tuple[str, str | None]] = Counter()
    keyed: dict[Key, Point] = {}
    for point in profile.points:
        pair = (point.phase, point.block)
        keyed[(*pair, seen[pair])] = point
        seen[pair] += 1
    return keyed
