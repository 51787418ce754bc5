from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tapeline.errors import InfeasibleBudgetError, UsageError
from tapeline.planner.nested import replay, smallest_nested, solve_nested, solve_segments
from tapeline.planner.nested_schedule import (
    BACKWARD,
    CHECKPOINT,
    FORWARD,
    LOSS,
    SAVE,
    Nested,
    Operation,
    forward_bytes,
    run,
)
from tapeline.planner.placements import placements
from tapeline.planner.route import Budgets, Links, Route
from tapeline.planner.segments import smallest_segments
from tapeline.planner.stage import Stage, StageOp
from tapeline.planner.synthetic import LLAMA_2_7B, LlamaBlock, Speed
from tapeline.planner.timeline import simulate
from tests.planner.routes import block, routes

Operations = tuple[Operation, ...]
EXACT = 4096
LINKS = Links(to_host=1.0, to_device=1.0)


def plain_options(route: Route, stage: int) -> list[int]:
    return np.nonzero(route.choices[stage].moved_bytes == 0)[0].tolist()


def kept(route: Route, stage: int, option: int) -> frozenset[int]:
    return route.choices[stage].kept[option] | route.choices[stage].moved[option]


def all_schedules(route: Route) -> list[Operations]:
    """Every nesting of checkpoints with every option, written down without any bytes."""
    first, last = route.num_frozen, len(route.stages) - 1

    @cache
    def interval(begin: int, end: int) -> list[Operations]:
        if begin > end:
            return [(Operation(LOSS, begin),)] if end == last else [()]
        found = []
        for option in plain_options(route, begin):
            found += [
                (Operation(SAVE, begin, option), *rest, Operation(BACKWARD, begin, option))
                for rest in interval(begin + 1, end)
            ]
            if begin == end < last and kept(route, begin, option) <= {0}:
                found.append((Operation(BACKWARD, begin, option),))
        for split in range(begin + 1, end + 1):
            forwards = [Operation(FORWARD, stage) for stage in range(begin, split)]
            for after, before in product(interval(split, end), interval(begin, split - 1)):
                # an input that is kept already is not checkpointed again
                again = tuple(item for item in before if item != Operation(CHECKPOINT, begin))
                found.append((Operation(CHECKPOINT, begin), *forwards, *after, *again))
        return found

    frozen = tuple(Operation(FORWARD, stage) for stage in range(first))
    return [(*frozen, *schedule) for schedule in interval(first, last)]


def all_segments(route: Route, rebuilds: str) -> Iterator[Operations]:
    """Every plan in segments, written down without any bytes."""
    first, last = route.num_frozen, len(route.stages) - 1
    stages = range(first, last + 1)
    for keeps in product([True, False], repeat=len(stages) - 1):
        heads = {
            stage: max(s for s in stages if s <= stage and (s == first or keeps[s - first - 1])) for stage in stages
        }
        for options in product(*(plain_options(route, stage) for stage in stages)):
            chosen = dict(zip(stages, options, strict=True))
            done = [Operation(FORWARD, stage) for stage in range(first)]
            done += [Operation(SAVE, stage, chosen[stage], heads[stage] < stage) for stage in stages]
            done.append(Operation(LOSS, last + 1))
            for stage in reversed(stages):
                again = range(heads[stage], stage)
                if rebuilds == "each" and 0 in route.choices[stage].kept[chosen[stage]]:
                    done += [Operation(FORWARD, before) for before in again]
                elif rebuilds == "once" and heads.get(stage + 1) != heads[stage]:
                    for before in again:
                        done += [Operation(FORWARD, before), Operation(CHECKPOINT, before + 1)]
                done.append(Operation(BACKWARD, stage, chosen[stage]))
            yield tuple(done)


def fastest(counted: list[tuple[float, float]], budget: float) -> float:
    return min((seconds for seconds, peak in counted if peak <= budget), default=math.inf)


def solved(route: Route, budget: float, slots: int = EXACT) -> float:
    try:
        return solve_nested(route, budget, slots=slots).seconds
    except InfeasibleBudgetError:
        return math.inf


def counted_runs(route: Route, schedules: Iterator[Operations] | list[Operations]) -> list[tuple[float, float]]:
    found = []
    for operations in schedules:
        try:
            found.append(run(route, operations))
        except ValueError:  # begins a segment with an input that is not kept
            continue
    return found


def every_schedule(route: Route) -> list[tuple[float, float]]:
    both = (operations for rebuilds in ("each", "once") for operations in all_segments(route, rebuilds))
    return counted_runs(route, [*all_schedules(route), *both])


@settings(max_examples=60, deadline=None)
@given(routes())
def test_as_fast_and_as_small_as_trying_everything(route: Route) -> None:
    counted = every_schedule(route)
    peaks = sorted({peak for _, peak in counted})
    assert smallest_nested(route) == peaks[0]
    for peak in peaks[:2] + peaks[2::9] + peaks[-1:]:
        for budget in (peak - 1, peak):
            assert solved(route, budget) == pytest.approx(fastest(counted, budget))


