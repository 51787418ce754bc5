"""Which values of one block to hold, which to replay, and in how many phases: no torch here.

Holding a value costs its bytes until backward; replaying one costs the time of every step between it and what is held.
For a price in seconds per byte, the best choice is a minimum cut of the tape: a linear programme with an integral optimum,
solved by HiGHS (after Jain et al. 2020, "Checkmate", and the min-cut partitioner of AOTAutograd). Sweeping the price
gives the front. The working set, what is alive while the block's backward runs, depends on the order of replay: it is
simulated, and bounded by replaying in several phases, the last part of the block first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import highspy
import numpy as np

from tapeline.planner.policy import CHEAP, KEEP, LEAST, RECOMPUTE, Policy

_MAX_BOUNDARIES = 12
_DROP_ALL = 1e4
_NUM_PRICES = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockValue:
    """One value of a tape."""

    num_bytes: int
    """Bytes of holding it; 0 if something else holds it anyway."""
    producer: int | None
    """The step that makes it; ``None`` for what the call is given."""
    is_free: bool = False
    """Found at replay without holding anything: parameters, arguments that all blocks share."""
    can_hold: bool = False
    """The runtime can hold it: autograd saves it, or it is an argument."""
    must_hold: bool = False
    """It is held whatever it costs."""
    must_drop: bool = False
    """It must not be held."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockStep:
    """One operation of a tape."""

    seconds: float
    flops: int
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    is_costly: bool
    """A matrix product, attention, or something unknown."""
    can_replay: bool
    in_place: bool = False
    """It makes new content of storages that exist, and no new bytes."""


@dataclass(frozen=True, kw_only=True)
class BlockGraph:
    """What one call computes and saves."""

    values: tuple[BlockValue, ...]
    steps: tuple[BlockStep, ...]
    """In the order of execution."""
    packs: tuple[tuple[int, int], ...]
    """For each saved tensor, in the order of saving: its value, and the number of steps before it."""

    @cached_property
    def saved(self) -> frozenset[int]:
        """Values that backward needs."""
        return frozenset(value for value, _ in self.packs)

    @cached_property
    def first_pack(self) -> dict[int, int]:
        """The first saved tensor of each value: its node is the last to let go."""
        first: dict[int, int] = {}
        for index, (value, _) in enumerate(self.packs):
            first.setdefault(value, index)
        return first


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockChoice:
    """A decision for one tape, and what it costs."""

    held: frozenset[int]
    """Values that stay in memory, arguments included."""
    groups: tuple[tuple[int, int], ...]
    """Phases of replay: ranges of saved tensors, first to last. Backward takes the last phase first."""
    held_bytes: int
    """Bytes held between forward and backward."""
    replay_seconds: float
    """Time of all replays at nominal rates."""
    replay_flops: int
    """Floating-point operations of all replays."""
    num_costly: int
    """Matrix products, attention calls and unknown ops that are replayed."""
    working_set_bytes: int
    """Most bytes alive at once while the backward of the block runs, what it holds included."""


def choose(graph: BlockGraph, policy: Policy) -> BlockChoice:
    """The best choice for one tape under a policy."""
    is_open = any(graph.values[value].must_drop for value in graph.saved)
    held = _hold_all(graph) if not policy.price and not is_open else _cut(graph, policy)
    return _scheduled(graph, held, policy.rerun)


