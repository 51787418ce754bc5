"""Eight budgets between the smallest feasible one and no checkpointing, on three kinds of model."""

from __future__ import annotations

import pytest
import torch

import tapeline
from tapeline.errors import InfeasibleBudgetError
from tests.models import FAMILIES, assert_equal


@pytest.mark.parametrize("name", ["llama", "gemma3", "t5"])
def test_every_budget_is_kept_predicted_and_exact(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = FAMILIES[name]()
    optimizer = torch.optim.AdamW(tiny.model.parameters(), lr=0.0)
    expected = tiny.step()
    optimizer.step()  # the state exists from here on
    tiny.model.zero_grad()
    largest = tapeline.plan(tiny.model, tiny.batch, mode="none", optimizer=optimizer).peak_bytes
    with pytest.raises(InfeasibleBudgetError) as caught:
        tapeline.plan(tiny.model, tiny.batch, 1000, optimizer=optimizer)
    smallest = caught.value.smallest_feasible_bytes
    assert smallest < largest
    flops = []
    for index in range(8):
        budget = smallest + (largest - smallest) * index // 7
        plan = tapeline.plan(tiny.model, tiny.batch, budget, optimizer=optimizer)
        with tapeline.apply(tiny.model, plan, measure=False) as session:
            assert_equal(tiny.step(), expected)
            tiny.model.zero_grad()
            with session.measure(optimizer):
                tiny.loss_fn(tiny.model, tiny.batch).backward()
                optimizer.step()
                tiny.model.zero_grad()
        measured = session.last_peak_bytes
        assert measured is not None
        with capsys.disabled():
            print(f"\n{name}: budget {budget}, predicted {plan.peak_bytes}, measured {measured}", end="")
        assert measured <= budget
        assert measured == pytest.approx(plan.peak_bytes, rel=0.02)
        flops.append(plan.flops)
    assert flops == sorted(flops, reverse=True)
    assert flops[-1] == plan.untouched_flops
