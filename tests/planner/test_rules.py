from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from tapeline.errors import UsageError
from tapeline.planner.rules import Advice, Situation, advise, combined, compare, segment_length, to_text

GIB = 2**30
BASE: dict[str, Any] = {
    "vram_bytes": 40 * GIB,
    "num_parameters": 5_000_000_000,
    "max_length": 1024,
    "num_layers": 32,
}
LORA = {"training": "lora", "lora_r": 16}


def situation(**changes: Any) -> Situation:
    return Situation(**(BASE | changes))


def rules(**changes: Any) -> dict[str, Advice]:
    return {one.rule: one for one in advise(situation(**changes))}


@pytest.mark.parametrize(
    ("vram_bytes", "num_parameters", "answer"),
    [
        (16 * GIB - 1, 10**9, "recompute"),
        (16 * GIB, 10**9, "none"),
        (16 * GIB - 1, 8 * 10**9, "recompute"),
        (16 * GIB, 7 * 10**9 - 1, "none"),
        (16 * GIB, 7 * 10**9, "recompute"),
        (24 * GIB - 1, 7 * 10**9, "recompute"),
        (24 * GIB, 7 * 10**9, "none"),
    ],
)
def test_vram(vram_bytes: int, num_parameters: int, answer: str) -> None:
    one = rules(vram_bytes=vram_bytes, num_parameters=num_parameters)["vram"]
    assert (one.answer, one.word) == (answer, "enable" if answer == "recompute" else "optional")


@pytest.mark.parametrize(
    ("num_parameters", "vram_bytes", "answer", "word"),
    [
        (3 * 10**9 - 1, 8 * GIB, "none", "disable"),
        (3 * 10**9, 16 * GIB - 1, "recompute", "enable"),
        (3 * 10**9, 16 * GIB, "none", "optional"),
        (7 * 10**9 - 1, 16 * GIB, "none", "optional"),
        (7 * 10**9, 24 * GIB, "offload", "unsloth"),
        (7 * 10**9, 24 * GIB + 1, "recompute", "enable"),
    ],
)
def test_size(num_parameters: int, vram_bytes: int, answer: str, word: str) -> None:
    one = rules(num_parameters=num_parameters, vram_bytes=vram_bytes)["size"]
    assert (one.answer, one.word) == (answer, word)


def test_length() -> None:
    assert "length" not in rules(max_length=4095)
    assert rules(max_length=4096)["length"].stance == "enable"
    short, long = rules(max_length=511)["mode"], rules(max_length=512)["mode"]
    assert (short.answer, short.word) == ("recompute", True)
    assert (long.answer, long.word) == ("offload", "unsloth")


def test_four_bits() -> None:
    assert "4bit" not in rules(**LORA)
    assert rules(load_in_4bit=True, **LORA)["4bit"].stance == "optional"


@pytest.mark.parametrize(("num_layers", "length"), [(2, 2), (6, 2), (7, 3), (16, 4), (32, 6), (80, 9)])
def test_every_kth_layer(num_layers: int, length: int) -> None:
    one = rules(num_layers=num_layers)["sqrt"]
    assert segment_length(num_layers) == length
    assert one.answer == f"segments:{length}"
    num_kept = len(range(0, num_layers, length))
    assert f"keep {num_kept} of {num_layers} layer inputs" in one.reason
    assert f"one more forward of the other {num_layers - num_kept} layers" in one.reason
    assert one.claim.saved is not None
    assert one.claim.saved[0] == pytest.approx(max(0, 1 - (num_kept + length) / num_layers))


def test_one_layer_has_nothing_between() -> None:
    assert "sqrt" not in rules(num_layers=1)


def test_every_rule_says_why_and_from_where() -> None:
    found = advise(situation(vram_bytes=8 * GIB, max_length=8192, load_in_4bit=True, **LORA))
    assert [one.rule for one in found] == ["vram", "size", "length", "4bit", "mode", "sqrt"]
    for one in found:
        assert one.reason
        assert one.source.startswith("guide for ")
        assert one.claim.mode == one.answer.partition(":")[0]
        assert one.conflicts == ()


def test_together_nothing_asks() -> None:
    one = combined(situation())
    assert (one.answer, one.word) == ("none", "optional")
    assert one.conflicts == ("mode has 'unsloth' by default, no other rule asks for checkpointing; taken: off",)


