from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tapeline.planner.chain import Chain, Link, Option, smallest, solve

small = st.integers(min_value=0, max_value=1000)


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    """Up to five blocks on a line of points, each kept or recomputed; some cannot be recomputed."""
    num_blocks = draw(st.integers(min_value=1, max_value=5))
    num_points = 2 * num_blocks + 1
    base = draw(st.lists(st.integers(min_value=1, max_value=1000), min_size=num_points, max_size=num_points))
    options = []
    for block in range(num_blocks):
        held = draw(small)
        kept = dict.fromkeys(range(block, num_points - block), held)
        options.append(Option(block=block, kind="keep", flops=0, added_bytes=kept))
        if draw(st.booleans()):
            local = {block: draw(small), num_points - 1 - block: draw(small)}
            options.append(Option(block=block, kind="recompute", flops=draw(small), added_bytes=local))
    return Chain(base_bytes=tuple(base), num_blocks=num_blocks, options=tuple(options))


def all_choices(chain: Chain) -> list[tuple[Option, ...]]:
    per_block = [[o for o in chain.options if o.block == block] for block in range(chain.num_blocks)]
    return list(product(*per_block))


def flops(choice: list[Option] | tuple[Option, ...]) -> int:
    return sum(option.flops for option in choice)


@settings(max_examples=150, deadline=None)
@given(chains(), st.integers(min_value=1, max_value=7000))
def test_the_solver_is_as_good_as_trying_everything(chain: Chain, budget: int) -> None:
    fitting = [choice for choice in all_choices(chain) if chain.peak_bytes(choice) <= budget]
    chosen = solve(chain, budget)
    if not fitting:
        assert chosen is None
    else:
        assert chosen is not None
        assert [option.block for option in chosen] == list(range(chain.num_blocks))
        assert chain.peak_bytes(chosen) <= budget
        assert flops(chosen) == min(flops(choice) for choice in fitting)


@settings(max_examples=60, deadline=None)
@given(chains(), st.integers(min_value=1, max_value=7000), st.integers(min_value=0, max_value=2000))
def test_more_budget_is_never_slower(chain: Chain, budget: int, more: int) -> None:
    tight, loose = solve(chain, budget), solve(chain, budget + more)
    if tight is not None:
        assert loose is not None
        assert flops(loose) <= flops(tight)


@settings(max_examples=60, deadline=None)
@given(chains())
def test_the_smallest_peak_is_found(chain: Chain) -> None:
    best = min(chain.peak_bytes(choice) for choice in all_choices(chain))
    assert best <= chain.peak_bytes(smallest(chain)) <= best * 1.001 + 1


def test_equal_blocks_are_kept_late() -> None:
    options = []
    for block in range(4):
        options.append(
            Option(block=block, kind="keep", flops=0, added_bytes=dict.fromkeys(range(block, 9 - block), 100))
        )
        options.append(Option(block=block, kind="recompute", flops=10, added_bytes={}))
    chain = Chain(base_bytes=(1,) * 9, num_blocks=4, options=tuple(options))
    chosen = solve(chain, 201)
    assert chosen is not None
    assert [option.kind for option in chosen] == ["recompute", "recompute", "keep", "keep"]


def test_eighty_blocks_take_no_time() -> None:
    """The size of a 70B model; equal blocks make a hard case for branch and bound."""
    options = []
    for block in range(80):
        options.append(
            Option(block=block, kind="keep", flops=0, added_bytes=dict.fromkeys(range(block, 161 - block), 320_000_000))
        )
        local = {block: 30_000_000, 160 - block: 350_000_000}
        options.append(Option(block=block, kind="recompute", flops=10**11, added_bytes=local))
    chain = Chain(base_bytes=(10**9,) * 161, num_blocks=80, options=tuple(options))
    chosen = solve(chain, 10**10)
    assert chosen is not None
    assert sum(option.kind == "keep" for option in chosen) == 28


# -- a tier below ------------------------------------------------------------------------------------------------------

FREE = Link(
    room_bytes=10**6, out_flops=0.0, back_flops=0.0, copy_flops=0.0, forward_flops=10.0**9, backward_flops=10.0**9
)


