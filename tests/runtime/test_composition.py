"""A managed model inside what other people put around it."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import tapeline
from tests.models import assert_equal

MODES = ("cheap", "recompute", "segments:2")
WIDTH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        self.p = 0.2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.dropout(self.down(self.act(self.up(x)).sin()), self.p, self.training)


class Model(nn.Module):
    def __init__(self, block: Callable[[], nn.Module] = Block, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block() for _ in range(depth)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def total(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).pow(2).mean()


class Pair:
    """A managed model and its untouched twin."""

    def __init__(self, mode: str, model: nn.Module | None = None, p: float = 0.2) -> None:
        self.untouched = model if model is not None else Model()
        for layer in self.untouched.layers:
            layer.p = p
        self.managed = copy.deepcopy(self.untouched)
        self.x = torch.randn(4, 6, WIDTH)
        self.session = tapeline.fit(self.managed, self.x, mode=mode, blocks=["layers.*"], loss_fn=total, measure=False)

    @property
    def num_calls(self) -> int:
        return sum(seam.num_calls for seam in self.session._seams.values())

    def check(self, run: Callable[[nn.Module], Any] | None = None, seed: int = 1) -> None:
        run = run or (lambda model: total(model, self.x).backward())
        assert_equal(*(result(model, run, seed) for model in (self.managed, self.untouched)))


def result(model: nn.Module, run: Callable[[nn.Module], Any], seed: int) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    returned = run(model)
    tensors = returned if isinstance(returned, tuple | list) else ()
    found = {f"grad.{n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    found |= {f"returned.{number}": tensor.detach().clone() for number, tensor in enumerate(tensors)}
    return found | {"random state": torch.get_rng_state()}


@pytest.fixture(params=MODES)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    made = Pair(request.param)
    yield made
    made.session.remove()


# -- saved-tensor hooks --------------------------------------------------------------------------------------------


@contextmanager
def counting_hooks(counts: list[int]) -> Iterator[None]:
    def pack(tensor: torch.Tensor) -> torch.Tensor:
        counts[0] += 1
        return tensor.clone()

    def unpack(tensor: torch.Tensor) -> torch.Tensor:
        counts[1] += 1
        return tensor

    with saved_tensors_hooks(pack, unpack):
        yield


def test_offloading_hooks_around_the_step_get_what_is_kept(pair: Pair) -> None:
    def run(model: nn.Module) -> None:
        with save_on_cpu():
            loss = total(model, pair.x)
        loss.backward()

    for way in (run, run, None, run):
        pair.check(way)


def test_hooks_of_somebody_else_see_fewer_tensors_and_each_comes_back(pair: Pair) -> None:
    def run(model: nn.Module) -> None:
        counts = [0, 0]
        with counting_hooks(counts):
            loss = total(model, pair.x)
        loss.backward()
        seen[model] = counts

    seen: dict[nn.Module, list[int]] = {}
    for _ in range(3):
        pair.check(run)
        assert seen[pair.managed][0] == seen[pair.managed][1]
        assert 0 < seen[pair.managed][0] < seen[pair.untouched][0]


def test_forbidding_hooks_around_the_step(pair: Pair) -> None:
    def run(model: nn.Module) -> None:
        with disable_saved_tensors_hooks("not here"):
            loss = total(model, pair.x)
        loss.backward()

    for way in (run, None, run):
        pair.check(way)
    assert "forbids" in "; ".join(reason for seam in pair.session._seams.values() for reason in seam.reasons)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_around_the_whole_model(pair: Pair, *, use_reentrant: bool) -> None:
    def run(model: nn.Module) -> None:
        x = pair.x.clone().requires_grad_(True)
        checkpoint(model, x, use_reentrant=use_reentrant).pow(2).mean().backward()

    for way in (run, None, run):
        pair.check(way)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_inside_a_block(mode: str, *, use_reentrant: bool) -> None:
    class Inner(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = checkpoint(
                lambda y: F.dropout(self.act(self.up(y)), 0.2), x * self.down.bias.exp(), use_reentrant=use_reentrant
            )
            return x + F.dropout(self.down(h.cos()), self.p)

    pair = Pair(mode, Model(Inner))
    x = pair.x.clone().requires_grad_(True)
    for _ in range(3):
        pair.check(lambda model: total(model, x * 1.0).backward())
    pair.session.remove()


@pytest.mark.parametrize("mode", MODES)
def test_hooks_inside_a_block(mode: str) -> None:
    class Inner(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
                h = self.act(self.up(x)).sin()
            return x + F.dropout(self.down(h.cos()), self.p)

    pair = Pair(mode, Model(Inner))
    for _ in range(3):
        pair.check()
    pair.session.remove()


# -- functorch -----------------------------------------------------------------------------------------------------


def test_gradients_by_function_transforms(pair: Pair) -> None:
    def run(model: nn.Module) -> list[torch.Tensor]:
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(values: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(model, values, (x,)).pow(2).mean()

        one = torch.func.grad(loss)(parameters, pair.x)
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="different")(parameters, pair.x)
        return [*one.values(), *each.values()]

    for way in (run, None, run):
        pair.check(way)


def test_a_functional_call_with_other_parameters(pair: Pair) -> None:
    def run(model: nn.Module) -> list[torch.Tensor]:
        values = {name: (p.detach() * 2).requires_grad_(True) for name, p in model.named_parameters()}
        torch.func.functional_call(model, values, (pair.x,)).pow(2).mean().backward()
        return [value.grad for value in values.values()]

    for way in (run, None, run, run):
        pair.check(way)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", ["vmap", "grad"])
def test_function_transforms_inside_a_block(mode: str, what: str) -> None:
    class Inner(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.act(self.up(x))
            if what == "vmap":
                h = torch.func.vmap(lambda row: row.sin() * row.sum())(h)
            else:
                h = torch.func.grad(lambda y: y.sin().sum())(h)
            return x + F.dropout(self.down(h.cos()), self.p)

    if what == "grad":  # torch itself refuses saved-tensor hooks there
        with pytest.raises(tapeline.UnsupportedModelError, match="saved tensor hooks"):
            Pair(mode, Model(Inner))
        return
    pair = Pair(mode, Model(Inner))
    for _ in range(3):
        pair.check()
    pair.session.remove()


# -- counting ------------------------------------------------------------------------------------------------------


def test_a_counter_of_operations_around_backward_sees_the_replays() -> None:
    flops = {}
    for mode in ("cheap", "recompute"):
        pair = Pair(mode)
        pair.check()
        for model in (pair.untouched, pair.managed):
            loss = total(model, pair.x)
            with FlopCounterMode(display=False) as counter:
                loss.backward()
            flops[mode, model is pair.managed] = counter.get_total_flops()
        pair.session.remove()
    assert flops["cheap", True] == flops["cheap", False]
    assert flops["recompute", True] > flops["recompute", False]


def test_anomaly_detection(pair: Pair) -> None:
    def run(model: nn.Module) -> None:
        with torch.autograd.set_detect_anomaly(mode=True, check_nan=True):
            total(model, pair.x).backward()

    pair.check(run)
    pair.check(run)


def test_profilers_of_python_around_the_step(pair: Pair) -> None:
    import cProfile

    def run(model: nn.Module) -> None:
        profile = cProfile.Profile()
        profile.enable()
        try:
            total(model, pair.x).backward()
        finally:
            profile.disable()

    pair.check(run)
    pair.check(run)


def test_the_profiler_of_torch_around_the_step(pair: Pair) -> None:
    def run(model: nn.Module) -> None:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_stack=True):
            total(model, pair.x).backward()

    pair.check(run)
    pair.check(run)


# -- hooks of modules and tensors ----------------------------------------------------------------------------------


def test_forward_hooks_that_come_and_go(pair: Pair) -> None:
    def hook(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out * 1.5

    for where in ("layers.1", "layers.1.up", "layers.0.act"):
        handles = [model.get_submodule(where).register_forward_hook(hook) for model in (pair.managed, pair.untouched)]
        pair.check()
        pair.check(seed=2)
        for handle in handles:
            handle.remove()
        pair.check()


def test_pre_hooks_that_come_and_go(pair: Pair) -> None:
    def hook(module: nn.Module, args: Any) -> Any:
        return (args[0].exp(),)

    for where in ("layers.1", "layers.1.down"):
        handles = [
            model.get_submodule(where).register_forward_pre_hook(hook) for model in (pair.managed, pair.untouched)
        ]
        pair.check()
        pair.check(seed=2)
        for handle in handles:
            handle.remove()
        pair.check()


def test_backward_hooks_that_come_and_go(pair: Pair) -> None:
    def hook(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
        return tuple(None if grad is None else grad * 2 for grad in grad_input)

    for where in ("layers.1", "layers.1.up"):
        handles = [
            model.get_submodule(where).register_full_backward_hook(hook) for model in (pair.managed, pair.untouched)
        ]
        pair.check()
        pair.check(seed=2)
        for handle in handles:
            handle.remove()
        pair.check()


def test_hooks_after_accumulation_that_step_the_optimizer() -> None:
    """An optimizer step fused into backward changes a parameter as soon as its gradient is there."""
    for mode in MODES:
        pair = Pair(mode)

        def step(parameter: torch.Tensor) -> None:
            with torch.no_grad():
                parameter.sub_(parameter.grad, alpha=0.01)
            parameter.grad = None

        for model in (pair.managed, pair.untouched):
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(step)
        for seed in range(3):
            pair.check(seed=seed)
            state = pair.managed.state_dict()
            assert_equal(state, pair.untouched.state_dict())
        pair.session.remove()


# -- copies and threads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_warm", [True, False])
def test_copies_and_pickles_of_a_managed_model(pair: Pair, *, is_warm: bool) -> None:
    if is_warm:
        pair.check()
    expected = result(pair.untouched, lambda model: total(model, pair.x).backward(), 1)
    for model in (copy.deepcopy(pair.managed), pickle.loads(pickle.dumps(pair.managed))):
        num_calls = pair.num_calls
        assert_equal(result(model, lambda model: total(model, pair.x).backward(), 1), expected)
        assert pair.num_calls == num_calls
        assert all(p is not q for p, q in zip(model.parameters(), pair.managed.parameters(), strict=True))
    pair.check()


def in_threads(runs: list[Callable[[], Any]]) -> list[Any]:
    outcomes: list[Any] = [None] * len(runs)
    barrier = threading.Barrier(len(runs))

    def work(number: int) -> None:
        torch.set_num_threads(1)
        barrier.wait()
        try:
            outcomes[number] = runs[number]()
        except BaseException as error:  # noqa: BLE001 - raised again below
            outcomes[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return outcomes


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("is_warm", [True, False])
def test_two_threads_train_one_managed_model(mode: str, *, is_warm: bool) -> None:
    pair = Pair(mode, p=0.0)
    inputs = [torch.randn(4, 6, WIDTH), torch.randn(3, 5, WIDTH)]

    def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        found = []
        for _ in range(10):
            found = list(torch.autograd.grad(total(model, x), list(model.parameters())))
        return found

    if is_warm:
        pair.check()
    got = in_threads([lambda x=x: gradients(pair.managed, x) for x in inputs])
    for x, found in zip(inputs, got, strict=True):
        assert all(map(torch.equal, found, gradients(pair.untouched, x)))
    pair.session.remove()


@pytest.mark.parametrize("mode", MODES)
def test_forward_in_one_thread_and_backward_in_another(mode: str) -> None:
    pair = Pair(mode)

    def run(model: nn.Module) -> None:
        loss = total(model, pair.x)
        in_threads([loss.backward])

    for _ in range(2):
        pair.check(run)
    pair.session.remove()


@pytest.mark.parametrize("mode", MODES)
def test_two_threads_replay_dropout_at_the_same_time(mode: str) -> None:
    """There is one default generator: each replay must draw undisturbed."""
    pair = Pair(mode, Model(depth=6))
    pair.check()

    def gradients(model: nn.Module, *, at_once: bool) -> list[torch.Tensor]:
        parameters = list(model.parameters())
        torch.manual_seed(1)
        losses = [total(model, pair.x) for _ in range(2)]
        runs = [lambda loss=loss: list(torch.autograd.grad(loss, parameters)) for loss in losses]
        found = in_threads(runs) if at_once else [run() for run in runs]
        return [*found[0], *found[1], torch.get_rng_state()]

    expected = gradients(pair.untouched, at_once=False)
    for _ in range(20):
        assert all(map(torch.equal, gradients(pair.managed, at_once=True), expected))
    pair.session.remove()
