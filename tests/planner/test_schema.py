from __future__ import annotations

import dataclasses
import json

import pytest

from tapeline.errors import UsageError
from tapeline.planner.policy import RECOMPUTE
from tapeline.planner.schema import Alternative, BlockPlan, Plan, parse_mode

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
