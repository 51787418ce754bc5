"""Rows F41 and F46 to F49: dropout, running statistics, choices of kernels, compiled code, generators of one's own."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import tapeline
from tests.failure_modes.twins import MODES, WIDTH, Block, Run, Stack, Twins, total, twins

hidden: dict[Any, Any] = {}
"""What blocks look at beside their arguments."""


@pytest.fixture(autouse=True)
def _nothing_hidden() -> Iterator[None]:
    hidden.clear()
    yield
    hidden.clear()


def read_if_asked(h: torch.Tensor) -> None:
    """A block that reads values has no tape: it is kept, or run again as a whole."""
    if hidden.get("reads"):
        h.detach().sum().item()


# -- F41: dropout --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("p", "has_tape"), [(0.0, True), (0.3, True), (0.3, False)])
def test_f41_masks_are_those_of_the_forward(mode: str, p: float, *, has_tape: bool) -> None:
    """Whatever is drawn between forward and backward; and the generator goes on as if nothing had been drawn again."""

    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        h = F.dropout(block.up(x).sin(), p)
        read_if_asked(h)
        heads = h.unflatten(-1, (4, 4)).transpose(1, 2)
        h = F.scaled_dot_product_attention(heads, heads, heads.cos(), dropout_p=p).transpose(1, 2).flatten(2)
        return x + F.dropout(block.down(F.dropout(h.exp(), p / 2)), p)

    def run(model: nn.Module) -> list[torch.Tensor]:
        loss = pair.loss(model)
        drawn = torch.rand(5)
        torch.manual_seed(99)
        loss.backward()
        return [drawn, torch.rand(5)]

    with twins(body, mode) as pair:
        hidden["reads"] = not has_tape
        for seed in range(3):
            pair.check(run, seed)
        if has_tape:
            pair.check_on_tape()
            is_random = any(program.is_random for recipe in pair.recipes for program in recipe.programs)
            assert is_random == bool(p)


# -- F46: running statistics ---------------------------------------------------------------------------------------


def mean_of_square(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).pow(2).mean()


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.conv(x)).relu()
        read_if_asked(h)
        with torch.no_grad():
            self.scale.lerp_(h.amax((0, 2, 3)), 0.1)
        return x + (h / self.scale.clone()[:, None, None]).sin().exp()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("has_tape", [True, False])
def test_f46_running_statistics_are_written_once(mode: str, *, has_tape: bool) -> None:
    model = nn.Sequential(*[Convolution() for _ in range(3)])
    with twins(model, mode, torch.randn(2, 4, 6, 6), loss_fn=mean_of_square) as pair:
        hidden["reads"] = not has_tape
        for seed in range(3):
            pair.check(seed=seed)
        assert [int(layer.norm.num_batches_tracked) for layer in pair.managed] == [3, 3, 3]
        if has_tape:
            pair.check_on_tape()
            replayed = pair.replayed()
            assert not any("batch_norm" in name or "lerp" in name for name in replayed)


# -- F47: the choice of an attention kernel ------------------------------------------------------------------------


def attending(block: Block, x: torch.Tensor) -> torch.Tensor:
    read_if_asked(x)
    query = block.up(x).unflatten(-1, (4, 4)).transpose(1, 2)
    out = F.scaled_dot_product_attention(query, query.sin(), query.cos(), is_causal=True)
    return x + block.down(out.transpose(1, 2).flatten(2).sin())


def forward_with(pair: Twins, *backends: SDPBackend) -> Run:
    """Kernels allowed in the forward alone; backward runs without the context."""

    def run(model: nn.Module) -> None:
        with sdpa_kernel(list(backends)):
            loss = pair.loss(model)
        loss.backward()

    return run


@pytest.mark.parametrize("mode", MODES)
def test_f47_attention_is_replayed_with_the_kernel_of_the_forward(mode: str) -> None:
    with twins(attending, mode) as pair:
        for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
            pair.check(forward_with(pair, backend))
        pair.check()
        pair.check_on_tape()
        assert sum(seam.num_recorded for seam in pair.seams) == 9  # neither, both, and each alone


@pytest.mark.parametrize("mode", MODES)
def test_f47_a_block_is_run_again_with_the_kernel_of_the_forward(mode: str) -> None:
    with twins(attending, mode) as pair:
        hidden["reads"] = True
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
            pair.check(forward_with(pair, backend))


# -- F48: compiled code --------------------------------------------------------------------------------------------


def plain(block: Block, x: torch.Tensor) -> torch.Tensor:
    return x + block.down(F.gelu(block.up(x)).sin())


def compile_blocks(model: nn.Module, backend: str) -> None:
    for layer in model.layers:
        layer.compile(backend=backend)


def compiles(test: Any) -> Any:
    asked = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo reads it
    return asked(pytest.mark.usefixtures("_no_compiled_code")(test))


@pytest.fixture
def _no_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@compiles
@pytest.mark.parametrize(("when", "backend"), [("before the plan", "eager"), ("after it", "aot_eager")])
def test_f48_compiled_blocks_are_left_alone_and_exact(when: str, backend: str) -> None:
    is_before = when == "before the plan"
    prepare = (lambda model: compile_blocks(model, backend)) if is_before else None
    with twins(plain, "recompute", prepare=prepare, plans=True) as pair:
        if not is_before:
            compile_blocks(pair.managed, backend)
            compile_blocks(pair.untouched, backend)
        for seed in range(2):
            pair.check(seed=seed)
        pair.batch = (torch.randn(3, 5, WIDTH),)
        pair.check()
        assert not pair.session.report().recomputed_calls


@compiles
def test_f48_a_compiled_model_is_left_alone_and_exact() -> None:
    with twins(plain, "recompute") as pair:
        compiled = {id(model): torch.compile(model, backend="aot_eager") for model in (pair.managed, pair.untouched)}
        for seed in range(2):
            pair.check(lambda model: pair.loss(compiled[id(model)]).backward(), seed)
        assert not pair.session.report().recomputed_calls


@compiles
def test_f48_compiled_blocks_that_do_not_follow_the_plan_are_reported() -> None:
    with twins(plain, "recompute") as pair:
        compile_blocks(pair.managed, "eager")
        pair.result(pair.managed)
        assert "compile" in " ".join(pair.session.report().notes)


def gate(h: torch.Tensor) -> torch.Tensor:
    return F.gelu(h) * h.sigmoid()


def gated(block: Block, x: torch.Tensor) -> torch.Tensor:
    return x + block.down(hidden["gate"](block.up(x)).sin())


@compiles
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("is_compiled_later", [True, False])
def test_f48_a_compiled_function_inside_a_block_is_exact(mode: str, *, is_compiled_later: bool) -> None:
    """Also where the block was recorded without it: compiled, it saves other tensors."""
    compiled = torch.compile(gate, backend="aot_eager")
    hidden["gate"] = gate if is_compiled_later else compiled
    with twins(gated, mode) as pair:
        for seed in range(2):
            pair.check(seed=seed)
        hidden["gate"] = compiled
        for seed in range(2):
            pair.check(seed=seed)
        assert ("differed from the tape" in pair.reasons) == is_compiled_later


# -- F49: generators of one's own ----------------------------------------------------------------------------------


class Rounds(torch.autograd.Function):
    """Stochastic rounding that draws from the generator of its layer."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, number: int) -> torch.Tensor:
        rounded = torch.floor(x * 64 + torch.rand(x.shape, generator=hidden["generators"][number])) / 64
        ctx.save_for_backward(rounded)
        return rounded

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad * ctx.saved_tensors[0].cos(), None


