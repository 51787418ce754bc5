"""The backward of a small block, followed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tapeline.planner.rebuild import Rebuild, rebuild
from tapeline.planner.stage import Stage
from tests.planner.small import ladder, op

X, A, B = 0, 1, 2


def built(*saved: int, stage: Stage | None = None, is_lazy: bool = True) -> Rebuild:
    return rebuild(stage or ladder(), frozenset(saved), is_lazy=is_lazy)


def order(plan: Rebuild) -> list[tuple[int, int | None]]:
    """For each moment, the operation whose backward it belongs to and the one that is run again."""
    return [(moment.op, moment.replays) for moment in plan.moments]


def test_nothing_is_run_again_when_all_is_saved() -> None:
    plan = built(X, A, B)
    assert order(plan) == [(2, None), (1, None), (0, None)]
    assert plan.seconds == (0.0, 0.0)
    assert plan.flops == 0
    assert plan.first_need == {B: 0, A: 1, X: 2}
    assert [moment.alive for moment in plan.moments] == [{B}, {A}, {X}]
    assert [moment.seconds for moment in plan.moments] == [4.0, 6.0, 2.0]
    assert [moment.extra_bytes for moment in plan.moments] == [50, 60, 30]


def test_from_the_input_alone_all_but_the_last_operation_is_run_again() -> None:
    plan = built(X)
    assert order(plan) == [(2, 0), (2, 1), (2, None), (1, None), (0, None)]
    assert plan.seconds == (0.0, 4.0), "the second part waits for it"
    assert plan.flops == 400
    assert plan.first_need == {X: 0}
    assert plan.last_need == {X: 4}
    assert [moment.alive for moment in plan.moments] == [{X, A}, {X, A, B}, {X, A, B}, {X, A}, {X}]
    incoming = ladder().ops[2].incoming_bytes
    assert [moment.extra_bytes for moment in plan.moments] == [incoming, incoming, 50, 60, 30]


def test_a_value_is_recomputed_when_it_is_first_needed() -> None:
    plan = built(X, B)
    assert order(plan) == [(2, None), (1, 0), (1, None), (0, None)]
    assert plan.seconds == (1.0, 0.0)
    assert plan.first_need == {B: 0, X: 1}
    assert plan.last_need == {B: 0, X: 3}
    assert [moment.alive for moment in plan.moments] == [{B}, {X, A}, {X, A}, {X}]
    assert plan.moments[1].extra_bytes == ladder().ops[1].incoming_bytes


def test_what_is_saved_ends_a_closure() -> None:
    plan = built(X, A)
    assert order(plan) == [(2, 1), (2, None), (1, None), (0, None)]
    assert plan.seconds == (0.0, 3.0)
    assert plan.first_need == {A: 0, X: 3}
    assert [moment.alive for moment in plan.moments] == [{A, B}, {A, B}, {A}, {X}]


def fork() -> Stage:
    """Two values from the input; the last operation needs one of them, the first operation the other."""
    ops = (
        op("left", (1.0, 1.0), reads=(0,), makes=1, needs=(1,)),
        op("right", (2.0, 1.0), reads=(0,), makes=2, needs=(0,)),
        op("join", (4.0, 1.0), reads=(1, 2), makes=3, needs=(2,)),
    )
    return Stage(names=("x", "left", "right", "y"), sizes=(8, 8, 8, 8), ops=ops)


def test_lazily_one_value_after_the_other_eagerly_both_at_once() -> None:
    assert order(built(X, stage=fork())) == [(2, 1), (2, None), (1, None), (0, 0), (0, None)]
    eager = built(X, stage=fork(), is_lazy=False)
    assert order(eager) == [(2, 0), (2, 1), (2, None), (1, None), (0, None)]
    assert eager.seconds == built(X, stage=fork()).seconds
    assert 1 in eager.moments[2].alive
    assert 1 not in built(X, stage=fork()).moments[2].alive


def test_what_is_run_again_once_is_still_there_for_a_later_need() -> None:
    """a is made again on the way to b, and the operation before needs a."""
    assert [replays for _, replays in order(built(X))].count(0) == 1


def test_the_bytes_of_a_replay_are_the_gradients_that_wait_and_no_variables_of_the_forward() -> None:
    stage = ladder()
    stage = replace(stage, ops=(replace(stage.ops[0], temporary_bytes=7), *stage.ops[1:]))
    assert built(X, stage=stage).moments[0].extra_bytes == 10


def test_an_input_that_was_not_saved_cannot_be_recomputed() -> None:
    with pytest.raises(ValueError, match="x is given to the block and was not saved"):
        built(A, B)


def test_what_must_not_be_run_again_is_not() -> None:
    stage = ladder()
    stage = replace(stage, ops=(stage.ops[0], replace(stage.ops[1], can_replay=False), stage.ops[2]))
    assert order(built(X, B, stage=stage)) == [(2, None), (1, 0), (1, None), (0, None)]
    with pytest.raises(ValueError, match="second must not be run again"):
        built(X, A, stage=stage)


def test_a_frozen_block_has_no_backward() -> None:
    plan = rebuild(replace(ladder(), is_frozen=True), frozenset())
    assert plan.moments == ()
    assert plan.seconds == (0.0, 0.0)
