"""Rows F36 to F40: threads, orders of reading, hooks of shared parameters, cycles, and what is really held."""

from __future__ import annotations

import gc
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tapeline
from tapeline.errors import UsageError
from tapeline.ledger import Ledger
from tests.failure_modes.twins import MODES, WIDTH, Block, Run, Stack, total, twins

hidden: dict[str, Any] = {}
"""What blocks look at beside their arguments."""


@pytest.fixture(autouse=True)
def _nothing_hidden() -> Iterator[None]:
    hidden.clear()
    yield
    hidden.clear()


@torch.library.custom_op("tapeline_failure_modes::pause", mutates_args=())
def pause(x: torch.Tensor) -> torch.Tensor:
    """A kernel that gives other threads the time to run."""
    time.sleep(0.002)
    return x.clone()


pause.register_fake(torch.empty_like)
pause.register_autograd(lambda _, grad: grad)


def plain(block: Block, x: torch.Tensor) -> torch.Tensor:
    return x + block.down(F.gelu(block.up(x)).sin())


def drawing(block: Block, x: torch.Tensor) -> torch.Tensor:
    h = pause(F.dropout(block.up(x), 0.3).sin())
    return x + F.dropout(block.down(F.dropout(pause(h), 0.3).cos()), 0.2)


# -- F36: threads --------------------------------------------------------------------------------------------------


