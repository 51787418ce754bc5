"""What could make a replayed gradient wrong without anybody noticing, each case against the untouched model."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import tapeline
from tapeline.errors import PlanDriftError
from tapeline.ledger import Ledger
from tests.models import FAMILIES, assert_equal, token_batch

MODES = ("cheap", "recompute")
ALL_MODES = ("cheap", "recompute", "least", "segments:2")
WIDTH = 8
hidden: dict[str, Any] = {}
"""What blocks read and no guard can see."""


@pytest.fixture(autouse=True)
def _nothing_hidden() -> Iterator[None]:
    hidden.clear()
    yield
    hidden.clear()


Body = Callable[["Block", torch.Tensor], torch.Tensor]


class Block(nn.Module):
    """A block that does what a function says, with two projections, a frozen scale and a buffer."""

    def __init__(self, body: Body, number: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.rand(2 * WIDTH) + 0.5, requires_grad=False)
        self.register_buffer("shift", torch.rand(2 * WIDTH))
        self.act_fn: nn.Module = nn.GELU()
        self.body, self.number, self.factor, self.p = body, number, 1.5, 0.25

    def forward(self, x: torch.Tensor, *extra: Any) -> torch.Tensor:
        return self.body(self, x, *extra)


class Stack(nn.Module):
    def __init__(self, body: Body, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(body, number) for number in range(depth)])

    def forward(self, x: torch.Tensor, *extra: Any) -> torch.Tensor:
        x = x * 1.0
        for layer in self.layers:
            x = layer(x, *extra)
        return x


def total(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(*batch).float().pow(2).sum()


class Pair:
    """A model under a plan and its untouched twin, driven alike."""

    def __init__(self, model: nn.Module, batch: tuple[Any, ...], mode: str, loss_fn: Any, **options: Any) -> None:
        self.untouched, self.managed = model, copy.deepcopy(model)
        self.batch, self.loss_fn = batch, loss_fn
        self.session = tapeline.fit(self.managed, batch, mode=mode, loss_fn=loss_fn, measure=False, **options)

    def check(self, run: Callable[[nn.Module], Any] | None = None, seed: int = 1) -> None:
        """Both do the same; gradients, buffers, what `run` returns and the random state are equal, bit for bit."""
        got, expected = (self._run(model, run, seed) for model in (self.managed, self.untouched))
        assert_equal(got, expected)

    def change(self, change: Callable[[Any], Any]) -> None:
        for model in (self.untouched, self.managed):
            for layer in model.layers:
                change(layer)

    @property
    def seams(self) -> list[Any]:
        return list(self.session._seams.values())

    @property
    def num_drifts(self) -> int:
        return sum(seam.num_drifts for seam in self.seams)

    @property
    def num_recorded(self) -> int:
        return sum(seam.num_recorded for seam in self.seams)

    @property
    def reasons(self) -> str:
        return "; ".join(reason for seam in self.seams for reason in seam.reasons)

    @property
    def num_replayed_ops(self) -> int:
        """In all recipes that were made so far."""
        return sum(program.num_ops for recipe in self.session._library._recipes.values() for program in recipe.programs)

    def loss(self, model: nn.Module) -> torch.Tensor:
        return self.loss_fn(model, self.batch)

    def _run(self, model: nn.Module, run: Callable[[nn.Module], Any] | None, seed: int) -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        torch.manual_seed(seed)
        returned = run(model) if run is not None else self.loss(model).backward()
        result = {f"grad.{n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        result |= {f"buffer.{n}": b.clone() for n, b in model.named_buffers()}
        tensors = returned if isinstance(returned, tuple | list) else ()
        result |= {f"returned.{number}": tensor.detach().clone() for number, tensor in enumerate(tensors)}
        return result | {"random state": torch.get_rng_state()}


def outcome(pair: Pair, model: nn.Module, run: Callable[[nn.Module], Any]) -> dict[str, torch.Tensor] | str:
    """What a run gives, or its error."""
    try:
        return pair._run(model, run, 1)
    except RuntimeError as error:
        return str(error)


@contextmanager
def compared(
    body: Body | nn.Module, mode: str, *extra: Any, loss_fn: Any = total, blocks: Any = ("layers.*",), batch: Any = None
) -> Iterator[Pair]:
    model = body if isinstance(body, nn.Module) else Stack(body)
    given = batch if batch is not None else (torch.randn(4, 6, WIDTH), *extra)
    pair = Pair(model, given, mode, loss_fn, blocks=list(blocks) if blocks else None)
    try:
        yield pair
    finally:
        pair.session.remove()


def plain(block: Block, x: torch.Tensor) -> torch.Tensor:
    h = block.act_fn(block.up(x) * block.scale + block.shift)
    return x + block.down(F.dropout(h.sin(), block.p, block.training)) * block.factor


@pytest.mark.parametrize("mode", ALL_MODES)
def test_the_plain_block_is_replayed_exactly(mode: str) -> None:
    with compared(plain, mode) as pair:
        for seed in range(3):
            pair.check(seed=seed)
        assert pair.num_replayed_ops
        assert pair.num_recorded == 3
        assert not pair.num_drifts
        assert not pair.session._library.failures


# -- 1. sources that change between forward and backward -----------------------------------------------------------


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("what", ["scale", "shift", "up.weight", "down.weight"])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_source_changed_before_backward_is_an_error_or_makes_no_difference(
    mode: str, what: str, *, is_first: bool
) -> None:
    def run(model: nn.Module) -> None:
        loss = pair.loss(model)
        part, _, name = what.rpartition(".")
        with torch.no_grad():
            getattr(model.layers[1].get_submodule(part), name).mul_(2)
        loss.backward()

    with compared(plain, mode) as pair:
        if not is_first:
            pair.check()
        got, expected = (outcome(pair, model, run) for model in (pair.managed, pair.untouched))
        if isinstance(got, str):
            assert "modified" in got
        else:
            assert isinstance(expected, dict)
            assert_equal(got, expected)


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("is_first", [True, False])
def test_a_block_input_changed_before_backward_is_an_error_where_a_replay_starts_from_it(
    mode: str, *, is_first: bool
) -> None:
    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        hidden[block.number] = x
        return (block.down((x * 3.0).sin().repeat(1, 1, 2)) * block.scale[:WIDTH]).sin()

    def run(model: nn.Module) -> None:
        loss = pair.loss(model)
        with torch.no_grad():
            hidden[1].add_(1)
        loss.backward()

    with compared(body, mode) as pair:
        if not is_first:
            pair.check()
        got, expected = (outcome(pair, model, run) for model in (pair.managed, pair.untouched))
        assert isinstance(expected, dict)
        if isinstance(got, str):
            assert "modified" in got
        else:
            assert_equal(got, expected)


@pytest.mark.parametrize("mode", ALL_MODES)
def test_a_source_that_nothing_needs_may_change(mode: str) -> None:
    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        return block.down((block.up(x) * 1.1).sin()) + block.shift[:WIDTH]

    def run(model: nn.Module) -> None:
        loss = pair.loss(model)
        model.layers[2].shift.add_(1)
        loss.backward()

    with compared(body, mode) as pair:
        pair.check()
        pair.change(lambda layer: layer.shift.fill_(0.5))
        pair.check(run)


@pytest.mark.parametrize("mode", MODES)
def test_a_saved_tensor_overwritten_inside_its_block_is_an_error_from_the_first_call_on(mode: str) -> None:
    """As in the untouched model; hooks switch autograd's own check off."""

    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        y = block.up(x).exp()
        z = y * 2.0
        if hidden.get("overwrites"):
            y.mul_(3)
        return block.down(z)

    for is_first in (True, False):
        hidden.clear()
        with compared(body, mode) as pair:
            hidden["overwrites"] = True
            for model in (pair.untouched, *[pair.managed] * (1 if is_first else 2)):
                loss = pair.loss(model)
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    loss.backward()


