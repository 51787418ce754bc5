"""A disk below a CPU: trains what memory cannot hold, leaves nothing behind however it ends, and says when it is full."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import tapeline
from tapeline.errors import FullTierError, TierError
from tests.runtime.tiers.models import WIDTH, Block, are_equal, gradients, loss_of, model_and_batch

ROOT = Path(__file__).parents[2]
BUDGET = 120_000_000
LIMIT = 260_000_000
QUOTA = 64 * 2**20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc as Linux has them")


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.e2e.offload_worker", *arguments]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def result(*arguments: str) -> Any:
    process = start(*arguments)
    out, error = process.communicate()
    assert process.returncode == 0, error[-2000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def untouched() -> Any:
    return result()


def test_what_memory_cannot_hold_trains_to_the_same_bits(untouched: Any, tmp_path: Path) -> None:
    too_large = start("--limit", str(LIMIT))
    _, error = too_large.communicate()
    assert too_large.returncode != 0
    assert "can't allocate memory" in error
    found = result("--limit", str(LIMIT), "--budget", str(BUDGET), "--folder", str(tmp_path))
    assert found["losses"] == untouched["losses"]
    assert found["gradients"] == untouched["gradients"]
    assert found["resident_bytes"] < LIMIT < untouched["resident_bytes"]
    assert found["resident_bytes"] < 1.25 * found["planned_bytes"]
    assert found["moved_bytes"] > found["planned_bytes"], "more is on the disk than in memory"
    assert found["most_used_bytes"] <= found["disk_bytes"]
    assert not list(tmp_path.iterdir())


def test_a_killed_process_leaves_no_file(tmp_path: Path) -> None:
    before = os.statvfs(tmp_path).f_bfree
    process = start("--budget", str(BUDGET), "--folder", str(tmp_path), "--steps", "3", "--waits")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert not list(tmp_path.iterdir()), "what is open has no name"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.communicate()
    assert not list(tmp_path.iterdir())
    assert os.statvfs(tmp_path).f_bfree * os.statvfs(tmp_path).f_bsize > before * os.statvfs(tmp_path).f_bsize - BUDGET


@pytest.fixture(params=["mounted", "emulated"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with room for 64 MiB."""
    if request.param == "mounted":
        command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", tmp_path]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("mounting is not allowed here")
        yield tmp_path
        subprocess.run(["umount", tmp_path], check=True)
        return
    claim = os.posix_fallocate

    def claim_up_to_quota(file: int, offset: int, length: int) -> None:
        if offset + length > QUOTA:
            raise OSError(28, "No space left on device")
        claim(file, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", claim_up_to_quota)
    yield tmp_path


def test_a_full_disk_is_said_before_anything_is_computed(small_disk: Path) -> None:
    model, batch = model_and_batch(num_blocks=16, rows=4000)
    before = [p.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    options: dict[str, Any] = {"loss_fn": loss_of, "disk_budget": "1GiB", "offload_dir": small_disk, "mode": "auto"}
    options["blocks"] = ["blocks.*"]
    needed = "30%"
    with pytest.raises(FullTierError, match="has no room for .*: make room, name another offload_dir, or a smaller"):
        tapeline.fit(model, batch, needed, **options)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert type(model.blocks[0].forward).__name__ == "method", "nothing was put into the model"
    with pytest.warns(UserWarning, match="Planning again with"):
        made = tapeline.fit(model, batch, needed, on_full_tier="replan", measure=False, **options)
    with made as session:
        assert 0 < session.plan.disk_bytes <= QUOTA
        expected = gradients(model, batch)
        with session.measure():
            loss_of(model, batch).backward()
        assert are_equal(model, expected)
        assert session.report().is_within_budget
    assert not list(small_disk.iterdir())


class Dropping(nn.Module):
    """A block that draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(nn.functional.dropout(x, 0.3))


@pytest.mark.parametrize("call", ["pwrite", "preadv"])
def test_a_disk_that_fails_leaves_weights_optimizer_and_random_state_as_they_were(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    model, batch = nn.Sequential(*(Dropping() for _ in range(5))).train(), torch.randn(400, WIDTH)
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        model(batch).square().mean().backward()

    options: dict[str, Any] = {"loss_fn": lambda model, batch: model(batch).square().mean(), "optimizer": optimizer}
    session = tapeline.fit(
        model, batch, mode="offload", disk_budget="1GiB", offload_dir=tmp_path, measure=False, **options
    )
    step()
    optimizer.step()
    optimizer.zero_grad()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    state, real, calls = torch.get_rng_state(), getattr(os, call), iter(range(100))

    def fails_at_the_third(*arguments: Any) -> int:
        if next(calls) >= 2:
            raise OSError(5, "Input/output error")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails_at_the_third)
        with pytest.raises(TierError, match=r"Cannot (write|read) in .*: Input/output error"):
            step()
    assert torch.equal(state, torch.get_rng_state())
    after = model.state_dict(), optimizer.state_dict()["state"]
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(before), tree_leaves(after), strict=True))
    session.remove()
    optimizer.zero_grad()
    step()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    torch.set_rng_state(state)
    optimizer.zero_grad()
    step()
    assert all(
        torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), found, strict=True) if p.grad is not None
    )
    assert not list(tmp_path.iterdir())
