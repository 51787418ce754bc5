"""A plan for each shape, made beside training: what it must not touch, and what it must keep."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import statistics
import threading
import time
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tapeline
from tapeline.errors import UsageError
from tapeline.runtime.ambient import Ambient
from tapeline.runtime.search import Search
from tapeline.runtime.signature import surroundings
from tapeline.runtime.wanted import Wanted
from tapeline.tape.beside import Demand
from tapeline.train.config import TrainConfig
from tapeline.train.run import _shape_plans
from tests.models import _llama, token_batch


def batch_of(length: int, size: int = 8, padding: int = 0) -> dict[str, torch.Tensor]:
    """Large enough that activations are most of what a step holds."""
    return token_batch(size, length, padding)


LENGTHS = (48, 40, 25, 48, 12, 31, 25, 12, 44)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "tapeline-plans"]


def trained(budget: str | None, *, waits: bool = False, autocast: bool = False) -> dict[str, Any]:
    """Weights, losses and random states after a few steps of different lengths, with dropout."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = _llama(num_hidden_layers=4).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    session = None
    losses, peaks = [], []
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if budget is not None:
            session = tapeline.fit(
                model, batch_of(48), budget, optimizer=optimizer, per_shape=True, measure=False, audit_every=0
            )
    torch.manual_seed(1)
    for number, length in enumerate(LENGTHS):
        batch = batch_of(length, 4 + 4 * (number % 2), padding=3 * (number == 5))
        random.random(), np.random.rand()
        if session is not None:
            with session.measure(optimizer):
                losses.append(step(model, batch, optimizer, autocast))
            peaks.append(session.last_peak_bytes)
            if waits:
                session.wait_for_plans()
        else:
            losses.append(step(model, batch, optimizer, autocast))
    result = {"losses": losses, "weights": [p.detach().clone() for p in model.parameters()]}
    result["random"] = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
    if session is not None:
        result["peaks"], result["session"] = peaks, session
        session.remove()
    return result


