"""A step needs no more bytes and operations than under torch's own checkpoint and selective checkpoint."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.against import CHECKPOINT, FAMILIES, PAIRS, SELECTIVE, SMALL, TRAINED, UNTOUCHED, WAYS, compare, exceeded

RECORD = Path(__file__).parents[2] / "bench" / "results" / "cpu" / "against.json"
CASES = (("llama", "lora"), ("gpt2", "full"), ("mixtral", "full"))


@functools.cache
def compared(name: str, trained: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    return compare(name, trained, SMALL)


@pytest.mark.parametrize(("name", "trained"), CASES)
def test_each_mode_needs_no_more_than_the_means_of_torch_that_it_replaces(name: str, trained: str) -> None:
    row = compared(name, trained)
    assert exceeded(row) == []
    ways = row["ways"]
    for ours, theirs in PAIRS:  # theirs are what they should be
        assert ways[theirs]["peak_bytes"] < ways[UNTOUCHED]["peak_bytes"]
        assert ways[ours]["peak_bytes"] < ways[UNTOUCHED]["peak_bytes"]
    assert ways[SELECTIVE]["flops"] == ways[UNTOUCHED]["flops"] < ways[CHECKPOINT]["flops"]


@pytest.mark.parametrize(("name", "trained"), CASES)
def test_all_ways_give_the_same_gradients(name: str, trained: str) -> None:
    assert [way for way in WAYS if not compared(name, trained)["ways"][way]["gradients_equal"]] == []


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize("key", ["peak_bytes", "flops"])
def test_one_byte_or_operation_more_is_noticed(ours: str, theirs: str, key: str) -> None:
    ways = {way: {"peak_bytes": 100, "flops": 100} for way in WAYS}
    assert exceeded({"ways": ways}) == []
    ways[ours][key] += 1
    assert len(exceeded({"ways": ways})) == 1


def test_the_record_has_every_row_and_says_why_where_ours_is_larger() -> None:
    rows = json.loads(RECORD.read_text())["rows"]
    assert [(row["model"], row["trained"]) for row in rows] == [
        (name, trained) for name in FAMILIES for trained in TRAINED
    ]
    assert len(rows) == 20
    for row in rows:
        assert list(row["ways"]) == list(WAYS)
        assert all(row["ways"][way]["gradients_equal"] for way in WAYS)
        if exceeded(row):
            assert len(row["reason"]) > 20, f"{row['model']} {row['trained']}: {', '.join(exceeded(row))}"
