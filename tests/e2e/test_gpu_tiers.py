"""Tiers below a real accelerator."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tapeline
from tests.runtime.tiers.models import Model, are_equal, gradients, loss_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
NUM_BLOCKS, ROWS, WIDTH = 12, 4096, 128
WORKSPACES = 128 * 2**20
"""What the library of matrix products takes of the same allocator."""


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def model_and_batch() -> tuple[Model, torch.Tensor]:
    torch.manual_seed(0)
    model = Model(NUM_BLOCKS).cuda().train()
    return model, torch.randn(ROWS, WIDTH, device="cuda")


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize(("mode", "budget"), [("offload", None), ("auto", "60%"), ("cheap", "60%")])
def test_a_tier_below_a_gpu_gives_the_same_bits_in_the_memory_that_was_promised(
    tier: str, mode: str, budget: str | None, model_and_batch: tuple[Model, torch.Tensor], tmp_path: Path
) -> None:
    model, batch = model_and_batch
    expected = gradients(copy.deepcopy(model), batch)
    options: dict[str, Any] = {f"{tier}_budget": "2GiB"} | ({} if budget is None else {"margin": 0})
    with tapeline.fit(
        model, batch, budget, mode=mode, loss_fn=loss_of, measure=False, offload_dir=tmp_path, checksums=True, **options
    ) as session:
        assert session.plan.moved_bytes > 0
        for _ in range(3):
            with session.measure():
                loss_of(model, batch).backward()
            assert are_equal(model, expected)
            model.zero_grad()
        report = session.report()
    (found,) = report.tiers
    assert found.name == tier
    assert found.out_bytes == found.planned_bytes
    assert report.measured_peak_bytes is not None
    excess = report.measured_peak_bytes - report.predicted_peak_bytes
    assert abs(excess) < 0.05 * report.predicted_peak_bytes + WORKSPACES
    assert not report.kept_instead
    assert not list(tmp_path.iterdir())


def test_reserved_memory_does_not_grow_from_step_to_step(model_and_batch: tuple[Model, torch.Tensor]) -> None:
    model, batch = model_and_batch
    with tapeline.fit(model, batch, mode="offload", loss_fn=loss_of, measure=False, host_budget="2GiB"):
        reserved = []
        for _ in range(20):
            loss_of(model, batch).backward()
            model.zero_grad()
            reserved.append(torch.cuda.memory_reserved())
    assert len(set(reserved[5:])) == 1