def rounded(h: torch.Tensor, number: int) -> torch.Tensor:
    noise = torch.rand(h.shape, generator=hidden["generators"][number])
    return h + ((h * 64 + noise).floor() / 64 - h).detach()


def scaled(h: torch.Tensor, number: int) -> torch.Tensor:
    return h * torch.empty_like(h).uniform_(0.5, 1.5, generator=hidden["generators"][number])


DRAWS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "an op": rounded,
    "an op in place": scaled,
    "a Function": Rounds.apply,
}


@pytest.mark.parametrize("mode", ["cheap", "recompute", "segments:2"])
@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("has_tape", [True, False])
def test_f49_a_generator_of_its_own_goes_on_as_in_the_untouched_model(mode: str, kind: str, *, has_tape: bool) -> None:
    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        h = block.up(x).sin()
        read_if_asked(h)
        return x + block.down(F.dropout(DRAWS[kind](h, block.number).exp(), 0.2).cos())

    def run(model: nn.Module) -> list[torch.Tensor]:
        generators = [torch.Generator().manual_seed(number) for number in range(3)]
        hidden["generators"] = generators
        for _ in range(2):
            pair.loss(model).backward()
        return [generator.get_state() for generator in generators]

    with twins(body, mode) as pair:
        hidden["reads"] = not has_tape
        for seed in range(2):
            pair.check(run, seed)
        assert not pair.session.report().kept_instead


def test_f49_planning_leaves_the_random_state_of_the_user_alone() -> None:
    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        return x + block.down(F.dropout(block.up(x) * random.random() * float(np.random.rand()), 0.3))

    def states() -> list[Any]:
        return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]

    model, batch = Stack(body).train(), (torch.randn(4, 6, WIDTH),)
    before = states()
    plan = tapeline.plan(model, batch, mode="recompute", loss_fn=total, blocks=["layers.*"])
    tapeline.apply(model, plan).remove()
    assert states() == before


@pytest.mark.parametrize("mode", ["cheap", "recompute"])
def test_f49_numbers_from_python_and_numpy_are_those_of_the_forward(mode: str) -> None:
    def body(block: Block, x: torch.Tensor) -> torch.Tensor:
        return x + block.down((block.up(x).sin() * random.uniform(0.9, 1.1) * float(np.random.rand())).sin())

    def run(model: nn.Module) -> list[torch.Tensor]:
        random.seed(1)
        np.random.seed(1)
        pair.loss(model).backward()
        return [torch.tensor([random.random(), np.random.rand()])]

    with twins(body, mode) as pair:
        for seed in range(3):
            pair.check(run, seed)
        assert "generators of Python or NumPy" in pair.reasons
