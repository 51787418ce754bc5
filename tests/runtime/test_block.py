from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

import tapeline
from tapeline.runtime import verifier
from tapeline.runtime.frame import Phase
from tapeline.tape import program
from tests.models import TinyModel, assert_equal


class Switch(nn.Module):
    """Its arguments are called like the options of torch's checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(
        self, x: torch.Tensor, *, debug: bool = False, early_stop: bool = True, forward: int = 1, function: int = 2
    ) -> torch.Tensor:
        y = self.linear(x).sin() if debug else self.linear(x).cos()
        return y * forward * function if early_stop else y


class Switches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Switch() for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, debug=True, early_stop=False, forward=3, function=4)
        return x.pow(2).mean()


@pytest.mark.parametrize("mode", ["recompute", "segments:2"])
def test_arguments_of_a_block_are_never_taken_for_options(mode: str) -> None:
    tiny = TinyModel(Switches(), (torch.randn(4, 8),))
    expected = tiny.step()
    with tapeline.fit(tiny.model, tiny.batch, mode=mode, measure=False):
        assert_equal(tiny.step(), expected)


class Nested(nn.Module):
    """Tensors come inside containers, and hang on the module as a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.table = torch.ones(8)

    def forward(self, x: torch.Tensor, pair: Any, *, listed: Any) -> torch.Tensor:
        return (self.linear(x) * pair[0][0] * listed[0] * self.table).sin() * pair[1]


class Nests(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Nested() for _ in range(3)])

    def forward(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, ((a,), 2), listed=[b])
        return x.pow(2).mean()


@pytest.mark.parametrize("mode", ["recompute", "segments:2"])
@pytest.mark.parametrize("what", ["tuple", "list", "attribute"])
def test_tensors_in_containers_and_attributes_are_checked(mode: str, what: str) -> None:
    a, b = torch.rand(8), torch.rand(8)
    tiny = TinyModel(Nests(), (torch.randn(4, 8), a, b))
    expected = tiny.step()
    with tapeline.fit(tiny.model, tiny.batch, mode=mode, measure=False):
        assert_equal(tiny.step(), expected)
        loss = tiny.model(*tiny.batch)
        {"tuple": a, "list": b, "attribute": tiny.model.layers[1].table}[what].add_(1)
        with pytest.raises(RuntimeError, match="modified"):
            loss.backward()


class Counting(nn.Module):
    """Counts its calls, as blocks with a schedule do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.linear(x).sin()


def test_blocks_that_change_their_own_attributes_are_kept() -> None:
    model = nn.Sequential(*[Counting() for _ in range(3)])
    plan = tapeline.plan(model, torch.randn(2, 8), mode="recompute", loss_fn=lambda m, x: m(x).sum())
    assert {block.saved for block in plan.blocks} == {"device"}
    assert "attributes" in plan.notes[0]
    assert all(block.calls == 0 for block in model)


def test_blocks_with_a_prefilled_cache_are_replayed_with_it() -> None:
    """transformers empties the cache of a layer that it checkpoints: prefix tuning would lose its prefix."""
    from peft import PrefixTuningConfig, get_peft_model

    from tests.models import _llama, token_batch

    model = get_peft_model(
        _llama(attention_dropout=0.0), PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    )
    tiny = TinyModel(model, token_batch())
    plan = tapeline.plan(tiny.model, tiny.batch, mode="recompute")
    assert [block.saved for block in plan.blocks][1:] == ["recompute"] * 5
    expected = tiny.step()
    with tapeline.apply(tiny.model, plan, measure=False):
        assert_equal(tiny.step(), expected)
        assert_equal(tiny.step(), expected)


class InPlace(nn.Module):
    """Changes its input in place: fine for autograd here, impossible to recompute."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.relu(x))


@pytest.mark.parametrize("mode", ["none", "recompute"])
def test_an_input_changed_in_place_is_no_obstacle(mode: str) -> None:
    layers = [nn.Sequential(nn.Linear(8, 8), nn.GELU()), *[InPlace() for _ in range(2)]]
    tiny = TinyModel(nn.Sequential(*layers), torch.randn(2, 8), lambda m, x: m(x).sum())
    names = ["0", "1", "2"]
    expected = tiny.step()
    plan = tapeline.plan(tiny.model, tiny.batch, mode=mode, blocks=names, loss_fn=tiny.loss_fn)
    with tapeline.apply(tiny.model, plan, measure=False):
        assert_equal(tiny.step(), expected)


