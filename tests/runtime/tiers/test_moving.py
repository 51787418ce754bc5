"""The runtime with a tier below: on an accelerator that is not there, and on a disk that is."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tapeline.runtime.session import Session
from tapeline.runtime.tiers.simulated import ComputeWatch, SimulatedMachine
from tapeline.runtime.tiers.tier import DISK, HOST
from tests.runtime.tiers.models import are_equal, gradients, loss_of, model_and_batch, planned, simulated, ways

WAYS = list(ways(DISK))
NUM_SCHEDULES, NUM_SLOW = 300, 10_000


@pytest.mark.parametrize("ahead", ["none", "one", "far"])
@pytest.mark.parametrize("way", WAYS)
def test_on_a_disk_gradients_are_equal_and_peaks_as_predicted(way: str, ahead: str, tmp_path: Path) -> None:
    model, batch = model_and_batch()
    expected = gradients(model, batch)
    plan = planned(model, batch, ways(DISK)[way], DISK, ahead)
    assert plan.moved_bytes > 0
    threads = set(threading.enumerate())
    with Session(model, plan, measure=False, offload_dir=tmp_path) as session:
        peaks = []
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            with session.measure():
                loss_of(model, batch).backward()
            peaks.append(session.last_peak_bytes)
            assert are_equal(model, expected)
            (tier,) = session.report().tiers
            assert tier.out_bytes == tier.planned_bytes == plan.moved_bytes
        assert peaks[1:] == [plan.peak_bytes] * 2
        assert peaks[0] == plan.first_step_peak_bytes
        assert tier.back_bytes <= tier.out_bytes
        assert not tier.stayed
    assert set(threading.enumerate()) == threads
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("way", WAYS)
def test_on_an_accelerator_that_is_not_there_nothing_races(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_and_batch()
    expected = gradients(model, batch)
    machine = SimulatedMachine(bandwidth=1e8)
    plan = planned(model, batch, ways(HOST)[way], HOST)
    with simulated(model, plan, machine, monkeypatch, ComputeWatch(machine)) as session:
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            loss_of(model, batch).backward()
            assert are_equal(model, expected)
        (tier,) = session.report().tiers
        assert tier.out_bytes == plan.moved_bytes


@pytest.mark.parametrize("part", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_random_schedules_of_whole_steps(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies take any time, the host looks at any moment: gradients stay equal bit for bit, and no access is in no order."""
    model, batch = model_and_batch(3)
    expected = gradients(model, batch)
    plans = [planned(model, batch, way, HOST, ahead) for way in ways(HOST).values() for ahead in ("none", "one", "far")]
    for seed in range(NUM_SLOW if part else NUM_SCHEDULES):
        machine = SimulatedMachine(seed=seed)
        with simulated(model, plans[seed % len(plans)], machine, monkeypatch, ComputeWatch(machine)):
            model.zero_grad(set_to_none=True)
            loss_of(model, batch).backward()
        assert are_equal(model, expected), f"seed {seed}"