@settings(max_examples=30, deadline=None)
@given(routes(max_stages=6), st.integers(min_value=0, max_value=60), st.sampled_from([8, 50, 500]))
def test_the_schedule_keeps_its_promises(route: Route, more: int, slots: int) -> None:
    budget = smallest_nested(route) + more
    nested = solve_nested(route, budget, slots=slots)
    seconds, peak = replay(route, nested)
    assert seconds == pytest.approx(nested.seconds)
    assert peak == nested.device_peak <= budget
    assert nested.seconds >= route.base_seconds - 1e-9


@settings(max_examples=40, deadline=None)
@given(routes(max_stages=6), st.integers(min_value=0, max_value=80), st.floats(min_value=0, max_value=60))
def test_more_memory_is_never_slower(route: Route, budget: int, more: float) -> None:
    assert solved(route, budget + more, slots=64) <= solved(route, budget, slots=64) + 1e-9


@settings(max_examples=40, deadline=None)
@given(routes(max_stages=6))
def test_the_smallest_budget_fits_and_one_byte_less_does_not(route: Route) -> None:
    least = smallest_nested(route)
    assert solve_nested(route, least, slots=20).device_peak <= least
    if least:
        with pytest.raises(InfeasibleBudgetError) as caught:
            solve_nested(route, least - 1)
        assert caught.value.smallest_feasible_bytes == least
        assert caught.value.budget_bytes == least - 1


@settings(max_examples=30, deadline=None)
@given(routes(max_stages=6))
def test_with_enough_memory_nothing_is_run_again(route: Route) -> None:
    for budget in (10_000, math.inf):
        nested = solve_nested(route, budget)
        assert nested.seconds == pytest.approx(route.base_seconds)
        assert nested.num_forwards == len(route.stages)


@settings(max_examples=30, deadline=None)
@given(routes(max_stages=6), st.integers(min_value=0, max_value=60))
def test_segments_are_never_faster(route: Route, more: int) -> None:
    for rebuilds in ("each", "once"):
        budget = smallest_segments(route, rebuilds=rebuilds) + more
        segments = solve_segments(route, budget, rebuilds=rebuilds)
        assert solve_nested(route, budget).seconds <= segments.seconds + 1e-9


def recompute_all(route: Route) -> list[int]:
    return [0 if stage.is_frozen else o.find({0}) for stage, o in zip(route.stages, route.choices, strict=True)]


def llama(num_blocks: int, gradient_bytes: int = 0) -> Route:
    speed = Speed(matmul_flops=450e12, memory_bytes=3.8e12)
    stage = LlamaBlock(LLAMA_2_7B, speed, length=4096, batch=1).stage()
    fields = {name: getattr(stage, name) for name in ("names", "sizes", "ops", "halves")}
    stage = Stage(**fields, gradient_bytes=gradient_bytes)
    return Route(
        stages=(stage,) * num_blocks, loss_seconds=0.01, loss_bytes=1 << 29, options=LLAMA_OPTIONS * num_blocks
    )


LLAMA_OPTIONS = (
    placements(LlamaBlock(LLAMA_2_7B, Speed(matmul_flops=450e12, memory_bytes=3.8e12), length=4096, batch=1).stage()),
)


def test_where_all_inputs_fit_at_most_as_slow_as_recomputing_everything() -> None:
    for route in (llama(12), llama(12, gradient_bytes=1 << 28)):
        timeline = simulate(route, recompute_all(route), Budgets(device=1e15), LINKS)
        nested = solve_nested(route, timeline.device_peak)
        assert nested.seconds < timeline.seconds
        assert nested.device_peak <= timeline.device_peak


def test_one_pass_counts_what_the_timeline_counts() -> None:
    for route in (llama(8), llama(8, gradient_bytes=1 << 28)):
        for share in (1.0, 1.3, 2.0, 4.0, 100.0):
            timeline = simulate(route, recompute_all(route), Budgets(device=1e15), LINKS)
            nested = solve_nested(route, share * timeline.device_peak)
            assert nested.num_forwards == 8
            chosen = [operation.option for operation in nested.operations if operation.kind == SAVE]
            again = simulate(route, chosen, Budgets(device=1e15), LINKS)
            assert (nested.seconds, nested.device_peak) == (pytest.approx(again.seconds), again.device_peak)


def test_the_bytes_of_a_forward_are_those_of_the_options() -> None:
    options = LLAMA_OPTIONS[0]
    for option, moved in enumerate(options.moved):
        if not moved:
            assert forward_bytes(options.stage, options.kept[option]) == options.forward_peak[option].max()


def test_below_all_inputs_it_trades_forwards_for_bytes() -> None:
    route = llama(16)
    least, inputs = smallest_nested(route), 16 * route.stages[0].sizes[0]
    costs = [solve_nested(route, least + share * inputs).seconds for share in (0.0, 0.1, 0.25, 0.5, 1.0)]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > 1.4 * costs[-1]


