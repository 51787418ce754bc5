"""Plans over device, host and disk: near the best of all where all can be tried, as good as expected where not."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from bench.planner import COLUMNS, DEVICES, EXPECTED, GIB, LOSS_BYTES, route_of
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tapeline.planner import hybrid
from tapeline.planner.hybrid import Hybrid, Infeasible, solve
from tapeline.planner.placements import placements
from tapeline.planner.relaxation import Relaxation
from tapeline.planner.route import Budgets, Route
from tapeline.planner.synthetic import LLAMA_2_7B, LlamaBlock
from tapeline.planner.tightest import smallest
from tapeline.planner.timeline import DoesNotFit, simulate
from tests.planner.small import Case, best_of_all, case

FEW = settings(
    max_examples=12, derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.filter_too_much]
)
CLOSE = 0.01
"""How far a plan of a short chain may be from the best of all."""


def solved(case: Case, **settings: object) -> Hybrid:
    return solve(case.route, case.budgets, case.links, **settings)


# -- the numbers that are expected -------------------------------------------------------------------------------------

ROWS = [(column, gib) for column in range(len(COLUMNS)) for gib in EXPECTED]
QUICK = {1.53, 6.11}


@pytest.mark.parametrize(
    ("column", "gib"),
    [
        pytest.param(
            *row, marks=() if row[1] in QUICK else pytest.mark.slow, id="-".join((*COLUMNS[row[0]], str(row[1])))
        )
        for row in ROWS
    ],
)
def test_the_headline(column: int, gib: float) -> None:
    device, training = COLUMNS[column]
    route = route_of("Llama-2-7B", device, training, 4096, 2)
    found = solve(route, Budgets(device=gib * GIB), DEVICES[device][1])
    assert 100 * (found.timeline.seconds / route.base_seconds - 1) <= EXPECTED[gib][column] + 1.0
    assert found.lower_bound <= found.timeline.seconds * (1 + 1e-9)
    assert found.gap <= 0.01
    assert found.timeline.device_peak <= gib * GIB * (1 + 1e-5)


# -- every plan of a short chain ---------------------------------------------------------------------------------------

NUM_SEEDS, NUM_SLOW = 30, 330


@pytest.mark.parametrize("tiers", [False, True], ids=["device", "tiers"])
@pytest.mark.parametrize(
    "seed", [pytest.param(s, marks=() if s < NUM_SEEDS else pytest.mark.slow) for s in range(NUM_SLOW)]
)
def test_close_to_the_best_of_all_plans(seed: int, tiers: bool) -> None:
    chain = case(seed, tiers=tiers)
    if chain is None:
        return
    best = best_of_all(chain)
    assert best < math.inf
    found = solved(chain)
    assert found.timeline.seconds <= best * (1 + CLOSE)
    assert found.lower_bound <= best * (1 + 1e-9)
    if not chain.budgets.disk:
        safe = Relaxation(chain.route, chain.budgets, chain.links, is_safe=True).solve()
        assert safe.seconds >= found.lower_bound * (1 - 1e-6), "the pessimistic reading is above the bound"


def test_rounding_alone_is_rarely_far_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of short chains all plans are tried; without that, what is left is what long chains get."""
    monkeypatch.setattr(hybrid, "_MAX_PLANS", 0)
    ratios = []
    for seed in range(40):
        chain = case(seed, tiers=seed % 2 == 1)
        if chain is not None:
            ratios.append(solved(chain).timeline.seconds / best_of_all(chain))
    assert sum(ratio <= 1 + CLOSE for ratio in ratios) >= 0.95 * len(ratios)
    assert max(ratios) < 1.1


# -- budgets that nothing fits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiers", [False, True], ids=["device", "tiers"])
@pytest.mark.parametrize("seed", range(12))
def test_the_smallest_plan_is_named_and_can_be_had(seed: int, tiers: bool) -> None:
    chain = case(seed, tiers=tiers)
    if chain is None:
        return
    least = smallest(chain.route, chain.budgets, chain.links)
    assert least is not None
    with pytest.raises(Infeasible) as caught:
        solved(chain.with_(device=0.95 * least.device_bytes))
    named = caught.value.smallest
    assert named is not None
    assert named.device_bytes == least.device_bytes
    assert f"{named.device_bytes:.0f} bytes" in str(caught.value)
    found = solved(chain.with_(device=named.device_bytes))
    assert found.timeline.device_peak <= named.device_bytes * (1 + 1e-5)
    assert (
        simulate(chain.route, named.chosen, replace(chain.budgets, device=named.device_bytes), chain.links).seconds > 0
    )


def test_a_llama_needs_its_smallest_budget_and_no_less() -> None:
    route, links = route_of("Llama-2-7B", "H200@450", "full", 4096, 2), DEVICES["H200@450"][1]
    with pytest.raises(Infeasible) as caught:
        solve(route, Budgets(device=0.5 * GIB), links)
    assert caught.value.smallest is not None
    needed = caught.value.smallest.device_bytes
    assert 0.5 < needed / GIB < 1.0
    assert solve(route, Budgets(device=needed), links).timeline.device_peak <= needed * (1 + 1e-5)


def test_without_a_host_nothing_moves() -> None:
    route, links = route_of("Llama-2-7B", "H200@450", "full", 4096, 2), DEVICES["H200@450"][1]
    found = solve(route, Budgets(device=4 * GIB, host=0.0), links)
    assert found.timeline.moved_bytes == found.timeline.host_peak == 0
    with pytest.raises(Infeasible) as caught:
        solve(route, Budgets(device=1.53 * GIB, host=0.0), links)
    assert caught.value.smallest is not None
    assert caught.value.smallest.device_bytes / GIB > 3


