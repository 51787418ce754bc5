"""What evaluations leave behind, and steps that do not go straight: other forwards in between, exceptions, too little memory."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tapeline
from tapeline.errors import UnsupportedModelError
from tapeline.ledger import BACKWARD, FORWARD, RECOMPUTE, Ledger
from tapeline.runtime.install import managed_module
from tapeline.runtime.step import model_loss
from tests.failure_modes.surfaces import (
    MODES,
    SURFACES,
    WIDTH,
    Block,
    Stack,
    Twins,
    log_probs,
    plain,
    small_llama,
    total,
    twins,
)
from tests.models import FAMILIES, assert_equal, token_batch

# -- F30: tensors made in inference mode ---------------------------------------------------------------------------


@pytest.mark.parametrize("surface", SURFACES)
def test_f30_an_input_made_in_inference_mode_is_the_error_that_autograd_gives(surface: str) -> None:
    with twins(surface) as pair:
        with torch.inference_mode():
            wrong = pair.batch * 1.0
        for _ in range(2):
            for model in (pair.untouched, pair.managed):
                with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
                    model.layers[0](wrong).sum().backward()
            pair.check()
        pair.assert_replayed()


def add_table(block: Block, x: torch.Tensor, table: torch.Tensor | None = None) -> torch.Tensor:
    return x + block.down((block.up(x).sin() + (block.table if table is None else table)).exp())


def with_tables(table: torch.Tensor) -> nn.Module:
    model = Stack(add_table)
    for layer in model.layers:
        layer.register_buffer("table", table, persistent=False)
    return model


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("place", ["argument", "buffer"])
@pytest.mark.parametrize("is_written", [False, True])
def test_f30_a_table_made_in_inference_mode_is_read_as_it_was(mode: str, place: str, *, is_written: bool) -> None:
    """A mask or rotary table that an evaluation has made, and writes again: it has no version that could tell."""

    def run(model: nn.Module) -> None:
        with torch.inference_mode():
            table = torch.rand(2 * WIDTH)
        for layer in model.layers:
            layer.table = table if place == "buffer" else None
        loss = total(model, pair.batch, None if place == "buffer" else table)
        with torch.inference_mode():
            table.mul_(1 + is_written)
        loss.backward()

    with twins(mode, with_tables(torch.zeros(2 * WIDTH))) as pair:
        for _ in range(3):
            expected, got = (pair.outcome(one, run) for one in (pair.untouched, pair.managed))
            assert isinstance(expected, dict)
            if is_written and isinstance(got, str):
                assert "inference" in got
            else:
                assert_equal(got, expected)


@pytest.mark.parametrize("mode", ["cheap", "recompute"])
def test_f30_a_model_that_has_a_table_made_in_inference_mode_can_be_planned(mode: str) -> None:
    with torch.inference_mode():
        table = torch.rand(2 * WIDTH)
    model, x = with_tables(table), torch.randn(4, 6, WIDTH)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(total(model, x), parameters)
    with tapeline.fit(model, x, mode=mode, loss_fn=total, blocks=["layers.*"], measure=False):
        for _ in range(2):
            got = torch.autograd.grad(total(model, x), parameters)
            assert all(map(torch.equal, got, expected))


# -- F31: forwards that are not to be trained ----------------------------------------------------------------------


@pytest.mark.parametrize("surface", SURFACES)
def test_f31_forwards_without_gradients_between_forward_and_backward_change_nothing(surface: str) -> None:
    """GRPO: log-probabilities of the policy without gradients, in training mode; an evaluation; both also before backward."""

    def run(model: nn.Module) -> list[torch.Tensor]:
        with torch.no_grad():
            old = log_probs(model, pair.batch)
        loss = -(log_probs(model, pair.batch) - old).exp().mean()
        with torch.no_grad():
            again = log_probs(model, pair.batch)
        model.eval()
        with torch.inference_mode():
            scores = model(pair.batch[:1, :3])
        bare = model(pair.batch[:2])
        model.train()
        loss.backward()
        return [old, again, scores, bare]

    with twins(surface) as pair:
        for number in range(1, 4):
            pair.check(run)
            pair.check()
            assert pair.session is None or pair.session.report().recomputed_calls == 6 * number
        pair.assert_replayed()


@pytest.mark.parametrize("mode", ["cheap", "segments:2"])
def test_f31_generating_between_forward_and_backward_changes_nothing(mode: str) -> None:
    """Rollouts in training mode, with a cache, while a graph waits for its backward."""
    batch = token_batch(2, 12)

    def run(model: nn.Module) -> list[torch.Tensor]:
        loss = model(**batch).loss
        tokens = model.generate(batch["input_ids"][:, :4], max_new_tokens=3, do_sample=True, pad_token_id=0)
        loss.backward()
        return [tokens]

    with twins(mode, small_llama(), batch, loss_fn=model_loss) as pair:
        for _ in range(3):
            pair.check(run)
        assert pair.session.report().recomputed_calls == 6
        pair.assert_replayed()


# -- F32: what is never asked for, and exceptions ------------------------------------------------------------------


@contextmanager
def nothing_left(pair: Twins, ledger: Ledger | None = None) -> Iterator[None]:
    """As many bytes are alive afterwards as before, without the garbage collector."""
    ledger = ledger or Ledger()
    with ledger, torch.no_grad():
        pair.loss_fn(pair.managed, pair.batch)
    before = ledger.live_bytes()
    gc.disable()
    try:
        with ledger:
            yield
        pair.managed.zero_grad(set_to_none=True)
        assert ledger.live_bytes() == before
    finally:
        gc.enable()


def memory_of(session: Any) -> Any:
    """What a session remembers from one step to the next, numbers of calls left out."""
    if session is None:
        return None
    library, seams = session._library, session._seams.values()
    known = [library.generation, set(library._recipes), set(library.verified), set(library.obstacles)]
    blocks = [(set(s._prepared.current), set(s.records.classes), s.num_drifts, s.num_reruns, *s.reasons) for s in seams]
    return [*known, dict(library.failures), blocks, [dict(seam.chain._last) for seam in seams]]


class Fragile(torch.autograd.Function):
    """Saves its input and fails when it is told to."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, fails: bool) -> torch.Tensor:
        ctx.save_for_backward(x)
        if fails:
            raise ZeroDivisionError
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad * ctx.saved_tensors[0].cos(), None


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("where", ["forward", "a function", "backward"])
def test_f32_an_exception_leaves_nothing_behind(surface: str, where: str, *, is_first: bool) -> None:
    fails: list[int] = []

    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        h = Fragile.apply(block.up(x).exp(), where == "a function" and block.number in fails)
        if where == "backward" and block.number in fails:
            h.register_hook(lambda grad: 1 / 0)
        y = F.dropout(block.down(h.cos()), 0.1)
        if where == "forward" and block.number in fails:
            raise ZeroDivisionError
        return x + y

    with twins(surface, body) as pair:
        if not is_first:
            pair.check()
        before = memory_of(pair.session)
        for number in range(3):
            with nothing_left(pair):
                fails.append(number)
                try:
                    total(pair.managed, pair.batch).backward()
                except ZeroDivisionError:
                    fails.clear()
            assert not fails
            assert is_first or memory_of(pair.session) == before
        pair.check()