def counter(num_stages: int) -> Route:
    """Stages of one second whose backward needs the input alone, all values of one byte."""
    op = StageOp(name="op", seconds=1.0, backward_seconds=1.0, reads=(0,), makes=(1,), needs=(0,), incoming_bytes=1, backward_bytes=2)  # fmt: skip
    stage = Stage(names=("x", "y"), sizes=(1, 1), ops=(op,))
    return Route(stages=(stage,) * num_stages)


def binomial_forwards(num_stages: int, num_inputs: int) -> int:
    """Fewest forwards with so many stored inputs, the first included (Griewank and Walther 2000), and the last stage's."""
    times = 0
    while math.comb(num_inputs + times, num_inputs) < num_stages:
        times += 1
    return times * num_stages - (math.comb(num_inputs + times, num_inputs + 1) if times else 0) + 1


@pytest.mark.parametrize("num_stages", [2, 5, 10, 30])
@pytest.mark.parametrize("num_inputs", [1, 2, 3, 5])
def test_equal_stages_follow_the_binomial_law(num_stages: int, num_inputs: int) -> None:
    # beside the stored inputs: one that is on its way, the gradients before and after the stage
    nested = solve_nested(counter(num_stages), num_inputs + 3)
    assert nested.num_forwards == binomial_forwards(num_stages, num_inputs)


def test_the_square_root_of_the_inputs_costs_one_forward() -> None:
    nested = solve_nested(counter(64), 2 * 8 + 3)
    assert 64 < nested.num_forwards <= 2 * 64
    assert solve_nested(counter(64), 8 + 3).num_forwards > nested.num_forwards
    assert solve_segments(counter(64), 2 * 8 + 3, rebuilds="once").schedule.num_forwards <= 2 * 64


def test_frozen_stages_run_forward_once_and_keep_nothing() -> None:
    frozen, trained = block(middle=9, is_frozen=True), block()
    route, alone = Route(stages=(frozen, frozen, *[trained] * 6)), Route(stages=(trained,) * 6)
    budget = smallest_nested(alone) + 2
    nested = solve_nested(route, budget + 7)
    assert nested.operations[:2] == (Operation(FORWARD, 0), Operation(FORWARD, 1))
    assert not [operation for operation in nested.operations[2:] if operation.stage < 2]
    assert solve_nested(route, max(budget, 13)).seconds == pytest.approx(
        solve_nested(alone, max(budget, 13)).seconds + 4
    )


def test_a_stage_that_must_not_run_again_runs_once() -> None:
    stages = [block(), block(can_replay=False, middle=1), block(), block()]
    route = Route(stages=tuple(stages))
    for budget in range(smallest_nested(route), 40):
        operations = solve_nested(route, budget).operations
        assert sum(operation.kind in {FORWARD, SAVE} and operation.stage == 1 for operation in operations) == 1


def test_a_step_without_backward_fits_or_does_not() -> None:
    route = Route(stages=(block(is_frozen=True),) * 3, loss_bytes=5)
    assert smallest_nested(route) == 9
    assert solve_nested(route, 9).seconds == route.base_seconds
    with pytest.raises(InfeasibleBudgetError):
        solve_nested(route, 8)


def test_different_stages_are_told_apart() -> None:
    """The intervals of two kinds in turn are shared; the answer is that of stages that are all their own."""
    kinds = block(middle=4, seconds=(5.0, 1.0)), block(middle=1, working=(0, 3))
    shared = Route(stages=kinds * 4)
    apart = Route(stages=shared.stages, options=tuple(placements(stage) for stage in shared.stages))
    for budget in range(smallest_nested(shared), 50, 3):
        assert solved(shared, budget) == solved(apart, budget)


def test_bad_input_is_refused() -> None:
    route = Route(stages=(block(),) * 2)
    with pytest.raises(UsageError, match="cannot be negative"):
        solve_nested(route, -1)
    with pytest.raises(UsageError, match="cannot be negative"):
        solve_segments(route, math.nan)
    with pytest.raises(UsageError, match="at least one"):
        solve_nested(route, 100, slots=0)
    stage = block()
    options = placements(stage)
    moving = options.rows([option for option, moved in enumerate(options.moved) if moved])
    with pytest.raises(UsageError, match="moves something"):
        solve_nested(Route(stages=(stage,), options=(moving,)), 100)


def test_a_schedule_that_cannot_run_is_refused() -> None:
    route = Route(stages=(block(),) * 2)
    good = solve_nested(route, 100).operations
    swapped = (good[1], good[0], *good[2:])
    for operations in (good[:-1], good[1:], swapped, (*good[:3], good[4], good[3]), (*good, good[-1])):
        with pytest.raises(ValueError, match=r"."):
            replay(route, Nested(seconds=0.0, device_peak=0.0, operations=operations))


def test_operations_are_readable() -> None:
    route = Route(stages=(block(),) * 3)
    shown = [str(operation) for operation in solve_nested(route, smallest_nested(route)).operations]
    assert "loss 3" in shown
    assert shown[-1].startswith("backward 0 option")
