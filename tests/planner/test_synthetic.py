"""Llama blocks by formula: the strategies that everybody knows take the bytes and the time that they should."""

from __future__ import annotations

import math

import pytest
from bench.planner import COLUMNS, DEVICES, GIB, route_of

from tapeline.planner.placements import Options
from tapeline.planner.route import Budgets, Links, Route
from tapeline.planner.synthetic import OUT, QKV, X2, G, Training, U, X
from tapeline.planner.timeline import simulate

EVERYTHING = set(range(9))
KNOWN: dict[str, tuple[tuple[set[int], set[int]], float, tuple[float, ...]]] = {
    "none": ((EVERYTHING, set()), 32.77, (0, 0, 0, 0, 0, 0)),
    "keep matrix products": (({X, QKV, OUT, X2, G, U}, set()), 23.40, (1.2, 1.5, 0.8, 1.0, 1.2, 1.6)),
    "keep attention": (({X, OUT}, set()), 5.06, (22.7, 31.0, 22.4, 30.9, 22.7, 31.0)),
    "checkpoint": (({X}, set()), 3.34, (25.7, 34.8, 25.5, 34.9, 25.7, 34.8)),
    "inputs on the host": ((set(), {X}), 1.53, (25.7, 34.8, 25.5, 34.9, 25.7, 34.8)),
}
"""What every block keeps and moves; GiB on the device; slowdown in percent, in the order of `COLUMNS`."""
WHOLE_FORWARD = (32.0, 43.2, 31.7, 43.5, 32.0, 43.2)


@pytest.fixture(params=range(len(COLUMNS)), ids=["-".join(column) for column in COLUMNS])
def column(request: pytest.FixtureRequest) -> int:
    return request.param


def llama(column: int) -> tuple[Route, Options, Links]:
    """Llama-2-7B at 2 x 4096 tokens."""
    device, training = COLUMNS[column]
    route = route_of("Llama-2-7B", device, training, 4096, 2)
    return route, route.choices[0], DEVICES[device][1]


def slowdown(route: Route, seconds: float) -> float:
    return 100 * (seconds / route.base_seconds - 1)


def test_known_strategies(column: int) -> None:
    route, options, links = llama(column)
    for name, ((kept, moved), gib, expected) in KNOWN.items():
        plan = [options.find(frozenset(kept), frozenset(moved))] * 32
        found = simulate(route, plan, Budgets(device=math.inf if not moved else gib * GIB), links)
        assert slowdown(route, found.seconds) == pytest.approx(expected[column], abs=0.2), name
        if not moved:
            assert found.device_peak / GIB == pytest.approx(gib, abs=0.02), name


def test_a_whole_forward_again_is_what_early_stop_saves(column: int) -> None:
    """Reentrant checkpointing runs every operation of a block once more."""
    route, _, _ = llama(column)
    again = sum(sum(stage.forward_seconds(part) for part in range(stage.num_parts)) for stage in route.stages)
    assert slowdown(route, route.base_seconds + again) == pytest.approx(WHOLE_FORWARD[column], abs=0.2)


def test_a_step_takes_as_long_as_it_should() -> None:
    expected = {"H200@700": (565, 443), "H200@450": (864, 655), "RTX 4090": (2640, 2071)}
    for device, times in expected.items():
        for training, milliseconds in zip(("full", "lora"), times, strict=True):
            assert _milliseconds(device, training) == pytest.approx(milliseconds, rel=0.005)


def _milliseconds(device: str, training: Training) -> float:
    return 1e3 * route_of("Llama-2-7B", device, training, 4096, 2).base_seconds