def test_every_phase_is_replayed_before_anything_is_dropped(monkeypatch: pytest.MonkeyPatch, llama: TinyModel) -> None:
    plan = tapeline.plan(llama.model, llama.batch, mode="least")
    with tapeline.apply(llama.model, plan, measure=False) as session:
        llama.loss_fn(llama.model, llama.batch)
        library = session._library
        assert library.verified
        programs = {len(recipe.programs) for recipe in library._recipes.values()}
        assert min(programs) > 1
    replays: list[int] = []
    original = Phase.replay
    monkeypatch.setattr(Phase, "replay", lambda self, check=None: replays.append(1) or original(self, check))
    with tapeline.apply(llama.model, plan, measure=False) as session:
        llama.loss_fn(llama.model, llama.batch)
        assert len(replays) == sum(len(recipe.programs) for recipe in session._library._recipes.values())


@pytest.mark.parametrize("mode", ["recompute", "least", "segments:2"])
@pytest.mark.parametrize("fault", ["other bits", "an error"])
def test_what_cannot_be_replayed_is_kept_and_reported(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch, mode: str, fault: str
) -> None:
    """A kernel that gives other bits the second time, or fails, stands for all that a tape cannot know."""
    expected = llama.step()
    plan = tapeline.plan(llama.model, llama.batch, mode=mode)
    original = program.callable_of

    def faulty(op: Any) -> Any:
        func = original(op)

        def call(*args: Any) -> Any:
            if fault == "an error":
                raise RuntimeError("no such kernel")
            return func(*args) * 1.5

        return call if op.name.startswith("silu") else func

    monkeypatch.setattr(program, "callable_of", faulty)
    with tapeline.apply(llama.model, plan, measure=False) as session:
        for step in range(4):
            assert_equal(llama.step(), expected)
            if step == 1:
                num_recorded = session.report().recorded_calls
        report = session.report()
        assert report.recorded_calls == num_recorded
        assert report.recomputed_calls
        assert "silu" in report.kept_instead[0]
        recipes = session._library._recipes.values()
        assert all(recipe.programs for recipe in recipes)
        replayed = {recipe.tape.ops[step].name for recipe in recipes for p in recipe.programs for step in p.steps}
        assert replayed
        assert not any(name.startswith("silu") for name in replayed)


def test_a_recipe_that_fails_in_an_audit_is_replaced_in_every_block(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = llama.step()
    plan = tapeline.plan(llama.model, llama.batch, mode="recompute")
    with tapeline.apply(llama.model, plan, measure=False, audit_every=2) as session:
        assert_equal(llama.step(), expected)
        same = verifier.same_bits
        monkeypatch.setattr(verifier, "same_bits", lambda one, other: one.shape[-1] != 176 and same(one, other))
        assert_equal(llama.step(), expected)
        monkeypatch.setattr(verifier, "same_bits", same)
        for _ in range(2):
            assert_equal(llama.step(), expected)
        report = session.report()
        assert report.audited_calls == 2
        assert report.kept_instead
        recipes = {id(p.recipe) for seam in session._seams.values() for p in seam._prepared.current.values()}
        assert recipes <= {id(recipe) for recipe in session._library._recipes.values()}


@pytest.mark.parametrize("mode", ["cheap", "recompute", "least"])
def test_a_graph_that_is_never_run_backward_leaves_nothing(llama: TinyModel, mode: str) -> None:
    with tapeline.fit(llama.model, llama.batch, mode=mode, measure=False):
        llama.step()
        llama.model.zero_grad()
        gc.collect()
        gc.disable()
        try:
            ledger = tapeline.Ledger()
            with ledger:
                ledger.track(llama.model.parameters(), "weights")
                ledger.begin_window()
                before = ledger.live_bytes()
                for _ in range(3):
                    llama.loss_fn(llama.model, llama.batch)
                ledger.track([torch.zeros(1)], "other")
                assert ledger.live_bytes() - before < 10_000
        finally:
            gc.enable()
