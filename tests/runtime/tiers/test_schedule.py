"""The schedule of the planner is what the runtime does: step times on the simulated accelerator against the timeline on paper."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tapeline.cost.catalogue import find_device
from tapeline.cost.price import count_flops
from tapeline.planner.placements import placements
from tapeline.planner.route import Budgets, Links, Route
from tapeline.planner.schema import Plan
from tapeline.planner.timeline import Timeline, simulate
from tapeline.runtime.candidates import Candidates
from tapeline.runtime.choosing import finished
from tapeline.runtime.predict import FakeStep
from tapeline.runtime.route import workload
from tapeline.runtime.tiers.simulated import ComputeWatch, SimulatedMachine
from tapeline.runtime.tiers.tier import HOST
from tapeline.tape.graph import ARGUMENT, Source
from tapeline.tape.stage import placement_of
from tests.runtime.tiers.models import below, loss_of, model_and_batch, simulated, ways

NUM_BLOCKS = 10
ROWS = 320
DEVICE = replace(find_device("rtx-4090"), op_seconds=0.0, memory_bandwidth=1e18, context_bytes=0)
RATES = DEVICE.rates("float32")
PLANS = [
    *(("inputs", share) for share in (0.2, 0.8, 1.5)),
    *(("everything", share) for share in (0.3, 0.9, 1.4)),
    *(("what is held", share) for share in (0.5, 1.2)),
    *(("between kept blocks", share) for share in (0.5, 1.3)),
]
"""How blocks are placed, and the time that moving one way takes on the link, as a share of half a step without it."""


def seconds(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    """Matrix products take their operations over the rate, all else nothing."""
    return count_flops(func, args, kwargs, out) / RATES.matmul_flops


def on_paper(candidates: Candidates, plan: Plan, bandwidth: float) -> Timeline:
    """The planner's timeline of a plan."""
    route = workload(candidates, DEVICE, "float32").route
    options = []
    for stage, block in zip(route.stages, plan.blocks, strict=True):
        (tape,) = candidates.tapes[block.name]
        recipe = candidates.step.library.recipe(tape, block.policy)
        value = next(v.index for v in tape.values if v.source == Source(ARGUMENT, 0))
        moved = {*recipe.tiers, *([value] if block.input == HOST else [])}
        pair = placement_of(tape, RATES, {*recipe.choice.held, value} - moved, moved)
        options.append(placements(stage, only=[pair]))
    links = Links(to_host=bandwidth, to_device=bandwidth, latency=0.0)
    route = Route(
        stages=tuple(option.stage for option in options),
        options=tuple(options),
        loss_seconds=route.loss_seconds,
        loss_bytes=route.loss_bytes,
        base_bytes=route.base_bytes,
    )
    return simulate(route, [0] * len(options), Budgets(device=1e15), links)


@pytest.mark.parametrize(("way", "share"), PLANS)
def test_the_runtime_takes_as_long_as_the_timeline_says(
    way: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = model_and_batch(NUM_BLOCKS, ROWS)
    names = [f"blocks.{number}" for number in range(NUM_BLOCKS)]
    candidates = Candidates(FakeStep(model, batch, names, loss_fn=loss_of), below(HOST))
    blocks = (*ways(HOST)[way](candidates)[:-1], candidates.keep_all()[-1])
    blocks = candidates.far_ahead(blocks, 1 << 40)
    plan = finished(candidates, "test", blocks, None)
    compute = candidates.profile(blocks).flops / RATES.matmul_flops
    bandwidth = plan.moved_bytes / (share * compute / 2)
    paper = on_paper(candidates, plan, bandwidth)
    machine = SimulatedMachine(bandwidth=bandwidth)
    with simulated(model, plan, machine, monkeypatch, ComputeWatch(machine, seconds)):
        for _ in range(2):  # the first is recorded, and takes longer
            model.zero_grad(set_to_none=True)
            began = machine.compute().now
            loss_of(model, batch).backward()
    took = machine.compute().now - began
    print(f"{way}, {share}: runtime {took / compute:.3f}, timeline {paper.seconds / compute:.3f} of computing alone")
    assert took == pytest.approx(paper.seconds, rel=0.03)
    assert (took > 1.05 * compute) == (share > 0.7), "beyond that, compute waits for the link"
