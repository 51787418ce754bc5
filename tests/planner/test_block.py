"""The cut of one block against trying everything, and laws of phases and working sets, on random small tapes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tapeline.planner.block import (
    BlockGraph,
    BlockStep,
    BlockValue,
    _boundaries,
    _Segment,
    choose,
    front,
    steps_for,
)
from tapeline.planner.policy import CHEAP, KEEP, LEAST, RECOMPUTE, Policy

QUICK = settings(max_examples=200, deadline=None, derandomize=True, database=None)


@st.composite
def graphs(draw: st.DrawFn, *, with_rules: bool = False) -> BlockGraph:
    """Up to three given values and seven steps; autograd saves some of what is there."""
    num_given, num_steps = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    num_bytes = st.integers(1, 200)
    values = [
        {"num_bytes": draw(num_bytes), "producer": None, "is_free": place > 0 and draw(st.booleans())}
        for place in range(num_given)
    ]
    steps: list[BlockStep] = []
    for number in range(num_steps):
        reads = draw(st.sets(st.integers(0, len(values) - 1), min_size=1, max_size=2))
        makes = range(len(values), len(values) + draw(st.integers(1, 2)))
        values += [{"num_bytes": draw(num_bytes), "producer": number} for _ in makes]
        is_costly = draw(st.booleans())
        steps.append(
            BlockStep(
                seconds=draw(st.integers(1, 50)) / 1000,
                flops=1000 if is_costly else 0,
                reads=tuple(reads),
                makes=tuple(makes),
                is_costly=is_costly,
                can_replay=draw(st.integers(0, 5)) > 0,
            )
        )
    packs = []
    for number in range(num_steps):
        there = [index for index, value in enumerate(values) if (value["producer"] or 0) <= number]
        packs += [(value, number + 1) for value in draw(st.lists(st.sampled_from(there), max_size=2))]
    saved = {value for value, _ in packs}
    for index, value in enumerate(values):
        is_made = value["producer"] is not None
        value["can_hold"] = (is_made and index in saved) or (not is_made and draw(st.integers(0, 3)) > 0)
        if with_rules and value["can_hold"] and is_made:
            rule = draw(st.sampled_from(["", "", "", "must_hold", "must_drop"]))
            if rule:
                value[rule] = True
    return BlockGraph(values=tuple(BlockValue(**v) for v in values), steps=tuple(steps), packs=tuple(packs))


prices = st.one_of(st.just(math.inf), st.floats(-6, 1).map(lambda exponent: 10.0**exponent))
policies = st.builds(Policy, price=prices, is_cheap=st.booleans(), rerun=st.sampled_from([0.0, 1.0, math.inf]))


# -- trying everything ---------------------------------------------------------------------------------------------


def closed_steps(graph: BlockGraph, held: frozenset[int], *, is_cheap: bool) -> set[int] | None:
    """The steps that bring back all saved values from `held`, written down again; ``None`` if something is missing."""
    needed: set[int] = set()

    def bring(index: int) -> bool:
        value = graph.values[index]
        if index in held or (value.is_free and not value.must_hold):
            return True
        if value.producer is None:
            return False
        step = graph.steps[value.producer]
        if not step.can_replay or (is_cheap and step.is_costly):
            return False
        needed.add(value.producer)
        return all(bring(read) for read in step.reads)

    for index in graph.saved:
        is_autograds_own = graph.values[index].producer is None and not graph.values[index].can_hold
        if not is_autograds_own and not bring(index):
            return None
    return needed


def all_holdings(graph: BlockGraph) -> Iterator[frozenset[int]]:
    forced = {index for index, value in enumerate(graph.values) if value.must_hold}
    free = [i for i, value in enumerate(graph.values) if value.can_hold and not value.must_drop and i not in forced]
    for size in range(len(free) + 1):
        for chosen in combinations(free, size):
            yield frozenset(forced.union(chosen))


def cost(graph: BlockGraph, held: frozenset[int], policy: Policy) -> tuple[float, float] | None:
    """What the cut minimises; with an infinite price bytes come first, then seconds."""
    steps = closed_steps(graph, held, is_cheap=policy.is_cheap)
    if steps is None:
        return None
    num_bytes = sum(graph.values[index].num_bytes for index in held)
    seconds = sum(graph.steps[step].seconds for step in steps)
    return (num_bytes, seconds) if math.isinf(policy.price) else (policy.price * num_bytes + seconds, 0.0)


@QUICK
@given(graphs(with_rules=True), policies)
def test_the_cut_is_as_good_as_trying_everything(graph: BlockGraph, policy: Policy) -> None:
    costs = [found for held in all_holdings(graph) if (found := cost(graph, held, policy)) is not None]
    if not costs:
        with pytest.raises(ValueError, match="no choice"):
            choose(graph, policy)
        return
    choice = choose(graph, policy)
    got, best = cost(graph, choice.held, policy), min(costs)
    assert got is not None
    assert got[0] == pytest.approx(best[0], rel=1e-6, abs=1e-9)
    assert got[1] == pytest.approx(best[1], rel=1e-6, abs=1e-9)
    assert choice.held_bytes == sum(graph.values[index].num_bytes for index in choice.held)


@QUICK
@given(graphs(with_rules=True), policies)
def test_rules_are_respected(graph: BlockGraph, policy: Policy) -> None:
    try:
        choice = choose(graph, policy)
    except ValueError:
        return
    assert choice.held >= {index for index in graph.saved if graph.values[index].must_hold}
    assert not choice.held & {index for index, value in enumerate(graph.values) if value.must_drop}
    assert all(graph.values[index].can_hold for index in choice.held)
    if policy.is_cheap:
        assert choice.num_costly == choice.replay_flops == 0


@QUICK
@given(graphs(), prices, st.floats(0, 3), st.booleans())
def test_more_price_never_holds_more_bytes(graph: BlockGraph, price: float, more: float, is_cheap: bool) -> None:
    low = choose(graph, Policy(price=price, is_cheap=is_cheap))
    high = choose(graph, Policy(price=price * 10**more, is_cheap=is_cheap))
    assert high.held_bytes <= low.held_bytes
    assert sum_once(graph, high.held) >= sum_once(graph, low.held) - 1e-6


def sum_once(graph: BlockGraph, held: frozenset[int]) -> float:
    """Seconds of replaying everything in one phase."""
    return sum(graph.steps[step].seconds for step in steps_for(graph, held, graph.saved))


@QUICK
@given(graphs())
def test_keeping_holds_what_is_saved_and_replays_nothing(graph: BlockGraph) -> None:
    choice = choose(graph, KEEP)
    assert {index for index in graph.saved if not graph.values[index].is_free} <= choice.held <= graph.saved
    assert not choice.groups
    assert choice.replay_seconds == 0


@QUICK
@given(graphs(with_rules=True))
def test_keeping_with_rules_replays_only_what_can_be_replayed(graph: BlockGraph) -> None:
    try:
        choice = choose(graph, KEEP)
    except ValueError:
        return
    assert closed_steps(graph, choice.held, is_cheap=False) is not None


# -- phases --------------------------------------------------------------------------------------------------------


@QUICK
@given(graphs(with_rules=True), policies)
def test_phases_cover_what_is_dropped_and_do_not_overlap(graph: BlockGraph, policy: Policy) -> None:
    try:
        choice = choose(graph, policy)
    except ValueError:
        return
    covered = [number for first, last in choice.groups for number in range(first, last)]
    assert covered == sorted(set(covered))
    assert all(before[1] <= after[0] for before, after in pairwise(choice.groups))
    for number, (index, _) in enumerate(graph.packs):
        value = graph.values[index]
        if index not in choice.held and not value.is_free and value.producer is not None:
            assert number in covered


@QUICK
@given(graphs(with_rules=True), policies)
def test_the_steps_of_a_phase_are_closed(graph: BlockGraph, policy: Policy) -> None:
    try:
        choice = choose(graph, policy)
    except ValueError:
        return
    for first, last in choice.groups:
        steps = steps_for(graph, choice.held, [value for value, _ in graph.packs[first:last]])
        there = set(choice.held)
        for step in steps:
            assert graph.steps[step].can_replay
            for read in graph.steps[step].reads:
                assert read in there or graph.values[read].is_free
            there |= set(graph.steps[step].makes)
        for index, _ in graph.packs[first:last]:
            assert index in there or graph.values[index].is_free or graph.values[index].producer is None


def partitions(ends: list[int]) -> Iterator[list[tuple[int, int]]]:
    inner = ends[1:-1]
    for size in range(len(inner) + 1):
        for chosen in combinations(inner, size):
            yield list(pairwise([ends[0], *chosen, ends[-1]]))


@QUICK
@given(graphs(), prices, st.sampled_from([0.0, 0.5, 1.0, math.inf]))
def test_phases_are_the_best_partition(graph: BlockGraph, price: float, rerun: float) -> None:
    choice = choose(graph, Policy(price=price, rerun=rerun))
    dropped = [
        number
        for number, (index, _) in enumerate(graph.packs)
        if index not in choice.held and not graph.values[index].is_free and graph.values[index].producer is not None
    ]
    ends = _boundaries(graph, dropped)
    assert ends == sorted(set(ends))
    segments = {(a, b): _Segment(graph, choice.held, a, b) for a in ends for b in ends if a < b}
    whole = segments[ends[0], ends[-1]]
    limit = math.inf if math.isinf(rerun) else whole.seconds * (1 + rerun) + 1e-9
    allowed = [parts for parts in partitions(ends) if sum(segments[part].seconds for part in parts) <= limit]
    best = min(max(segments[part].working_set for part in parts) for parts in allowed)
    assert choice.working_set_bytes == best
    assert choice.working_set_bytes <= whole.working_set
    assert choice.replay_seconds <= limit


@QUICK
@given(graphs(), prices)
def test_one_phase_never_needs_less_than_the_best_partition(graph: BlockGraph, price: float) -> None:
    least = choose(graph, Policy(price=price, rerun=math.inf))
    some = choose(graph, Policy(price=price, rerun=1.0))
    one = choose(graph, Policy(price=price))
    assert least.held == some.held == one.held
    assert least.working_set_bytes <= some.working_set_bytes <= one.working_set_bytes
    assert one.replay_seconds <= least.replay_seconds + 1e-9


# -- the front -----------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(graphs())
def test_no_point_of_the_front_is_worse_than_another(graph: BlockGraph) -> None:
    rows = front(graph)
    found = [(c.held_bytes, c.replay_seconds, c.working_set_bytes) for _, c in rows]
    assert found == sorted(found, key=lambda row: (-row[0], row[1]))
    for row in found:
        assert not any(other != row and all(x <= y for x, y in zip(other, row, strict=True)) for other in found)
    for policy in (KEEP, CHEAP, RECOMPUTE, LEAST):
        choice = choose(graph, policy)
        point = choice.held_bytes, choice.replay_seconds, choice.working_set_bytes
        assert any(all(x <= y for x, y in zip(row, point, strict=True)) for row in found)
    assert all(choose(graph, policy) == choice for policy, choice in rows)