@pytest.mark.parametrize("mode", MODES)
def test_parameters_with_new_data_are_found_in_the_next_step(mode: str) -> None:
    def renew(layer: Block) -> None:
        torch.manual_seed(layer.number)
        layer.up.weight.data = torch.randn_like(layer.up.weight)
        layer.scale = nn.Parameter(torch.rand_like(layer.scale), requires_grad=False)

    with compared(plain, mode) as pair:
        pair.check()
        pair.change(renew)
        pair.check()


@pytest.mark.parametrize("mode", MODES)
def test_arguments_made_in_inference_mode(mode: str) -> None:
    """A mask or rotary table of an evaluation: it has no version."""

    def body(block: Block, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return block.down((block.up(x) + bias).sin())

    with compared(body, mode, torch.zeros(2 * WIDTH)) as pair:
        with torch.inference_mode():
            pair.batch = (pair.batch[0], torch.rand(2 * WIDTH))
        pair.check()
        pair.check()


# -- 2. numbers ----------------------------------------------------------------------------------------------------


def change_factor(layer: Block) -> None:
    layer.factor = 2.5


def change_dropout(layer: Block) -> None:
    layer.p = 0.5


def change_activation(layer: Block) -> None:
    layer.act_fn = nn.GELU(approximate="tanh")


CHANGES = [change_factor, change_dropout, change_activation]


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_steps_counts_from_then_on(mode: str, change: Callable[[Any], None]) -> None:
    with compared(plain, mode) as pair:
        pair.check()
        pair.change(change)
        pair.check()
        pair.check(seed=2)
        assert not pair.num_drifts


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_before_backward_counts_in_the_next_forward_only(mode: str, change: Callable[[Any], None]) -> None:
    def run(model: nn.Module) -> None:
        loss = pair.loss(model)
        for layer in model.layers:
            change(layer)
        loss.backward()

    with compared(plain, mode) as pair:
        pair.check()
        pair.check(run)
        pair.check(seed=3)


@pytest.mark.parametrize("mode", MODES)
def test_activation_mode_back_and_forth_reuses_what_was_recorded(mode: str) -> None:
    with compared(plain, mode) as pair:
        first, second = nn.GELU(), nn.GELU(approximate="tanh")
        counts = []
        for number in range(8):
            pair.change(lambda layer, number=number: setattr(layer, "act_fn", (first, second)[number % 2]))
            pair.check()
            counts.append(pair.num_recorded)
        assert counts[3] == counts[-1]


class Scale:
    """Something that can be called and has a number, and is no module."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.value).sin()


@dataclasses.dataclass
class Settings:
    value: float


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: float) -> None:
        self.value = value


def np_number(value: float) -> Any:
    import numpy as np

    return np.float32(value)


HOLDERS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], float]]] = {
    "dict": (lambda v: {"default": v}, lambda h: h["default"]),
    "nested dict": (lambda v: {"a": {"b": v}}, lambda h: h["a"]["b"]),
    "list": (lambda v: [v, 1], lambda h: h[0]),
    "list of lists": (lambda v: [[v], 1], lambda h: h[0][0]),
    "tuple of tuples": (lambda v: ((v,), 1), lambda h: h[0][0]),
    "list of dicts": (lambda v: [{"a": v}], lambda h: h[0]["a"]),
    "object": (Settings, lambda h: h.value),
    "slots": (Slotted, lambda h: h.value),
    "callable": (Scale, lambda h: h.value),
    "namespace": (lambda v: types.SimpleNamespace(value=v), lambda h: h.value),
    "partial": (lambda v: functools.partial(float, v), lambda h: h()),
    "numpy": (np_number, float),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", HOLDERS)
def test_numbers_are_seen_wherever_they_hang(mode: str, kind: str) -> None:
    make, read = HOLDERS[kind]

    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        return block.down((block.up(x).sin() * read(block.settings)).sin())

    model = Stack(body)
    for layer in model.layers:
        layer.settings = make(1.5)
    with compared(model, mode) as pair:
        pair.check()
        pair.change(lambda layer: setattr(layer, "settings", make(2.5)))
        pair.check()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["dict", "list", "list of lists", "list of dicts", "object", "slots", "callable"])
def test_numbers_changed_where_they_are_kept_are_seen(mode: str, kind: str) -> None:
    make, read = HOLDERS[kind]

    def put(layer: Block) -> None:
        holder = layer.settings
        if hasattr(holder, "value"):
            holder.value = 2.5
        elif kind == "dict":
            holder["default"] = 2.5
        elif kind == "list":
            holder[0] = 2.5
        else:
            holder[0][0 if kind == "list of lists" else "a"] = 2.5

    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        return block.down((block.up(x).sin() * read(block.settings)).sin())

    model = Stack(body)
    for layer in model.layers:
        layer.settings = make(1.5)
    with compared(model, mode) as pair:
        pair.check()
        pair.change(put)
        pair.check()


class Sized(Block):
    value = 1.5


@pytest.mark.parametrize("mode", MODES)
def test_a_number_of_the_class_is_seen(mode: str) -> None:
    def body(block: Any, x: torch.Tensor) -> torch.Tensor:
        return block.down((block.up(x).sin() * block.value).sin())

    model = Stack(body, 0)
    model.layers.extend([Sized(body, number) for number in range(3)])
    try:
        with compared(model, mode) as pair:
            pair.check()
            Sized.value = 2.5
            pair.check()
    finally:
        Sized.value = 1.5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["number", "object", "slots", "namespace", "slice", "numpy", "set", "list of lists"])
def test_numbers_among_the_arguments_are_seen(mode: str, kind: str) -> None:
    makes: dict[str, Callable[[int], Any]] = {
        "number": float,
        "slice": lambda v: slice(v, v + WIDTH),
        "set": lambda v: frozenset([v]),
    }
    make = makes[kind] if kind in makes else HOLDERS[kind][0]

    def body(block: Block, x: torch.Tensor, given: Any) -> torch.Tensor:
        h = block.up(x).sin()
        if isinstance(given, slice):
            h = h[..., given].repeat(1, 1, 2)
        elif isinstance(given, frozenset):
            h = h * next(iter(given))
        else:
            h = h * (float(given) if kind == "number" else HOLDERS[kind][1](given))
        return block.down(h.sin())

    with compared(body, mode, make(1)) as pair:
        pair.check()
        pair.batch = (pair.batch[0], make(3))
        pair.check()


@pytest.mark.parametrize("mode", MODES)
def test_functions_among_the_arguments_are_told_apart_even_at_the_same_address(mode: str) -> None:
    def body(block: Block, x: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return block.down(change(block.up(x).sin()).sin())

    def run(model: nn.Module) -> None:
        total(model, (pair.batch[0], functools.partial(torch.mul, other=float(hidden["factor"])))).backward()

    hidden["factor"] = 1
    with compared(body, mode, functools.partial(torch.mul, other=1.0)) as pair:
        for factor in range(1, 12):
            hidden["factor"] = factor
            pair.check(run)
            assert pair.num_replayed_ops


@pytest.mark.parametrize("mode", MODES)
def test_lora_scaling_counts_as_it_was_in_the_forward(mode: str) -> None:
    tiny = FAMILIES["llama_lora"]()

    def scale(model: nn.Module, by: float) -> None:
        for module in model.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling = {name: value * by for name, value in module.scaling.items()}

    def run(model: nn.Module) -> None:
        loss = pair.loss(model)
        scale(model, 3.0)
        loss.backward()

    with compared(tiny.model, mode, loss_fn=tiny.loss_fn, blocks=None, batch=tiny.batch) as pair:
        pair.check()
        for model in (pair.untouched, pair.managed):
            scale(model, 2.0)
        pair.check()
        pair.check(run)
        pair.check()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "change",
    [
        lambda attention: setattr(attention, "scaling", 0.7),
        lambda attention: setattr(attention, "attention_dropout", 0.4),
        lambda attention: setattr(attention.config, "_attn_implementation", "eager"),
    ],
    ids=["scaling", "dropout", "implementation"],
)
def test_attention_settings_changed_between_steps(mode: str, change: Callable[[Any], None]) -> None:
    tiny = FAMILIES["llama"]()
    with compared(tiny.model, mode, loss_fn=tiny.loss_fn, blocks=None, batch=tiny.batch) as pair:
        pair.check()
        for model in (pair.untouched, pair.managed):
            for layer in model.model.layers:
                change(layer.self_attn)
        pair.check()
        pair.check(seed=5)


@pytest.mark.parametrize("mode", MODES)
def test_adapters_switched_off_and_on(mode: str) -> None:
    tiny = FAMILIES["llama_lora"]()
    with compared(tiny.model, mode, loss_fn=tiny.loss_fn, blocks=None, batch=tiny.batch) as pair:
        pair.check()
        for switch in ("disable_adapter_layers", "enable_adapter_layers"):
            for model in (pair.untouched, pair.managed):
                getattr(model.base_model, switch)()
                next(p for n, p in model.named_parameters() if "embed_tokens" in n).requires_grad_(True)
            pair.check()


@pytest.mark.parametrize("mode", MODES)
def test_freezing_and_training_mode_between_steps(mode: str) -> None:
    with compared(plain, mode) as pair:
        pair.check()
        pair.change(lambda layer: layer.up.requires_grad_(layer.number > 0))
        pair.check()
        pair.change(lambda layer: layer.train(layer.number == 1))
        pair.check()
        pair.change(lambda layer: layer.train().requires_grad_(True))
        pair.check()


# -- tapes that look alike -----------------------------------------------------------------------------------------


def make_function(factor: float) -> Any:
    """Classes of one name with a number inside."""

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            y = (x * factor).sin()
            ctx.save_for_backward((x * factor).cos())
            return y

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * ctx.saved_tensors[0] * factor

    return Scaled


@pytest.mark.parametrize("mode", ALL_MODES)
def test_functions_of_one_name_with_other_numbers_are_told_apart(mode: str) -> None:
    functions = [make_function(1.0 + number) for number in range(3)]

    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        return block.down(functions[block.number].apply(block.up(x)).sin())

    with compared(body, mode) as pair:
        pair.check()
        pair.check()
        assert pair.num_replayed_ops


@pytest.mark.parametrize("mode", MODES)
def test_constants_that_print_alike_are_told_apart(mode: str) -> None:
    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        return block.down((block.up(x).sin() * torch.tensor(1.5 + 1e-6 * block.number)).sin())

    with compared(body, mode) as pair:
        pair.check()
        pair.check()
        assert pair.num_replayed_ops


def other_half(b: Block, h: torch.Tensor) -> torch.Tensor:
    return h[..., :WIDTH] if b.number == 0 else h[..., WIDTH:]


def other_order(b: Block, h: torch.Tensor) -> torch.Tensor:
    square = h.flatten()[: WIDTH * WIDTH].view(WIDTH, WIDTH)
    return (square if b.number == 0 else square.t()).repeat(3, 1).view(4, 6, WIDTH)


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("look", [other_half, other_order])
def test_blocks_that_look_at_other_parts_do_not_share_a_recipe(mode: str, look: Body) -> None:
    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        h = block.up(x).sin()
        return block.down((look(block, h) * 1.5).repeat(1, 1, 2).sin())

    with compared(body, mode) as pair:
        pair.check()
        pair.check()


@pytest.mark.parametrize("mode", MODES)
def test_blocks_with_other_numbers_do_not_share_a_recipe(mode: str) -> None:
    model = Stack(plain)
    for layer in model.layers:
        layer.factor = 1.0 + 1e-9 * layer.number
        layer.p = 0.1 * layer.number
    with compared(model, mode) as pair:
        pair.check()
        pair.check()


# -- 4. autocast ---------------------------------------------------------------------------------------------------


def bf16() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("mode", ALL_MODES)
def test_autocast_on_and_off_between_steps(mode: str) -> None:
    def cast(model: nn.Module) -> None:
        with bf16():
            loss = pair.loss(model)
        loss.backward()

    with compared(plain, mode) as pair:
        for run in (None, cast, None, cast, cast):
            pair.check(run)
        assert pair.num_recorded == 2 * 3
        assert not pair.num_drifts


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("name", ["llama", "albert", "t5"])
def test_two_forwards_in_one_autocast_context_with_optimizer_steps_between_contexts(mode: str, name: str) -> None:
    tiny = FAMILIES[name]()
    with compared(tiny.model, mode, loss_fn=tiny.loss_fn, blocks=None, batch=tiny.batch) as pair:
        optimizers = {model: torch.optim.SGD(model.parameters(), lr=0.01) for model in (pair.untouched, pair.managed)}

        def run(model: nn.Module) -> None:
            with bf16():
                losses = [pair.loss(model) for _ in range(2)]
            sum(losses).backward()
            optimizers[model].step()

        for seed in range(3):
            pair.check(run, seed)
        assert not pair.num_drifts


@pytest.mark.parametrize("mode", MODES)
def test_backward_inside_the_autocast_context(mode: str) -> None:
    with compared(plain, mode) as pair:
        optimizers = {model: torch.optim.SGD(model.parameters(), lr=0.01) for model in (pair.untouched, pair.managed)}

        def run(model: nn.Module) -> None:
            with bf16():
                pair.loss(model).backward()
            optimizers[model].step()

        for seed in range(4):
            pair.check(run, seed)


@pytest.mark.parametrize("mode", MODES)
def test_an_optimizer_step_inside_one_autocast_context(mode: str) -> None:
    """The untouched model goes on with the stale copies in the cache; a replay would cast the new weights: an error."""
    with compared(plain, mode) as pair:
        optimizers = {model: torch.optim.SGD(model.parameters(), lr=0.01) for model in (pair.untouched, pair.managed)}

        def run(model: nn.Module) -> None:
            with bf16():
                for _ in range(3):
                    model.zero_grad()
                    pair.loss(model).backward()
                    optimizers[model].step()

        with pytest.raises(PlanDriftError, match="autocast context"):
            pair.check(run)


@pytest.mark.parametrize("mode", MODES)
def test_an_evaluation_before_training_in_one_autocast_context(mode: str) -> None:
    def run(model: nn.Module) -> None:
        with bf16():
            with torch.no_grad():
                pair.loss(model)
            pair.loss(model).backward()

    with compared(plain, mode) as pair:
        pair.check(run)
        pair.check()
        pair.check(run)


@pytest.mark.parametrize("mode", MODES)
def test_autocast_inside_a_block(mode: str) -> None:
    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        with bf16():
            h = block.up(x).sin()
        with torch.autocast("cpu", enabled=False):
            return block.down(h.float().cos()).sin()

    def cast(model: nn.Module) -> None:
        with bf16():
            loss = pair.loss(model)
        loss.backward()

    with compared(body, mode) as pair:
        for run in (None, cast, None):
            pair.check(run)


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("has_tape", [True, False])
def test_a_block_with_an_autocast_of_its_own_takes_the_dtype_of_the_one_around_it(mode: str, has_tape: bool) -> None:
    """Also of one that is switched off again for the call."""

    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        if hidden.get("reads"):
            x.detach().sum().item()
        with torch.autocast("cpu"):
            h = block.up(x)
        return block.down(h.float().sin())

    def under(dtype: torch.dtype) -> Callable[[nn.Module], None]:
        def run(model: nn.Module) -> None:
            with torch.autocast("cpu", dtype=dtype), torch.autocast("cpu", enabled=False):
                loss = pair.loss(model)
            loss.backward()

        return run

    hidden.clear()
    with compared(body, mode) as pair:
        hidden["reads"] = not has_tape
        for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
            pair.check(under(dtype))
        assert not pair.num_drifts
    hidden.clear()


# -- 5. what is in force during backward ---------------------------------------------------------------------------


class AddsOne(TorchDispatchMode):
    """Somebody's mode that changes products."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        is_hit = func is torch.ops.aten.sin.default
        return out + 1 if is_hit else out


class DoublesSin(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out * 2 if getattr(func, "__name__", "") == "sin" else out


def undifferentiated(block: Block, x: torch.Tensor) -> torch.Tensor:
    """Its backward calls cos, never sin, so that only a replay does."""
    return block.down((block.up(x).sin() * block.scale).sin() * block.factor + 1)


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize(
    "context",
    [AddsOne, DoublesSin, bf16, lambda: torch.autocast("cpu", torch.float16), lambda: torch.device("meta")],
    ids=["dispatch mode", "function mode", "bfloat16", "float16", "default device"],
)
def test_what_is_in_force_in_backward_does_not_reach_the_replay(mode: str, context: Callable[[], Any]) -> None:
    def run(model: nn.Module) -> None:
        loss = pair.loss(model)
        with context():
            loss.backward()

    with compared(undifferentiated, mode) as pair:
        pair.check()
        pair.check(run)
        pair.check(run)
        assert pair.num_replayed_ops


@contextmanager
def float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("kind", ["arange", "zeros", "full", "integer product", "division"])
def test_the_default_dtype_in_backward_does_not_reach_the_replay(mode: str, kind: str) -> None:
    def table() -> torch.Tensor:
        numbers = torch.arange(2 * WIDTH)
        return {
            "arange": lambda: torch.arange(0.0, 2 * WIDTH),
            "zeros": lambda: torch.zeros(2 * WIDTH) + 0.3,
            "full": lambda: torch.full((2 * WIDTH,), 0.3),
            "integer product": lambda: numbers * 0.3,
            "division": lambda: numbers / 7,
        }[kind]()

    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        return block.down((block.up(x).sin() * table()).sin())

    def run(model: nn.Module) -> None:
        loss = pair.loss(model)
        with float64():
            loss.backward()

    with compared(body, mode) as pair:
        pair.check()
        pair.check(run)
        assert pair.num_replayed_ops


@pytest.mark.parametrize("mode", MODES)
def test_a_setting_of_the_kernels_changed_before_backward_is_an_error(mode: str) -> None:
    with compared(undifferentiated, mode) as pair:
        loss = pair.loss(pair.managed)
        torch.use_deterministic_algorithms(True)
        try:
            with pytest.raises(RuntimeError, match="changed between forward and backward"):
                loss.backward()
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("mode", MODES)
def test_modes_in_force_in_forward_count(mode: str) -> None:
    """A function mode that changes the forward changes the untouched model alike."""

    def run(model: nn.Module) -> None:
        with DoublesSin():
            loss = pair.loss(model)
        loss.backward()

    with compared(undifferentiated, mode) as pair:
        for way in (None, run, None, run):
            pair.check(way)


# -- 6. masks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("name", ["llama", "gemma3", "t5"])
def test_masks_come_and_go_across_steps(mode: str, name: str) -> None:
    tiny = FAMILIES[name]()
    ones, padded = token_batch(), token_batch(padding=9)
    without = {key: value for key, value in ones.items() if key != "attention_mask"}
    with compared(tiny.model, mode, loss_fn=tiny.loss_fn, blocks=None, batch=tiny.batch) as pair:
        for batch in (ones, padded, without, padded, ones, token_batch(1, 17), token_batch(padding=20)):
            pair.batch = batch
            pair.check()
        assert not pair.num_drifts


# -- 7. what no guard can see --------------------------------------------------------------------------------------


def branching(block: Block, x: torch.Tensor) -> torch.Tensor:
    h = block.up(x).sin()
    if hidden.get("branch") == "more":
        h = (h * 1.5).sin() * h
    elif hidden.get("branch") == "wider":
        h = torch.cat([h, h], -1).sin()[..., WIDTH : 3 * WIDTH]
    return block.down(h.cos())


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("branch", ["more", "wider"])
def test_a_call_that_takes_another_way_is_recovered(mode: str, branch: str) -> None:
    with compared(branching, mode) as pair:
        pair.check()
        hidden["branch"] = branch
        pair.check()
        assert pair.num_drifts == 3
        for number in range(10):
            hidden["branch"] = branch if number % 2 else None
            pair.check()
        assert [seam.num_drifts for seam in pair.seams] == [3, 3, 3]
        num_recorded = pair.num_recorded
        for way in (branch, None, branch):
            hidden["branch"] = way
            pair.check()
        assert pair.num_recorded == num_recorded
        assert "differ" in pair.reasons


def test_a_hidden_change_that_a_rerun_meets_too_late_is_an_error() -> None:
    with compared(branching, "recompute") as pair:
        pair.check()
        hidden["branch"] = "wider"
        loss = pair.loss(pair.managed)
        hidden.clear()
        with pytest.raises((PlanDriftError, RuntimeError)):
            loss.backward()


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("what", ["buffer", "frozen parameter", "input"])
def test_a_way_not_seen_before_that_changes_a_source_is_never_rerun_on_what_it_left(mode: str, what: str) -> None:
    """Exact, or an error; a rerun that starts from the changed source would be neither."""

    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        y = (x * 1.5).sin() if what == "input" else x
        h = (block.up(y) * block.scale + block.shift).sin()
        out = block.down((h * block.scale + block.shift).cos())
        if hidden.get("writes"):
            with torch.no_grad():
                {"buffer": block.shift, "frozen parameter": block.scale, "input": x}[what].add_(0.5)
        return out

    with compared(body, mode) as pair:
        pair.check()
        hidden["writes"] = True
        try:
            expected = pair._run(pair.untouched, None, 1)
        except RuntimeError as error:
            expected = str(error)
        try:
            got = pair._run(pair.managed, None, 1)
        except (RuntimeError, PlanDriftError):
            return
        assert isinstance(expected, dict)
        assert_equal(got, expected)


@pytest.mark.parametrize("mode", ALL_MODES)
def test_a_block_that_keeps_a_running_mean_and_takes_another_way(mode: str) -> None:
    """Running it again would move the mean twice, and start from the moved one."""

    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        h = (block.up(x) * 1.1).sin() * block.shift.clone()
        with torch.no_grad():
            block.shift.lerp_(h.mean((0, 1)), 0.1)
        if hidden.get("branch"):
            h = (h * 1.5).sin()
        return block.down(h.cos())

    with compared(body, mode) as pair:
        pair.check()
        pair.check()
        hidden["branch"] = True
        expected = pair._run(pair.untouched, None, 1)
        try:
            got = pair._run(pair.managed, None, 1)
        except (RuntimeError, PlanDriftError):
            return
        assert_equal(got, expected)


@pytest.mark.parametrize("mode", MODES)
def test_layers_dropped_at_random(mode: str) -> None:
    """Stochastic depth decided by Python's own generator."""
    import random

    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        if random.random() < 0.5:
            return x + block.down(block.up(x).sin())
        return x + block.down(block.up(x).sin().cos())

    with compared(body, mode) as pair:

        def run(model: nn.Module) -> None:
            random.seed(hidden["seed"])
            pair.loss(model).backward()

        for seed in range(6):
            hidden["seed"] = seed
            pair.check(run)


@pytest.mark.parametrize("mode", MODES)
def test_numbers_from_the_generators_of_python_and_numpy(mode: str) -> None:
    """A jitter drawn outside torch is another number in every call."""
    import random

    import numpy as np

    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        jitter = random.uniform(0.9, 1.1) * float(np.random.rand())
        return x + block.down((block.up(x).sin() * jitter).sin())

    with compared(body, mode) as pair:

        def run(model: nn.Module) -> None:
            random.seed(hidden["seed"])
            np.random.seed(hidden["seed"])
            pair.loss(model).backward()

        for seed in range(3):
            hidden["seed"] = seed
            pair.check(run)


# -- 8. kernels out of sight ---------------------------------------------------------------------------------------


def fill(out: torch.Tensor, content: torch.Tensor) -> None:
    """Write as a kernel does that no dispatcher shows, and that a plan without data does not run."""
    if not isinstance(out, FakeTensor) and not isinstance(content, FakeTensor):
        out.detach().numpy()[...] = content.detach().clone().numpy()


class Norm(torch.autograd.Function):
    """RMS norm by a kernel out of sight, which saves its output, and a statistic."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, name: str) -> torch.Tensor:
        out, rstd = torch.empty_like(x), torch.empty(*x.shape[:-1], 1)
        fill(rstd, (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt())
        fill(out, x * rstd * weight)
        ctx.save_for_backward(x, weight, rstd, out)
        ctx.eps, ctx.name = eps, name
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight, rstd, out = ctx.saved_tensors
        assert ctx.name == "norm"
        normed = x * rstd
        g = grad * weight
        dx = rstd * (g - normed * (g * normed).mean(-1, keepdim=True)) + 0 * out
        return dx, (grad * normed).sum((0, 1)), None, None


class MaxAndIndex(torch.autograd.Function):
    """Two outputs, one of them not differentiable; an attribute on the context."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        value, index = torch.empty(*x.shape[:-1], 1), torch.empty(*x.shape[:-1], 1, dtype=torch.long)
        fill(index, x.argmax(-1, keepdim=True))
        fill(value, x.detach().gather(-1, index))
        ctx.mark_non_differentiable(index)
        ctx.index, ctx.width = index, x.shape[-1]
        ctx.save_for_backward(value)
        return value, index

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> torch.Tensor:
        out = torch.zeros(*grad.shape[:-1], ctx.width)
        return out.scatter(-1, ctx.index, grad * (1 + 0 * ctx.saved_tensors[0]))


class SavesWhatIsNeeded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        saved = [x.sin()] if ctx.needs_input_grad[1] else []
        saved += [weight.exp()] if ctx.needs_input_grad[0] else []
        ctx.save_for_backward(*saved)
        out = torch.empty_like(x)
        fill(out, x.sin() * weight.exp())
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        saved = list(ctx.saved_tensors)
        for_weight = (grad * saved.pop(0)).sum((0, 1)) if ctx.needs_input_grad[1] else None
        for_x = grad * saved.pop(0) if ctx.needs_input_grad[0] else None
        return for_x, for_weight


class WithSetup(torch.autograd.Function):
    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        fill(out, x.exp())
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: torch.Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * ctx.saved_tensors[0]


class Drops(torch.autograd.Function):
    """Draws inside."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        mask = torch.rand_like(x) > 0.3
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * ctx.saved_tensors[0]


class Matrix(torch.autograd.Function):
    """Obeys autocast inside."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = x @ weight.t()
        ctx.save_for_backward(x, weight, out.sin())
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight, sine = ctx.saved_tensors
        grad = grad * sine
        return (grad.float() @ weight.float()).to(x.dtype), grad.flatten(0, 1).float().t() @ x.flatten(0, 1).float()


class Adds(torch.autograd.Function):
    """Writes into its argument."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(x)
        ctx.save_for_backward(y.cos())
        return x.add_(y.sin())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad, grad * ctx.saved_tensors[0]


class Same(torch.autograd.Function):
    """Returns its argument; saves a view of it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x[..., :1])
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * (1 + ctx.saved_tensors[0])


early_bound = Norm.apply

FUNCTIONS: dict[str, Body] = {
    "norm": lambda b, x: b.down(Norm.apply(b.up(x), b.scale, 1e-6, "norm").sin()),
    "bound early": lambda b, x: b.down(early_bound(b.up(x), b.scale, 1e-6, "norm").sin()),
    "norm of the input": lambda b, x: b.down(b.up(Norm.apply(x, b.down.bias, 1e-6, "norm")).sin()),
    "several outputs": lambda b, x: b.down(b.up(x) * MaxAndIndex.apply(b.up(x).sin())[0].sin()),
    "what is needed": lambda b, x: b.down(SavesWhatIsNeeded.apply(b.up(x).sin(), b.scale).cos()),
    "what is needed by the weight": lambda b, x: b.down(SavesWhatIsNeeded.apply(b.up(x).sin(), b.up.bias).cos()),
    "setup": lambda b, x: b.down(WithSetup.apply(b.up(x)).sin()),
    "twice": lambda b, x: b.down(WithSetup.apply(WithSetup.apply(b.up(x).sin())).sin()),
    "random": lambda b, x: F.dropout(b.down(F.dropout(Drops.apply(b.up(x).sin()).cos(), 0.2)), 0.1),
    "writes": lambda b, x: b.down(Adds.apply(b.up(x).sin() * 1.0, b.up(x)).sin()),
    "same": lambda b, x: b.down(Same.apply(b.up(x).sin()).cos()),
    "matrix": lambda b, x: Matrix.apply(b.up(x).sin(), b.down.weight).cos(),
}


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_functions_that_nobody_can_see_into(mode: str, kind: str) -> None:
    model = Stack(FUNCTIONS[kind])
    with compared(model, mode) as pair:
        for seed in range(3):
            pair.check(seed=seed)
        assert pair.num_replayed_ops
        assert not pair.num_drifts


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["random", "matrix", "setup"])
def test_functions_under_autocast(mode: str, kind: str) -> None:
    def run(model: nn.Module) -> None:
        with bf16():
            loss = pair.loss(model)
        loss.backward()

    if kind == "setup":
        body: Body = lambda b, x: b.down(WithSetup.apply(b.up(x).float()).sin())  # noqa: E731
    else:
        body = FUNCTIONS[kind]
    with compared(body, mode) as pair:
        for way in (None, run, run):
            pair.check(way)


