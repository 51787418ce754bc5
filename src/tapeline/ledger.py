"""Exact live bytes over time, by op dispatch: on a CPU, on an accelerator, and on fake tensors.

The ledger is a dispatch mode. It counts each storage once, from the op that created it until the storage is
really freed (a weak reference to the storage object tells), and remembers in which phase and block that happened.
What it cannot see is memory that one kernel allocates and frees inside itself, and storages that no op under the
ledger ever touched.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from tapeline.compat import run_op
from tapeline.table import text_table
from tapeline.units import format_bytes

OUTSIDE = "outside"
FORWARD = "forward"
BACKWARD = "backward"
RECOMPUTE = "recompute"
OPTIMIZER = "optimizer"

Observer = Callable[[Any, tuple[Any, ...], dict[str, Any], Any, "Span"], None]
_ACCUMULATE_GRAD = 2**63  # AccumulateGrad nodes carry the largest sequence number there is: they belong to no block
_MAX_RANGES = 65536
DEVICE_OF = torch.ops.prim.device.default
"""Not an op: autograd asks fake tensors for their device, twice for every gradient."""


class Allocation:
    """One storage: how big it is, and who made it."""

    __slots__ = ("block", "category", "device", "dtype", "num_bytes", "op", "phase", "shape")

    def __init__(self, tensor: torch.Tensor, num_bytes: int, op: str, phase: str, block: str | None) -> None:
        self.num_bytes = num_bytes
        self.device = str(tensor.device)
        self.shape = tuple(tensor.shape)
        self.dtype = str(tensor.dtype).removeprefix("torch.")
        self.op, self.phase, self.block = op, phase, block
        self.category: str | None = None


@dataclass(slots=True)
class Span:
    """A stretch of time in one phase and block."""

    phase: str
    block: str | None
    start_bytes: int
    """Live bytes of the ledger's device when it began."""
    peak_bytes: int
    end_bytes: int = 0