@pytest.mark.parametrize(
    ("changes", "answer", "asking"),
    [
        ({"vram_bytes": 8 * GIB, "num_parameters": 10**9}, "offload", "vram"),
        ({"vram_bytes": 8 * GIB}, "offload", "vram, size"),
        ({"num_parameters": 8 * 10**9}, "offload", "size"),
        ({"max_length": 4096}, "offload", "length"),
        ({"vram_bytes": 8 * GIB, "max_length": 256}, "recompute", "vram, size"),
    ],
)
def test_together_one_that_asks_wins_and_the_length_says_which_kind(
    changes: dict[str, Any], answer: str, asking: str
) -> None:
    one = combined(situation(**changes))
    assert one.answer == answer
    assert one.stance == "enable"
    assert one.reason.startswith(f"asked for by {asking};")


def test_promises_together_are_the_widest() -> None:
    plain = combined(situation(vram_bytes=8 * GIB, max_length=256)).claim
    assert (plain.saved, plain.slowdown) == ((0.3, 0.6), (0.2, 0.3))
    moved = combined(situation(vram_bytes=8 * GIB)).claim
    assert (moved.saved, moved.slowdown) == ((0.5, 0.7), (0.2, 0.2))
    assert "LLaMA-Factory" in moved.source


@pytest.mark.parametrize(
    ("changes", "conflict"),
    [
        (
            {"num_parameters": 10**9, "vram_bytes": 8 * GIB},
            "checkpointing is asked for by vram, left off by size; taken: on",
        ),
        (
            {"num_parameters": 8 * 10**9, "load_in_4bit": True, **LORA},
            "checkpointing is asked for by size, left off by vram, 4bit; taken: on",
        ),
        (
            {"num_parameters": 8 * 10**9, "vram_bytes": 20 * GIB, "max_length": 256},
            "size says 'unsloth', mode makes it plain checkpointing below 512 tokens; taken: plain",
        ),
        ({"vram_bytes": 8 * GIB}, "sqrt keeps one layer input in 6, mode every one; taken: every one"),
        ({"vram_bytes": 23 * GIB}, "23.00 GiB are below 24 GiB, but may be a card sold as 24 GB; taken: below"),
        ({"vram_bytes": 15 * GIB}, "15.00 GiB are below 16 GiB, but may be a card sold as 16 GB; taken: below"),
        (
            {"num_parameters": 6_738_415_616},
            "6,738,415,616 parameters are below 7B, but may be a model called that; taken: below",
        ),
        ({"vram_bytes": 24 * GIB}, "24 GiB is the end of one row of the table and the start of the next"),
        ({"num_parameters": 7 * 10**9}, "at 7B parameters the table asks for checkpointing, the tree only above"),
        ({"max_length": 4096}, "at 4096 tokens the table asks for checkpointing, the tree only above"),
    ],
)
def test_conflicts_are_named(changes: dict[str, Any], conflict: str) -> None:
    assert any(one.startswith(conflict) for one in combined(situation(**changes)).conflicts)


def test_far_from_a_threshold_nothing_is_said_of_it() -> None:
    for changes in ({"vram_bytes": 21 * GIB}, {"num_parameters": 6_200_000_000}, {"max_length": 4097}):
        assert not any("below" in one or "only above" in one for one in combined(situation(**changes)).conflicts)


NONE, PLAIN = (20 * GIB, 1.0), (8 * GIB, 1.3)
ASKED = combined(situation(vram_bytes=8 * GIB, max_length=256))


def test_compare_when_none_already_fits() -> None:
    table = {"none": NONE, "recompute": PLAIN}
    assert compare(ASKED, table, budget_bytes=20 * GIB) == (
        "combined: 'recompute' makes a step 30.0% slower and is not needed: 'none' (20.00 GiB, 1.000x) fits in 20.00 GiB",
    )
    moved = combined(situation(vram_bytes=8 * GIB))
    assert compare(moved, table, budget_bytes=20 * GIB) == (
        "combined: 'offload' is not needed: 'none' (20.00 GiB, 1.000x) fits in 20.00 GiB",
    )


def test_compare_when_the_mode_does_not_fit() -> None:
    table = {"none": NONE, "recompute": PLAIN, "least": (6 * GIB, 1.6)}
    (line,) = compare(ASKED, table, budget_bytes=7 * GIB)
    assert line == (
        "combined: 'recompute' does not fit: peak 8.00 GiB, 1.00 GiB over 7.00 GiB; "
        "'least' (6.00 GiB, 1.600x) is the best that does"
    )
    (line,) = compare(ASKED, table, budget_bytes=5 * GIB)
    assert line == (
        "combined: 'recompute' does not fit, nor does any other: peak 8.00 GiB, 3.00 GiB over 5.00 GiB; "
        "'least' (6.00 GiB, 1.600x) is the smallest"
    )
    unneeded = combined(situation())
    assert "'none' does not fit" in compare(unneeded, table, budget_bytes=8 * GIB)[0]