def in_threads(runs: list[Callable[[], Any]]) -> list[Any]:
    """All at once; what they return, or the first error."""
    results: dict[int, Any] = {}
    barrier = threading.Barrier(len(runs))

    def work(number: int) -> None:
        torch.set_num_threads(1)
        barrier.wait()
        try:
            results[number] = runs[number]()
        except BaseException as error:  # noqa: BLE001 - raised again below
            results[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for result in results.values():
        if isinstance(result, BaseException):
            raise result
    return [results[number] for number in range(len(runs))]


@pytest.mark.parametrize("mode", MODES)
def test_f36_backward_in_a_thread_that_did_not_run_the_forward(mode: str) -> None:
    def run(model: nn.Module) -> None:
        loss = pair.loss(model)
        in_threads([loss.backward])

    with twins(drawing, mode) as pair:
        for seed in range(2):
            pair.check(run, seed)
        pair.check_on_tape()


@pytest.mark.parametrize("mode", ["recompute", "segments:2"])
def test_f36_graphs_that_drew_numbers_run_backward_at_the_same_time(mode: str) -> None:
    """There is one default generator, and each replay has to draw from it undisturbed."""

    def run(model: nn.Module, *, at_once: bool) -> list[torch.Tensor]:
        parameters = list(model.parameters())
        losses = [pair.loss(model) for _ in range(3)]
        ways = [lambda loss=loss: torch.autograd.grad(loss, parameters) for loss in losses]
        found = in_threads(ways) if at_once else [way() for way in ways]
        return [grad for grads in found for grad in grads]

    with twins(drawing, mode) as pair:
        pair.check()
        for seed in range(2):
            got = pair.result(pair.managed, lambda model: run(model, at_once=True), seed)
            expected = pair.result(pair.untouched, lambda model: run(model, at_once=False), seed)
            assert all(torch.equal(got[name], expected[name]) for name in expected)
        pair.check_on_tape()


# -- F37: the order of reading -------------------------------------------------------------------------------------


def saved_places(loss: torch.Tensor) -> list[tuple[Any, str]]:
    """Every node of a graph with the names of what it saves, newest first."""
    nodes, stack = {}, [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and id(node) not in nodes:
            nodes[id(node)] = node
            stack += [before for before, _ in node.next_functions]
    return [(node, name) for node in nodes.values() for name in sorted(dir(node)) if name.startswith("_saved_")]


def read(places: list[tuple[Any, str]], order: list[int]) -> list[torch.Tensor]:
    values = [getattr(*places[index]) for index in order]
    return [value for value in values if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", ["oldest first", "newest first", "shuffled"])
def test_f37_saved_tensors_are_right_in_whatever_order_they_are_asked_for(mode: str, order: str) -> None:
    """Each is known by its own place: those who read them beside backward come in any order, and come again."""

    def run(model: nn.Module) -> list[torch.Tensor]:
        loss = pair.loss(model)
        places = saved_places(loss)
        numbers = list(range(len(places)))
        if order == "shuffled":
            random.Random(0).shuffle(numbers)
        found = read(places, numbers[::-1] if order == "oldest first" else numbers)
        found += read(places, numbers[::2])
        loss.backward()
        return found

    with twins(drawing, mode) as pair:
        for seed in range(2):
            pair.check(run, seed)
        pair.check_on_tape()


# -- F38: hooks of shared parameters -------------------------------------------------------------------------------


class Tied(Stack):
    """All blocks have one and the same first projection."""

    def __init__(self, body: Callable[..., torch.Tensor]) -> None:
        super().__init__(body)
        for layer in self.layers:
            layer.up = self.layers[0].up


@pytest.mark.parametrize("mode", ["cheap", "recompute", "segments:2"])
@pytest.mark.parametrize("has_tape", [True, False])
def test_f38_hooks_of_a_shared_parameter_fire_once_and_in_the_same_order(mode: str, *, has_tape: bool) -> None:
    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        if hidden.get("reads"):
            x.detach().sum().item()
        return plain(block, x)

    def run(model: nn.Module) -> list[torch.Tensor]:
        fired: list[tuple[str, torch.Tensor]] = []
        handles = []
        for name, parameter in model.named_parameters():
            after = lambda p, name=name: fired.append((f"{name} done", p.grad.clone()))  # noqa: E731
            handles.append(parameter.register_post_accumulate_grad_hook(after))
            handles.append(parameter.register_hook(lambda grad, name=name: fired.append((name, grad.clone()))))
        pair.loss(model).backward()
        for handle in handles:
            handle.remove()
        names.append([name for name, _ in fired])
        return [grad for _, grad in fired]

    names: list[list[str]] = []
    with twins(Tied(body), mode) as pair:
        hidden["reads"] = not has_tape
        for _ in range(2):
            pair.check(run)
    assert all(fired == names[0] for fired in names)
    assert len(names[0]) == len(set(names[0])) == 2 * 8


def test_f38_reentrant_checkpointing_which_fires_them_twice_is_refused() -> None:
    weight = nn.Parameter(torch.randn(4, 4))
    fired = []
    weight.register_post_accumulate_grad_hook(lambda p: fired.append(p.grad.clone()))

    def layer(x: torch.Tensor) -> torch.Tensor:
        return (x @ weight).sin()

    def run(checkpoint: Callable[..., torch.Tensor]) -> torch.Tensor:
        x = torch.ones(2, 4, requires_grad=True)
        weight.grad = None
        checkpoint(layer, checkpoint(layer, x)).sum().backward()
        assert weight.grad is not None
        return weight.grad

    expected = run(lambda function, x: function(x))
    fired.clear()
    assert torch.equal(run(tapeline.checkpoint), expected)
    assert len(fired) == 1
    assert torch.equal(fired[0], expected)
    with pytest.raises(UsageError, match="use_reentrant=True is not supported"):
        run(lambda function, x: tapeline.checkpoint(function, x, use_reentrant=True))


# -- F39: cycles ---------------------------------------------------------------------------------------------------


def backward(model: nn.Module, batch: Any) -> None:
    total(model, batch).backward()


def dropped(model: nn.Module, batch: Any) -> None:
    total(model, batch)


def in_part(model: nn.Module, batch: Any) -> None:
    torch.autograd.grad(total(model, batch), [model.layers[2].down.weight])


def failed(model: nn.Module, batch: Any) -> None:
    hidden["fails"] = True
    with suppress(ZeroDivisionError):
        total(model, batch)
    hidden["fails"] = False


@pytest.mark.parametrize("mode", ["cheap", "recompute", "segments:2"])
@pytest.mark.parametrize("way", [backward, dropped, in_part, failed])
@pytest.mark.parametrize("is_first", [True, False])
def test_f39_activations_die_without_the_garbage_collector(mode: str, way: Run, *, is_first: bool) -> None:
    made: list[weakref.ref[Any]] = []

    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        h = block.up(x).exp()
        out = block.down(F.dropout(h.sigmoid(), 0.2).softmax(-1)).tanh()
        made.extend(weakref.ref(tensor.untyped_storage()) for tensor in (x, h, out))
        if hidden.get("fails") and block.number == 2:
            raise ZeroDivisionError
        return out

    with twins(body, mode) as pair:
        if not is_first:
            pair.check()
        made.clear()
        gc.collect()
        gc.disable()
        try:
            way(pair.managed, pair.batch)
            assert len(made) == 9
            assert not any(ref() is not None for ref in made)
        finally:
            gc.enable()


# -- F40: what is held ---------------------------------------------------------------------------------------------

INPUT = 4 * 6 * WIDTH * 4
INSIDE = 2 * INPUT
WEIGHTS = 4 * (2 * 2 * WIDTH * WIDTH + 3 * WIDTH)
HELD = {  # before the backward of the first block, of the second, of the third
    "none": [number * (INPUT + 2 * INSIDE) for number in (1, 2, 3)],  # the input, what GELU takes, what GELU makes
    "cheap": [number * (INPUT + INSIDE) for number in (1, 2, 3)],
    "recompute": [number * INPUT for number in (1, 2, 3)],
    "segments:2": [INPUT, INPUT, 2 * INPUT],
    "segments:3": [INPUT, 2 * INPUT, INPUT],  # rebuilding the third input has left the second
}


@pytest.mark.parametrize("mode", HELD)
def test_f40_bytes_that_each_block_holds_are_those_of_the_choice_and_go_with_its_backward(mode: str) -> None:
    """By hand: nothing beside the choice is alive after the forward, nor after the backward of a block what was for it."""
    ledger = Ledger()
    at_input: dict[int, int] = {}

    def live() -> int:
        ledger.track([torch.zeros(1)], "other")  # seen, and gone
        return ledger.live_bytes()

    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        if hidden.get("measures") and x.requires_grad:
            x.register_hook(lambda _: at_input.update({block.number: live()}))
        return block.down(F.gelu(block.up(x)))

    with twins(body, mode) as pair:
        for _ in range(2):
            pair.check()
        pair.managed.zero_grad()
        hidden["measures"] = True
        with ledger:
            ledger.track([*pair.managed.parameters(), *pair.managed.buffers(), *pair.batch], "weights")
            before = live()
            loss = pair.loss(pair.managed)
            assert live() - before - loss.nbytes - INPUT == HELD[mode][2]  # the output is what pow saves
            loss.backward()
            base = before + 2 * loss.nbytes + INPUT  # with the gradients of the loss and of the input
            assert at_input[2] - base - WEIGHTS == HELD[mode][1]
            assert at_input[1] - base - 2 * WEIGHTS == HELD[mode][0]
            assert live() - before - loss.nbytes == 3 * WEIGHTS


@pytest.mark.parametrize("mode", MODES)
def test_f40_backward_in_two_halves_is_exact(mode: str) -> None:
    """First the gradient of the input, later those of the weights, as schedules of pipelines have it."""

    def run(model: nn.Module) -> list[torch.Tensor]:
        x = pair.batch[0].clone().requires_grad_(True)
        loss = total(model, (x,))
        first = torch.autograd.grad(loss, [x], retain_graph=True)
        return [*first, *torch.autograd.grad(loss, list(model.parameters()))]

    with twins(plain, mode) as pair:
        for _ in range(2):
            pair.check(run)
        pair.check_on_tape()
