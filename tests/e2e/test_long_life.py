"""A thousand steps of one managed model beside its untouched twin, with everything on the way that goes wrong in a long life."""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import random
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from torch import nn

import tapeline
from tests.models import _llama, assert_equal

NUM_STEPS = 1000
COMPARED_EVERY = 5
LENGTHS = (4, 6, 9)
Event = Callable[[Any, torch.Tensor, int], None]
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
}


class Interrupted(RuntimeError):  # noqa: N818 - not an error of the model
    """Raised in the middle of a pass."""


def adapted_model() -> nn.Module:
    """Two layers, and two adapters of different ranks on different projections."""
    from peft import LoraConfig, get_peft_model

    config = {"lora_dropout": 0.1, "task_type": "CAUSAL_LM"}
    model = get_peft_model(_llama(**SIZES), LoraConfig(r=4, target_modules=["q_proj", "up_proj"], **config))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["o_proj"], **config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    for number in range(2):
        layer_of(model, number).register_forward_hook(remember)
    return model.train()


made: list[weakref.ref[Any]] = []
"""The memory of what the layers have made in a step."""


def remember(module: nn.Module, args: Any, out: torch.Tensor) -> None:
    made.append(weakref.ref(out.untyped_storage()))


def layer_of(model: Any, number: int) -> Any:
    return model.get_base_model().model.layers[number]


def fail(*_: Any) -> None:
    raise Interrupted


def fail_later(module: nn.Module, args: Any, out: torch.Tensor) -> None:
    out.register_hook(fail)


def amplify(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
    return out * 1.5


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids).loss


def step(model: nn.Module, ids: torch.Tensor, number: int) -> None:
    loss_of(model, ids).backward()


def accumulate(model: nn.Module, ids: torch.Tensor, number: int) -> None:
    for part in ids.split(1):
        loss_of(model, part).backward()


def fail_in_forward(model: nn.Module, ids: torch.Tensor, number: int) -> None:
    handle = layer_of(model, number % 2).mlp.act_fn.register_forward_hook(fail)
    with suppress(Interrupted):
        loss_of(model, ids).backward()
    handle.remove()
    step(model, ids, number)


def fail_in_backward(model: nn.Module, ids: torch.Tensor, number: int) -> None:
    handle = layer_of(model, number % 2).register_forward_hook(fail_later)
    with suppress(Interrupted):
        loss_of(model, ids).backward()
    handle.remove()


def hook_for_a_step(model: nn.Module, ids: torch.Tensor, number: int) -> None:
    handle = layer_of(model, 0).mlp.register_forward_hook(amplify)
    step(model, ids, number)
    handle.remove()


def skip_backward(model: nn.Module, ids: torch.Tensor, number: int) -> None:
    loss = loss_of(model, ids)
    step(model, ids, number)
    del loss


def evaluate(model: nn.Module, ids: torch.Tensor, number: int) -> None:
    model.eval()
    with torch.no_grad():
        loss_of(model, ids)
    model.train()
    step(model, ids, number)


def train_in_eval_mode(model: nn.Module, ids: torch.Tensor, number: int) -> None:
    model.eval()
    step(model, ids, number)
    model.train()


def generate(model: Any, ids: torch.Tensor, number: int) -> None:
    model.eval()
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    model.train()
    step(model, ids, number)


def switch_adapters(model: Any, ids: torch.Tensor, number: int) -> None:
    model.set_adapter("second" if model.active_adapter == "default" else "default")
    step(model, ids, number)


def replace_a_module(model: nn.Module, ids: torch.Tensor, number: int) -> None:
    layer = layer_of(model, 0)
    layer.mlp = copy.deepcopy(layer.mlp)
    step(model, ids, number)


def checkpoint_elsewhere(model: Any, ids: torch.Tensor, number: int) -> None:
    model.activation_checkpointing_enable()
    step(model, ids, number)
    model.activation_checkpointing_disable()
    model.disable_input_require_grads()


def train_a_copy(model: nn.Module, ids: torch.Tensor, number: int) -> None:
    step(copy.deepcopy(model), ids, number)
    step(model, ids, number)


def train_an_unpickled_one(model: nn.Module, ids: torch.Tensor, number: int) -> None:
    step(pickle.loads(pickle.dumps(model)), ids, number)
    step(model, ids, number)


def save_and_load(model: nn.Module, ids: torch.Tensor, number: int) -> None:
    step(model, ids, number)
    for what in (model, model.state_dict()):
        file = io.BytesIO()
        torch.save(what, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=what is not model)
    model.load_state_dict(loaded)


EVENTS: dict[Event, int] = {
    step: 480,
    accumulate: 60,
    fail_in_forward: 50,
    fail_in_backward: 60,
    hook_for_a_step: 50,
    skip_backward: 60,
    evaluate: 60,
    train_in_eval_mode: 40,
    generate: 20,
    switch_adapters: 60,
    replace_a_module: 15,
    checkpoint_elsewhere: 15,
    train_a_copy: 10,
    train_an_unpickled_one: 10,
    save_and_load: 10,
}
"""What happens in a step, and how often in a thousand."""


