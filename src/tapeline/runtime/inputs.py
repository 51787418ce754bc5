"""Block inputs that are not kept: rebuilt in backward by running the blocks before them again.

With every k-th input kept (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"), the inputs in between
are the outputs of earlier blocks. The first block of a segment that backward reaches replays its predecessors without
autograd, once, and leaves their outputs for the recompute of each.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import get_device_states, set_device_states


class Ambient:
    """Random state and autocast state at the entry of a call."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        devices = {t.device.type for t in tensors} - {"cpu", "meta"}
        self.device_type = min(devices, default="cuda")
        self.cpu_state = torch.get_rng_state()
        self.devices, self.device_states = get_device_states(*tensors)
        kinds = ["cpu", *sorted(devices)]
        self.autocast = [(k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds]
        self.is_cache_enabled = torch.is_autocast_cache_enabled()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Run under the noted state, and put today's state back."""
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=self.devices, device_type=self.device_type))
            torch.set_rng_state(self.cpu_state)
            if self.devices:
                set_device_states(self.devices, self.device_states, device_type=self.device_type)
            for kind, is_enabled, dtype in self.autocast:
                stack.enter_context(
                    torch.autocast(kind, dtype=dtype, enabled=is_enabled, cache_enabled=self.is_cache_enabled)
                )
            yield


class KeptInput:
    """A tensor that stays in memory, with the version it had."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor.detach()
        self.requires_grad = tensor.requires_grad
        self.version = tensor._version

    def peek(self) -> torch.Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "A tensor needed to recompute block inputs has been modified in place between forward and backward: "
                f"it is at version {self.tensor._version}, expected {self.version}."
            )
        return self.tensor


class Invocation:
    """A function with its arguments, one of which, the block's input, can be taken out and put back.

    The input is the first tensor by position, or the keyword argument ``hidden_states``; `place` says where.
    """

    __slots__ = ("args", "forward", "kwargs", "place")

    def __init__(
        self,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        place: int | str | None = None,
    ) -> None:
        self.forward, self.args, self.kwargs = forward, args, kwargs
        self.place = _input_place(args, kwargs) if place is None else place

    @property
    def input(self) -> torch.Tensor | None:
        if self.place is None:
            return None
        value = self.args[self.place] if isinstance(self.place, int) else self.kwargs[self.place]
        return value if isinstance(value, torch.Tensor) else None

    def with_input(self, value: torch.Tensor | None) -> Invocation:
        """The same call on another input; ``None`` gives a call that holds no input."""
        args, kwargs = self.args, self.kwargs
        if isinstance(self.place, int):
            args = (*args[: self.place], value, *args[self.place + 1 :])
        elif self.place is not None:
            kwargs = kwargs | {self.place: value}
        return Invocation(self.forward, args, kwargs, self.place)

    def tensors(self) -> list[torch.Tensor]:
        return tensor_leaves((self.args, self.kwargs))

    def run(self) -> Any:
        return self.forward(*self.args, **self.kwargs)


class BlockCall:
    """One call of a block, kept so that its output can be computed again.

    Args:
        invocation: the call.
        source: where its input comes from.
        check: raises if the block has changed since.
    """

    def __init__(self, invocation: Invocation, source: KeptInput | RecomputedInput, check: Callable[[], None]) -> None:
        self.ambient = Ambient(invocation.tensors())
        self.invocation = invocation.with_input(None)
        self.others = [KeptInput(tensor) for tensor in self.invocation.tensors()]
        self.source, self.check = source, check

    def output(self, index: int) -> torch.Tensor:
        """Run the block again; return the `index`-th tensor of what it returns.

        Autograd is on, as it was: kernels and blocks choose by it. What it would save is thrown away at once.
        """
        self.check()
        for other in self.others:
            other.peek()
        value = self.source.peek().detach().requires_grad_(self.source.requires_grad)
        with torch.enable_grad(), saved_tensors_hooks(_forget_saved, _never_unpacked), self.ambient.restored():
            leaves = tensor_leaves(self.invocation.with_input(value).run())
        return leaves[index].detach()


class RecomputedInput:
    """An input that was dropped: output `index` of `call`."""

    def __init__(self, call: BlockCall, index: int, value: torch.Tensor) -> None:
        self.call, self.index, self.requires_grad = call, index, value.requires_grad
        self.placeholder = value.detach().new_empty(0)
        self.tensor: torch.Tensor | None = None
        before = call.source
        self.lock: threading.Lock = before.lock if isinstance(before, RecomputedInput) else threading.Lock()
        """One for the whole segment: rebuilding one input fills in those before it."""

    def peek(self) -> torch.Tensor:
        """The value, without giving up the copy that the block's own recompute will take."""
        assert self.tensor is not None, "predecessors are rebuilt in order"
        return self.tensor

    def take(self) -> torch.Tensor:
        """Rebuild what is missing, from the last kept input on, and hand the value over."""
        with self.lock:
            for missing in self._missing():
                missing.tensor = missing.call.output(missing.index)
            value = self.peek()
            self.tensor = None
        return value.detach().requires_grad_(self.requires_grad)

    def _missing(self) -> list[RecomputedInput]:
        """This input and those before it that are not there, first one first."""
        missing: list[RecomputedInput] = []
        at: KeptInput | RecomputedInput = self
        while isinstance(at, RecomputedInput) and at.tensor is None:
            missing.append(at)
            at = at.call.source
        return missing[::-1]


class Chain:
    """Remembers the last block call of each thread, for as long as its output lives."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[list[tuple[weakref.ref[torch.Tensor], int]], BlockCall | None]] = {}

    def note(self, out: Any, call: BlockCall | None) -> None:
        """Remember what a block returned, and how to compute it again (``None``: only that it did)."""
        thread = threading.get_ident()
        chain = weakref.ref(self)
        refs = [
            (weakref.ref(tensor, lambda _: _forget(chain, thread)), tensor._version) for tensor in tensor_leaves(out)
        ]
        self._last[thread] = (refs, call)

    def match(self, tensor: torch.Tensor | None) -> tuple[BlockCall | None, int] | None:
        """The call and output index that `tensor` is, unchanged; ``None`` if it is something else."""
        refs, call = self._last.get(threading.get_ident(), ([], None))
        for index, (ref, version) in enumerate(refs):
            if tensor is not None and ref() is tensor and tensor._version == version:
                return call, index
        return None

    def __reduce__(self) -> tuple[type[Chain], tuple[()]]:
        return Chain, ()


def _forget(chain: weakref.ref[Chain], thread: int) -> None:
    alive = chain()
    if alive is not None and thread in alive._last and all(ref() is None for ref, _ in alive._last[thread][0]):
        del alive._last[thread]


def _forget_saved(tensor: torch.Tensor) -> None:
    """Pack hook: keep nothing."""


def _never_unpacked(_: None) -> torch.Tensor:
    raise AssertionError("no backward runs through a replay")


def _input_place(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str | None:
    for index, value in enumerate(args):
        if isinstance(value, torch.Tensor):
            return index
    return "hidden_states" if "hidden_states" in kwargs else None


def tensor_leaves(out: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
