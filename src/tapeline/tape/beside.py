"""A step on tensors without data in one thread, while a real step may run in another.

Threads share more than they seem to: the default generators, and the copies of parameters that autocast keeps. A step that is
only thought through must neither draw from the ones nor throw away the others.
"""

from __future__ import annotations

import functools
import inspect
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from tapeline.compat import AUTOCAST_KINDS, Autocast, autocast_of_caller
from tapeline.errors import TapelineError

_WORK_SECONDS = 0.5e-3
_REST = 3.0
"""Times as long as it has worked."""


_GENERATORS = (random.Random, np.random.RandomState, np.random.Generator)


class SharedStateError(TapelineError):
    """A step cannot be thought through beside a real one: it would change what both share."""


class CancelledError(TapelineError):
    """Nobody waits for the result any more."""


class Demand(Enum):
    """How much the result of a step beside a real one is wanted."""

    NONE = "none"
    """Not any more."""
    LATER = "later"
    """As long as the real step goes on: it comes first."""
    NOW = "now"
    """The real step waits for it."""


class Beside:
    """What a step on tensors without data has of its own, because it runs beside a real one.

    Args:
        holds_casts: whether autocast keeps its copies of parameters until the end of a forward.
        demand: asked before every op.
    """

    def __init__(self, *, holds_casts: bool, demand: Callable[[], Demand]) -> None:
        self.holds_casts = holds_casts
        self._demand = demand
        self._casts: dict[tuple[int, torch.dtype], torch.Tensor] = {}
        self._since = time.perf_counter()

    def check(self) -> None:
        """Leave the interpreter to others for a while, if it is time to.

        A real step lets go of the interpreter's lock at every op, and would get it back five milliseconds later.

        Raises:
            CancelledError: if nobody waits for the result.
        """
        demand = self._demand()
        if demand is Demand.NONE:
            raise CancelledError("nobody waits for this step any more")
        worked = time.perf_counter() - self._since
        if worked > _WORK_SECONDS:
            if demand is Demand.LATER:
                time.sleep(worked * _REST)
            self._since = time.perf_counter()

    def cast(self, make: Callable[[], Any], source: Any, dtype: torch.dtype | None) -> Any:
        """The copy of a parameter in another dtype: one until the end of the forward, as autocast's cache has it."""
        if not (self.holds_casts and _is_cached(source) and dtype in {kind[1] for kind in autocast_of_caller()}):
            return make()
        assert dtype is not None, "one that autocast computes in"
        key = id(source), dtype
        if key in self._casts:
            return self._casts[key].detach()
        self._casts[key] = make()
        return self._casts[key]

    def end_forward(self) -> None:
        """As leaving the outermost autocast context does."""
        self._casts.clear()


def _is_cached(source: Any) -> bool:
    return isinstance(source, nn.Parameter) and source.requires_grad and source.dtype == torch.float32


def has_outer_state(function: Any, *, may_be_method: bool = False) -> bool:
    """Whether a function has variables of a function or an object around it: a copy of a model has not copied them.

    Args:
        function: a function, a partial, or any callable.
        may_be_method: an object that it belongs to is known to be a copy.
    """
    while isinstance(function, functools.partial):
        function = function.func
    if inspect.ismethod(function) or not inspect.isroutine(function):
        return not may_be_method
    return bool(getattr(function, "__closure__", None))


@contextmanager
def no_draws() -> Iterator[None]:
    """Stop at the first draw from the generators of Python or NumPy, which all threads share.

    Raises:
        SharedStateError: before a number is drawn.
    """
    before = sys.getprofile()

    def notice(frame: Any, event: str, function: Any) -> None:
        if event == "c_call" and isinstance(getattr(function, "__self__", None), _GENERATORS):
            raise SharedStateError(f"the model draws a number in Python ({function.__name__})")

    sys.setprofile(notice)
    try:
        yield
    finally:
        sys.setprofile(before)


def beside() -> Beside | None:
    """What the dispatch mode in force here has for a step that runs beside a real one."""
    for mode in _get_current_dispatch_mode_stack():
        found = getattr(mode, "beside", None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    return None


def end_forward() -> None:
    """Forget autocast's copies, as at the end of the context that a training loop has around its forward."""
    own = beside()
    if own is None:
        torch.clear_autocast_cache()
    else:
        own.end_forward()


def keeps_casts() -> bool:
    """Whether autocast, where it is on, uses one copy of a parameter until the end of the forward."""
    own = beside()
    return torch.is_autocast_cache_enabled() if own is None else own.holds_casts


@contextmanager
def own_autocast(kinds: Autocast) -> Iterator[None]:
    """Autocast for these kinds of device in this thread, without the cache that all threads share.

    A nesting that never ends keeps contexts inside from clearing that cache.
    """
    now = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in AUTOCAST_KINDS}
    was_enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    torch.autocast_increment_nesting()
    try:
        for kind in AUTOCAST_KINDS:
            torch.set_autocast_enabled(kind, kind in dict(kinds))
        for kind, dtype in kinds:
            torch.set_autocast_dtype(kind, dtype)
        yield
    finally:
        for kind, (is_enabled, dtype) in now.items():
            torch.set_autocast_enabled(kind, is_enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.autocast_decrement_nesting()
        torch.set_autocast_cache_enabled(was_enabled)
