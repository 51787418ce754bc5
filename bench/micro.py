"""What the runtime itself costs: hooks, replayed calls, the guard, a call whose tape is known, and a recording.

Run as part of ``python -m bench.smoke``. Operands are so small that kernels cost next to nothing.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from tapeline.cost.device import nominal_rates
from tapeline.planner.policy import CHEAP, KEEP, RECOMPUTE, Policy
from tapeline.runtime.ambient import Ambient
from tapeline.runtime.block import BlockSeam
from tapeline.runtime.frame import Frame, Phase, unpack
from tapeline.runtime.inputs import Chain
from tapeline.runtime.library import Library
from tapeline.runtime.role import Role
from tapeline.runtime.signature import arguments_key, surroundings
from tapeline.tape.program import Recipe
from tapeline.tape.replay import run_program

NUM_SAVED = 200
NUM_SHAPES = 6
NUM_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Rounds:
    """How often each thing is timed."""

    number: int

    def microseconds(self, *functions: Callable[[], Any]) -> list[float]:
        """Median of each function, timed in turns, so that a busy machine is busy for all of them."""
        times: list[list[float]] = [[] for _ in functions]
        with _no_collection():
            for _ in range(self.number):
                for function, found in zip(functions, times, strict=True):
                    _let_go(function())  # warms the caches
                    begin = time.perf_counter()
                    out = function()
                    found.append(time.perf_counter() - begin)
                    _let_go(out)
        return [statistics.median(found) * 1e6 for found in times]


def _let_go(out: Any) -> None:
    """Go through the graph of a forward: tensors that hooks have kept refer to the graph that keeps them until then."""
    if isinstance(out, torch.Tensor) and out.requires_grad:
        out.sum().backward()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without the garbage collector, as `timeit` does: it would run in one function for what another one made."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Sines(nn.Module):
    """Saves one tensor per operation."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.start
        for _ in range(NUM_SAVED):
            x = x.sin()
        return x


class Block:
    """One block with its arguments, outside a model."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.module, self.args, self.kwargs = module, args, kwargs

    def plain(self) -> torch.Tensor:
        out: torch.Tensor = type(self.module).forward(self.module, *self.args, **self.kwargs)
        return out

    def step(self) -> None:
        self.plain().sum().backward()

    def seam(self, policy: Policy) -> BlockSeam:
        """A seam of its own for this block, which has recorded these arguments."""
        device = next(self.module.parameters()).device
        seam = BlockSeam("block", self.module, Library(nominal_rates(device)), Chain(), Role(policy))
        self.managed(seam).sum().backward()
        return seam

    def managed(self, seam: BlockSeam) -> torch.Tensor:
        out: torch.Tensor = seam(self.module.forward, *self.args, **self.kwargs)
        return out

    def managed_step(self, seam: BlockSeam) -> None:
        self.managed(seam).sum().backward()

    def saved(self) -> list[torch.Tensor]:
        """What autograd saves, in order."""
        found: list[torch.Tensor] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            found.append(tensor.detach())
            return tensor

        with saved_tensors_hooks(pack, _same):
            self.plain()
        return found


def sines(device: torch.device) -> Block:
    return Block(Sines().to(device), (torch.ones(4, device=device),), {})


def llama(device: torch.device) -> nn.Module:
    """A Llama of one tiny block."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=16,
        use_cache=False,
    )
    with device:
        return LlamaForCausalLM(config)


