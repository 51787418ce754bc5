"""What runs in place of one block's forward while a session is in force."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from tapeline.ledger import RECOMPUTE, active_ledgers
from tapeline.runtime.checkpoint import run_checkpointed
from tapeline.runtime.guard import BlockGuard, Noted
from tapeline.runtime.inputs import BlockCall, Chain, Invocation, KeptInput, RecomputedInput


class BlockSeam:
    """Runs a block so that what it saves for backward is recomputed, and its input too where the plan says so.

    Args:
        name: the block's name in the model.
        module: the block.
        chain: shared by the blocks of a session.
        drops_input: rebuild the input in backward instead of keeping it, where it is the output of the block before.
        feeds_next: the next block drops its input, so that this call must be repeatable.
    """

    def __init__(
        self, name: str, module: nn.Module, chain: Chain, *, drops_input: bool = False, feeds_next: bool = False
    ) -> None:
        self.name, self.chain = name, chain
        self.drops_input, self.feeds_next = drops_input, feeds_next
        self.guard = BlockGuard(name, module)
        self.is_in_force = True
        """False in a copied or unpickled model, which belongs to no session: the block runs as it is."""
        self.num_calls = 0
        """Recorded calls so far."""
        self.num_chained = 0
        """Recorded calls whose input was the output of the block called before."""

    def __call__(self, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run ``forward(*args, **kwargs)``; nothing is spent where autograd records nothing."""
        invocation = Invocation(forward, args, kwargs)
        if not self.is_in_force or not self._is_recorded(invocation):
            return invocation.run()
        source = self._source(invocation.input)
        body = _Body(self.guard, invocation, source)
        call = BlockCall(invocation, source, body.check) if self.feeds_next and source is not None else None
        if isinstance(source, RecomputedInput):
            # an empty tensor in its place tells torch which device's random state to keep
            invocation = invocation.with_input(source.placeholder)
        del args, kwargs
        out = run_checkpointed(body, invocation.args, invocation.kwargs)
        self.chain.note(out, call)
        return out

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"is_in_force": False}

    def from_partial(self, function: partial[Any], /, *args: Any) -> Any:
        """The per-layer function of transformers: `function` is ``partial(forward, layer, **kwargs)``."""
        return self(partial(function.func, *function.args), *args, **function.keywords)

    def _is_recorded(self, invocation: Invocation) -> bool:
        if not torch.is_grad_enabled():
            return False
        return self.guard.has_trainable() or any(t.requires_grad for t in invocation.tensors())

    def _source(self, value: torch.Tensor | None) -> KeptInput | RecomputedInput | None:
        match = self.chain.match(value)
        self.num_calls += 1
        self.num_chained += match is not None
        if value is None:
            return None
        if self.drops_input and match is not None and match[0] is not None:
            return RecomputedInput(match[0], match[1], value)
        return KeptInput(value)


class _Body:
    """What torch's checkpoint runs: the first call is the forward, every later one a recompute."""

    def __init__(self, guard: BlockGuard, invocation: Invocation, source: KeptInput | RecomputedInput | None) -> None:
        self.guard, self.forward, self.place = guard, invocation.forward, invocation.place
        self.dropped = source if isinstance(source, RecomputedInput) else None
        self.input = invocation.input if self.dropped else None
        self.noted: Noted | None = None

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        invocation = Invocation(self.forward, args, kwargs, self.place)
        if self.noted is None:
            self.noted = self.guard.note()
            value, self.input = self.input, None
            return (invocation if value is None else invocation.with_input(value)).run()
        self.check()
        with ExitStack() as stack:
            for ledger in active_ledgers():
                stack.enter_context(ledger.scope(RECOMPUTE, self.guard.name))
            if self.dropped is not None:
                invocation = invocation.with_input(self.dropped.take())
            return invocation.run()

    def check(self) -> None:
        assert self.noted is not None, "a block is recomputed after its forward"
        self.guard.check(self.noted)