def test_compare_when_another_is_faster() -> None:
    table = {"none": NONE, "recompute": PLAIN, "auto": (9 * GIB, 1.04)}
    assert compare(ASKED, table, budget_bytes=10 * GIB) == (
        "combined: 'recompute' fits, but is 25.0% slower than 'auto' (9.00 GiB, 1.040x)",
    )


@pytest.mark.parametrize(("slowdown", "is_right"), [(1.03, True), (1.0301, False)])
def test_three_percent_is_as_good(slowdown: float, is_right: bool) -> None:
    table = {"auto": (9 * GIB, 1.0), "recompute": (8 * GIB, slowdown)}
    assert (compare(ASKED, table, budget_bytes=10 * GIB) == ()) is is_right


def test_rules_that_say_the_same_share_a_line() -> None:
    found = advise(situation(vram_bytes=8 * GIB))
    lines = compare(found, {"none": NONE, "recompute": PLAIN, "segments": (7 * GIB, 1.5)}, budget_bytes=8 * GIB)
    assert lines == (
        "mode: 'offload' cannot be compared: computed are none, recompute, segments",
        "sqrt: 'segments:6' fits, but is 15.4% slower than 'recompute' (8.00 GiB, 1.300x)",
    )
    lines = compare(found, {"none": NONE, "recompute": PLAIN}, budget_bytes=20 * GIB)
    assert lines[0].startswith("vram, size: 'recompute' makes a step 30.0% slower and is not needed")


def test_segments_of_another_length_are_not_the_same() -> None:
    found = [rules()["sqrt"]]
    table = {"segments:6": (8 * GIB, 1.0), "segments:2": (9 * GIB, 1.0), "segments": (99 * GIB, 1.0)}
    assert compare(found, table, budget_bytes=8 * GIB) == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vram_bytes": -1}, "vram_bytes must be a whole number of at least 1, got -1: give the memory"),
        ({"num_parameters": 0}, "num_parameters must be a whole number of at least 1, got 0"),
        ({"num_parameters": 7e9}, "num_parameters must be a whole number of at least 1, got 7000000000.0"),
        ({"max_length": -5}, "max_length must be a whole number of at least 1, got -5"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"num_layers": True}, "num_layers must be a whole number of at least 1, got True"),
        ({"lora_r": -16}, "lora_r must be a whole number of at least 0, got -16: give the rank"),
        ({"training": "loar", "lora_r": 16}, r"Unknown training 'loar' \(did you mean 'lora'\?\): use full or lora"),
        ({"training": "lora"}, "training='lora' with lora_r=0 makes no sense: use training='lora' with a rank"),
        ({"lora_r": 16}, "training='full' with lora_r=16 makes no sense"),
        ({"load_in_4bit": True}, "load_in_4bit freezes the model: use training='lora'"),
    ],
)
def test_bad_situations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        situation(**changes)


@pytest.mark.parametrize(
    ("table", "budget_bytes", "message"),
    [
        ({}, 1, "No computed mode to compare with, got 0"),
        ({"none": NONE}, -1, "budget_bytes must be at least 1, got -1"),
        ({"none": (-1, 1.0)}, 1, "Computed 'none' has peak -1 and slowdown 1.0: give bytes"),
        ({"none": (1, 0.0)}, 1, "Computed 'none' has peak 1 and slowdown 0.0: give bytes, and a ratio above 0"),
        ({"none": (1, float("nan"))}, 1, "slowdown nan"),
    ],
)
def test_bad_comparisons(table: dict[str, tuple[int, float]], budget_bytes: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        compare(ASKED, table, budget_bytes=budget_bytes)


def test_json() -> None:
    here = situation(vram_bytes=8 * GIB, max_length=256)
    data = json.loads(combined(here).to_json())
    assert data["word"] is True
    assert data["claim"]["saved"] == [0.3, 0.6]
    assert data["conflicts"]
    assert Situation(**json.loads(json.dumps(asdict(here)))) == here


def test_text() -> None:
    here = situation(vram_bytes=8 * GIB)
    lines = to_text(advise(here)).splitlines()
    assert " ".join(lines[0].split()) == "rule mode in the guide promises to save at a slowdown of from"
    assert lines[2].split()[:5] == ["vram", "recompute", "enable", "40-60%", "20-30%"]
    assert "vram: below 16 GiB checkpointing is held necessary for a model to fit" in lines
    text = to_text(combined(here), ["a line"])
    assert "50-70%" in text
    assert "promise of combined: 10-20 points more than plain checkpointing" in text
    assert "conflict: sqrt keeps one layer input in 6" in text
    assert text.endswith("computed otherwise: a line")
