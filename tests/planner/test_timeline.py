"""The referee: small steps with waits worked out by hand, and laws on random ones."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tapeline.planner.route import Budgets, Links, Route
from tapeline.planner.stage import Stage
from tapeline.planner.timeline import (
    BACKWARD,
    FORWARD,
    LOSS,
    OPTIMIZER,
    RECOMPUTE,
    DoesNotFit,
    Timeline,
    simulate,
)
from tests.planner.small import FREE, audit, case, ladder, line, op, run

KEEP: tuple[set[int], set[int]] = ({0}, set())
MOVE: tuple[set[int], set[int]] = (set(), {0})
EVEN = Links(to_host=100.0, to_device=100.0, latency=0.0)
"""A value of `line` takes a second."""
COPIES = "memory: copies to the host"


def lines(count: int = 3, **settings: int) -> Route:
    """`count` stages of one operation with values of 100 bytes; forward takes 1 s each, backward 2 s."""
    return Route(stages=(line(**settings),) * count)


def starts(timeline: Timeline, phase: str) -> list[float]:
    return [entry.start for entry in timeline.entries if entry.phase == phase]


# -- without copies ----------------------------------------------------------------------------------------------------


def test_everything_kept() -> None:
    found = run(lines(), [KEEP] * 3, EVEN)
    assert found.seconds == 3 * 1 + 3 * 2
    assert found.device_peak == 300 + 100 + 100, "three inputs, the output and its gradient"
    assert (found.host_peak, found.disk_peak, found.moved_bytes, found.recompute_seconds, found.waits) == (
        0,
        0,
        0,
        0,
        {},
    )
    assert [entry.device_bytes for entry in found.entries] == [200, 300, 400, 500, 500, 400, 300]
    assert [entry.phase for entry in found.entries] == [FORWARD] * 3 + [LOSS] + [BACKWARD] * 3


def test_what_is_recomputed_is_counted() -> None:
    found = run(Route(stages=(ladder(),)), [({0}, set())], EVEN)
    assert found.seconds == 6 + 12 + 4
    assert found.recompute_seconds == 4
    assert starts(found, RECOMPUTE) == [6, 7]
    assert found.device_peak == 10 + 20 + 40 + 50


def test_the_loss_and_the_base_are_counted() -> None:
    route = replace(lines(), loss_seconds=5.0, loss_bytes=1000, base_bytes=7)
    found = run(route, [KEEP] * 3, EVEN)
    assert found.seconds == 9 + 5
    assert found.device_peak == 7 + 500 + 1000


@pytest.mark.parametrize(("device", "excess"), [(450.0, 50.0), (300.0, 100.0), (150.0, 50.0)])
def test_what_does_not_fit_says_by_how_much(device: float, excess: float) -> None:
    """At the loss 500 bytes are needed, after the second forward 300, in the first 200."""
    with pytest.raises(DoesNotFit) as caught:
        run(lines(), [KEEP] * 3, EVEN, device=device)
    assert caught.value.excess == pytest.approx(excess)


def test_a_plan_fits_its_own_peak() -> None:
    peak = run(lines(), [KEEP] * 3, EVEN).device_peak
    assert run(lines(), [KEEP] * 3, EVEN, device=peak).seconds == 9
    with pytest.raises(DoesNotFit):
        run(lines(), [KEEP] * 3, EVEN, device=peak - 1)


# -- frozen stages, gradients, the optimizer step ----------------------------------------------------------------------


def test_a_frozen_beginning_saves_nothing_and_has_no_backward() -> None:
    route = Route(stages=(line(is_frozen=True), line(is_frozen=True), line()))
    found = run(route, [(set(), set()), (set(), set()), KEEP], EVEN)
    assert route.num_frozen == 2
    assert found.seconds == 3 + 2
    assert [entry.device_bytes for entry in found.entries] == [200, 200, 200, 300, 300]


def test_gradients_grow_through_backward_and_the_optimizer_step_sees_them_all() -> None:
    route = replace(lines(gradients=30), optimizer_bytes=1000, optimizer_seconds=4.0)
    found = run(route, [KEEP] * 3, EVEN)
    assert [entry.device_bytes for entry in found.entries] == [200, 300, 400, 500, 530, 460, 390, 1090]
    assert found.entries[-1].phase == OPTIMIZER
    assert found.seconds == 9 + 4
    with pytest.raises(DoesNotFit) as caught:
        run(route, [KEEP] * 3, EVEN, device=1000)
    assert caught.value.excess == pytest.approx(90)


def test_gradients_that_live_through_the_forward_are_in_the_base() -> None:
    route = replace(lines(gradients=30), base_bytes=90, keeps_gradients=True)
    assert [entry.device_bytes for entry in run(route, [KEEP] * 3, EVEN).entries] == [
        *(290, 390, 490),
        590,
        *(590, 490, 390),
    ]


# -- the device and its links ------------------------------------------------------------------------------------------


def test_fetches_wait_for_room() -> None:
    """Copies out are done at 3 s. Each backward fills the device, so each fetch begins when the one before has ended."""
    found = run(lines(), [MOVE] * 3, EVEN, device=300)
    assert starts(found, BACKWARD) == [4, 7, 10]
    assert found.seconds == 12
    assert found.waits == {"fetch": 3}
    assert found.moved_bytes == found.host_peak == 300
    assert found.device_peak == pytest.approx(300)


def test_with_more_room_fetches_come_early() -> None:
    found = run(lines(), [MOVE] * 3, EVEN, device=400)
    assert starts(found, BACKWARD) == [4, 6, 8]
    assert found.waits == {"fetch": 1}
    assert [entry.device_bytes for entry in found.entries if entry.phase == BACKWARD] == pytest.approx([400, 400, 300])


def test_a_copy_has_a_latency() -> None:
    """Out from 0 to 1.5 s, while compute is done at 1 s; back from 1.5 to 3 s."""
    found = run(lines(1), [MOVE], replace(EVEN, latency=0.5))
    assert starts(found, BACKWARD) == [3]
    assert found.seconds == 5


def test_copies_leave_one_after_the_other() -> None:
    """Made at 0, 1 and 2 s, two seconds each: the last has left at 6 s, and comes back first."""
    found = run(lines(), [MOVE] * 3, replace(EVEN, to_host=50.0))
    assert starts(found, LOSS) == [3]
    assert starts(found, BACKWARD) == [7, 9, 11]


def test_the_forward_waits_while_the_device_is_full() -> None:
    """An operation needs 200 bytes beyond what is there: the second waits for the first copy, and so on."""
    found = run(lines(temporary=100), [MOVE] * 3, replace(EVEN, to_host=50.0), device=300)
    assert starts(found, FORWARD) == [0, 2, 4]
    assert found.waits[COPIES] == 2
    assert {entry.reason for entry in found.entries if entry.phase == FORWARD and entry.wait} == {COPIES}
    with pytest.raises(DoesNotFit) as caught:
        run(lines(temporary=100), [MOVE] * 3, replace(EVEN, to_host=50.0), device=290)
    assert caught.value.excess == pytest.approx(10)


def test_the_loss_waits_for_the_copies_it_has_no_room_beside() -> None:
    route = replace(lines(), loss_bytes=100)
    free = run(route, [MOVE] * 3, replace(EVEN, to_host=50.0), device=500)
    tight = run(route, [MOVE] * 3, replace(EVEN, to_host=50.0), device=300)
    assert COPIES not in free.waits
    assert tight.waits[COPIES] == 3, "the last input has left at 6 s"
    assert max(entry.device_bytes for entry in tight.entries) == pytest.approx(300)


def test_backward_waits_for_the_last_copy_out() -> None:
    """The last stage keeps its input; the copies of the first two are done at 20 s."""
    found = run(lines(), [MOVE, MOVE, KEEP], replace(EVEN, to_host=10.0))
    assert starts(found, BACKWARD)[0] == 20
    assert found.waits["copies to the host"] == 17


@pytest.mark.parametrize(("rate", "seconds"), [(100.0, 10.0), (50.0, 11.0), (20.0, 20.0), (10.0, 35.0)])
def test_a_lagging_link_makes_compute_wait(rate: float, seconds: float) -> None:
    """Three copies back to back from 3 s on, then the last backward: memory has room for all of them."""
    found = run(lines(), [MOVE] * 3, replace(EVEN, to_device=rate))
    assert found.seconds == pytest.approx(max(seconds, 3 + 300 / rate + 2))
    assert found.seconds - sum(found.waits.values()) == 9


def test_a_fetch_does_not_take_the_room_of_what_is_still_leaving() -> None:
    """The input has left and is needed first, while three other values are on their way."""
    ops = (
        op("first", (0.1, 1), reads=(0,), makes=1, needs=(1,)),
        op("second", (0.1, 1), reads=(1,), makes=2, needs=(2,)),
        op("third", (0.1, 1), reads=(2,), makes=3, needs=(3,)),
        op("last", (0.1, 1), reads=(3,), makes=4, needs=(0,)),
    )
    stage = Stage(names=tuple("xabcy"), sizes=(100, 40, 40, 40, 1), ops=ops)
    links = Links(to_host=40.0, to_device=1000.0, latency=0.0)
    route = Route(stages=(stage,), loss_seconds=0.1)
    chosen = [route.choices[0].find((), (0, 1, 2, 3))]
    counted, said = audit(route, chosen, Budgets(device=150), links)
    assert counted <= said <= 150, "it comes back when two of the three have left"


def test_fetches_beside_the_loss_wait_for_the_room_of_copies() -> None:
    """The loss leaves 150 bytes for what leaves and what comes: it waits for the first copy, and a fetch for the second."""
    route = replace(lines(2), loss_bytes=100, loss_seconds=4.5)
    found = run(route, [MOVE] * 2, replace(EVEN, to_host=25.0), device=450)
    assert starts(found, LOSS)[-1] == 4, "when the first copy has ended"
    assert starts(found, BACKWARD) == [9, 11], "the second has ended at 8 s and is back at 9 s"
    assert all(entry.device_bytes <= 450 * (1 + 1e-5) for entry in found.entries)


def test_directions_that_cannot_work_at_once_take_turns() -> None:
    """x has left at 4 s and is needed first; a is under way until 8 s."""
    ops = (
        op("first", (1, 1), reads=(0,), makes=1, needs=(1,)),
        op("second", (1, 1), reads=(1,), makes=2, needs=(0,)),
    )
    stage = Stage(names=tuple("xay"), sizes=(100, 100, 100), ops=ops)
    links = Links(to_host=25.0, to_device=50.0, latency=0.0)
    duplex = run(Route(stages=(stage,)), [(set(), {0, 1})], links)
    turns = run(Route(stages=(stage,)), [(set(), {0, 1})], replace(links, both=1.0))
    assert starts(duplex, BACKWARD) == [8, 10], "x is back at 6 s, a at 10 s"
    assert starts(turns, BACKWARD) == [10, 12]


# -- host and disk -----------------------------------------------------------------------------------------------------

DISK = replace(EVEN, disk_write=100.0, disk_read=100.0)


def test_what_the_host_cannot_hold_goes_on_to_the_disk() -> None:
    """The first input is needed last: written from 1 to 2 s, read again when the third has left the host at 4 s."""
    found = run(lines(), [MOVE] * 3, DISK, device=400, host=200, disk=100)
    assert (found.host_peak, found.disk_peak, found.spilled_bytes, found.moved_bytes) == (200, 100, 100, 300)
    assert starts(found, BACKWARD) == [4, 6, 8]


def test_a_value_is_read_from_the_disk_before_it_is_used() -> None:
    found = run(lines(), [MOVE] * 3, replace(DISK, disk_read=10.0), device=400, host=200, disk=100)
    assert starts(found, BACKWARD) == [4, 6, 4 + 10 + 1], "read from 4 to 14 s, fetched until 15 s"
    slow = run(lines(), [MOVE] * 3, replace(DISK, disk_write=10.0), device=400, host=200, disk=100)
    assert starts(slow, BACKWARD) == [13, 15, 17], "written from 1 to 11 s: only then the host takes the third input"


def test_copies_wait_for_the_host() -> None:
    """Half of what is moved fits: each copy out waits until the disk has taken the one before."""
    slow = replace(DISK, disk_write=50.0)
    found = run(lines(4), [MOVE] * 4, slow, host=100, disk=300)
    assert found.host_peak == 100
    assert found.spilled_bytes == 300
    assert found.waits.keys() == {"fetch"} | ({"copies to the host"} & found.waits.keys())
    assert starts(found, BACKWARD)[0] >= 3 * (1 + 2) + 1 + 1


@pytest.mark.parametrize(
    ("host", "disk", "links", "excess"),
    [
        (200, 0, EVEN, 100),  # no disk
        (200, 50, DISK, 50),  # a disk that is too small
        (50, 1000, DISK, 100),  # a value does not even pass through
        (0, 0, EVEN, 100),
    ],
)
def test_what_does_not_fit_the_host(host: int, disk: int, links: Links, excess: int) -> None:
    with pytest.raises(DoesNotFit) as caught:
        run(lines(), [MOVE] * 3, links, host=host, disk=disk)
    assert caught.value.excess == pytest.approx(excess)


def test_a_host_that_is_large_enough_needs_no_disk() -> None:
    found = run(lines(), [MOVE] * 3, EVEN, host=300)
    assert (found.host_peak, found.disk_peak) == (300, 0)


# -- random steps ------------------------------------------------------------------------------------------------------


def plans(seed: int, *, tiers: bool, count: int = 12) -> list[tuple[Route, list[int], Budgets, Links]]:
    """Random plans of a random chain under random budgets."""
    found = case(seed, tiers=tiers, num_options=40)
    if found is None:
        return []
    generator = random.Random(seed)
    every = []
    for _ in range(count):
        chosen = [generator.randrange(len(options)) for options in found.route.choices]
        device = found.budgets.device * generator.choice([1.0, 1.1, 1.3, 2.0, 3.0])
        every.append((found.route, chosen, replace(found.budgets, device=device), found.links))
    return every


@pytest.mark.parametrize("tiers", [False, True])
def test_no_tier_holds_more_than_its_budget(tiers: bool) -> None:
    num_run = 0
    for seed in range(60):
        for route, chosen, budgets, links in plans(seed, tiers=tiers):
            try:
                found = simulate(route, chosen, budgets, links)
            except DoesNotFit:
                continue
            num_run += 1
            assert all(entry.device_bytes <= budgets.device * (1 + 1e-5) for entry in found.entries)
            assert found.host_peak <= budgets.host * (1 + 1e-5)
            assert found.disk_peak <= budgets.disk * (1 + 1e-5)
            assert found.seconds == pytest.approx(
                route.base_seconds + found.recompute_seconds + sum(found.waits.values())
            )
    assert num_run > 100


def test_bytes_counted_from_the_times_of_copies_are_within_the_budget() -> None:
    """Every value, copy and gradient as an interval of time, added up without the simulator's own books."""
    num_run = 0
    for seed in range(60):
        for route, chosen, budgets, links in plans(seed, tiers=False):
            try:
                counted, said = audit(route, chosen, budgets, links)
            except DoesNotFit:
                continue
            num_run += 1
            assert counted <= said * (1 + 1e-6)
            assert said <= budgets.device * (1 + 1e-5)
    assert num_run > 100


