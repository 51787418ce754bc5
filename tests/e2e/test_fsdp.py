"""A plan made on the whole model, in force on the model sharded over two processes (FSDP2, gloo, CPU)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import tapeline
from tapeline.planner.schema import Plan
from tapeline.runtime.blocks import find_blocks
from tests.models import _llama, token_batch

pytestmark = pytest.mark.multi_process

NUM_RANKS = 2
NUM_STEPS = 2
STATE = "random state"


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return _llama(num_hidden_layers=3, attention_dropout=0.1, use_cache=False).train()


def make_batch(rank: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(100 + rank)
    return token_batch(length=32)


def shard(model: nn.Module, *, reshard: bool) -> nn.Module:
    mesh = init_device_mesh("cpu", (NUM_RANKS,))
    for name in find_blocks(model):
        fully_shard(model.get_submodule(name), mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    return model


def train(model: nn.Module, batch: dict[str, torch.Tensor], rank: int) -> list[dict[str, torch.Tensor]]:
    """Steps with an optimizer; loss, gradients, weights and random state of each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows = []
    for step in range(NUM_STEPS):
        torch.manual_seed(10 * step + rank)
        loss = model(**batch).loss
        loss.backward()
        row = {f"grad.{n}": p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        row |= {f"weight.{n}": p.detach().full_tensor() for n, p in model.named_parameters()}
        rows.append(row | {"loss": loss.detach(), STATE: torch.get_rng_state()})
    return rows


def differences(got: list[dict[str, torch.Tensor]], expected: list[dict[str, torch.Tensor]]) -> list[str]:
    found = []
    for step, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        found += [f"step {step}: only one has {name}" for name in ours.keys() ^ theirs.keys()]
        found += [f"step {step}: {n}" for n in theirs if n in ours and not torch.equal(ours[n], theirs[n])]
    return found


def work(rank: int, store: str, mode: str, reshard: bool, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=NUM_RANKS)
    try:
        torch.save(compare(rank, mode, reshard=reshard), Path(results) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def compare(rank: int, mode: str, *, reshard: bool) -> dict[str, Any]:
    batch = make_batch(rank)
    whole = make_model()
    text = tapeline.plan(whole, batch, mode=mode).to_json()
    expected = train(shard(make_model(), reshard=reshard), batch, rank)
    model = shard(make_model(), reshard=reshard)
    before = [dict(vars(part)) for part in model.modules()]
    session = tapeline.apply(model, Plan.from_json(text), measure=False)
    got = train(model, batch, rank)
    seams = list(session._seams.values())
    facts = {
        "differences": differences(got, expected),
        "reasons": sorted({reason for seam in seams for reason in seam.reasons}),
        "num_calls": sum(seam.num_calls for seam in seams),
        "num_reruns": sum(seam.num_reruns for seam in seams),
        "num_drifts": sum(seam.num_drifts for seam in seams),
        "num_replayed": sum(len(p.steps) for r in session._library._recipes.values() for p in r.programs),
        "failures": session._library.failures,
        "num_gradients": sum(name.startswith("grad.") for name in expected[0]),
    }
    session.remove()
    facts["is_restored"] = all(
        vars(part).keys() == own.keys() for part, own in zip(model.modules(), before, strict=True)
    )
    return facts


@pytest.mark.parametrize("reshard", [True, False], ids=["resharded", "kept whole"])
@pytest.mark.parametrize("mode", ["cheap", "recompute"])
def test_sharded_gradients_are_those_of_the_untouched_sharded_model(tmp_path: Path, mode: str, reshard: bool) -> None:
    mp.spawn(work, (str(tmp_path / "store"), mode, reshard, str(tmp_path)), nprocs=NUM_RANKS)
    for rank in range(NUM_RANKS):
        facts = torch.load(tmp_path / f"{rank}.pt")
        print(f"\nrank {rank}, {mode}: {facts}", end="")
        assert facts["num_gradients"]
        assert not facts["differences"]
        assert facts["is_restored"]
        assert facts["num_calls"] == 3 * NUM_STEPS
        assert not facts["reasons"]
        assert facts["num_replayed"]
        assert facts["num_reruns"] == facts["num_drifts"] == 0
        assert not facts["failures"]
