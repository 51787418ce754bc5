from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tapeline.errors import InfeasibleBudgetError
from tapeline.planner.nested_schedule import FORWARD, replay
from tapeline.planner.route import Route
from tapeline.planner.segments import smallest_segments, solve_segments
from tests.planner.routes import block, routes
from tests.planner.test_nested import all_segments, counted_runs, counter, fastest, solved

modes = st.sampled_from(["each", "once"])


def segmented(route: Route, budget: float, rebuilds: str, slots: int = 4096) -> float:
    try:
        return solve_segments(route, budget, rebuilds=rebuilds, slots=slots).seconds
    except InfeasibleBudgetError:
        return math.inf


@settings(max_examples=60, deadline=None)
@given(routes(), modes)
def test_as_fast_and_as_small_as_trying_everything(route: Route, rebuilds: str) -> None:
    counted = counted_runs(route, all_segments(route, rebuilds))
    peaks = sorted({peak for _, peak in counted})
    assert smallest_segments(route, rebuilds=rebuilds) == peaks[0]
    for peak in peaks[:2] + peaks[2::5] + peaks[-1:]:
        for budget in (peak - 1, peak):
            assert segmented(route, budget, rebuilds) == pytest.approx(fastest(counted, budget))


@settings(max_examples=40, deadline=None)
@given(routes(max_stages=6), modes, st.integers(min_value=0, max_value=60), st.sampled_from([8, 50, 500]))
def test_the_plan_keeps_its_promises(route: Route, rebuilds: str, more: int, slots: int) -> None:
    budget = smallest_segments(route, rebuilds=rebuilds) + more
    plan = solve_segments(route, budget, rebuilds=rebuilds, slots=slots)
    assert replay(route, plan.schedule) == (pytest.approx(plan.seconds), plan.device_peak)
    assert plan.device_peak <= budget
    assert len(plan.chosen) == len(plan.keeps_input) == len(route.stages)


@settings(max_examples=40, deadline=None)
@given(routes(max_stages=6), modes, st.integers(min_value=0, max_value=80), st.floats(min_value=0, max_value=60))
def test_more_memory_is_never_slower(route: Route, rebuilds: str, budget: int, more: float) -> None:
    assert segmented(route, budget + more, rebuilds, slots=64) <= segmented(route, budget, rebuilds, slots=64) + 1e-9


def test_where_all_inputs_fit_all_are_kept() -> None:
    plan = solve_segments(counter(9), 9 + 3)
    assert all(plan.keeps_input)
    assert plan.seconds == counter(9).base_seconds


def test_two_stages_are_as_good_as_nested() -> None:
    route = Route(stages=(block(), block(middle=5)))
    for rebuilds in ("each", "once"):
        for budget in range(smallest_segments(route, rebuilds=rebuilds), 40):
            assert segmented(route, budget, rebuilds) == pytest.approx(solved(route, budget))


def test_what_a_segment_costs() -> None:
    route = counter(6)
    each = solve_segments(route, smallest_segments(route))
    assert each.keeps_input == (True, False, False, False, False, True)  # the last is still there after the loss
    assert each.schedule.num_forwards == 6 + (1 + 2 + 3 + 4)
    once = solve_segments(route, 3 + 3 + 2, rebuilds="once")
    assert once.schedule.num_forwards < 2 * 6
    assert sum(operation.kind == FORWARD for operation in once.schedule.operations) == 6 - sum(once.keeps_input)


def test_frozen_stages_keep_nothing() -> None:
    route = Route(stages=(block(is_frozen=True), block(), block()))
    plan = solve_segments(route, smallest_segments(route))
    assert not plan.keeps_input[0]
    assert plan.keeps_input[1]


def test_too_little_says_how_much_is_enough() -> None:
    route = counter(6)
    with pytest.raises(InfeasibleBudgetError, match="smallest possible") as caught:
        solve_segments(route, 1, rebuilds="once")
    assert caught.value.smallest_feasible_bytes == smallest_segments(route, rebuilds="once")
