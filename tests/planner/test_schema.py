from __future__ import annotations

import dataclasses
import json
from dataclasses import replace

import pytest

from tapeline.errors import UsageError
from tapeline.planner.policy import CHEAP, KEEP, LEAST, RECOMPUTE, Policy
from tapeline.planner.schema import SCHEMA_VERSION, Alternative, BlockPlan, Placement, Plan, parse_mode

BLOCK = BlockPlan(name="layers.0", kind="Layer", policy=RECOMPUTE, input="device", held_bytes=10, recompute_flops=5)
PLAN = Plan(
    mode="auto",
    device="cpu",
    budget_bytes=1000,
    peak_bytes=900,
    first_step_peak_bytes=800,
    untouched_peak_bytes=1500,
    flops=120,
    untouched_flops=100,
    memory={"weights": 400, "activations": 500},
    untouched_memory={"weights": 400, "activations": 1100},
    blocks=(BLOCK,),
    alternatives=(Alternative(name="none", peak_bytes=1500, flops=100, fits=False),),
    notes=("a note",),
)


def test_a_plan_survives_json() -> None:
    assert Plan.from_json(PLAN.to_json()) == PLAN


MOVES: list[tuple[Policy, Placement]] = [
    (RECOMPUTE, "disk"),
    (replace(KEEP, disk=("*",)), "device"),
    (replace(CHEAP, host=("mlp", "softmax"), disk=("self_attn",)), "host"),
    (replace(LEAST, host=("*",)), "recompute"),
]


def test_a_plan_that_moves_tensors_survives_json() -> None:
    blocks = tuple(
        replace(BLOCK, name=f"layers.{number}", policy=policy, input=source, ahead_bytes=2**40 + number)
        for number, (policy, source) in enumerate(MOVES)
    )
    plan = replace(
        PLAN,
        mode="offload",
        blocks=blocks,
        host_bytes=2**35,
        disk_bytes=2**41,
        in_flight_bytes=2**20,
        moved={"host": 2**34, "disk": 2**39},
    )
    read = Plan.from_json(plan.to_json())
    assert read == plan
    assert [type(block.policy) for block in read.blocks] == [Policy] * len(MOVES)
    assert not read.keeps_all
    assert read.moved_bytes == 2**34 + 2**39


def test_a_plan_of_an_earlier_release_is_refused_before_its_fields_are_looked_at() -> None:
    for version in (1, SCHEMA_VERSION - 1, SCHEMA_VERSION + 1, None):
        with pytest.raises(
            UsageError, match=f"schema version {version}, this release reads {SCHEMA_VERSION}: make the"
        ):
            Plan.from_json(json.dumps({"schema_version": version, "mode": "auto"}))


def test_a_plan_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLAN.peak_bytes = 0  # type: ignore[misc]


def test_derived_numbers() -> None:
    assert PLAN.slowdown == 1.2
    assert PLAN.recomputed_flops == 20


def test_the_table_shows_what_matters() -> None:
    text = str(PLAN)
    for word in ("weights", "activations", "none", "1.200x", "1 of 1 blocks replayed", "note: a note"):
        assert word in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema_version=99), "schema version 99"),
        (lambda d: d.pop("schema_version"), "no 'schema_version'"),
        (lambda d: d.update(peak_byte=1), "did you mean 'peak_bytes'"),
        (lambda d: d.pop("device"), "missing device"),
        (lambda d: d["blocks"][0].pop("name"), "missing name"),
    ],
)
def test_a_wrong_file_is_refused_with_the_reason(change: object, message: str) -> None:
    data = json.loads(PLAN.to_json())
    change(data)  # type: ignore[operator]
    with pytest.raises(UsageError, match=message):
        Plan.from_json(json.dumps(data))
    with pytest.raises(UsageError, match="not JSON"):
        Plan.from_json("{")


def test_modes_are_read() -> None:
    assert parse_mode("segments:4") == ("segments", 4)
    assert parse_mode("segments") == ("segments", None)
    assert parse_mode(mode=True) == ("recompute", None)
    assert parse_mode(mode=False) == ("none", None)


@pytest.mark.parametrize("mode", ["segment", "segments:0", "segments:x", "segments:", "recompute:2", "", "AUTO"])
def test_unknown_modes_are_refused(mode: str) -> None:
    with pytest.raises(UsageError):
        parse_mode(mode)
