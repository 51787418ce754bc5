"""What one step did, as data: bytes at every point in time, operations, and facts about the blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tapeline.planner.chain import Chain, Link, Option

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
    reason: str = ""
    """Why it was not replayed from its tape; empty if it was."""


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
    moved_bytes: dict[str, int] = field(default_factory=dict)
    """Bytes that left the device, by tier."""
    room_bytes: dict[str, int] = field(default_factory=dict)
    """Room that they took there."""
    outside_flops: int = 0
    """Operations outside blocks: embeddings, the head and the loss, in forward and backward."""


def held_bytes(profile: StepProfile, baseline: StepProfile) -> Counter[str]:
    """Bytes that each block holds between forward and backward in `profile` beyond `baseline`."""
    held: Counter[str] = Counter()
    growth = {key: point.end_bytes - point.start_bytes for key, point in _keyed(baseline).items()}
    for key, point in _keyed(profile).items():
        if point.phase == "forward" and point.block is not None and key in growth:
            held[point.block] += point.end_bytes - point.start_bytes - growth[key]
    return held


def build_chain(
    kept: StepProfile,
    recomputed: StepProfile,
    names: list[str],
    samples: Sequence[tuple[StepProfile, dict[str, str]]] = (),
    groups: dict[str, str] | None = None,
    moves: Callable[[str, str], Mapping[str, Sequence[int]]] = lambda _name, _kind: {},
    link: Link | None = None,
) -> Chain:
    """Compose the choice problem from runs: everything kept, everything recomputed that can be, and mixtures.

    What a block holds under an option is added to every point between its forward and its backward; inside its own
    points the peaks come from a run in which it, or a block of its group, took that option.

    Args:
        kept: the step with everything kept.
        recomputed: the step with everything recomputed that can be.
        names: the blocks.
        samples: steps with a mixture of options, and which option each block took.
        groups: blocks of one group behave alike.
        moves: for a block and an option, the ways to move a part of what it holds, each with the bytes of its tensors.
        link: where that goes.
    """
    keyed = _keyed(recomputed)
    order = {key: index for index, key in enumerate(keyed)}
    spans = _lifetimes(list(keyed))
    base = [point.start_bytes if point.block in names else point.peak_bytes for point in keyed.values()]
    measured = _measured(samples, groups or {})
    options = []
    for index, name in enumerate(names):
        if recomputed.blocks[name].num_calls:
            flops = recomputed.blocks[name].recompute_flops
            local = {order[key]: keyed[key].peak_bytes - keyed[key].start_bytes for key in keyed if key[1] == name}
            options.append(Option(block=index, kind="recompute", flops=flops, added_bytes=local))
            for kind, (other, profile) in measured.get((groups or {}).get(name, ""), {}).items():
                added = _kept_bytes(name, keyed, _renamed(profile, other, name), order, spans)
                flops = profile.blocks[other].recompute_flops
                options.append(Option(block=index, kind=kind, flops=flops, added_bytes=added))
        added = _kept_bytes(name, keyed, _keyed(kept), order, spans)
        options.append(Option(block=index, kind="keep", flops=0, added_bytes=added))
    if link is not None:
        for option in list(options):
            name = names[option.block]
            for way, sizes in moves(name, option.kind).items():
                options.append(
                    _moving(option, way, sizes, [(order[f], order[b]) for f, b in spans.items() if b and f[1] == name])
                )
    return Chain(base_bytes=tuple(base), num_blocks=len(names), options=tuple(options), link=link)


def _moving(option: Option, way: str, sizes: Sequence[int], spans: Sequence[tuple[int, int]]) -> Option:
    """The option with a part of what it holds moved away between each forward and its backward."""
    added = Counter(option.added_bytes)
    for forward, backward in spans:
        for point in range(forward + 1, backward):
            added[point] -= sum(sizes)
    return replace(
        option, kind=f"{option.kind}+{way}", added_bytes=dict(added), moved_bytes=sum(sizes), num_moved=len(sizes)
    )


def _measured(
    samples: Sequence[tuple[StepProfile, dict[str, str]]], groups: dict[str, str]
) -> dict[str, dict[str, tuple[str, StepProfile]]]:
    """For each group and option, a block that took it and the run in which it did."""
    found: dict[str, dict[str, tuple[str, StepProfile]]] = {}
    for profile, kinds in samples:
        for name, kind in kinds.items():
            if name in groups:
                found.setdefault(groups[name], {}).setdefault(kind, (name, profile))
    return found


def _renamed(profile: StepProfile, other: str, name: str) -> dict[Key, Point]:
    """The points of block `other`, as if they were those of `name`."""
    return {(phase, name, count): p for (phase, block, count), p in _keyed(profile).items() if block == other}


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