def by_numpy(x: torch.Tensor, *, start: str) -> torch.Tensor:
    """No Function: the gradient goes around it."""
    content = x.detach().cos()
    if start == "empty":
        out = torch.empty_like(content)
        fill(out, content)
    elif start == "zeros":
        out = torch.zeros_like(content)
        fill(out, content)
    elif start == "half":
        out = torch.empty(*content.shape[:-1], 2 * content.shape[-1])
        out[..., : content.shape[-1]] = content.sin()
        fill(out[..., content.shape[-1] :], content)
        out = out[..., content.shape[-1] :]
    else:
        out = content.clone()
        fill(out, content + 1)
    return out


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("start", ["empty", "zeros", "half", "copy"])
@pytest.mark.parametrize("place", ["inside", "output"])
def test_memory_filled_out_of_sight(mode: str, start: str, place: str) -> None:
    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        if place == "output":
            return (block.down(block.up(x).sin()) * 1.1).sin() * by_numpy(x, start=start)
        h = block.up(x)
        return block.down((h * by_numpy(h, start=start)).sin())

    with compared(body, mode) as pair:
        for seed in range(3):
            pair.batch = (torch.randn(4, 6, WIDTH),)
            pair.check(seed=seed)
        assert not pair.num_drifts


@pytest.mark.parametrize("mode", MODES)
def test_custom_ops(mode: str) -> None:
    with compared(lambda b, x: b.down(twice_sin(b.up(x)).cos()), mode) as pair:
        pair.check()
        pair.check()
        assert pair.num_replayed_ops


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("kind", ["op", "function"])
def test_products_inside_a_python_kernel_follow_autocast(mode: str, kind: str) -> None:
    """As in the 4-bit products of bitsandbytes on a CPU; a dispatch mode around the op would switch autocast off for them."""

    def run(model: nn.Module) -> None:
        with bf16(), Ledger():
            loss = pair.loss(model)
        loss.backward()

    def body(b: Block, x: torch.Tensor) -> torch.Tensor:
        h = b.up(x).float().sin()
        product = plain_product(h, b.down.weight) if kind == "op" else PlainProduct.apply(h, b.down.weight)
        return product.sin()

    with compared(body, mode) as pair:
        for way in (run, run, None, run):
            pair.check(way)
        assert not pair.session.report().kept_instead


