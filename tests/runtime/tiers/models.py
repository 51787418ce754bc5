"""Small models whose blocks save views, transposes, expanded and shared tensors, and a machine under them that is not there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn

from tapeline.planner.policy import CHEAP, KEEP, LEAST, RECOMPUTE, Policy
from tapeline.planner.schema import BlockPlan, Plan
from tapeline.runtime import replaying, rerun, session_tiers
from tapeline.runtime.below import Below
from tapeline.runtime.candidates import Candidates
from tapeline.runtime.choosing import finished
from tapeline.runtime.predict import FakeStep
from tapeline.runtime.session import Session
from tapeline.runtime.tiers.engine import Engine
from tapeline.runtime.tiers.simulated import ComputeWatch, SimulatedMachine
from tapeline.runtime.tiers.slab import HostSlab
from tapeline.runtime.tiers.tier import HOST, Tier

WIDTH, ROWS = 128, 160
ROOM = 1 << 30


class Block(nn.Module):
    """What it saves: an input, a transposed view, an expanded row, one storage twice, a mask of bools, and its own result."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x * self.scale)
        first, second = hidden.chunk(2, dim=-1)
        gated = torch.tanh(first) * second
        scores = gated @ gated.transpose(-1, -2)
        row = scores.mean(dim=-1, keepdim=True).expand_as(gated)
        mixed = torch.where(gated > 0, gated, row) * row
        return x + self.down(torch.cat([mixed, gated], dim=-1))


class Model(nn.Module):
    """Blocks in a row; of the last, the result is not used for a part of the rows."""

    def __init__(self, num_blocks: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x).mean()


def model_and_batch(num_blocks: int = 4, rows: int = ROWS) -> tuple[Model, torch.Tensor]:
    torch.manual_seed(0)
    return Model(num_blocks).train(), torch.randn(rows, WIDTH)


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = model(batch)
    return out


def gradients(model: nn.Module, batch: torch.Tensor) -> list[torch.Tensor]:
    """Of an untouched copy."""
    untouched = copy.deepcopy(model)
    loss_of(untouched, batch).backward()
    return [p.grad for p in untouched.parameters() if p.grad is not None]


def are_equal(model: nn.Module, expected: Sequence[torch.Tensor]) -> bool:
    found = [p.grad for p in model.parameters() if p.grad is not None]
    return len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


Way = Callable[[Candidates], tuple[BlockPlan, ...]]


def uniform(policy: Policy, source: str = "device") -> Way:
    def made(candidates: Candidates) -> tuple[BlockPlan, ...]:
        blocks = candidates.uniform(policy)
        return tuple(replace(block, input=source) for block in blocks)  # type: ignore[arg-type]

    return made


def ways(tier: str) -> dict[str, Way]:
    """Placements of every kind that move something to `tier`."""

    def moving(policy: Policy, names: tuple[str, ...] = ("*",)) -> Policy:
        return replace(policy, host=names) if tier == HOST else replace(policy, disk=names)

    return {
        "inputs": uniform(RECOMPUTE, tier),
        "inputs, least": uniform(LEAST, tier),
        "inputs alone": uniform(KEEP, tier),
        "everything": uniform(moving(KEEP), tier),
        "what is held": uniform(moving(CHEAP), tier),
        "by name": uniform(moving(RECOMPUTE, ("tanh", "down")), tier),
        "between kept blocks": lambda c: tuple(
            replace(block, input=tier if n % 2 else "device", policy=moving(CHEAP) if n % 2 else KEEP)
            for n, block in enumerate(c.keep_all())
        ),
        "under segments": lambda c: tuple(
            replace(block, input=tier if n % 2 == 0 else "recompute") for n, block in enumerate(c.segments(2))
        ),
    }


def below(tier: str) -> Below:
    return Below(name=tier, room_bytes=ROOM, out_bandwidth=1e9, back_bandwidth=1e9, copy_seconds=1e-5)  # type: ignore[arg-type]


def planned(model: nn.Module, batch: torch.Tensor, way: Way, tier: str, ahead: str = "one") -> Plan:
    """A plan that places the blocks in one way, with its prediction."""
    names = [f"blocks.{number}" for number in range(len(model.blocks))]  # type: ignore[arg-type]
    candidates = Candidates(FakeStep(model, batch, names, loss_fn=loss_of), below(tier))
    blocks = way(candidates)
    if ahead == "one":
        blocks = candidates.one_ahead(blocks)
    elif ahead == "far":
        blocks = tuple(replace(block, ahead_bytes=1 << 40) for block in blocks)
    return finished(candidates, "test", blocks, None)


@contextmanager
def simulated(
    model: nn.Module, plan: Plan, machine: SimulatedMachine, monkeypatch: pytest.MonkeyPatch, watch: ComputeWatch
) -> Iterator[Session]:
    """A session on an accelerator that is not there."""

    def open_host(device: torch.device, num_bytes: int, in_flight_bytes: int) -> Tier:
        slab = HostSlab(num_bytes, torch.device("cpu"))
        return Tier(name=HOST, device=device, engine=Engine(machine, slab, most_in_flight=in_flight_bytes))

    observers = (*replaying.OBSERVERS, ComputeWatch)
    with monkeypatch.context() as patch:
        patch.setattr(session_tiers, "open_host", open_host)
        patch.setattr(replaying, "OBSERVERS", observers)
        patch.setattr(rerun, "OBSERVERS", observers)
        with Session(model, plan, measure=False) as session, watch:
            yield session
    machine.check()


class StillEvent:
    """Of an accelerator that is quick: what it comes after is over."""

    def is_done(self) -> bool:
        return True

    def synchronize(self) -> None: ...


class StillStream:
    """Its operations are over when they have been given."""

    def record(self) -> StillEvent:
        return StillEvent()

    def wait(self, event: StillEvent) -> None: ...


class StillAccelerator:
    """An accelerator whose memory is the host's; it notes which stream its operations were given to."""

    def __init__(self) -> None:
        self.streams: dict[str, StillStream] = {}
        self.used: set[StillStream] = set()
        self._compute = StillStream()

    def compute(self) -> StillStream:
        return self._compute

    def side(self, name: str) -> StillStream:
        return self.streams.setdefault(name, StillStream())

    def empty(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def use(self) -> None: ...

    @contextmanager
    def on(self, stream: StillStream) -> Iterator[None]:
        self.used.add(stream)
        yield
