"""Every family in every mode, with the other axes taking turns: exact on the tape, or exact by a fall-back that is named here.

The covering rows give every family every mode once, and all pairs of the other axes (six minutes on two cores); after them comes
the full product. A fall-back or a wrong prediction that disappears makes its row fail, so that progress is kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import tapeline
from tests.exact.families import FAMILIES
from tests.models import assert_equal

MODES = ("cheap", "recompute", "least", "segments:2")
TRAINED = ("all", "lora", "last half", "first half", "norms")
PRECISION = ("fp32", "bf16", "autocast")
MASK = ("none", "padded")
MICRO_BATCHES = (1, 2)

FALL_BACKS: dict[str, tuple[tuple[str, ...], str]] = {
    "gemma3n": (TRAINED, "reads the values of tensors"),  # the first layer takes a quantile of its activations
    "qwen2_5_vl": (
        ("all", "lora", "first half", "norms"),
        "reads the values of tensors",
    ),  # windows of the vision tower
    "qwen3_next": (("lora",), "changes the size of a storage"),  # PEFT parametrises fused experts in every forward
}
"""Families with blocks that are not on the tape when these parts are trained, and why."""

MISPREDICTED = {
    "qwen3_next-recompute-all-autocast-padded-2": "4 % more than predicted",
    "gptj-cheap-first half-fp32-padded-1": "7 % less than predicted",
    "gptj-least-lora-fp32-padded-2": "5 % less than predicted",
    "qwen2_5_vl-segments:2-all-autocast-padded-1": "6 % less than predicted",
}
"""Rows whose gradients are exact and whose peak is not within 2 % of the prediction."""


class Row(NamedTuple):
    """One way to train one family."""

    family: str
    mode: str
    trained: str
    precision: str
    mask: str
    micro_batches: int

    def __str__(self) -> str:
        return "-".join(map(str, self))


AXES = (TRAINED, PRECISION, MASK, MICRO_BATCHES)


def covering_rows() -> Iterator[Row]:
    """Every family in every mode; the other axes so that each pair of their values comes up early and often."""
    product = list(itertools.product(*AXES))
    seen: dict[tuple[int, Any, int, Any], int] = {}

    def pairs(values: tuple[Any, ...]) -> list[tuple[int, Any, int, Any]]:
        return [(i, values[i], j, values[j]) for i, j in itertools.combinations(range(len(values)), 2)]

    for family, mode in itertools.product(FAMILIES, MODES):
        values = min(product, key=lambda one: sorted(seen.get(pair, 0) for pair in pairs(one)))
        for pair in pairs(values):
            seen[pair] = seen.get(pair, 0) + 1
        yield Row(family, mode, *values)


ROWS = list(covering_rows())


def build(row: Row) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model, batch = FAMILIES[row.family]()
    if row.precision == "bf16":
        model.bfloat16()
        batch = {n: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v for n, v in batch.items()}
    if row.mask == "padded" and "attention_mask" in batch:
        batch["attention_mask"][0, -4:] = 0
    model = choose_trained(model, row.trained)
    return model.train(), batch


def choose_trained(model: nn.Module, trained: str) -> nn.Module:
    if trained == "lora":
        from peft import LoraConfig, get_peft_model

        parts = [(name.split(".")[-1], type(part).__name__) for name, part in model.named_modules()]
        kinds = {kind for _, kind in parts}
        targets = {name for name, kind in parts if kind in ("Linear", "Conv1D")} - {"lm_head", "gate", "router", "head"}
        if any("Mamba" in kind for kind in kinds):
            targets -= {"out_proj"}  # PEFT does not support it: a kernel of its own reads the weight
        config = LoraConfig(
            r=4,
            target_modules=sorted(targets),
            lora_dropout=0.0 if any("Experts" in kind for kind in kinds) else 0.1,  # PEFT has none for fused experts
            fan_in_fan_out="Conv1D" in kinds,
        )
        model = get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
        return model
    parameters = list(model.named_parameters())
    half = len(parameters) // 2
    chosen = {
        "all": parameters,
        "first half": parameters[:half],
        "last half": parameters[half:],
        "norms": [(name, p) for name, p in parameters if "norm" in name.lower() or "ln" in name.lower()],
    }[trained]
    for _, parameter in parameters:
        parameter.requires_grad_(False)
    for _, parameter in chosen:
        parameter.requires_grad_(True)
    return model


def context(row: Row) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if row.precision == "autocast" else nullcontext()


def step(model: nn.Module, batch: dict[str, Any], row: Row, measured: AbstractContextManager[Any]) -> dict[str, Any]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    losses = []
    with measured:
        for _ in range(row.micro_batches):
            with context(row):
                loss = model(**batch).loss / row.micro_batches
            loss.backward()
            losses.append(loss.detach())
            del loss
    result = {f"grad.{n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return result | {"loss": torch.stack(losses), "random state": torch.get_rng_state()}


def check(row: Row) -> None:
    model, batch = build(row)
    start = {name: buffer.clone() for name, buffer in model.named_buffers()}
    expected = step(model, batch, row, nullcontext())
    assert len(expected) > 2, "something is trained"
    with context(row):
        plan = tapeline.plan(model, batch, mode=row.mode, accumulation=row.micro_batches)
    with tapeline.apply(model, plan, measure=False) as session:
        for _ in range(3):  # a block that is not like the one before it is recorded in the second
            for name, buffer in model.named_buffers():
                buffer.copy_(start[name])
            assert_equal(step(model, batch, row, session.measure()), expected)
        report, peak = session.report(), session.last_peak_bytes
    assert not report.kept_instead
    reasons = " ".join(note for note in plan.notes if "not replayed" in note)
    trained, expected_reason = FALL_BACKS.get(row.family, ((), ""))
    expected_reason = expected_reason if row.trained in trained else ""
    assert expected_reason in reasons
    assert bool(expected_reason) == bool(reasons), reasons
    assert peak is not None
    is_predicted = abs(peak / plan.peak_bytes - 1) < 0.02
    assert is_predicted != (str(row) in MISPREDICTED), f"predicted {plan.peak_bytes}, measured {peak}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_exact(row: Row) -> None:
    check(row)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_in_the_full_product(family: str, mode: str) -> None:
    for values in itertools.product(*AXES):
        row = Row(family, mode, *values)
        if row not in ROWS:
            check(row)


def test_the_rows_cover_every_pair() -> None:
    for (i, one), (j, other) in itertools.combinations(list(enumerate(zip(*ROWS, strict=True)))[1:], 2):
        assert {(a, b) for a, b in zip(one, other, strict=True)} == set(itertools.product(set(one), set(other))), (i, j)
