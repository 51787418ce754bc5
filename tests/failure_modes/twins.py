"""A model under a plan beside its untouched twin, both driven alike and compared bit for bit."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import tapeline
from tapeline.planner.schema import Plan
from tapeline.runtime.blocks import find_blocks
from tapeline.runtime.step import model_loss
from tests.exact.families import DECODER
from tests.models import assert_equal

MODES = ("cheap", "recompute", "least", "segments:2")
WIDTH = 8
Body = Callable[..., torch.Tensor]
Run = Callable[[nn.Module], Any]


class Block(nn.Module):
    """A block that does what a function says, with two projections and a buffer."""

    def __init__(self, body: Body, number: int, width: int = WIDTH) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.register_buffer("shift", torch.rand(2 * width))
        self.body, self.number = body, number

    def forward(self, x: torch.Tensor, *extra: Any) -> torch.Tensor:
        return self.body(self, x, *extra)


class Stack(nn.Module):
    """Blocks one after the other, with what else the model is given passed to each."""

    def __init__(self, body: Body, depth: int = 3, width: int = WIDTH) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(body, number, width) for number in range(depth)])

    def forward(self, x: torch.Tensor, *extra: Any) -> torch.Tensor:
        x = x * 1.0
        for layer in self.layers:
            x = layer(x, *extra)
        return x


def total(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(*batch).pow(2).sum()


class Twins:
    """A managed model and an untouched copy of it."""

    def __init__(self, model: nn.Module, batch: Any, loss_fn: Callable[[nn.Module, Any], torch.Tensor]) -> None:
        self.untouched, self.managed = model.train(), copy.deepcopy(model).train()
        self.batch, self.loss_fn = batch, loss_fn
        self.session: tapeline.Session

    def loss(self, model: nn.Module) -> torch.Tensor:
        return self.loss_fn(model, self.batch)

    def check(self, run: Run | None = None, seed: int = 1) -> None:
        """Gradients, buffers, what `run` returns and the random state after it are equal in every bit."""
        got, expected = (self.result(model, run, seed) for model in (self.managed, self.untouched))
        assert_equal(got, expected)

    def result(self, model: nn.Module, run: Run | None = None, seed: int = 1) -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        torch.manual_seed(seed)
        returned = run(model) if run is not None else self.loss(model).backward()
        found = {f"grad.{n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        assert found or returned, "something is compared"
        found |= {f"buffer.{n}": b.clone() for n, b in model.named_buffers()}
        found |= {f"returned.{number}": tensor.detach().clone() for number, tensor in enumerate(returned or ())}
        return found | {"random state": torch.get_rng_state()}

    @property
    def seams(self) -> list[Any]:
        return list(self.session._seams.values())

    @property
    def reasons(self) -> str:
        """Why calls were not replayed from a tape."""
        return "; ".join(reason for seam in self.seams for reason in seam.reasons)

    @property
    def recipes(self) -> list[Any]:
        return list(self.session._library._recipes.values())

    def replayed(self) -> list[str]:
        """The names of all operations that some recipe replays."""
        return [recipe.tape.ops[step].name for recipe in self.recipes for p in recipe.programs for step in p.steps]

    def check_on_tape(self) -> None:
        """Everything was replayed from a tape, and nothing was found to differ."""
        assert not self.session.report().kept_instead
        assert not self.reasons
        assert self.replayed()


def tiny(model_type: str, **settings: Any) -> nn.Module:
    """A decoder of transformers with two layers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model(model_type, **DECODER | sizes | {"num_hidden_layers": 2} | settings)
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


@functools.cache
def plan_for_stacks(mode: str, depth: int) -> Plan:
    state = torch.get_rng_state()
    stack, batch = Stack(lambda b, x: x + b.down(b.up(x).sin()), depth), (torch.randn(4, 6, WIDTH),)
    torch.set_rng_state(state)
    return tapeline.plan(stack, batch, mode=mode, loss_fn=total, blocks=["layers.*"])


def plan_for(model: nn.Module, names: Sequence[str], mode: str) -> Plan:
    """A plan says of a block how much to drop, whatever the block does: that of a simple stack serves all models."""
    plan = plan_for_stacks(mode, len(names))
    pairs = zip(plan.blocks, names, strict=True)
    blocks = (replace(b, name=name, kind=type(model.get_submodule(name)).__name__) for b, name in pairs)
    return replace(plan, blocks=tuple(blocks))


@contextmanager
def twins(
    model: nn.Module | Body,
    mode: str,
    batch: Any = None,
    *,
    loss_fn: Callable[[nn.Module, Any], torch.Tensor] = total,
    prepare: Callable[[nn.Module], Any] | None = None,
    plans: bool = False,
    kind: type[Twins] = Twins,
    **options: Any,
) -> Iterator[Twins]:
    """A pair with a plan in force on one of them.

    Args:
        model: a model, or what each block of a stack does.
        mode: mode of the plan.
        batch: what `loss_fn` is given.
        loss_fn: makes a scalar of a model and the batch.
        prepare: called with both models before planning.
        plans: make a plan for this very model and batch, which takes longer than running a step of it.
        kind: class of the pair.
        **options: of the session.
    """
    model = model if isinstance(model, nn.Module) else Stack(model)
    pair = kind(model, (torch.randn(4, 6, WIDTH),) if batch is None else batch, loss_fn)
    for one in (pair.untouched, pair.managed):
        if prepare is not None:
            prepare(one)
    names = find_blocks(pair.managed, ["layers.*"] if isinstance(model, Stack) else None)
    if plans:
        plan = tapeline.plan(pair.managed, pair.batch, mode=mode, loss_fn=loss_fn, blocks=names)
    else:
        plan = plan_for(pair.managed, names, mode)
    pair.session = tapeline.apply(pair.managed, plan, measure=False, **options)
    try:
        yield pair
    finally:
        pair.session.remove()


@contextmanager
def transformer(model: nn.Module, mode: str, batch: Any, **options: Any) -> Iterator[Twins]:
    """The same for a model of transformers."""
    with twins(model, mode, batch, loss_fn=model_loss, **options) as pair:
        yield pair