def block_of(model: nn.Module, num_tokens: int = NUM_TOKENS) -> Block:
    """The block of a Llama, with the arguments that the model calls it with."""
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def notice(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((tuple(_detached(arg) for arg in args), {name: _detached(arg) for name, arg in kwargs.items()}))

    block: Any = model.get_submodule("model.layers.0")
    device = next(model.parameters()).device
    with block.register_forward_pre_hook(notice, with_kwargs=True):
        model(torch.zeros(1, num_tokens, dtype=torch.long, device=device))
    return Block(block, *found[0])


def _detached(value: Any) -> Any:
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value


# -- the parts ---------------------------------------------------------------------------------------------------------


def hooks(block: Block, rounds: Rounds) -> dict[str, float]:
    """Microseconds per saved tensor that is kept, packed and unpacked, beyond what torch's own call of two hooks costs."""
    seam = block.seam(KEEP)
    recipe = _recipe(seam)

    def framed() -> None:
        frame = Frame("block", recipe, _sources(seam, recipe, block), _ambient(block))
        with saved_tensors_hooks(frame.pack, unpack):
            out = block.plain()
        assert frame.finish(), frame.drift
        out.sum().backward()

    plain, identity, ours = rounds.microseconds(block.step, lambda: _step_with_identity_hooks(block), framed)
    number = len(recipe.packs)
    return {
        "us_per_saved_tensor_identity_hooks": (identity - plain) / number,
        "us_per_saved_tensor": (ours - identity) / number,
    }


def dropped(block: Block, rounds: Rounds) -> dict[str, float]:
    """Microseconds per saved tensor that is dropped, beyond what torch's call of two hooks and the calls that make it again cost."""
    seam = block.seam(RECOMPUTE)
    phases, number = _phases(seam, block), len(_recipe(seam).packs)

    def replay() -> None:
        for phase in phases:
            run_program(phase.program, _used(phase), phase.roots)

    identity, managed, replayed = rounds.microseconds(
        lambda: _step_with_identity_hooks(block), lambda: block.managed_step(seam), replay
    )
    return {"us_per_dropped_tensor": (managed - identity - replayed) / number}


def replays(block: Block, rounds: Rounds) -> dict[str, float]:
    """Microseconds per replayed op, and of the same calls with nothing around them."""
    seam = block.seam(RECOMPUTE)
    phases = _phases(seam, block)
    calls = [call for phase in phases for call in _bare_calls(phase)]

    def replay() -> None:
        for phase in phases:
            run_program(phase.program, _used(phase), phase.roots)

    def phase_replay() -> None:
        for phase in phases:
            phase.replay()

    def bare() -> None:
        with torch.no_grad():
            for func, args, kwargs in calls:
                func(*args, **kwargs)

    with_phase, with_program, without = rounds.microseconds(phase_replay, replay, bare)
    number = sum(phase.program.num_ops for phase in phases)
    return {
        "ops_replayed": number,
        "phases_replayed": len(phases),
        "us_per_replayed_op": with_program / number,
        "us_per_replayed_op_bare": without / number,
        "us_per_phase_around_its_program": (with_phase - with_program) / len(phases),
    }


def guard(block: Block, rounds: Rounds) -> dict[str, float]:
    """Microseconds per call for deciding whether a tape is valid for it."""
    seam = block.seam(KEEP)
    parts = (
        seam.fingerprint.token,
        lambda: arguments_key(block.args, block.kwargs),
        surroundings,
    )
    token, key, settings = rounds.microseconds(*(_often(part) for part in parts))
    return {
        "us_guard_fingerprint": token / _OFTEN,
        "us_guard_arguments": key / _OFTEN,
        "us_guard_surroundings": settings / _OFTEN,
    }


def hits(block: Block, rounds: Rounds) -> dict[str, float]:
    """Microseconds of a forward whose tape is known, beyond the plain one and beyond one under hooks that do nothing."""
    kept, cheap = block.seam(KEEP), block.seam(CHEAP)

    def with_identity() -> torch.Tensor:
        with saved_tensors_hooks(_same, _same):
            return block.plain()

    plain, identity, hit, cheap_hit = rounds.microseconds(
        block.plain, with_identity, lambda: block.managed(kept), lambda: block.managed(cheap)
    )
    return {
        "us_plain_forward": plain,
        "us_hit_beyond_plain": hit - plain,
        "us_hit_beyond_identity_hooks": hit - identity,
        "us_hit_beyond_plain_cheap": cheap_hit - plain,
        "saved_tensors_of_the_block": len(_recipe(kept).packs),
    }


def recordings(device: torch.device) -> dict[str, float]:
    """Milliseconds of the first call of each new shape: recording, solving, compiling and verifying."""
    model = llama(device)
    seam = block_of(model).seam(RECOMPUTE)
    times: list[float] = []
    again: list[float] = []
    for number in range(NUM_SHAPES):
        block = block_of(model, NUM_TOKENS + 1 + number)
        for found in (times, again):
            begin = time.perf_counter()
            block.managed_step(seam)
            found.append(time.perf_counter() - begin)
    assert seam.num_recorded == NUM_SHAPES + 1, "each shape once"
    return {"ms_recording_a_new_shape": (statistics.median(times) - statistics.median(again)) * 1e3}


def microbenchmarks(device: torch.device, rounds: Rounds) -> dict[str, float]:
    """All of them, by name; medians."""
    chain, block = sines(device), block_of(llama(device))
    found = hooks(chain, rounds) | dropped(chain, rounds) | replays(block, rounds) | guard(block, rounds)
    found |= hits(block, rounds) | recordings(device)
    return {name: round(value, 3) for name, value in found.items()}


# -- helpers -----------------------------------------------------------------------------------------------------------

_OFTEN = 100


def _often(function: Callable[[], Any]) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(_OFTEN):
            function()

    return repeated


def _step_with_identity_hooks(block: Block) -> None:
    with saved_tensors_hooks(_same, _same):
        out = block.plain()
    out.sum().backward()


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _recipe(seam: BlockSeam) -> Recipe:
    """The recipe of the only tape that the seam knows."""
    (tape,) = seam.library.tapes.values()
    return seam.library.recipe(tape, seam.policy)


def _sources(seam: BlockSeam, recipe: Recipe, block: Block) -> list[torch.Tensor]:
    _, tensors = arguments_key(block.args, block.kwargs)
    return [
        tensors[place].detach() if isinstance(place, int) else place().detach()
        for place in seam.getters(recipe.sources)
    ]


def _ambient(block: Block) -> Ambient:
    return Ambient(surroundings(), arguments_key(block.args, block.kwargs)[1])


def _phases(seam: BlockSeam, block: Block) -> list[Phase]:
    """The phases of one call of the block, ready to be replayed."""
    recipe = _recipe(seam)
    frame = Frame("block", recipe, _sources(seam, recipe, block), _ambient(block))
    phases = list(frame.phases)
    for tensor in block.saved():
        frame.place(tensor)
    assert frame.complete(), frame.drift
    return phases


def _used(phase: Phase) -> list[torch.Tensor]:
    """The sources that its program reads."""
    return [phase.sources[number] for number in phase.program.sources]


def _bare_calls(phase: Phase) -> list[tuple[Any, Any, Any]]:
    """The calls of a program with the very operands that they have."""
    found: list[tuple[Any, Any, Any]] = []

    def noting(func: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            found.append((func, args, kwargs))
            return func(*args, **kwargs)

        return call

    script = phase.program.script
    function: Any = script.function
    noted = FunctionType(
        function.__code__,
        function.__globals__,
        argdefs=tuple(noting(value) if isinstance(value, _CALLED) else value for value in function.__defaults__),
    )
    run_program(replace(phase.program, script=script._replace(function=noted)), _used(phase), phase.roots)
    return found


_CALLED = (torch._ops.OpOverload, BuiltinFunctionType, partial)
"""What a generated function calls: ops, their inner functions, and Python autograd Functions."""