def front(graph: BlockGraph) -> list[tuple[Policy, BlockChoice]]:
    """All choices that are best in held bytes, replay time or working set, most bytes first."""
    scale = sum(step.seconds for step in graph.steps) / max(1, sum(graph.values[v].num_bytes for v in graph.saved))
    prices = [scale * 2.0**exponent for exponent in range(-_NUM_PRICES // 2, _NUM_PRICES // 2)]
    policies = [Policy(price=p, rerun=r) for p in prices for r in (0.0, 1.0)]
    policies += [KEEP, CHEAP, RECOMPUTE, LEAST]
    found: dict[tuple[frozenset[int], tuple[tuple[int, int], ...]], tuple[Policy, BlockChoice]] = {}
    for policy in policies:
        try:
            choice = choose(graph, policy)
        except ValueError:  # what must be dropped is too dear for this policy
            continue
        found.setdefault((choice.held, choice.groups), (policy, choice))
    rows = sorted(found.values(), key=lambda row: (-row[1].held_bytes, row[1].replay_seconds))
    return [row for row in rows if not any(_dominates(other[1], row[1]) for other in rows)]


def _dominates(one: BlockChoice, other: BlockChoice) -> bool:
    a = (one.held_bytes, one.replay_seconds, one.working_set_bytes)
    b = (other.held_bytes, other.replay_seconds, other.working_set_bytes)
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


def _hold_all(graph: BlockGraph) -> frozenset[int]:
    """Everything that backward needs and that is not there anyway."""
    return frozenset(v for v in graph.saved if not graph.values[v].is_free)


# -- the cut -------------------------------------------------------------------------------------------------------


def _cut(graph: BlockGraph, policy: Policy) -> frozenset[int]:
    """The values to hold, by the linear programme.

    Columns: hold a value, replay a step. For each value that backward or a replayed step needs: it is held, or its step is
    replayed. All rows are differences of two columns with a third that pays, so that the optimum is integral.
    """
    programme = _Programme()
    total_bytes = sum(value.num_bytes for value in graph.values) or 1
    total_seconds = sum(step.seconds for step in graph.steps) or 1.0
    weight = _DROP_ALL / total_bytes if math.isinf(policy.price) else policy.price / total_seconds
    replay = [
        programme.add(step.seconds / total_seconds, 1.0 if _may_replay(step, policy) else 0.0) for step in graph.steps
    ]
    hold: dict[int, int] = {}
    for index, value in enumerate(graph.values):
        if value.can_hold and not value.must_drop:
            hold[index] = programme.add(0.0 if value.must_hold else weight * value.num_bytes + 1e-9, 1.0)
    for index in graph.saved:
        programme.require(index, None, graph, replay, hold)
    for number, step in enumerate(graph.steps):
        for index in step.reads:
            programme.require(index, replay[number], graph, replay, hold)
    chosen = programme.solve()
    held = {index for index, column in hold.items() if chosen[column] > 0.5 and _is_worth_holding(graph, index)}
    return frozenset(held | {v for v in graph.saved if graph.values[v].must_hold})


def _is_worth_holding(graph: BlockGraph, index: int) -> bool:
    return not graph.values[index].is_free or index in graph.saved


def _may_replay(step: BlockStep, policy: Policy) -> bool:
    return step.can_replay and not (policy.is_cheap and step.is_costly)


class _Programme:
    """Columns between 0 and a bound, rows that demand at least a sum."""

    def __init__(self) -> None:
        self.costs: list[float] = []
        self.bounds: list[float] = []
        self.starts: list[int] = []
        self.columns: list[int] = []
        self.factors: list[float] = []
        self.lower: list[float] = []

    def add(self, cost: float, bound: float) -> int:
        self.costs.append(cost)
        self.bounds.append(bound)
        return len(self.costs) - 1

    def require(
        self, index: int, reader: int | None, graph: BlockGraph, replay: Sequence[int], hold: dict[int, int]
    ) -> None:
        """Value `index` is there if column `reader` is chosen; ``None``: always."""
        value = graph.values[index]
        if value.is_free and not value.must_hold:
            return
        terms = [(hold[index], 1.0)] if index in hold else []
        if value.producer is not None:
            terms.append((replay[value.producer], 1.0))
        if reader is None and not terms:
            return  # held by autograd itself, whatever is chosen
        if reader is not None:
            terms.append((reader, -1.0))
        self.starts.append(len(self.columns))
        self.columns += [column for column, _ in terms]
        self.factors += [factor for _, factor in terms]
        self.lower.append(1.0 if reader is None else 0.0)

    def solve(self) -> Sequence[float]:
        solver = highspy.Highs()
        solver.setOptionValue("output_flag", False)
        solver.setOptionValue("threads", 1)
        size = len(self.costs)
        solver.addVars(size, np.zeros(size), np.array(self.bounds))
        solver.changeColsCost(size, np.arange(size, dtype=np.int32), np.array(self.costs))
        rows = len(self.lower)
        upper = np.full(rows, highspy.kHighsInf)
        solver.addRows(
            rows,
            np.array(self.lower),
            upper,
            len(self.columns),
            np.array(self.starts, dtype=np.int32),
            np.array(self.columns, dtype=np.int32),
            np.array(self.factors),
        )
        solver.run()
        if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            raise ValueError("no choice satisfies what must be held and dropped")
        values: Sequence[float] = solver.getSolution().col_value
        return values


# -- phases and the working set ------------------------------------------------------------------------------------


def steps_for(graph: BlockGraph, held: frozenset[int], targets: Iterable[int]) -> list[int]:
    """The steps that make `targets` from what is held or free, in order."""
    needed: set[int] = set()
    stack = [value for value in targets if value not in held]
    while stack:
        value = graph.values[stack.pop()]
        if value.is_free or value.producer is None or value.producer in needed:
            continue
        needed.add(value.producer)
        stack += [read for read in graph.steps[value.producer].reads if read not in held]
    return sorted(needed)


class _Segment:
    """Replaying for the saved tensors ``first`` to ``last`` (exclusive) at once."""

    def __init__(self, graph: BlockGraph, held: frozenset[int], first: int, last: int) -> None:
        packs = graph.packs[first:last]
        targets = {value for value, _ in packs if value not in held and not _is_given(graph, value)}
        self.steps = steps_for(graph, held, targets)
        self.seconds = sum(graph.steps[step].seconds for step in self.steps)
        position = packs[-1][1] if packs else 0
        alive = sum(graph.values[v].num_bytes for v in held if _is_alive(graph, v, last, position))
        replaying, ready = _replay_bytes(graph, self.steps, targets)
        largest = max((graph.values[value].num_bytes for value, _ in packs), default=0)
        self.working_set = alive + max(replaying, ready + 2 * largest)


def _is_given(graph: BlockGraph, value: int) -> bool:
    return graph.values[value].is_free or graph.values[value].producer is None


def _is_alive(graph: BlockGraph, value: int, last_pack: int, position: int) -> bool:
    """Whether a held value is still needed when backward is about to begin with the saved tensor before `last_pack`."""
    producer = graph.values[value].producer
    return graph.first_pack.get(value, -1) < last_pack or producer is None or producer < position


def _replay_bytes(graph: BlockGraph, steps: Sequence[int], targets: set[int]) -> tuple[int, int]:
    """Most bytes alive while the steps run, intermediates freed at their last use, and bytes left at the end."""
    last_use: dict[int, int] = {}
    for step in steps:
        for value in graph.steps[step].reads:
            last_use[value] = step
    live = peak = 0
    mine: set[int] = set()
    for step in steps:
        for value in graph.steps[step].makes:
            mine.add(value)
            if not graph.steps[step].in_place:
                live += graph.values[value].num_bytes
        peak = max(peak, live)
        for value in (*graph.steps[step].reads, *graph.steps[step].makes):
            if value in mine and value not in targets and last_use.get(value, step) == step:
                mine.discard(value)
                if not graph.steps[step].in_place or value in graph.steps[step].makes:
                    live -= graph.values[value].num_bytes
    return peak, live


def _scheduled(graph: BlockGraph, held: frozenset[int], rerun: float) -> BlockChoice:
    """Cut the replay into phases: the smallest working set with at most ``1 + rerun`` times the time of one phase."""
    dropped = [i for i, (value, _) in enumerate(graph.packs) if value not in held and not _is_given(graph, value)]
    ends = _boundaries(graph, dropped)
    segments = {(a, b): _Segment(graph, held, a, b) for a in ends for b in ends if a < b}
    whole = segments[ends[0], ends[-1]]
    limit = whole.seconds * (1 + rerun) + 1e-12 if not math.isinf(rerun) else math.inf
    path = [(ends[0], ends[-1])]
    sizes = sorted({segment.working_set for segment in segments.values()})
    low, high = 0, len(sizes) - 1
    while low < high:
        middle = (low + high) // 2
        found = _shortest(ends, segments, sizes[middle])
        if found is not None and sum(segments[part].seconds for part in found) <= limit:
            path, high = found, middle
        else:
            low = middle + 1
    chosen = [segments[part] for part in path]
    steps = [graph.steps[step] for segment in chosen for step in segment.steps]
    return BlockChoice(
        held=held,
        groups=tuple(part for part in path if segments[part].steps),
        held_bytes=sum(graph.values[value].num_bytes for value in held),
        replay_seconds=sum(step.seconds for step in steps),
        replay_flops=sum(step.flops for step in steps),
        num_costly=sum(step.is_costly for step in steps),
        working_set_bytes=max(segment.working_set for segment in chosen),
    )


def _boundaries(graph: BlockGraph, dropped: Sequence[int]) -> list[int]:
    """Where phases may begin: places that share the dropped bytes out evenly."""
    total = sum(graph.values[graph.packs[index][0]].num_bytes for index in dropped)
    ends, seen, share = [0], 0, 1
    for index in dropped:
        if seen * _MAX_BOUNDARIES >= share * total and index > ends[-1]:
            ends.append(index)
            share = seen * _MAX_BOUNDARIES // max(1, total) + 1
        seen += graph.values[graph.packs[index][0]].num_bytes
    return [*ends, max(1, len(graph.packs))]


def _shortest(
    ends: Sequence[int], segments: dict[tuple[int, int], _Segment], limit: int
) -> list[tuple[int, int]] | None:
    """The partition with the least replay time in which no phase needs more than `limit` bytes."""
    best: dict[int, tuple[float, list[tuple[int, int]]]] = {ends[0]: (0.0, [])}
    for position, end in enumerate(ends[1:], 1):
        options = [
            (best[start][0] + segments[start, end].seconds + 1e-9, [*best[start][1], (start, end)])
            for start in ends[:position]
            if start in best and segments[start, end].working_set <= limit
        ]
        if options:
            best[end] = min(options, key=lambda option: option[0])
    return best[ends[-1]][1] if ends[-1] in best else None