@torch.library.custom_op("tapeline_tests::plain_product", mutates_args=())
def plain_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight).float()


@plain_product.register_fake
def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


plain_product.register_autograd(
    lambda ctx, grad: (grad @ ctx.saved_tensors[1], grad.flatten(0, -2).T @ ctx.saved_tensors[0].flatten(0, -2)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class PlainProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight).float()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.flatten(0, -2).T @ x.flatten(0, -2)


@torch.library.custom_op("tapeline_tests::twice_sin", mutates_args=())
def twice_sin(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    fill(out, 2 * x.sin())
    return out


@twice_sin.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: Any, output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[0].cos())


def _grad(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
    return 2 * grad * ctx.saved_tensors[0]


twice_sin.register_autograd(_grad, setup_context=_save)


@torch.library.custom_op("tapeline_tests::by_pointer", mutates_args=())
def by_pointer(x: torch.Tensor) -> torch.Tensor:
    """An op whose kernel leaves torch, as those that call into a library of their own do."""
    assert x.data_ptr()
    return torch.from_numpy(x.detach().numpy() * 2.0)


by_pointer.register_fake(torch.empty_like)
by_pointer.register_autograd(lambda ctx, grad: 2 * grad)


@pytest.mark.parametrize("mode", MODES)
def test_what_the_kernel_of_an_op_does_is_its_own_business(mode: str) -> None:
    with compared(lambda b, x: b.down(by_pointer(b.up(x)).sin()), mode) as pair:
        for seed in range(2):
            pair.check(seed=seed)
        assert pair.num_replayed_ops
        assert not any(seam.reasons for seam in pair.seams)


class Quantised:
    """What belongs to a weight: its scales, and a number that its kernel needs."""

    def __init__(self, scale: torch.Tensor) -> None:
        self.inner = types.SimpleNamespace(scale=scale)
        self.bits = 4


class Dequantising(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, state: Quantised) -> torch.Tensor:
        ctx.weight, ctx.state = weight, state
        return x @ (weight * state.inner.scale * state.bits)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad @ (ctx.weight * ctx.state.inner.scale * ctx.state.bits).t(), None, None


def quantised_stack() -> Stack:
    model = Stack(lambda b, x: x + b.down(Dequantising.apply(b.up(x), b.mix, b.state).sin()))
    for layer in model.layers:
        layer.mix = nn.Parameter(torch.rand(2 * WIDTH, 2 * WIDTH) - 0.5, requires_grad=False)
        layer.state = Quantised(torch.rand(2 * WIDTH))
    return model


@pytest.mark.parametrize("mode", MODES)
def test_functions_that_are_given_the_state_of_a_weight_are_replayed(mode: str) -> None:
    with compared(quantised_stack(), mode) as pair:
        for seed in range(2):
            pair.check(seed=seed)
        assert pair.num_replayed_ops
        tapes = [known.tape for seam in pair.seams[1:] for known in seam.records.classes.values()]
        assert len({tape.digest for tape in tapes}) == 1

        def fewer_bits(layer: Any) -> None:
            layer.state.bits = 2

        pair.change(fewer_bits)
        pair.check()
        pair.check()
        pair.change(lambda layer: setattr(layer, "state", Quantised(torch.full((2 * WIDTH,), 0.3))))
        pair.check()
        assert not pair.num_drifts


@pytest.mark.parametrize("mode", ["recompute", "segments:2"])
def test_a_scale_of_a_weight_that_changes_before_backward_is_an_error(mode: str) -> None:
    with compared(quantised_stack(), mode) as pair:
        pair.check()
        loss = pair.loss(pair.managed)
        with torch.no_grad():
            pair.managed.layers[1].state.inner.scale.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# -- 9. writes, views, several outputs -----------------------------------------------------------------------------


def own_dropout(b: Block, x: torch.Tensor) -> torch.Tensor:
    h = b.up(x).sin()
    mask = torch.empty_like(h).bernoulli_(0.7).div_(0.7)
    return b.down((h * mask).cos() * mask)


def in_place(b: Block, x: torch.Tensor) -> torch.Tensor:
    h = b.up(x).relu_()
    h = (h * 1.5).add_(b.shift).mul_(b.scale)
    return b.down(h.sin().mul_(2).cos())


def scores(b: Block, x: torch.Tensor) -> torch.Tensor:
    s = x @ x.transpose(1, 2)
    s += b.shift[: s.shape[-1]]
    s[:, 0] = 0
    s.masked_fill_(s > 3, 0.5)
    return b.down(b.up(F.dropout(s.softmax(-1), 0.1) @ x).sin())


def views(b: Block, x: torch.Tensor) -> torch.Tensor:
    one, two = b.up(x).chunk(2, -1)
    parts = (one.sin() * two.view(4, 2, 3, WIDTH).flatten(1, 2)).transpose(0, 1).contiguous().split([1, 2, 3])
    h = torch.cat([parts[2].cos(), parts[0], parts[1].exp()]).permute(1, 0, 2).unflatten(-1, (2, WIDTH // 2))
    return b.down(torch.stack([h.flatten(2), h.sin().flatten(2)], -1).reshape(4, 6, -1)[..., ::1])


def several(b: Block, x: torch.Tensor) -> torch.Tensor:
    h = b.up(x)
    top = h.topk(4, -1)
    norm, std = torch.var_mean(h, -1, keepdim=True)
    values, index = h.sort(-1)
    unbound = (values.sin() * norm.sqrt() + std).unbind(1)
    return b.down(torch.stack(unbound, 1).cos() + top.values.sin().repeat(1, 1, 4) + index)


def shared(b: Block, x: torch.Tensor) -> torch.Tensor:
    h = b.up(x).sin()
    h = F.linear(h, b.up.weight.t()).sin()
    return F.linear(b.up(h).cos(), b.up.weight.t()) + F.linear(x, (b.down.weight @ b.up.weight)).sin()


def norms(b: Block, x: torch.Tensor) -> torch.Tensor:
    h = F.layer_norm(b.up(x), (2 * WIDTH,), b.scale, b.shift)
    h = F.group_norm(h.transpose(1, 2), 4).transpose(1, 2)
    return b.down(F.rms_norm(F.silu(h), (2 * WIDTH,)))


def partial_writes(b: Block, x: torch.Tensor) -> torch.Tensor:
    h = b.up(x).sin()
    out = torch.zeros_like(h)
    out[..., ::2] = h[..., 1::2] * 2
    out[..., 1::2] += h[..., ::2].exp()
    out.view(-1)[3:9].mul_(0.5)
    kept = out.exp()
    out.add_(1)
    return b.down(kept * out.sin())


def indexed(b: Block, x: torch.Tensor) -> torch.Tensor:
    h = b.up(x)
    out = torch.zeros_like(h).index_add(1, torch.tensor([0, 2, 1, 3, 5, 4]), h.sin())
    out = out.index_copy_(1, torch.arange(2), h[:, :2].cos())
    rows = torch.arange(6).flip(0)
    out = out + torch.zeros_like(h).scatter_add_(1, rows[None, :, None].expand_as(h), h.exp())
    return b.down(out[:, rows].sin() + F.embedding(rows, b.up.weight[:6, :].repeat(1, 2)))


def attention(b: Block, x: torch.Tensor) -> torch.Tensor:
    q, k = (b.up(x).unflatten(-1, (4, 4)).transpose(1, 2) for _ in range(2))
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    out = F.scaled_dot_product_attention(q, k, q.sin(), dropout_p=0.1, attn_mask=mask)
    out = F.scaled_dot_product_attention(out, k, q, is_causal=True)
    return b.down(out.transpose(1, 2).flatten(2))


def complex_numbers(b: Block, x: torch.Tensor) -> torch.Tensor:
    h = torch.fft.rfft(b.up(x), dim=1)
    h = (h * torch.polar(b.scale, b.shift)).conj() * 1j
    return b.down(torch.view_as_real(h).sin().sum(-1).repeat(1, 2, 1)[:, :6] + h.real.repeat(1, 2, 1)[:, :6])


def other_dtypes(b: Block, x: torch.Tensor) -> torch.Tensor:
    h = b.up(x)
    bits = h.detach().view(torch.int32) & 1
    return b.down((h.to(torch.bfloat16).sin().float() * (bits + 1) + h.half().float().cos()).double().sin().float())


def random_ops(b: Block, x: torch.Tensor) -> torch.Tensor:
    h = F.dropout(b.up(x), 0.2)
    h = h + torch.randn_like(h) * F.rrelu(h, training=True) + torch.rand(2 * WIDTH)
    h = h * torch.randint(0, 2, (2 * WIDTH,)) + torch.randperm(2 * WIDTH) * 0.01
    return F.dropout(b.down(F.alpha_dropout(h.sin(), 0.1)), 0.1)


def aliased_output(b: Block, x: torch.Tensor) -> torch.Tensor:
    h = b.up(x).tanh()
    return torch.cat([b.down(h).tanh(), h.exp()], -1).sigmoid()[..., :WIDTH].transpose(0, 1).transpose(0, 1)


BODIES: dict[str, Body] = {
    body.__name__: body
    for body in (
        *(own_dropout, in_place, scores, views, several, shared, norms, partial_writes, indexed, attention),
        *(complex_numbers, other_dtypes, random_ops, aliased_output),
    )
}


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("name", BODIES)
def test_blocks_of_all_sorts(mode: str, name: str) -> None:
    with compared(BODIES[name], mode) as pair:
        for seed in range(3):
            pair.check(seed=seed)
        pair.batch = (torch.randn(4, 6, WIDTH).transpose(0, 1).contiguous().transpose(0, 1),)
        pair.check()
        assert pair.num_replayed_ops or (name, mode) == ("complex_numbers", "cheap")
        assert not pair.num_drifts
        assert not pair.session._library.failures


@pytest.mark.parametrize("mode", ALL_MODES)
def test_a_block_that_returns_its_input_or_a_view_of_it_beside_its_output(mode: str) -> None:
    class Both(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * 1.0
            for layer in self.layers:
                x, same, part = layer(x)
                x = x + same.sin() + part
            return x

    model = Both(lambda b, x: (b.down(b.up(x).sin()).exp(), x, x[..., :1]))
    with compared(model, mode) as pair:
        pair.check()
        pair.check()


@pytest.mark.parametrize("mode", ALL_MODES)
def test_arguments_that_share_memory(mode: str) -> None:
    class Pairs(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                both = torch.cat([x, x.sin()], -1)
                x = layer(both[..., WIDTH:], both[..., :WIDTH], both)
            return x

    model = Pairs(lambda b, x, y, z: b.down(b.up(x * y).sin() + z.cos()))
    with compared(model, mode) as pair:
        pair.check()
        pair.check()


@pytest.mark.parametrize("mode", ALL_MODES)
def test_an_output_changed_in_place_by_the_model(mode: str) -> None:
    class Residual(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                out = layer(x)
                out += x
                x = out
            return x

    with compared(Residual(lambda b, x: b.down(b.up(x.sin()).sin())), mode) as pair:
        pair.check()
        pair.check()


@pytest.mark.parametrize("mode", ALL_MODES)
def test_a_block_that_leaves_a_loss_of_its_own_behind(mode: str) -> None:
    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        h = block.up(x).sin()
        block.penalty = h.exp().mean()
        return block.down(h.cos())

    def run(model: nn.Module) -> None:
        loss = pair.loss(model)
        (loss + sum(layer.penalty for layer in model.layers)).backward()
        for layer in model.layers:
            del layer.penalty

    with compared(body, mode) as pair:
        for model in (pair.untouched, pair.managed):
            for layer in model.layers:
                vars(layer).pop("penalty", None)
        for _ in range(3):
            pair.check(run)


# -- 10. random state ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("name", ["llama", "t5", "albert", "encoder"])
def test_the_generator_goes_on_as_if_nothing_had_been_replayed(mode: str, name: str) -> None:
    tiny = FAMILIES[name]()
    with compared(tiny.model, mode, loss_fn=tiny.loss_fn, blocks=None, batch=tiny.batch) as pair:
        drawn = []
        for model in (pair.untouched, pair.managed):
            torch.manual_seed(11)
            for _ in range(3):
                pair.loss(model).backward()
            drawn.append(torch.rand(4))
        assert torch.equal(*drawn)
        pair.check()


@pytest.mark.parametrize("mode", MODES)
def test_a_block_that_seeds_for_itself(mode: str) -> None:
    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        h = F.dropout(block.up(x).sin(), 0.3)
        with torch.random.fork_rng():
            torch.manual_seed(hidden.get("seed", 0))
            h = F.dropout(h.cos(), 0.3)
        return F.dropout(block.down(h.exp()), 0.3)

    with compared(body, mode) as pair:
        for seed in range(3):
            hidden["seed"] = seed
            pair.check(seed=seed)


@pytest.mark.parametrize("mode", MODES)
def test_a_generator_of_its_own(mode: str) -> None:
    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        generator = hidden.setdefault((id(block), "generator"), torch.Generator())
        h = F.dropout(block.up(x).sin(), 0.3)
        noise = torch.rand(h.shape, generator=generator)
        return F.dropout(block.down((h * noise).sin()), 0.3)

    with compared(body, mode) as pair:
        hidden.clear()
        for seed in range(3):
            pair.check(seed=seed)


class Halved(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 0.5


@pytest.mark.parametrize("mode", ALL_MODES)
def test_a_weight_that_is_parametrised_for_the_time_of_a_forward(mode: str) -> None:
    """As PEFT does for the experts of a mixture: it writes its own parameter, and is no less exact for that."""

    def body(b: Block, x: torch.Tensor) -> torch.Tensor:
        parametrize.register_parametrization(b.up, "weight", Halved())
        h = b.up(x)
        parametrize.remove_parametrizations(b.up, "weight", leave_parametrized=False)
        return b.down(h.sin())

    with compared(body, mode) as pair:
        for seed in range(3):
            pair.check(seed=seed)


# -- 11. control flow that depends on data -------------------------------------------------------------------------


def on_sum(b: Block, x: torch.Tensor) -> torch.Tensor:
    h = b.up(x)
    if hidden.get("reads"):
        h = h.sin() if h.detach().sum() > hidden["reads"] else h.exp()
    return b.down(h.cos())


def on_item(b: Block, x: torch.Tensor) -> torch.Tensor:
    h = b.up(x).sin()
    return b.down((h * h.detach().max().item()).sin() if hidden.get("reads") else h.sin())


def on_nonzero(b: Block, x: torch.Tensor) -> torch.Tensor:
    h = b.up(x).flatten(0, 1)
    if hidden.get("reads"):
        rows = (h.detach()[:, 0] > 0).nonzero().squeeze(-1)
        h = h.sin().index_add(0, rows, h[rows].exp())
    return b.down(h.cos()).view_as(x)


def on_mask(b: Block, x: torch.Tensor) -> torch.Tensor:
    h = b.up(x)
    if hidden.get("reads"):
        h = h.masked_scatter(h > 0, h[h > 0].exp().sin())
    return b.down(h.cos())


def on_list(b: Block, x: torch.Tensor) -> torch.Tensor:
    h = b.up(x).sin()
    return b.down((h * sum(h.detach()[0, 0].tolist())).sin() if hidden.get("reads") else h.sin())


def on_numpy(b: Block, x: torch.Tensor) -> torch.Tensor:
    h = b.up(x).sin()
    return b.down((h * float(h.detach().numpy().max())).sin() if hidden.get("reads") else h.sin())


def on_equality(b: Block, x: torch.Tensor) -> torch.Tensor:
    h = b.up(x)
    if hidden.get("reads") and not torch.allclose(h, h + 0.1):
        h = h.sin()
    return b.down(h.cos())


DATA_DEPENDENT = {body.__name__: body for body in (on_sum, on_item, on_nonzero, on_mask, on_list, on_equality)}


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("name", DATA_DEPENDENT)
def test_blocks_that_look_at_data_are_exact(mode: str, name: str) -> None:
    with compared(DATA_DEPENDENT[name], mode) as pair:
        hidden["reads"] = 1e-9
        for seed in range(4):
            pair.batch = (torch.randn(4, 6, WIDTH),)
            pair.check(seed=seed)
        if name != "on_mask":
            assert "depend" in pair.reasons or "read" in pair.reasons


@pytest.mark.parametrize("mode", MODES)
def test_a_number_read_through_numpy(mode: str) -> None:
    with compared(on_numpy, mode) as pair:
        hidden["reads"] = True
        for seed in range(3):
            pair.batch = (torch.randn(4, 6, WIDTH),)
            pair.check(seed=seed)


@pytest.mark.parametrize("mode", MODES)
def test_what_one_block_may_do_again_another_of_its_class_may_not(mode: str) -> None:
    """Both look at data; only one of them counts its calls, and running it again would count twice."""

    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        h = block.up(x)
        if hidden.get("reads"):
            h = h * (1 + h.detach().max().item())
            if block.number:
                block.factor += 0.5
        return block.down((h * block.factor).sin())

    with compared(body, mode) as pair:
        hidden["reads"] = True
        for _ in range(4):
            pair.check()


# -- 12. ways to call autograd -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ALL_MODES)
def test_two_forwards_before_one_backward(mode: str) -> None:
    def run(model: nn.Module) -> None:
        chosen, rejected = (total(model, (pair.batch[0][part],)) for part in (slice(2), slice(2, 4)))
        with torch.no_grad():
            reference = total(model, pair.batch)
        F.softplus(chosen - rejected + reference).backward()

    with compared(plain, mode) as pair:
        pair.check(run)
        pair.check(run)


@pytest.mark.parametrize("mode", ALL_MODES)
def test_a_graph_kept_for_a_second_backward(mode: str) -> None:
    def run(model: nn.Module) -> None:
        loss = pair.loss(model)
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        loss.backward()

    with compared(plain, mode) as pair:
        pair.check(run)
        pair.check(run)


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("is_first", [True, False])
def test_double_backward(mode: str, *, is_first: bool) -> None:
    def run(model: nn.Module) -> list[torch.Tensor]:
        loss = pair.loss(model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        sum(g.pow(2).sum() for g in first).backward()
        return list(first)

    with compared(plain, mode) as pair:
        if not is_first:
            pair.check()
        pair.check(run)


@pytest.mark.parametrize("mode", ALL_MODES)
def test_gradients_of_inputs_and_of_some_parameters(mode: str) -> None:
    def run(model: nn.Module) -> list[torch.Tensor]:
        x = pair.batch[0].clone().requires_grad_(True)
        loss = total(model, (x,))
        inner = model.layers[1]
        one = torch.autograd.grad(loss, [x], retain_graph=True)
        two = torch.autograd.grad(loss, [inner.down.weight], retain_graph=True)
        three = torch.autograd.grad(loss, [inner.up.weight, x])
        return [*one, *two, *three]

    with compared(plain, mode) as pair:
        pair.check(run)
        pair.check(run)


@pytest.mark.parametrize("mode", ALL_MODES)
def test_accumulation_with_evaluations_and_bare_forwards_in_between(mode: str) -> None:
    def run(model: nn.Module) -> None:
        for part in pair.batch[0].split(1):
            total(model, (part,)).backward()
            with torch.no_grad():
                total(model, pair.batch)
            model.eval()
            with torch.inference_mode():
                total(model, pair.batch)
            total(model, pair.batch)
            model.train()

    with compared(plain, mode) as pair:
        pair.check(run)
        pair.check(run)


@pytest.mark.parametrize("mode", ALL_MODES)
def test_a_step_after_an_exception_in_a_forward_or_a_backward(mode: str) -> None:
    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        h = block.up(x).sin()
        if hidden.get("fails") == "forward" and block.number == 1:
            raise ZeroDivisionError
        if hidden.get("fails") == "backward" and block.number == 1:
            h.register_hook(lambda grad: 1 / 0)
        return F.dropout(block.down(h.cos()), 0.1)

    with compared(body, mode) as pair:
        for when in ("forward", "backward", "forward"):
            hidden["fails"] = when
            with pytest.raises(ZeroDivisionError):
                pair.loss(pair.managed).backward()
            hidden.clear()
            pair.check()


@pytest.mark.parametrize("mode", ALL_MODES)
def test_graphs_that_never_run_backward_leave_nothing_behind(mode: str) -> None:
    kept: list[weakref.ref[Any]] = []

    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        kept.append(weakref.ref(x.untyped_storage()))
        h = block.up(x).sin()
        kept.append(weakref.ref(h.untyped_storage()))
        return F.dropout(block.down(h.cos()), 0.1)

    with compared(body, mode) as pair:
        pair.check()
        gc.collect()
        gc.disable()
        try:
            ledger = Ledger()
            sizes = []
            for _ in range(3):
                kept.clear()
                with ledger:
                    pair.loss(pair.managed)
                    loss = pair.loss(pair.managed)
                    torch.autograd.grad(loss, [pair.managed.layers[2].down.weight])
                    del loss
                sizes.append(ledger.live_bytes())
                assert all(ref() is None for ref in kept)
            assert len(set(sizes)) == 1
        finally:
            gc.enable()


@pytest.mark.parametrize("mode", ALL_MODES)
def test_backward_inside_the_forward_of_a_block(mode: str) -> None:
    """Forces as the gradient of an energy."""

    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        h = block.up(x).sin()
        energy = block.down(h.exp()).sin().sum()
        (force,) = torch.autograd.grad(energy, h, create_graph=True)
        return block.down(force.cos()) + x

    with compared(body, mode) as pair:
        for _ in range(3):
            pair.check()


@pytest.mark.parametrize("mode", ALL_MODES)
def test_one_block_called_many_times(mode: str) -> None:
    class Looped(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(3):
                for layer in self.layers:
                    x = layer(x)
            return x + self.layers[0](x.detach()) + self.layers[0](x)

    with compared(Looped(plain), mode) as pair:
        pair.check()
        pair.check()


@pytest.mark.parametrize("mode", ALL_MODES)
def test_saved_tensors_that_are_asked_for_out_of_order(mode: str) -> None:
    """Gradients of parts of a block in one order and then in another, on one graph."""

    def run(model: nn.Module) -> list[torch.Tensor]:
        loss = pair.loss(model)
        weights = [layer.up.weight for layer in model.layers] + [layer.down.weight for layer in model.layers]
        return [
            grad
            for weight in (*weights, *weights[::-1])
            for grad in torch.autograd.grad(loss, [weight], retain_graph=True)
        ]

    with compared(plain, mode) as pair:
        pair.check(run)
        pair.check(run)
