"""Small stages with numbers that a hand can follow, random chains of them, and every plan of such a chain."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from tapeline.planner.placements import Options, placements
from tapeline.planner.route import Budgets, Links, Route
from tapeline.planner.stage import Stage, StageOp
from tapeline.planner.tightest import smallest
from tapeline.planner.timeline import (
    BACKWARD,
    FORWARD,
    LOSS,
    RECOMPUTE,
    DoesNotFit,
    Entry,
    Timeline,
    _Simulation,
    simulate,
)

FREE = Links(to_host=math.inf, to_device=math.inf, latency=0.0)
"""Copies take no time."""


def op(
    name: str,
    times: tuple[float, float],
    *,
    reads: tuple[int, ...],
    makes: int,
    needs: tuple[int, ...],
    incoming: int = 0,
    running: int = 0,
    temporary: int = 0,
    can_replay: bool = True,
) -> StageOp:
    """An operation with its times forward and backward."""
    return StageOp(
        name=name,
        seconds=times[0],
        backward_seconds=times[1],
        reads=reads,
        makes=(makes,),
        needs=needs,
        incoming_bytes=incoming,
        backward_bytes=running,
        temporary_bytes=temporary,
        flops=int(100 * times[0]),
        can_replay=can_replay,
    )


def ladder() -> Stage:
    """x (10 bytes) -> a (20) -> b (40) -> y (10), where the last step adds x; a and b are made in the first of two parts."""
    ops = (
        op("first", (1.0, 2.0), reads=(0,), makes=1, needs=(0,), incoming=20, running=30),
        op("second", (3.0, 6.0), reads=(1,), makes=2, needs=(1,), incoming=40, running=60),
        op("third", (2.0, 4.0), reads=(0, 2), makes=3, needs=(2,), incoming=10, running=50),
    )
    return Stage(names=("x", "a", "b", "y"), sizes=(10, 20, 40, 10), ops=ops, halves=(2,))


def line(size: int = 100, *, temporary: int = 0, gradients: int = 0, is_frozen: bool = False) -> Stage:
    """One operation, 1 s forward and 2 s backward, whose backward reads its input; gradients are as large as what they are of."""
    only = op("only", (1.0, 2.0), reads=(0,), makes=1, needs=(0,), incoming=size, running=2 * size, temporary=temporary)
    return Stage(names=("x", "y"), sizes=(size, size), ops=(only,), gradient_bytes=gradients, is_frozen=is_frozen)


def run(
    route: Route, plan: Sequence[tuple[set[int], set[int]]], links: Links, *, device: float = math.inf,
    host: float = math.inf, disk: float = 0.0,
) -> Timeline:  # fmt: skip
    """Run what each stage keeps and moves."""
    chosen = [options.find(frozenset(k), frozenset(m)) for options, (k, m) in zip(route.choices, plan, strict=True)]
    return simulate(route, chosen, Budgets(device=device, host=host, disk=disk), links)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A random chain with budgets near the smallest feasible ones, or not so near."""

    route: Route
    budgets: Budgets
    links: Links

    def with_(self, **changes: float) -> Case:
        """The same chain under other budgets or links."""
        tiers = {name: value for name, value in changes.items() if name in ("device", "host", "disk")}
        rates = {name: value for name, value in changes.items() if name not in tiers}
        return replace(self, budgets=replace(self.budgets, **tiers), links=replace(self.links, **rates))


def case(seed: int, *, tiers: bool = False, num_options: int = 9, max_blocks: int = 4) -> Case | None:
    """A chain of up to four random blocks with some of their options; `tiers`: the host is limited, and there may be a disk.

    ``None`` if nothing fits the other tiers.
    """
    generator = random.Random(seed)
    stages: list[Stage] = []
    for _ in range(generator.randint(1, max_blocks)):
        stages.append(_stage(generator, stages[-1].sizes[-1] if stages else generator.randint(10, 100)))
    options = tuple(_some(placements(stage), generator, num_options) for stage in stages)
    route = Route(
        stages=tuple(stages),
        loss_seconds=generator.choice([1.0, 10.0]),
        loss_bytes=generator.randint(0, 200),
        options=options,
    )
    rates = {name: generator.choice([5.0, 20.0, 100.0]) for name in ("to_host", "to_device", "disk_write", "disk_read")}
    links = Links(**rates, latency=generator.choice([0.0, 0.1]), both=generator.choice([1.0, 1.5, 2.0]))
    budgets = Budgets(device=0.0)
    if tiers:
        most = float(sum(some.moved_bytes.max() for some in options))
        budgets = Budgets(
            device=0.0, host=most * generator.choice([0, 0.1, 0.3, 0.6]), disk=most * generator.choice([0, 0.5, 1])
        )
    least = smallest(route, budgets, links)
    if least is None:
        return None
    factor = generator.choice([1.0, 1.002, 1.01, 1.02, 1.1, 1.3, 1.6, 2.0])
    return Case(route=route, budgets=replace(budgets, device=least.device_bytes * factor), links=links)