def step(model: nn.Module, batch: Any, optimizer: torch.optim.Optimizer, autocast: bool) -> float:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("waits", [False, True], ids=["beside", "waiting"])
def test_training_is_that_without_tapeline(waits: bool, autocast: bool) -> None:
    plain, ours = trained(None, autocast=autocast), trained("50%", waits=waits, autocast=autocast)
    assert ours["losses"] == plain["losses"]
    assert ours["random"] == plain["random"]
    assert all(map(torch.equal, ours["weights"], plain["weights"]))
    session = ours["session"]
    assert max(ours["peaks"]) <= session.plan.budget_bytes
    report = session.report()
    assert report.is_within_budget
    assert report.num_plans > 1
    assert not [note for note in report.notes if "no plan of its own" in note]
    base = session.plan
    assert all(plan.slowdown <= base.slowdown for plan in session.plans.values() if plan is not base) or any(
        "padded" in name for name in session.plans
    )
    assert any(plan.slowdown < base.slowdown for plan in session.plans.values())


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_a_plan_made_beside_training_is_the_one_made_alone(autocast: bool) -> None:
    model = _llama(num_hidden_layers=4).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        search = Search(model, batch_of(48), "60%", Wanted(optimizer="AdamW"))
        search.plan()
        alone = search.plan_for(batch_of(30))
    made = []

    def work() -> None:
        with search.step.beside_training(lambda: Demand.NOW):
            made.append(search.plan_for(batch_of(30)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert made[0].blocks == alone.blocks
    assert made[0].peak_bytes == alone.peak_bytes
    assert made[0].flops == alone.flops


def test_the_peak_of_a_later_shape_is_the_predicted_one() -> None:
    model = _llama(num_hidden_layers=4).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    with tapeline.fit(
        model, batch_of(48), "60%", optimizer=optimizer, per_shape=True, measure=False, audit_every=0
    ) as session:
        for _ in range(2):
            step(model, batch_of(48), optimizer, False)
        batch = batch_of(30)
        step(model, batch, optimizer, False)
        session.wait_for_plans()
        plan = session.plans["8 x 30"]
        for _ in range(3):
            with session.measure(optimizer):
                step(model, batch, optimizer, False)
            assert session.last_peak_bytes is not None
            assert session.last_peak_bytes <= plan.budget_bytes
        assert session.last_peak_bytes == pytest.approx(plan.peak_bytes, rel=1e-3)
        assert session.placements == [plan.blocks]


def test_backward_follows_the_plan_of_its_forward() -> None:
    """Two forwards of different shapes before their backwards, with plans that keep and that rebuild inputs."""
    model = _llama(num_hidden_layers=4, attention_dropout=0.0).train()
    batches = [batch_of(48), batch_of(12, 4)]

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        losses = [model(**batch).loss for batch in batches]
        for loss in losses:
            loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    small = tapeline.plan(model, batches[0], mode="segments:3", optimizer=optimizer).peak_bytes
    with tapeline.fit(
        model, batches[0], small, optimizer=optimizer, per_shape=True, measure=False, audit_every=0
    ) as session:
        assert all(map(torch.equal, gradients(), expected))
        session.wait_for_plans()
        assert len(session.plans) == 2
        for _ in range(3):
            assert all(map(torch.equal, gradients(), expected))
        assert len(set(session.placements[-2:])) == 2


def test_autocast_keeps_its_copies_while_plans_are_made() -> None:
    model = _llama(num_hidden_layers=4).train()
    with torch.autocast("cpu", torch.bfloat16):
        search = Search(model, batch_of(48), "60%", Wanted(optimizer="AdamW"))
        search.plan()
        weight, x = nn.Parameter(torch.randn(8, 8)), torch.randn(8, 8)
        torch.mm(x, weight)
        with search.step.beside_training(lambda: Demand.NOW):
            thread = threading.Thread(target=search.plan_for, args=(batch_of(30),))
            thread.start()
            thread.join()
        with Casts() as casts:
            torch.mm(x, weight)
    assert casts.num_casts == 1  # of x alone; the weight's copy is still there


class Casts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.num_casts = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_casts += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


def test_a_session_that_ends_stops_planning_at_once() -> None:
    model = _llama(num_hidden_layers=12).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    session = tapeline.fit(model, batch_of(48), "50%", optimizer=optimizer, per_shape=True, measure=False)
    for length in (30, 20, 12):
        model(**batch_of(length)).loss.backward()
    start = time.perf_counter()
    session.remove()
    assert time.perf_counter() - start < 1.0
    assert not any(thread.name == "tapeline-plans" for thread in threading.enumerate())
    assert not any(hasattr(module, "seam") or "forward" in vars(module) for module in model.modules())
    assert not model._forward_pre_hooks
    del session
    gc.collect()


class Fussy(nn.Module):
    """Refuses short batches, and draws a number if told to."""

    def __init__(self, draws: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(4))
        self.draws = draws

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cpu" and type(x) is not torch.Tensor and x.shape[1] < 20:
            raise ValueError("too short")
        if self.draws and random.random() < 0:
            x = x * 2
        for layer in self.layers:
            x = layer(x)
        return x


def total(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).sum()


def test_a_shape_that_cannot_be_planned_is_served_by_the_next_larger_plan() -> None:
    model = Fussy()
    x = torch.randn(4, 64, 16)
    with tapeline.fit(model, x, "60%", loss_fn=total, per_shape=True, measure=False) as session:
        for length in (64, 10, 10, 30):
            total(model, x[:, :length]).backward()
            session.wait_for_plans()
        total(model, torch.randn(5, 64, 16)).backward()
    notes = session.report().notes
    assert "no plan of its own for 4 x 12: ValueError: too short" in notes
    assert any("5 x 64: the plan was made for batches of up to 4 x 64, and larger ones may" in note for note in notes)
    assert "4 x 32" in session.plans


def test_what_makes_no_sense_is_refused() -> None:
    x = torch.randn(4, 64, 16)
    with pytest.raises(UsageError, match="mode 'recompute' does the same for every shape"):
        tapeline.fit(Fussy(), x, mode="recompute", loss_fn=total, per_shape=True)
    with pytest.raises(UsageError, match="draws numbers in Python"):
        tapeline.fit(Fussy(draws=True), x, "60%", loss_fn=total, per_shape=True)
    with pytest.raises(UsageError, match="no tensor in it has a dimension"):
        tapeline.fit(Fussy(), {"x": 1}, "60%", loss_fn=lambda m, _: total(m, torch.randn(4, 64, 16)), per_shape=True)
    with pytest.raises(UsageError, match="calls the model 2 times"):
        tapeline.fit(Fussy(), x, "60%", loss_fn=lambda m, x: total(m, x) + total(m, x[:, :30]), per_shape=True)
    with pytest.raises(UsageError, match="with other shapes"):
        tapeline.fit(Fussy(), x, "60%", loss_fn=lambda m, x: total(m, x[:2]), per_shape=True)
    seen: list[torch.Tensor] = []
    with pytest.raises(UsageError, match="loss_fn has variables"):
        tapeline.fit(Fussy(), x, "60%", loss_fn=lambda m, x: seen.append(x) or total(m, x), per_shape=True)
    hooked = Fussy()
    hooked.layers[0].register_forward_hook(lambda module, args, out: seen.append(out))
    with pytest.raises(UsageError, match="a hook on the model has variables"):
        tapeline.fit(hooked, x, "60%", loss_fn=total, per_shape=True)


def test_calls_that_the_batch_does_not_cover_follow_the_first_plan() -> None:
    """Other tensors than the first may be larger, or not have been there: no smaller plan is safe then."""
    from tests.models import t5

    family = t5()
    model, batch = family.model, family.batch
    with tapeline.fit(model, batch, "70%", per_shape=True, measure=False) as session:
        short = {**batch, "input_ids": batch["input_ids"][:, :8], "attention_mask": batch["attention_mask"][:, :8]}
        model(**short).loss.backward()  # as long a target as before
        assert session._switch.calls[-1] is session.plan
        session.wait_for_plans()
        assert len(session.plans) == 1
    plain = {name: batch_of(48)[name] for name in ("input_ids", "labels")}
    model = _llama(num_hidden_layers=4).train()
    with tapeline.fit(model, plain, "70%", per_shape=True, measure=False) as session:
        model(**batch_of(30, padding=3)).loss.backward()  # with a mask, which the first batch had not
        assert session._switch.calls[-1] is session.plan


def test_each_bucket_is_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _llama(num_hidden_layers=4).train()
    made: list[tuple[int, ...]] = []
    plan_for = Search.plan_for

    def counted(search: Search, batch: Any) -> Any:
        made.append(tuple(batch["input_ids"].shape))
        return plan_for(search, batch)

    monkeypatch.setattr(Search, "plan_for", counted)
    with tapeline.fit(model, batch_of(48), "45%", per_shape=True, measure=False) as session:
        for length in (36, 30, 24, 36, 30, 24):
            model(**batch_of(length)).loss.backward()
        session.wait_for_plans()
    assert len(made) == len(set(made)) == 3


def test_a_part_that_is_called_by_itself_follows_the_first_plan() -> None:
    model = _llama(num_hidden_layers=4).train()
    with tapeline.fit(model, batch_of(48), "50%", per_shape=True, measure=False) as session:
        for _ in range(2):
            model(**batch_of(12)).loss.backward()
            session.wait_for_plans()
        assert session._switch.calls[-1] is not session.plan
        roles = {block.name: block.policy.price for block in session.plan.blocks}
        assert {name: seam.policy.price for name, seam in session._seams.items()} == roles


def test_a_model_under_plans_can_be_copied() -> None:
    model = _llama(num_hidden_layers=4).train()
    batch = batch_of(12)
    with tapeline.fit(model, batch_of(48), "50%", per_shape=True, measure=False) as session:
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        session.wait_for_plans()
    losses = []
    for made in (model, *copies):
        torch.manual_seed(3)
        losses.append(made(**batch).loss)
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])