class Life:
    """Drives a managed model and its twin through the same events."""

    def __init__(self, mode: str, *, collects: bool) -> None:
        self.collects = collects
        self.managed = adapted_model()
        self.twin = copy.deepcopy(self.managed)
        self.before = self.census()
        self.session: tapeline.Session | None = tapeline.apply(self.managed, plan_for(mode), measure=False)
        self.random = random.Random(0)
        self.num_steps = 0

    def warm_up(self) -> None:
        """Meet everything in every length with either adapter, after what leaves its marks on modules, twice.

        A class of calls is known from its second call on where another block of its like has had another tape.
        """
        for _ in range(6):
            for event in EVENTS:
                for length in LENGTHS if event is not switch_adapters else ():
                    self.live(event, length)
            self.live(switch_adapters, LENGTHS[0])

    def go_on(self) -> None:
        for event in self.random.choices(list(EVENTS), list(EVENTS.values()), k=NUM_STEPS - self.num_steps):
            self.live(event, self.random.choice(LENGTHS))

    def come_to_rest(self) -> None:
        """Take counts where they can be compared: under the first adapter, right after a replacement, without gradients."""
        if self.managed.active_adapter != "default":
            self.live(switch_adapters, LENGTHS[0])
        self.live(replace_a_module, LENGTHS[0])
        for model in (self.managed, self.twin):
            model.zero_grad(set_to_none=True)

    def live(self, event: Event, length: int) -> None:
        """One step of both, gradients compared now and then."""
        number = self.num_steps
        self.num_steps += 1
        ids = torch.randint(3, SIZES["vocab_size"], (2, length), generator=torch.Generator().manual_seed(number))
        found = []
        for model in (self.managed, self.twin):
            torch.manual_seed(number)
            event(model, ids, number)
            if number % COMPARED_EVERY == 0:
                found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
                found[-1]["random state"] = torch.get_rng_state()
            update(model, set_to_none=number % 3 > 0)
        if found:
            assert_equal(*found)
        assert made
        assert all(memory() is None for memory in made), event
        made.clear()

    def census(self) -> Counter[str]:
        """How many tensors have been made and are alive, how many bytes they have, and our own objects by class."""
        if self.collects:
            gc.collect()
        found: Counter[str] = Counter()
        sizes = {}
        for thing in gc.get_objects():
            kind = type(thing)
            if issubclass(kind, torch.Tensor):
                found["tensors"] += 1
                sizes[thing.untyped_storage()._cdata] = thing.untyped_storage().nbytes()
            elif str(kind.__module__).startswith("tapeline."):
                found[kind.__qualname__] += 1
        found["bytes"] = sum(sizes.values())
        return found

    def end(self) -> None:
        """The session is over, and nobody holds it any longer."""
        for model in (self.managed, self.twin):
            model.zero_grad(set_to_none=True)
        if self.session is not None:
            self.session.remove()
        self.session = None


def update(model: nn.Module, *, set_to_none: bool) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=0.01)
    model.zero_grad(set_to_none=set_to_none)


@functools.cache
def plan_for(mode: str) -> tapeline.Plan:
    ids = torch.randint(3, SIZES["vocab_size"], (2, max(LENGTHS)))
    plan = tapeline.plan(adapted_model(), {"input_ids": ids, "labels": ids}, mode=mode)
    made.clear()
    return plan


@contextmanager
def collecting(*, collects: bool) -> Iterator[None]:
    """Count what is made from now on, with or without the garbage collector."""
    gc.collect()
    gc.freeze()
    if not collects:
        gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def differences(now: Counter[str], before: Counter[str]) -> dict[str, tuple[int, int]]:
    return {name: (before[name], now[name]) for name in sorted(now | before) if now[name] != before[name]}


@pytest.mark.parametrize("collects", [True, False], ids=["collected", "never collected"])
@pytest.mark.parametrize(
    "mode",
    ["cheap", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("recompute", "least", "segments:2"))],
)
def test_a_thousand_steps_end_where_they_began(mode: str, *, collects: bool) -> None:
    plan_for(mode)
    with collecting(collects=collects):
        life = Life(mode, collects=collects)
        life.warm_up()
        life.come_to_rest()
        warm = life.census()
        life.go_on()
        life.come_to_rest()
        grown = differences(life.census(), warm)
        assert life.num_steps >= NUM_STEPS
        assert_equal(life.managed.state_dict(), life.twin.state_dict())
        notes = life.session.report().notes
        life.end()
        left = differences(life.census(), life.before)
    assert (grown, left, notes) == ({}, {}, ())


@pytest.mark.parametrize("event", EVENTS)
def test_what_happens_again_and_again_leaves_nothing_behind(event: Event) -> None:
    plan_for("recompute")
    with collecting(collects=False):
        life = Life("recompute", collects=False)
        for _ in range(4):
            life.live(event, LENGTHS[0])
        warm = life.census()
        for _ in range(6):
            life.live(event, LENGTHS[0])
        grown = differences(life.census(), warm)
        life.end()
        left = differences(life.census(), life.before)
    assert (grown, left) == ({}, {})


@pytest.mark.parametrize(
    ("event", "num_lengths"),
    [(hook_for_a_step, 1), (replace_a_module, 1), (checkpoint_elsewhere, 1), (step, 70)],
    ids=["a hook", "a module", "checkpointing", "a length"],
)
def test_a_plan_stays_in_force_however_often_something_changes(event: Event, num_lengths: int) -> None:
    life = Life("recompute", collects=True)
    for number in range(70):
        life.live(event, LENGTHS[0] + number % num_lengths)
    life.live(step, LENGTHS[0])
    before = life.session.report()
    life.live(step, LENGTHS[0])
    after = life.session.report()
    life.end()
    assert not after.notes
    assert after.recomputed_calls == before.recomputed_calls + 2
    assert after.rerun_calls == before.rerun_calls