@pytest.mark.parametrize("surface", SURFACES)
def test_f32_outputs_that_nobody_uses_leave_nothing_behind(surface: str) -> None:
    """Router scores that go into no loss, and whole graphs that never run backward."""

    class Unused(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x, _ = layer(x * 1.0)
            return x

    def body(block: Block, x: torch.Tensor) -> Any:
        h = block.up(x)
        return x + block.down(F.gelu(h)), h.exp().softmax(-1).sin()

    with twins(surface, Unused(body)) as pair:
        for _ in range(2):
            with nothing_left(pair):
                total(pair.managed, pair.batch)
                total(pair.managed, pair.batch).backward()
                torch.autograd.grad(total(pair.managed, pair.batch), [pair.managed.layers[2].down.bias])
            before = memory_of(pair.session)
            pair.check()
            assert memory_of(pair.session) == before
        pair.assert_replayed()


@pytest.mark.parametrize("mode", ["cheap", "recompute"])
def test_f32_an_expert_that_is_given_no_token_leaves_nothing_behind(mode: str) -> None:
    """Few tokens, so that some experts go without, others in other batches (axolotl#3638)."""

    def run(model: nn.Module) -> None:
        model(**batch).loss.backward()

    tiny = FAMILIES["mixtral"]()
    with twins(mode, tiny.model, tiny.batch, loss_fn=model_loss) as pair:
        for seed in range(3):
            torch.manual_seed(seed)
            pair.batch = batch = token_batch(1, 3)
            with nothing_left(pair):
                run(pair.managed)
            pair.check(run)
            experts = [p.grad for n, p in pair.untouched.named_parameters() if n.endswith("experts.down_proj")]
            assert any(not expert.any() for grad in experts for expert in grad)


@pytest.mark.parametrize("surface", ["checkpoint", "cheap"])
def test_f32_experts_that_are_looped_over_are_checkpointed_or_refused(surface: str) -> None:
    """How many tokens an expert has depends on the data: a plan for that is an error that says what to do."""

    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, 1)
        weights, chosen = (block.up(tokens)[:, :3] + bias).softmax(-1).max(-1)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(block.experts):
            (rows,) = torch.where(chosen == number)
            out = out.index_add(0, rows, expert(tokens[rows]).sin() * weights[rows, None])
        return x + block.down(torch.cat([out, tokens], dim=-1).exp()).view_as(x)

    model, bias = Stack(body), torch.zeros(3)
    for layer in model.layers:
        layer.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
    if surface != "checkpoint":
        with (
            pytest.raises(UnsupportedModelError, match="choose grouped experts"),
            twins(surface, model, is_planned=True),
        ):
            pass
        return
    with twins(surface, model) as pair:
        for unused in (2, 0, 1):
            bias.zero_()[unused] = -100.0
            with nothing_left(pair):
                total(pair.managed, pair.batch).backward()
            pair.check()


