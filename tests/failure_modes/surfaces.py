"""What autograd is called on in these tests: a model under a plan, or with its blocks under checkpoints, and an untouched copy."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import tapeline
from tests.models import _llama, assert_equal

MODES = ("cheap", "recompute", "least", "segments:2")
SURFACES = ("checkpoint", *MODES)
WIDTH = 8
Body = Callable[..., Any]
Run = Callable[[nn.Module], Any]


class Block(nn.Module):
    """A block that does what a function says, with two projections."""

    def __init__(self, body: Body, number: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.body, self.number = body, number

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(self, *args, **kwargs)


class Stack(nn.Module):
    def __init__(self, body: Body, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(body, number) for number in range(depth)])

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        x = x * 1.0
        for layer in self.layers:
            x = layer(x, *args, **kwargs)
        return x


def plain(block: Block, x: torch.Tensor) -> torch.Tensor:
    return x + F.dropout(block.down(F.gelu(block.up(x)).sin()), 0.2, block.training)


def total(model: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return model(x, *args, **kwargs).float().pow(2).sum()


def log_probs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.log_softmax(model(x), dim=-1)[..., 0]


@functools.cache
def stack_plan(mode: str) -> tapeline.Plan:
    """One plan for all stacks: it says how to treat blocks, and what those do is recorded when they run."""
    return tapeline.plan(Stack(plain), torch.randn(4, 6, WIDTH), mode=mode, loss_fn=total, blocks=["layers.*"])


class Twins:
    """An untouched model and a copy of it under a plan or under checkpoints, driven alike."""

    def __init__(self, surface: str, model: nn.Module, batch: Any, loss_fn: Any, *, is_planned: bool) -> None:
        self.untouched, self.managed = model.train(), copy.deepcopy(model).train()
        self.batch, self.loss_fn = batch, loss_fn
        self.session: Any = None
        if surface == "checkpoint":
            for layer in self.managed.layers:
                layer.forward = functools.partial(tapeline.checkpoint, layer.forward)
        elif isinstance(model, Stack) and not is_planned:
            self.session = tapeline.apply(self.managed, stack_plan(surface), measure=False)
        else:
            self.session = tapeline.fit(self.managed, batch, mode=surface, loss_fn=loss_fn, measure=False)

    def check(self, run: Run | None = None, seed: int = 1) -> None:
        """Gradients, what `run` returns and the random state after it are the same, bit for bit."""
        got, expected = (self.result(model, run, seed) for model in (self.managed, self.untouched))
        assert len(expected) > 1
        assert_equal(got, expected)

    def result(self, model: nn.Module, run: Run | None = None, seed: int = 1) -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        torch.manual_seed(seed)
        returned = run(model) if run is not None else self.loss_fn(model, self.batch).backward()
        found = {f"grad.{n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found |= {f"returned.{number}": tensor.detach().clone() for number, tensor in enumerate(returned or ())}
        return found | {"random state": torch.get_rng_state()}

    def outcome(self, model: nn.Module, run: Run | None = None) -> dict[str, torch.Tensor] | str:
        """What a step gives, or its error."""
        try:
            return self.result(model, run)
        except RuntimeError as error:
            return str(error)

    def assert_replayed(self) -> None:
        """In a session: every call came from its tape, with nothing kept instead and no block run again."""
        if self.session is not None:
            report = self.session.report()
            assert report.recomputed_calls
            assert not report.kept_instead
            assert not report.rerun_calls
            assert not report.notes


@contextmanager
def twins(
    surface: str,
    model: Body | nn.Module = plain,
    batch: Any = None,
    *,
    loss_fn: Any = total,
    is_planned: bool = False,
) -> Iterator[Twins]:
    """The pair for one surface: a mode, or ``"checkpoint"``; stacks have a plan of their own only if asked for."""
    batch = torch.randn(4, 6, WIDTH) if batch is None else batch
    stack = model if isinstance(model, nn.Module) else Stack(model)
    pair = Twins(surface, stack, batch, loss_fn, is_planned=is_planned)
    try:
        yield pair
    finally:
        if pair.session is not None:
            pair.session.remove()


def small_llama() -> nn.Module:
    return _llama(num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=2)


@contextmanager
def offloading(seen: list[torch.Size]) -> Iterator[None]:
    """Hooks of somebody else, which keep a copy of what they are given; also counts what they are asked for."""

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tensor.shape)
        return tensor.detach().clone()

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
