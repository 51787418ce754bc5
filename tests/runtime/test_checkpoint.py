"""What torch documents for the non-reentrant checkpoint, and what is added to it."""

from __future__ import annotations

import weakref
from collections import namedtuple
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import set_checkpoint_early_stop

import tapeline
from tapeline.errors import UsageError


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.calls = 0

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        self.calls += 1
        y = self.linear(x).sin()
        return y if scale is None else y * scale.exp()


def gradients(module: Counting, x: torch.Tensor, run: Any) -> list[torch.Tensor]:
    module.zero_grad()
    x.grad = None
    run().sum().backward()
    return [x.grad.clone(), *(p.grad.clone() for p in module.parameters())]


def equal(got: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return len(got) == len(expected) and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_gradients_are_those_of_the_plain_call() -> None:
    module, x = Counting(), torch.randn(4, 8, requires_grad=True)
    expected = gradients(module, x, lambda: module(x))
    assert equal(gradients(module, x, lambda: tapeline.checkpoint(module, x)), expected)
    assert module.calls == 3  # plain, forward, recompute


def test_reentrant_is_refused_with_the_reason() -> None:
    with pytest.raises(UsageError, match="no gradients, without an error"):
        tapeline.checkpoint(torch.sin, torch.ones(1), use_reentrant=True)


def test_no_recompute_without_grad() -> None:
    module = Counting()
    with torch.no_grad():
        assert not tapeline.checkpoint(module, torch.ones(4, 8)).requires_grad
    assert module.calls == 1


def test_gradients_although_no_input_requires_grad() -> None:
    module = Counting()
    tapeline.checkpoint(module, torch.ones(4, 8)).sum().backward()
    assert module.linear.weight.grad is not None


def test_autograd_grad_and_inputs_argument_work() -> None:
    module, x = Counting(), torch.randn(4, 8, requires_grad=True)
    (expected,) = torch.autograd.grad(module(x).sum(), x)
    (got,) = torch.autograd.grad(tapeline.checkpoint(module, x).sum(), x)
    assert torch.equal(got, expected)
    tapeline.checkpoint(module, x).sum().backward(inputs=[module.linear.weight])
    assert x.grad is None


def test_nested_checkpoints() -> None:
    module, x = Counting(), torch.randn(4, 8, requires_grad=True)
    expected = gradients(module, x, lambda: module(module(x)))

    def inner(value: torch.Tensor) -> torch.Tensor:
        return tapeline.checkpoint(module, tapeline.checkpoint(module, value))

    assert equal(gradients(module, x, lambda: tapeline.checkpoint(inner, x)), expected)


def test_double_backward() -> None:
    x = torch.randn(5, requires_grad=True)

    def second(f: Any) -> torch.Tensor:
        (first,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
        return torch.autograd.grad(first.sum(), x)[0]

    assert torch.equal(second(lambda v: tapeline.checkpoint(torch.sin, v)), second(torch.sin))


def test_retained_graph_can_be_used_twice() -> None:
    module, x = Counting(), torch.randn(4, 8, requires_grad=True)
    loss = tapeline.checkpoint(module, x).sum()
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    x.grad = None
    loss.backward()
    assert torch.equal(x.grad, first)


def test_random_state_is_preserved_unless_told_otherwise() -> None:
    x = torch.ones(1000, requires_grad=True)

    def masked(value: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(value, 0.5)

    out = tapeline.checkpoint(masked, x)
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())
    x.grad = None
    out = tapeline.checkpoint(masked, x, preserve_rng_state=False)
    out.sum().backward()
    assert not torch.equal(x.grad, out.detach())


def test_early_stop_can_be_switched_off() -> None:
    reached = []

    def fn(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        reached.append(1)
        return y + 1

    x = torch.ones(3, requires_grad=True)
    tapeline.checkpoint(fn, x).sum().backward()
    assert len(reached) == 1  # the recompute stopped at the sine's input
    tapeline.checkpoint(fn, x, early_stop=False).sum().backward()
    assert len(reached) == 3
    with set_checkpoint_early_stop(False):
        out = tapeline.checkpoint(fn, x)
    out.sum().backward()
    assert len(reached) == 5


def test_a_different_recompute_is_an_error_unless_the_check_is_off() -> None:
    calls = []

    def unstable(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return (x if len(calls) % 2 else x[:1]).sin().cos()

    x = torch.ones(3, requires_grad=True)
    with pytest.raises(torch.utils.checkpoint.CheckpointError, match="different metadata"):
        tapeline.checkpoint(unstable, x).sum().backward()
    tapeline.checkpoint(torch.sin, x, debug=True).sum().backward()
    with pytest.raises(ValueError, match="determinism_check"):
        tapeline.checkpoint(torch.sin, x, determinism_check="sometimes")


def test_context_fn_wraps_forward_and_recompute() -> None:
    entered = []

    @contextmanager
    def note(name: str) -> Any:
        entered.append(name)
        yield

    x = torch.ones(3, requires_grad=True)
    tapeline.checkpoint(torch.sin, x, context_fn=lambda: (note("forward"), note("recompute"))).sum().backward()
    assert entered == ["forward", "recompute"]


def test_autocast_is_the_same_in_the_recompute() -> None:
    module, x = Counting(), torch.randn(4, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = gradients(module, x, lambda: module(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = tapeline.checkpoint(module, x)
    assert out.dtype == torch.bfloat16
    assert equal(gradients(module, x, lambda: out), expected)


def test_tensor_keywords_are_saved_like_positional_arguments() -> None:
    module, x = Counting(), torch.randn(4, 8, requires_grad=True)
    scale = torch.randn(8, requires_grad=True)
    expected = gradients(module, x, lambda: module(x, scale=scale))
    expected_scale = scale.grad.clone()
    scale.grad = None
    packed = []
    with saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
        got = gradients(module, x, lambda: tapeline.checkpoint(module, x, scale=scale))
    assert equal(got, expected)
    assert torch.equal(scale.grad, expected_scale)
    assert torch.Size([8]) in packed


Pair = namedtuple("Pair", "a b")  # noqa: PYI024


@pytest.mark.parametrize("how", ["positional", "keyword", "in a tuple", "in a tuple in a tuple", "in a named tuple"])
def test_an_input_changed_in_place_is_an_error(how: str) -> None:
    x, other = torch.ones(3, requires_grad=True), torch.ones(3)

    def fn(value: torch.Tensor, pair: Any) -> torch.Tensor:
        while isinstance(pair, tuple):
            pair = pair[0]
        return value * pair

    nested = {"keyword": other, "in a tuple": (other, 1), "in a tuple in a tuple": ((other, 2), 1)}
    if how == "positional":
        out = tapeline.checkpoint(fn, x, other)
    else:
        out = tapeline.checkpoint(fn, x, pair=nested.get(how, Pair(other, 1)))
    other.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_keywords_of_any_kind_arrive_as_they_were() -> None:
    seen: dict[str, Any] = {}

    def fn(x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        seen.update(kwargs)
        return x.sin()

    kwargs = {
        "named": Pair(torch.ones(1), 2),
        "plain": (torch.ones(2), None, "text"),
        "listed": [torch.ones(3)],
        "mapped": {"t": torch.ones(4)},
        "flag": True,
    }
    tapeline.checkpoint(fn, torch.ones(3, requires_grad=True), **kwargs).sum().backward()
    assert type(seen["named"]) is Pair
    assert seen["listed"] is kwargs["listed"]
    assert seen["mapped"] is kwargs["mapped"]
    assert seen["plain"][1:] == (None, "text")
    assert seen["flag"] is True


def test_nothing_is_held_once_the_graph_is_gone() -> None:
    module, x = Counting(), torch.randn(4, 8, requires_grad=True)
    scale = torch.randn(8)
    held = weakref.ref(scale)
    out = tapeline.checkpoint(module, x, scale=scale)
    del scale
    assert held() is not None
    out.sum().backward()
    del out
    assert held() is None


def test_the_function_can_be_given_by_name() -> None:
    x = torch.ones(3, requires_grad=True)
    tapeline.checkpoint(function=torch.sin, input=x).sum().backward()
    assert torch.equal(x.grad, x.detach().cos())


def test_an_inference_tensor_may_be_a_keyword_argument() -> None:
    """An additive mask cached by an evaluation pass; torch takes it too."""
    with torch.inference_mode():
        mask = torch.ones(3)
    x = torch.ones(3, requires_grad=True)
    tapeline.checkpoint(lambda x, mask: (x + mask).sin(), x, mask=mask).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0).cos())


def test_it_can_be_compiled() -> None:
    def fn(x: torch.Tensor, pair: Any) -> torch.Tensor:
        return (x * pair[0][0]).sin()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return tapeline.checkpoint(fn, x, pair=((scale, 1), 2)).sum()

    x, scale = torch.ones(3, requires_grad=True), torch.full((3,), 2.0)
    compiled(x, scale).backward()
    assert torch.equal(x.grad, 2 * torch.full((3,), 2.0).cos())