# -- F33: too little memory, tried again with a smaller batch ------------------------------------------------------


ERRORS = {
    "cuda": (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": (RuntimeError, "DefaultCPUAllocator: can't allocate memory: you tried to allocate 2147483648 bytes."),
}


class Short(Ledger):
    """A device that runs out of memory once: at one operation of one phase."""

    def __init__(self, kind: str = "cuda") -> None:
        super().__init__()
        self.kind, self.phase, self.countdown = kind, "", 0

    def run_out(self, phase: str, countdown: int) -> None:
        self.phase, self.countdown = phase, countdown

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.countdown -= self._span.phase == self.phase
        if self.phase and not self.countdown:
            self.phase = ""
            kind, text = ERRORS[self.kind]
            raise kind(text)
        return out


def retried(step: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes that accelerate tries until a step fits; here without its garbage collection, so that what lingers is seen."""
    from accelerate.utils import find_executable_batch_size, memory

    monkeypatch.setattr(memory, "clear_device_cache", lambda **_: None)
    sizes = []

    @find_executable_batch_size(starting_batch_size=4)
    def run(batch_size: int) -> None:
        sizes.append(batch_size)
        step(batch_size)

    run()
    return sizes


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize(
    ("phase", "kind"), [(FORWARD, "cuda"), (BACKWARD, "cuda"), (RECOMPUTE, "cuda"), (RECOMPUTE, "cpu")]
)
@pytest.mark.parametrize("is_first", [True, False])
def test_f33_out_of_memory_is_caught_and_a_smaller_batch_tried(
    surface: str, phase: str, kind: str, monkeypatch: pytest.MonkeyPatch, *, is_first: bool
) -> None:
    """In the first step, the replays that run out are those that check the recipe."""
    ledger = Short(kind)

    def step(batch_size: int) -> None:
        pair.managed.zero_grad(set_to_none=True)
        torch.manual_seed(1)
        with ledger.scope(FORWARD):
            loss = total(pair.managed, pair.batch[:batch_size])
        loss.backward()

    with twins(surface) as pair:
        if not is_first:
            pair.check()
        with nothing_left(pair, ledger):
            # the recompute of a checkpoint counts as backward
            phase = BACKWARD if surface == "checkpoint" and phase == RECOMPUTE else phase
            ledger.run_out(phase, 12 if phase == FORWARD else 3)
            sizes = retried(step, monkeypatch)
        assert sizes == [4, 3]
        pair.check(lambda model: total(model, pair.batch[:3]).backward())
        pair.check()
        pair.assert_replayed()


def test_f33_planning_inside_the_step_that_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each try has a plan for its own shape, and a plan never changes."""
    model, ledger, plans = Stack(plain).train(), Short(), []

    def step(batch_size: int) -> None:
        batch = torch.ones(batch_size, 6, WIDTH)
        plans.append(tapeline.plan(model, batch, mode="cheap", loss_fn=total, blocks=["layers.*"]))
        known = plans[-1].to_json()
        ledger.run_out(BACKWARD if batch_size == 4 else "", 9)
        try:
            with tapeline.apply(model, plans[-1], measure=False), ledger:
                total(model, batch).backward()
        finally:
            assert plans[-1].to_json() == known

    assert retried(step, monkeypatch) == [4, 3]
    assert managed_module(model) is None
    assert plans[1].peak_bytes < plans[0].peak_bytes
    with pytest.raises(dataclasses.FrozenInstanceError):
        plans[1].mode = "none"