@st.composite
def chains_with_a_link(draw: st.DrawFn) -> Chain:
    """Chains of which what some options hold may be moved, over a link that may be slow, to a tier that may be small."""
    chain = draw(chains())
    last = len(chain.base_bytes) - 1
    options = list(chain.options)
    for option in chain.options:
        most = min((added for added in option.added_bytes.values()), default=0)
        if most and draw(st.booleans()):
            size = draw(st.integers(min_value=1, max_value=most))
            between = range(option.block + 1, last - option.block)
            moved = option.added_bytes | {at: option.added_bytes.get(at, 0) - size for at in between}
            num = draw(st.integers(min_value=1, max_value=3))
            kind = f"{option.kind}+all"
            options.append(replace(option, kind=kind, added_bytes=moved, moved_bytes=size, num_moved=num))
    cost = st.floats(min_value=0.0, max_value=3.0)
    hidden = st.floats(min_value=0.0, max_value=2000.0)
    link = Link(
        room_bytes=draw(st.integers(min_value=10, max_value=3000)),
        out_flops=draw(cost),
        back_flops=draw(cost),
        copy_flops=10 * draw(cost),
        forward_flops=draw(hidden),
        backward_flops=draw(hidden),
    )
    return replace(chain, options=tuple(options), link=link)


def moved_bytes(choice: list[Option] | tuple[Option, ...]) -> int:
    return sum(option.moved_bytes for option in choice)


def cost(link: Link, choice: list[Option] | tuple[Option, ...]) -> float:
    """Recomputed operations, and those that compute could do while it waits for the link, out and back."""
    starting = link.copy_flops * sum(option.num_moved for option in choice)
    out = link.out_flops * moved_bytes(choice) + starting - link.forward_flops
    back = link.back_flops * moved_bytes(choice) + starting - link.backward_flops
    return flops(choice) + max(0.0, out) + max(0.0, back)


@settings(max_examples=150, deadline=None)
@given(chains_with_a_link(), st.integers(min_value=1, max_value=7000))
def test_with_a_link_the_solver_is_as_good_as_trying_everything(chain: Chain, budget: int) -> None:
    link = chain.link
    assert link is not None
    fitting = [
        choice
        for choice in all_choices(chain)
        if chain.peak_bytes(choice) <= budget and moved_bytes(choice) <= link.room_bytes
    ]
    chosen = solve(chain, budget)
    assert (chosen is None) == (not fitting)
    if chosen is not None:
        assert chain.peak_bytes(chosen) <= budget
        assert moved_bytes(chosen) <= link.room_bytes
        least = min(cost(link, choice) for choice in fitting)
        assert cost(link, chosen) == pytest.approx(
            least, rel=1e-5, abs=1e-5 * sum(o.flops for o in chain.options) + 1e-3
        )


def equal_blocks(link: Link, num_blocks: int = 4) -> Chain:
    """Blocks that hold 100 bytes, recompute them in 10 operations, or move them."""
    options = []
    last = 2 * num_blocks
    for block in range(num_blocks):
        span = dict.fromkeys(range(block, last + 1 - block), 100)
        ends = {block: 100, last - block: 100}
        options += [
            Option(block=block, kind="keep", flops=0, added_bytes=span),
            Option(block=block, kind="recompute", flops=10, added_bytes=ends),
            Option(block=block, kind="keep+all", flops=0, added_bytes=ends, moved_bytes=100, num_moved=1),
        ]
    return Chain(base_bytes=(1,) * (last + 1), num_blocks=num_blocks, options=tuple(options), link=link)


def kinds(link: Link, budget: int = 201) -> list[str]:
    chosen = solve(equal_blocks(link), budget)
    assert chosen is not None
    return [option.kind for option in chosen]


def test_what_moves_for_nothing_is_moved_rather_than_recomputed() -> None:
    """And that of the first blocks, which leaves first and is needed last."""
    found = kinds(FREE)
    assert found == ["keep+all", "keep+all", "keep", "keep"], "and no more than must be"


def test_no_byte_more_is_moved_than_there_is_room_for() -> None:
    for room, expected in ((200, 2), (199, 1), (100, 1), (99, 0)):
        found = kinds(replace(FREE, room_bytes=room))
        assert found.count("keep+all") == expected
        assert found.count("recompute") == 2 - expected