def _some(options: Options, generator: random.Random, count: int) -> Options:
    """Some options, those at both ends of what is kept among them."""
    chosen = {int(options.kept_bytes.argmin()), int(options.kept_bytes.argmax())}
    chosen |= set(generator.sample(range(len(options)), min(count - 2, len(options))))
    return options.rows(sorted(chosen))


def _stage(generator: random.Random, size: int) -> Stage:
    """Four operations in two parts, with shortcuts now and then."""
    sizes = (size, *(generator.randint(10, 100) for _ in range(4)))
    ops = tuple(
        op(
            f"op{k}",
            (generator.choice([0.1, 1, 1, 5]) * generator.uniform(0.5, 2), generator.uniform(1, 5)),
            reads=(k,) if k < 2 or generator.random() < 0.6 else (k, generator.randrange(k)),
            makes=k + 1,
            needs=(k,) if k == 3 else tuple({k, generator.randrange(k + 1)}),
            incoming=sizes[k + 1],
            running=sizes[k] + sizes[k + 1],
        )
        for k in range(4)
    )
    return Stage(names=tuple("xabcy"), sizes=sizes, ops=ops, halves=(2,))


def best_of_all(case: Case) -> float:
    """Seconds of the fastest of all plans; infinite if none fits."""
    best = math.inf
    for chosen in product(*(range(len(options)) for options in case.route.choices)):
        try:
            best = min(best, simulate(case.route, chosen, case.budgets, case.links).seconds)
        except DoesNotFit:
            continue
    return best


def audit(route: Route, chosen: Sequence[int], budgets: Budgets, links: Links) -> tuple[float, float]:
    """Most bytes on the device by the times of operations and copies alone, and what the simulator says."""
    simulation = _Simulation(route, chosen, budgets, links, is_detailed=True)
    said = simulation.run()
    held = _held_in_backward(simulation, said)
    forward = [entry for entry in said.entries if entry.phase == FORWARD]
    (loss,) = [entry for entry in said.entries if entry.phase == LOSS and entry.seconds]
    before = 0.0
    for number, stage in enumerate(route.stages):
        ops, forward = forward[: len(stage.ops)], forward[len(stage.ops) :]
        for value, size in enumerate(stage.sizes):
            begin = ops[stage.producer[value]].start if value else before
            if value == len(stage.sizes) - 1:
                before = begin
                if number + 1 == len(route.stages):
                    held.append((begin, _end(loss), size))
                continue
            end = _end(ops[stage.last_use[value]])
            if (number, value) in simulation.copies:
                end = max(end, simulation.copies[number, value].out_end)
            elif value in route.choices[number].kept[chosen[number]]:
                continue  # counted below, until backward is done with it
            held.append((begin, end, size))
    held.append((loss.start, _end(loss), route.loss_bytes + route.stages[-1].sizes[-1]))
    times = sorted({begin for begin, _, _ in held})
    most = max(sum(size for begin, end, size in held if begin <= now + 1e-9 < end - 1e-9) for now in times)
    return route.base_bytes + most, said.device_peak


def _end(entry: Entry) -> float:
    return entry.start + entry.seconds


def _held_in_backward(simulation: _Simulation, said: Timeline) -> list[tuple[float, float, float]]:
    """Begin, end and bytes of what is kept, fetched, recomputed, and of gradients."""
    route, links = simulation.route, simulation.links
    made = _made(route, said)
    entries = [entry for entry in said.entries if entry.phase in (BACKWARD, RECOMPUTE)]
    held: list[tuple[float, float, float]] = []
    for number in reversed(range(len(route.stages))):
        stage, options, option = route.stages[number], route.choices[number], simulation.chosen[number]
        plan, kept, moved = options.rebuilds[option], options.kept[option], options.moved[option]
        own, entries = entries[: len(plan.moments)], entries[len(plan.moments) :]
        for moment, entry in zip(plan.moments, own, strict=True):
            size = moment.extra_bytes + sum(stage.sizes[value] for value in moment.alive - kept - moved)
            held.append((entry.start, _end(entry), size))
        for value in kept:
            last = plan.last_need.get(value)
            held.append((made[number, value], own[0].start if last is None else _end(own[last]), stage.sizes[value]))
        for value in moved & plan.first_need.keys():
            copy = simulation.copies[number, value]
            begin = copy.back_end - links.latency - copy.size / links.to_device
            held.append((begin, _end(own[plan.last_need[value]]), copy.size))
    return held


def _made(route: Route, said: Timeline) -> dict[tuple[int, int], float]:
    """When each value of each stage comes into being."""
    forward = iter([entry for entry in said.entries if entry.phase == FORWARD])
    found: dict[tuple[int, int], float] = {}
    for number, stage in enumerate(route.stages):
        found[number, 0] = found[number - 1, len(route.stages[number - 1].sizes) - 1] if number else 0.0
        for one in stage.ops:
            start = next(forward).start
            found |= {(number, value): start for value in one.makes}
    return found