def test_in_pieces_a_step_is_no_faster_and_no_smaller_than_operation_by_operation() -> None:
    for seed in range(30):
        for route, chosen, budgets, links in plans(seed, tiers=False):
            try:
                found = simulate(route, chosen, budgets, links)
            except DoesNotFit:
                continue
            detailed = simulate(route, chosen, budgets, links, is_detailed=True)
            assert detailed.seconds <= found.seconds * (1 + 1e-9)


GROW = {"device": 1.2, "host": 1.3, "disk": 1.3, "to_host": 1.5, "to_device": 1.5, "disk_write": 1.5, "disk_read": 1.5}


@pytest.mark.parametrize("what", GROW)
def test_more_of_anything_does_not_slow_a_plan_down(what: str) -> None:
    """But for the host: what is no longer read from the disk first may be in the way of what still is."""
    allowed = 0.02 if what == "host" else 1e-9
    for seed in range(60):
        for route, chosen, budgets, links in plans(seed, tiers=True):
            try:
                before = simulate(route, chosen, budgets, links).seconds
            except DoesNotFit:
                continue
            tiers, rates = budgets, links
            if what in ("device", "host", "disk"):
                tiers = replace(budgets, **{what: getattr(budgets, what) * GROW[what]})
            else:
                rates = replace(links, **{what: getattr(links, what) * GROW[what]})
            assert simulate(route, chosen, tiers, rates).seconds <= before * (1 + allowed)


def test_copies_that_take_no_time_cost_nothing() -> None:
    assert run(lines(), [MOVE] * 3, FREE, device=300).seconds == 9
