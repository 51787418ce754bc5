"""Blocks that do what a function says, under plans that move tensors to a disk, and what was sent there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from tapeline.planner.schema import Plan
from tapeline.runtime.blocks import find_blocks
from tapeline.runtime.candidates import Candidates
from tapeline.runtime.choosing import finished
from tapeline.runtime.predict import FakeStep
from tapeline.runtime.session import Session
from tapeline.runtime.tier_report import TierReport
from tapeline.runtime.tiers.engine import Engine
from tapeline.runtime.tiers.tier import DISK
from tapeline.tape.graph import Geometry
from tapeline.tape.sources import attached, storage_key
from tests.runtime.tiers.models import below, loss_of, ways

WIDTH = 64
WAYS = ["inputs", "everything", "what is held"]
NUM_STEPS = 3
Loss = Callable[[nn.Module, Any], torch.Tensor]
Body = Callable[["Block", torch.Tensor], torch.Tensor]


class Block(nn.Module):
    """Does what a function says, with two projections and a buffer."""

    def __init__(self, body: Body, number: int, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.register_buffer("shift", torch.rand(2 * width))
        self.body, self.number = body, number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self, x)


class Model(nn.Module):
    def __init__(self, body: Body, width: int = WIDTH) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(body, number, width) for number in range(3))
        self.head = nn.Linear(width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x).pow(2).mean()


def a_batch(width: int = WIDTH) -> torch.Tensor:
    return torch.randn(4, 160, width)


def plan_of(model: nn.Module, batch: Any, way: str, loss_fn: Loss = loss_of) -> Plan:
    names = find_blocks(model, ["blocks.*"] if hasattr(model, "blocks") else None)
    candidates = Candidates(FakeStep(model, batch, names, loss_fn=loss_fn), below(DISK))
    return finished(candidates, "test", candidates.one_ahead(ways(DISK)[way](candidates)), None)


@dataclass
class Sent:
    """The bytes of one storage that left the device."""

    storage: int
    values: torch.Tensor


def note_sent(monkeypatch: pytest.MonkeyPatch) -> list[Sent]:
    """All storages with bytes that are sent from here on."""
    found: list[Sent] = []
    send = Engine.send

    def noted(self: Engine, source: torch.Tensor, original: torch.Tensor | None = None, where: str = "") -> Any:
        transfer = send(self, source, original, where)
        if transfer is not None and type(source) is torch.Tensor and original is not None:
            found.append(Sent(source.untyped_storage()._cdata, source.clone().view(original.dtype)))
        return transfer

    monkeypatch.setattr(Engine, "send", noted)
    return found


def held_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    for held in (*model.parameters(), *model.buffers()):
        yield held
        yield from (part for _, part in attached(held))


def is_content_of(weight: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether the bytes are those of a weight, in whatever dtype, as it is or transposed."""
    if weight.numel() != values.numel():
        return False
    cast = weight.detach().to(values.dtype)
    return any(torch.equal(values, one.reshape(-1)) for one in (cast, cast.t() if cast.dim() == 2 else cast))


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def gradients_of(
    model: nn.Module, batch: Any, loss_fn: Loss = loss_of, context: AbstractContextManager[Any] | None = None
) -> list[Any]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    with context or nullcontext():
        loss = loss_fn(model, batch)
    loss.backward()
    return [None if p.grad is None else local(p.grad).clone() for p in model.parameters()]


def check(
    session: Session,
    expected: list[Any],
    batch: Any,
    loss_fn: Loss = loss_of,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> TierReport:
    """Steps with the gradients of the untouched model in every bit; returns what the last one moved."""
    assert any(one is not None for one in expected)
    for _ in range(NUM_STEPS):
        got = gradients_of(session.model, batch, loss_fn, context())
        assert all(a is b if b is None else torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        (tier,) = session.report().tiers
    assert not session.report().kept_instead
    return tier


def check_weights_stayed(model: nn.Module, sent: list[Sent], weights: list[torch.Tensor] | None = None) -> None:
    """Neither their storages were sent, nor copies of them."""
    assert not {storage_key(held) for held in held_tensors(model)} & {one.storage for one in sent}
    weights = weights or [p for p in model.parameters() if p.is_floating_point()]
    copies = [one for one in sent if any(is_content_of(weight, one.values) for weight in weights)]
    assert not copies, f"{len(copies)} of {len(sent)} storages are copies of weights"


def moved(session: Session) -> Iterator[Geometry]:
    """How the saved tensors look at the storages that are moved."""
    for recipe in session._library._recipes.values():
        yield from (pack.geometry for pack in recipe.tape.packs if pack.value in recipe.tiers)