class Fickle(nn.Module):
    """Draws in Python, for short batches only."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] < 40:
            x = x * random.choice([1.0, 2.0])
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_draw_ends_the_planning_of_its_shape() -> None:
    model, x = Fickle(), torch.randn(4, 64, 16)
    with tapeline.fit(model, x, "60%", loss_fn=total, per_shape=True, measure=False) as session:
        random.seed(5)
        total(model, x[:, :30]).backward()
        session.wait_for_plans()
        state = random.getstate()
    random.seed(5)
    random.choice([1.0, 2.0])
    assert state == random.getstate()
    assert any(
        "it would change the training: the model draws a number in Python" in note for note in session.report().notes
    )


def test_the_model_is_restored_though_waiting_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _llama(num_hidden_layers=4).train()
    session = tapeline.fit(model, batch_of(48), "50%", per_shape=True, measure=False)

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(session._switch, "stop", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.remove()
    assert not any("forward" in vars(module) for module in model.modules())
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_no_mode_is_said_to_be_active_afterwards() -> None:
    from torch.utils import _python_dispatch

    model = _llama(num_hidden_layers=4).train()
    with tapeline.fit(model, batch_of(48), "50%", per_shape=True, measure=False) as session:
        for length in (30, 12):
            with session.measure():
                model(**batch_of(length)).loss.backward()
    assert not _python_dispatch._is_in_torch_dispatch_mode


def test_a_plan_that_keeps_everything_is_reported_as_such() -> None:
    model = _llama(num_hidden_layers=4).train()
    with tapeline.fit(model, batch_of(48), "100%", per_shape=True, audit_every=1) as session:
        for _ in range(3):
            model(**batch_of(48)).loss.backward()
            model.zero_grad()
    report = session.report()
    assert report.recomputed_calls == report.audited_calls == 0
    assert not report.notes


def test_a_call_of_a_known_shape_costs_less_than_five_milliseconds() -> None:
    model = _llama(num_hidden_layers=16, hidden_size=16, intermediate_size=16, num_attention_heads=2).train()
    with tapeline.fit(model, batch_of(48), "70%", per_shape=True, measure=False) as session:
        batches = [batch_of(length) for length in (48, 12)]
        for batch in batches:
            model(**batch).loss.backward()
        session.wait_for_plans()
        times = []
        for number in range(40):  # each call changes over to the other plan
            start = time.perf_counter()
            session._switch(model, (), batches[number % 2])
            times.append(time.perf_counter() - start)
    assert len(session.plans) == 2
    assert statistics.median(times) < 5e-3


def test_settings_of_the_process_are_not_written_beside_training() -> None:
    search = Search(Fussy(), torch.randn(4, 64, 16), "60%", Wanted(loss_fn=total))
    now = surroundings()
    then = now._replace(default_dtype=torch.float64, attention=tuple(not allowed for allowed in now.attention))
    state = torch.get_rng_state()
    ambient = Ambient(then, [])
    with search.step.beside_training(lambda: Demand.NOW), search.step.mode, ambient.restored():
        assert surroundings().default_dtype == now.default_dtype
        assert surroundings().attention == now.attention
    with ambient.restored():  # as in a backward of one's own
        assert surroundings().attention == then.attention
    assert torch.equal(torch.get_rng_state(), state)


def test_a_training_run_goes_on_with_one_plan_where_others_cannot_be_made() -> None:
    seen: list[Any] = []
    said: list[str] = []
    model = Fussy()
    model.layers[0].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    search = Search(model, torch.randn(4, 64, 16), "60%", Wanted(loss_fn=total))
    observer = types.SimpleNamespace(said=said.append)
    assert _shape_plans(TrainConfig(), search, search.plan(), observer) is None  # type: ignore[arg-type]
    (line,) = said
    assert line.startswith(
        "One plan for all shapes of batches: a hook on the model has variables of the function around it"
    )
