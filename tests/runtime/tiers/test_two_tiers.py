"""The host and a disk below one device: what the host has no room for goes to the disk, that of the first blocks first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tapeline
from tapeline.errors import FullTierError
from tapeline.planner.schema import Plan
from tapeline.runtime import search as search_module
from tapeline.runtime import session_tiers
from tapeline.runtime.below import Below
from tapeline.runtime.candidates import Candidates
from tapeline.runtime.predict import FakeStep
from tapeline.runtime.tiers.opening import open_disk
from tapeline.runtime.tiers.tier import HOST, Tier
from tests.runtime.tiers.models import are_equal, gradients, loss_of, model_and_batch

NUM_BLOCKS, ROWS = 6, 640
TIERS = ("host", "disk")


def below(host_room: int, disk_room: int, disk_bandwidth: float = 1e12) -> Below:
    disk = Below(
        name="disk",
        room_bytes=disk_room,
        out_bandwidth=disk_bandwidth,
        back_bandwidth=disk_bandwidth,
        copy_seconds=1e-7,
    )
    return Below(
        name="host",
        room_bytes=host_room,
        out_bandwidth=1e12,
        back_bandwidth=1e12,
        copy_seconds=1e-7,
        overflow=disk,
    )


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The CPU as an accelerator that has a host: memory of the host would be counted as the device's, so it is a file."""
    folder = tmp_path_factory.mktemp("host")

    def open_host(device: torch.device, num_bytes: int, in_flight_bytes: int) -> Tier:
        return replace(open_disk(device, num_bytes, in_flight_bytes, folder), name=HOST)

    monkeypatch.setattr(session_tiers, "open_host", open_host)


def planned(monkeypatch: pytest.MonkeyPatch, tiers: Below, mode: str, budget: str | None = None) -> Plan:
    model, batch = model_and_batch(NUM_BLOCKS, ROWS)
    with monkeypatch.context() as patch:
        patch.setattr(search_module, "below", lambda device, wanted: tiers)
        return tapeline.plan(model, batch, budget, mode=mode, loss_fn=loss_of)


def moved_by_block(plan: Plan) -> list[str]:
    return [block.input if block.input != "device" else "" for block in plan.blocks]


def run(plan: Plan, folder: Path) -> dict[str, tuple[int, int]]:
    """Train two steps; by tier, what was moved and the room that was used."""
    model, batch = model_and_batch(NUM_BLOCKS, ROWS)
    expected = gradients(model, batch)
    with tapeline.apply(model, plan, offload_dir=folder, measure=False, checksums=True) as session:
        for _ in range(2):
            with session.measure():
                loss_of(model, batch).backward()
            assert are_equal(model, expected)
            model.zero_grad()
        report = session.report()
    assert report.measured_peak_bytes is not None
    assert max(plan.peak_bytes, plan.first_step_peak_bytes) == report.measured_peak_bytes
    for tier in report.tiers:
        assert tier.out_bytes == tier.planned_bytes == plan.moved[tier.name]
    assert not list(folder.iterdir())
    return {tier.name: (tier.out_bytes, tier.most_used_bytes) for tier in report.tiers}


@pytest.mark.usefixtures("played")
def test_what_the_host_has_no_room_for_goes_to_the_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = planned(monkeypatch, below(1 << 30, 1 << 30), "offload")
    assert moved_by_block(whole) == ["host"] * (NUM_BLOCKS - 1) + [""]
    each = whole.host_bytes // (NUM_BLOCKS - 1)
    plan = planned(monkeypatch, below(2 * each, 1 << 30), "offload")
    assert moved_by_block(plan) == ["disk", "disk", "disk", "host", "host", ""]
    assert (plan.host_bytes, plan.disk_bytes) == (2 * each, 3 * each)
    assert "moved to the host" in plan.headline
    assert "moved to the disk" in plan.headline
    assert run(plan, tmp_path) == {"host": (2 * each, 2 * each), "disk": (3 * each, 3 * each)}
    assert Plan.from_json(plan.to_json()) == plan


def test_what_neither_has_room_for_stays_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = planned(monkeypatch, below(1 << 30, 1 << 30), "offload")
    each = whole.host_bytes // (NUM_BLOCKS - 1)
    plan = planned(monkeypatch, below(each, each), "offload")
    assert moved_by_block(plan) == ["disk", "host", "", "", "", ""]


@pytest.mark.usefixtures("played")
def test_an_automatic_plan_keeps_to_the_room_of_both(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    least = planned(monkeypatch, below(1 << 30, 1 << 30), "offload").peak_bytes
    free = planned(monkeypatch, below(1 << 30, 1 << 30), "auto", str(int(1.1 * least)))
    assert free.flops == free.untouched_flops, "links this quick cost nothing: nothing is computed again"
    assert set(free.moved) == {"host"}
    room = free.host_bytes // 2
    tight = planned(monkeypatch, below(room, 1 << 30), "auto", str(int(1.1 * least)))
    assert tight.host_bytes <= room
    assert set(tight.moved) == set(TIERS)
    assert set(run(tight, tmp_path)) == set(TIERS)


def test_a_slow_disk_is_used_no_more_than_it_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    least = planned(monkeypatch, below(1 << 30, 1 << 30), "offload").peak_bytes
    free = planned(monkeypatch, below(1 << 30, 1 << 30), "auto", str(int(1.2 * least)))
    slow = planned(monkeypatch, below(free.host_bytes // 2, 1 << 30, 1e3), "auto", str(int(1.2 * least)))
    assert "disk" not in slow.moved
    assert slow.flops > free.flops, "computing again is quicker"


def test_plans_of_other_shapes_use_the_rooms_that_are_open(monkeypatch: pytest.MonkeyPatch) -> None:
    both = below(1 << 30, 1 << 29)
    whole = planned(monkeypatch, both, "offload")
    opened = both.opened(whole)
    assert opened is not None
    assert (opened.name, opened.room_bytes, opened.overflow) == ("host", whole.host_bytes, None)
    on_disk = both.opened(replace(whole, host_bytes=0, disk_bytes=7))
    assert on_disk is not None
    assert (on_disk.name, on_disk.room_bytes) == ("disk", 7)
    assert both.opened(replace(whole, host_bytes=0)) is None
    model, batch = model_and_batch(NUM_BLOCKS, ROWS)
    names = [f"blocks.{number}" for number in range(NUM_BLOCKS)]
    candidates = Candidates(FakeStep(model, batch, names, loss_fn=loss_of), opened)
    assert candidates.has_room(candidates.offloaded()), "what was taken is enough for the same again"


def test_half_of_the_full_tier_is_tried_next(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = planned(monkeypatch, below(1 << 30, 1 << 30), "offload")
    plan = replace(whole, host_bytes=1 << 20, disk_bytes=1 << 22)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    wanted = session_tiers.Wanted(on_full_tier="replan", host_budget="1GiB", disk_budget="2GiB")
    for tier, host, disk in (("host", 1 << 20, 2 << 30), ("disk", 1 << 30, 1 << 22)):
        with pytest.warns(UserWarning, match="Planning again"):
            less = session_tiers.less_room(wanted, plan, FullTierError("Full.", tier=tier))
        assert (less.host_bytes, less.disk_bytes) == (host, disk)