def test_it_is_said_when_no_device_is_large_enough() -> None:
    assert str(Infeasible(None)) == "nothing fits: whatever the device has"


# -- laws --------------------------------------------------------------------------------------------------------------

chains = st.builds(case, st.integers(0, 10_000), tiers=st.booleans(), num_options=st.just(30), max_blocks=st.just(6))
MORE = st.sampled_from(
    ["device", "host", "disk", "to_host", "to_device", "disk_write", "disk_read"],
)


@FEW
@given(chain=chains, what=MORE, factor=st.sampled_from([1.01, 1.1, 1.5, 3.0]))
def test_more_of_anything_is_never_slower(chain: Case | None, what: str, factor: float) -> None:
    """The plan of the smaller budget is tried too; but see `test_more_of_anything_does_not_slow_a_plan_down` for the host."""
    assume(chain is not None)
    before = solved(chain)
    tiers = {"device": chain.budgets.device, "host": chain.budgets.host, "disk": chain.budgets.disk}
    more = chain.with_(**{what: factor * (tiers[what] if what in tiers else getattr(chain.links, what))})
    after = solved(more, also=[before.chosen])
    allowed = 0.02 if what == "host" else 1e-9
    assert after.timeline.seconds <= before.timeline.seconds * (1 + allowed)
    assert after.lower_bound <= before.lower_bound * (1 + 1e-6)


@FEW
@given(chain=chains)
def test_plans_run_as_promised_and_within_their_budgets(chain: Case | None) -> None:
    assume(chain is not None)
    found = solved(chain)
    assert simulate(chain.route, found.chosen, chain.budgets, chain.links) == found.timeline
    detailed = simulate(chain.route, found.chosen, chain.budgets, chain.links, is_detailed=True)
    assert detailed.seconds <= found.timeline.seconds * (1 + 1e-9)
    for tier in ("device", "host", "disk"):
        assert getattr(found.timeline, f"{tier}_peak") <= getattr(chain.budgets, tier) * (1 + 1e-5)
    assert found.lower_bound <= found.timeline.seconds * (1 + 1e-9)
    assert found.gap >= -1e-9


@FEW
@given(chain=chains)
def test_the_same_question_has_the_same_answer(chain: Case | None) -> None:
    assume(chain is not None)
    assert solved(chain) == solved(chain)


def test_larger_budgets_are_never_slower_for_a_llama() -> None:
    """Each budget is solved on its own: how far the solver is from monotone is bounded by how far it is from its bound."""
    route, links = route_of("Llama-2-7B", "RTX 4090", "lora", 4096, 2), DEVICES["RTX 4090"][1]
    alone = [solve(route, Budgets(device=gib * GIB), links) for gib in (2.29, 2.4, 3.06, 4.58)]
    seconds = [found.timeline.seconds for found in alone]
    assert all(later <= before * 1.005 for before, later in pairwise(seconds))
    last = solve(route, Budgets(device=5 * GIB), links, also=[found.chosen for found in alone])
    assert last.timeline.seconds <= min(seconds)


def test_enough_of_everything_costs_nothing() -> None:
    route, links = route_of("Llama-2-7B", "H200@450", "full", 4096, 2), DEVICES["H200@450"][1]
    found = solve(route, Budgets(device=40 * GIB), links)
    assert found.timeline.seconds == pytest.approx(route.base_seconds)


# -- time --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "gib", "limit"), [("Llama-2-7B", (1.53, 3.06, 9.17), 1.5), ("Llama-3-70B", (6, 12), 4)]
)
def test_planning_takes_seconds(model: str, gib: tuple[float, ...], limit: float) -> None:
    """Processor time, on average over some budgets; options are listed before."""
    route, links = route_of(model, "H200@450", "lora", 4096, 2), DEVICES["H200@450"][1]
    assert len(route.choices) in (32, 80)
    begin = time.process_time()
    for budget in gib:
        solve(route, Budgets(device=budget * GIB), links)
    assert (time.process_time() - begin) / len(gib) < limit


# -- blocks that differ ------------------------------------------------------------------------------------------------


def test_blocks_that_differ_are_treated_differently() -> None:
    """Narrow and wide MLPs in turns, four times the bytes: no placement that is the same for all of them is as good."""
    speed, links = DEVICES["H200@450"]
    shapes = [replace(LLAMA_2_7B, intermediate=width) for width in (2048, 40960)]
    pair = [LlamaBlock(shape, speed, length=4096, batch=2).stage() for shape in shapes]
    saved = [sum(stage.sizes[value] for value in stage.needed) for stage in pair]
    assert saved[1] / saved[0] == pytest.approx(4, rel=0.05)
    route = Route(stages=tuple(pair) * 4, loss_bytes=LOSS_BYTES)
    budgets = Budgets(device=smallest(route, Budgets(device=0.0), links).device_bytes * 1.5)  # type: ignore[union-attr]
    assert solve(route, budgets, links).timeline.seconds < _best_uniform(route, budgets, links) * 0.999


def _best_uniform(route: Route, budgets: Budgets, links: object) -> float:
    """Seconds of the fastest placement that keeps and moves the same values in all blocks."""
    kinds = [placements(stage) for stage in route.stages[:2]]
    places = [{pair: i for i, pair in enumerate(zip(o.kept, o.moved, strict=True))} for o in kinds]
    common = places[0].keys() & places[1].keys()
    assert len(common) > 300
    best = math.inf
    for pair in common:
        chosen = [places[number % 2][pair] for number in range(len(route.stages))]
        try:
            best = min(best, simulate(route, chosen, budgets, links).seconds)
        except DoesNotFit:
            continue
    assert np.isfinite(best)
    return best
