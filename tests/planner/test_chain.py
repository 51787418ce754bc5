from __future__ import annotations

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from tapeline.planner.chain import Chain, Option, smallest, solve

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