class Ledger(TorchDispatchMode):
    """Counts the live bytes of every storage that ops create or touch while the mode is active.

    Frees are seen even while the mode is not active, so that it may be entered for some steps only; call `track`
    with the model and the optimizer at the start of each, for what was made in between.

    Args:
        device: the device whose spans and peak are kept in detail, ``"cpu"`` or ``"cuda:0"``. Other devices are
            counted too, see `live_bytes` and `peak_bytes`.
        observe: called after each op as ``observe(func, args, kwargs, out, span)``.

    Example:
        >>> import torch
        >>> from tapeline.ledger import Ledger
        >>> with Ledger() as ledger:
        ...     a = torch.zeros(1024)
        ...     b = a[:10] + 1
        >>> ledger.live_bytes()
        4136
    """

    def __init__(self, device: torch.device | str = "cpu", observe: Observer | None = None) -> None:
        super().__init__()
        self.device = str(device)
        self._observe = observe
        self._live: dict[int, tuple[weakref.ref[Any], Allocation]] = {}
        self._bytes: dict[str, int] = {}
        self._peaks: dict[str, int] = {}
        self._stack: list[tuple[str, str | None]] = []
        self._range_starts: list[int] = []
        self._range_blocks: list[str | None] = []
        self._span = Span(OUTSIDE, None, 0, 0)
        self.spans: list[Span] = [self._span]
        self._at_peak: dict[Allocation, int] = {}
        self._since_peak: dict[Allocation, int] = {}

    # -- reading -------------------------------------------------------------------------------------------------

    def live_bytes(self, device: torch.device | str | None = None) -> int:
        """Bytes alive now on `device` (default: the ledger's device)."""
        return self._bytes.get(str(device or self.device), 0)

    def peak_bytes(self, device: torch.device | str | None = None) -> int:
        """Largest number of bytes alive at once on `device` since the window began."""
        return self._peaks.get(str(device or self.device), 0)

    def peak_holders(self) -> list[Allocation]:
        """What was alive on the ledger's device at its peak, largest first."""
        holders = [a for a in self._at_peak if a.device == self.device]
        return sorted(holders, key=lambda a: -a.num_bytes)

    def peak_table(self, limit: int = 10) -> str:
        """The `limit` largest tensors alive at the peak: bytes, where and by which op they were made."""
        header = ("op", "shape", "phase", "block", "bytes")
        rows = [
            (a.op, f"{a.dtype}{list(a.shape)}", a.phase, a.block or "-", format_bytes(a.num_bytes))
            for a in self.peak_holders()[:limit]
        ]
        return text_table(header, rows, left=4)

    # -- telling the ledger what it sees -------------------------------------------------------------------------

    def begin_window(self) -> None:
        """Forget peak and spans; what is alive stays counted."""
        self._at_peak = {allocation: allocation.num_bytes for _, allocation in list(self._live.values())}
        self._since_peak.clear()
        self._peaks = dict(self._bytes)
        live = self.live_bytes()
        self._span = Span(self._span.phase, self._span.block, live, live)
        self.spans = [self._span]

    def track(self, tensors: Iterable[torch.Tensor | None], category: str) -> None:
        """Count tensors that exist already and name what they are, for example ``"weights"``."""
        for tensor in tensors:
            if tensor is None:
                continue
            for storage in _storages(tensor):
                self._add(tensor, storage, category).category = category

    @contextmanager
    def scope(self, phase: str, block: str | None = None) -> Iterator[None]:
        """Attribute what happens inside to a phase and block; a nested scope without a block keeps the outer one."""
        self._push(phase, block)
        try:
            yield
        finally:
            self._pop()

    @contextmanager
    def watch(self, model: torch.nn.Module, blocks: Iterable[str]) -> Iterator[None]:
        """Attribute forward and backward of each named block to it; hooks are taken off on leaving."""
        handles = []
        for name in blocks:
            module = model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(_Enter(self, name), prepend=True))
            handles.append(module.register_forward_hook(_Leave(self), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # -- the mode ------------------------------------------------------------------------------------------------

    def __exit__(self, *exc: object) -> None:
        self._span.end_bytes = self.live_bytes()
        super().__exit__(*exc)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is DEVICE_OF:
            return func(*args)
        span = self._locate()
        for tensor in _tensors(args):
            self._see(tensor, "found")
        for tensor in _tensors(kwargs.values()):
            self._see(tensor, "found")
        out = run_op(func, args, kwargs)
        if isinstance(out, torch.Tensor):
            self._see(out, str(func))
        elif isinstance(out, list | tuple):
            for tensor in _tensors(out):
                self._see(tensor, str(func))
        if self._observe is not None:
            self._observe(func, args, kwargs, out, span)
        return out

    def _see(self, tensor: torch.Tensor, op: str) -> None:
        for storage in _storages(tensor):
            known = self._live.get(storage._cdata)
            if known is None:
                self._add(tensor, storage, op)
            elif known[1].num_bytes != storage.nbytes():  # resized in place
                self._change(known[1], storage.nbytes() - known[1].num_bytes)

    def _add(self, tensor: torch.Tensor, storage: torch.UntypedStorage, op: str) -> Allocation:
        key = storage._cdata
        known = self._live.get(key)
        if known is not None:
            return known[1]
        allocation = Allocation(tensor, 0, op, self._span.phase, self._span.block)
        ledger = weakref.ref(self)
        self._live[key] = (weakref.ref(storage, lambda _: _freed(ledger, key)), allocation)
        self._change(allocation, storage.nbytes())
        return allocation

    def _change(self, allocation: Allocation, delta: int) -> None:
        device = allocation.device
        allocation.num_bytes += delta
        live = self._bytes[device] = self._bytes.get(device, 0) + delta
        self._remember(allocation, delta)
        is_peak = live > self._peaks.get(device, 0)
        if is_peak:
            self._peaks[device] = live
        if device == self.device:
            self._span.peak_bytes = max(self._span.peak_bytes, live)
            if is_peak:
                self._fold()

    def _free(self, key: int) -> None:
        known = self._live.pop(key, None)
        if known is None:
            return
        allocation = known[1]
        self._bytes[allocation.device] -= allocation.num_bytes
        self._remember(allocation, -allocation.num_bytes)

    def _remember(self, allocation: Allocation, delta: int) -> None:
        """Note a change since the peak; what came and went again leaves nothing."""
        change = self._since_peak.pop(allocation, 0) + delta
        if change:
            self._since_peak[allocation] = change

    def _fold(self) -> None:
        """A new peak: what is alive now is what was alive at the old one, and what has changed since."""
        for allocation, delta in self._since_peak.items():
            size = self._at_peak.pop(allocation, 0) + delta
            if size:
                self._at_peak[allocation] = size
        self._since_peak.clear()

    # -- phases and blocks ---------------------------------------------------------------------------------------

    def _push(self, phase: str, block: str | None) -> None:
        if block is None and self._stack:
            block = self._stack[-1][1]
        self._stack.append((phase, block))
        if phase == FORWARD:
            self._mark_range(block)
        self._switch(phase, block)

    def _pop(self) -> None:
        phase, _ = self._stack.pop()
        outer = self._stack[-1] if self._stack else (OUTSIDE, None)
        if phase == FORWARD:
            self._mark_range(outer[1])
        if phase != RECOMPUTE:  # what follows a recompute is the backward of the same block: the next op tells
            self._switch(*outer)

    def _mark_range(self, block: str | None) -> None:
        """From now on, autograd nodes (numbered in the order of their creation) belong to `block`."""
        self._range_starts.append(torch.autograd._get_sequence_nr())
        self._range_blocks.append(block)
        if len(self._range_starts) > _MAX_RANGES:
            del self._range_starts[: _MAX_RANGES // 2], self._range_blocks[: _MAX_RANGES // 2]

    def _locate(self) -> Span:
        stack = self._stack
        if stack and stack[-1][0] == RECOMPUTE:
            self._switch(*stack[-1])
        elif (node := torch._C._current_autograd_node()) is not None:
            number = node._sequence_nr()
            if number < _ACCUMULATE_GRAD:
                index = bisect_right(self._range_starts, number) - 1
                self._switch(BACKWARD, self._range_blocks[index] if index >= 0 else None)
            elif self._span.phase not in (BACKWARD, RECOMPUTE):
                self._switch(BACKWARD, None)
        elif self._span.phase not in (BACKWARD, RECOMPUTE):
            self._switch(*(stack[-1] if stack else (OUTSIDE, None)))
        return self._span

    def _switch(self, phase: str, block: str | None) -> None:
        span = self._span
        if span.phase == phase and span.block == block:
            return
        live = self.live_bytes()
        span.end_bytes = live
        self._span = Span(phase, block, live, live)
        self.spans.append(self._span)
        if len(self.spans) > _MAX_RANGES:
            del self.spans[: _MAX_RANGES // 2]


class _Enter:
    """Forward pre-hook of a block: open its scope."""

    def __init__(self, ledger: Ledger, name: str) -> None:
        self.ledger, self.name = ledger, name

    def __call__(self, module: torch.nn.Module, args: Any) -> None:
        self.ledger._push(FORWARD, self.name)


class _Leave:
    """Forward hook of a block: close its scope, also when the forward raised."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def __call__(self, module: torch.nn.Module, args: Any, out: Any) -> None:
        self.ledger._pop()


def active_ledgers() -> list[Ledger]:
    """The ledgers that see the ops of this thread now."""
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    return [mode for mode in modes if isinstance(mode, Ledger)]


def _freed(ledger: weakref.ref[Ledger], key: int) -> None:
    alive = ledger()
    if alive is not None:
        alive._free(key)


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _storages(tensor: torch.Tensor) -> Iterator[torch.UntypedStorage]:
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _storages(getattr(tensor, name))
    elif tensor.layout == torch.strided:
        yield tensor.untyped_storage()
    elif tensor.layout == torch.sparse_coo:
        yield tensor._indices().untyped_storage()
        yield tensor._values().untyped_storage()