@pytest.mark.parametrize("way", ["out", "back"])
def test_waiting_for_a_slow_link_is_weighed_against_recomputing(way: str) -> None:
    """Two blocks of 100 bytes each have to make room: moving one costs 5 operations, or 15, where recomputing it costs 10."""

    def link(seconds_per_byte: float, hidden: float = 0.0) -> Link:
        per_byte = {f"{way}_flops": seconds_per_byte}
        return replace(FREE, **per_byte, **{"forward_flops" if way == "out" else "backward_flops": hidden})

    assert kinds(link(0.05)).count("keep+all") == 2
    assert kinds(link(0.15)).count("keep+all") == 0
    assert kinds(link(0.15, hidden=15.0)).count("keep+all") == 1, "one moves beside the compute, a second would not"
    assert kinds(link(0.15, hidden=21.0)).count("keep+all") == 2, (
        "the wait for the second is shorter than recomputing it"
    )


def test_starting_a_copy_counts() -> None:
    without = replace(FREE, forward_flops=0.0, backward_flops=0.0)
    assert kinds(replace(without, copy_flops=4.0)).count("keep+all") == 2
    assert kinds(replace(without, copy_flops=6.0)).count("keep+all") == 0


# -- and a tier below that ---------------------------------------------------------------------------------------------


def cost_of_both(link: Link, choice: list[Option] | tuple[Option, ...]) -> float:
    """The cost if what goes on to the second tier is chosen best: it is linear between the points where a wait begins."""
    more, moved = link.overflow, moved_bytes(choice)
    assert more is not None
    starting = link.copy_flops * sum(option.num_moved for option in choice)
    least, most = max(0, moved - link.room_bytes), more.room_bytes

    def at(spilled: float) -> float:
        waits = [
            link.out_flops * (moved - spilled) + starting - link.forward_flops,
            link.back_flops * (moved - spilled) + starting - link.backward_flops,
            more.out_flops * spilled - more.forward_flops,
            more.back_flops * spilled - more.backward_flops,
        ]
        return flops(choice) + sum(max(0.0, wait) for wait in waits)

    turns = [float(least), float(most)]
    for per_byte, hidden, is_first in (
        (link.out_flops, link.forward_flops, True),
        (link.back_flops, link.backward_flops, True),
        (more.out_flops, more.forward_flops, False),
        (more.back_flops, more.backward_flops, False),
    ):
        if per_byte:
            turn = moved - (hidden - starting) / per_byte if is_first else hidden / per_byte
            turns.append(min(max(turn, least), most))
    return min(at(spilled) for spilled in turns)


@settings(max_examples=100, deadline=None)
@given(chains_with_a_link(), chains_with_a_link(), st.integers(min_value=1, max_value=7000))
def test_with_two_tiers_the_solver_is_as_good_as_trying_everything(chain: Chain, other: Chain, budget: int) -> None:
    assert chain.link is not None
    link = replace(chain.link, overflow=other.link)
    assert link.overflow is not None
    room = link.room_bytes + link.overflow.room_bytes
    fitting = [
        choice for choice in all_choices(chain) if chain.peak_bytes(choice) <= budget and moved_bytes(choice) <= room
    ]
    chosen = solve(replace(chain, link=link), budget)
    assert (chosen is None) == (not fitting)
    if chosen is not None:
        assert moved_bytes(chosen) <= room
        least = min(cost_of_both(link, choice) for choice in fitting)
        tolerance = 1e-5 * sum(o.flops for o in chain.options) + 1e-3
        assert cost_of_both(link, chosen) == pytest.approx(least, rel=1e-5, abs=tolerance)


def test_what_a_step_waits_for_is_what_each_link_takes_beyond_what_is_computed() -> None:
    disk = replace(FREE, out_flops=2.0, back_flops=4.0, forward_flops=100.0, backward_flops=100.0)
    host = replace(disk, room_bytes=100, out_flops=1.0, back_flops=1.0, copy_flops=5.0, overflow=disk)
    assert host.wait_flops(90, 2) == 0
    assert host.wait_flops(100, 2) == 10 + 10
    assert host.wait_flops(200, 2) == 10 + 10 + 100 + 300
    assert replace(host, overflow=None).wait_flops(200, 2) == 110 + 110
