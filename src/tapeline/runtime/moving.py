"""What a block's forward needs in backward and the plan has moved: sent when it is there, fetched ahead of its need, taken by who asks.

The unit is the storage: it is sent once, however many views of it are saved, and each view is made anew from what comes back. Lifetimes
follow references, as everywhere in the runtime: when the last place of a saved tensor goes, its slot is free again.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tapeline.errors import TierError
from tapeline.runtime.ambient import RandomState
from tapeline.runtime.guard import changed
from tapeline.runtime.tiers.tier import Tier
from tapeline.tape.graph import Geometry
from tapeline.tape.nested import tensor_leaves
from tapeline.tape.sources import attached, storage_key
from tapeline.tape.values import is_lazy

LEAST_BYTES = 2**16
"""Smaller tensors stay: starting a copy costs more than they are worth."""


class Moved:
    """A storage that has left the device, or is leaving it."""

    __slots__ = ("__weakref__", "_tensor", "call", "geometry", "lock", "mover", "stream", "tier", "transfer", "version")

    def __init__(self, mover: Mover, tier: Tier, call: MovedCall, tensor: torch.Tensor, transfer: Any) -> None:
        self.mover, self.tier, self.call, self.transfer = mover, tier, call, transfer
        self.geometry, self.version = Geometry.of(tensor), tensor._version
        self.lock = threading.RLock()
        self._tensor: torch.Tensor | None = None
        self.stream: Any = None
        """The compute stream that has it."""

    def tensor(self) -> torch.Tensor:
        """The tensor as it was sent; it stays on the device until this object goes, or another call is asked for its own.

        Raises:
            RuntimeError: if it was changed in place while its bytes were read.
            TierError: if the bytes cannot be had.
        """
        with self.lock:
            tensor, stream = self._tensor, self.tier.engine.machine.compute()
            if tensor is None or stream != self.stream:  # another stream has its own
                self.call.begin_backward()
                if not self.transfer.look():
                    raise RuntimeError(self._changed())
                with torch.no_grad(), self.mover.undoing():
                    bytes_ = self.tier.engine.take(self.transfer)
                    tensor = self.geometry.apply(bytes_.view(self.geometry.dtype))
                self._tensor, self.stream = tensor, stream
            return tensor

    def look(self) -> bool:
        """Whether it is as it was when it was sent."""
        return bool(self.transfer.look())

    def release(self) -> None:
        """It can be had again from where it is."""
        self._tensor = None

    def _changed(self) -> str:
        original = self.transfer.original
        if original is not None:
            return changed(original, self.version, "for gradient computation")
        return (
            f"One of the variables needed for gradient computation has been modified by an inplace operation: {self.geometry} "
            f"was written while it was on its way to the {self.tier.name}. Run backward before the change."
        )

    def __del__(self) -> None:
        self.tier.engine.drop(self.transfer)


class MovedCall:
    """One call of a block: what of it has been moved, and how much of the calls before it may come back while its backward runs.

    Args:
        mover: what it belongs to.
        block: name of the block.
        ahead_bytes: bytes of earlier calls that may be on the device, or on their way to it, when its backward begins.
        before: the call before it.
    """

    def __init__(self, mover: Mover, block: str, ahead_bytes: int, before: MovedCall | None) -> None:
        self.mover, self.block, self.ahead_bytes = mover, block, ahead_bytes
        self._before = None if before is None else weakref.ref(before)
        self._members: list[weakref.ref[Moved]] = []
        self._has_ended = False

    def send(self, tensor: torch.Tensor, tier: str) -> Moved | None:
        """As `Mover.send`, for this call."""
        moved = self.mover.send(tensor, tier, self)
        if moved is not None and moved.call is self:
            self._members.append(weakref.ref(moved))  # what is sent last is needed first
        return moved

    def members(self) -> Iterator[Moved]:
        """What is still needed, in the order of need."""
        for ref in reversed(self._members):
            moved = ref()
            if moved is not None:
                yield moved

    def end(self, out: Any) -> None:
        """The call is over: what the one before it has sent is given back.

        From here on the backward of this call may begin: when the gradient of what it returned is there.
        """
        self._has_ended = True
        if (before := self.before()) is not None:
            with self.mover.undoing():
                for moved in before.members():
                    moved.tier.engine.let_go(moved.transfer)
        for tensor in tensor_leaves(out):
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(self._on_gradient)
                return

    def begin_backward(self) -> None:
        """The backward of this call begins: bring back what earlier calls need, as far as the plan has room for it."""
        if not self._has_ended or not self.mover.enter(self):
            return
        left = self.ahead_bytes
        at = self.before()
        while at is not None:
            for moved in at.members():
                left -= moved.transfer.num_bytes
                if left < 0:
                    return
                moved.tier.engine.fetch(moved.transfer)
            at = at.before()

    def before(self) -> MovedCall | None:
        """The call before, if anything of it is still needed."""
        return self._before() if self._before is not None else None

    def release(self) -> None:
        """Its backward is over, or its verification: what is asked for again is brought again."""
        for moved in self.members():
            moved.release()

    def _on_gradient(self, _: Any) -> None:
        self.begin_backward()


class Mover:
    """Moves storages of one model to its tiers and back.

    Args:
        tiers: by name.
        model: whose parameters and buffers never move.
        least_bytes: smaller storages stay.
    """

    def __init__(self, tiers: Mapping[str, Tier], model: nn.Module, *, least_bytes: int = LEAST_BYTES) -> None:
        self.tiers, self.model, self.least_bytes = dict(tiers), model, least_bytes
        self.stayed: Counter[str] = Counter()
        """Tensors that were to be moved and stayed on the device, by reason."""
        self._owned: set[int] = set()
        self._last: dict[int, weakref.ref[MovedCall]] = {}
        self._entered: weakref.ref[MovedCall] | None = None
        self._known: dict[int, tuple[weakref.ref[Any], int, weakref.ref[Moved]]] = {}
        self.begin_forward()

    def begin_forward(self) -> None:
        """A training forward of the model begins: look again at which storages are those of its weights."""
        self._owned = {
            storage_key(tensor)
            for held in (*self.model.parameters(), *self.model.buffers())
            for tensor in (held, *(part for _, part in attached(held)))
        }
        self._random_state = RandomState([tensor for tensor in self.model.parameters() if not tensor.is_cpu][:1])
        self._known = {key: known for key, known in self._known.items() if known[2]() is not None}
        self._before = {name: (tier.engine.bytes_out, tier.engine.bytes_back) for name, tier in self.tiers.items()}

    @contextmanager
    def undoing(self) -> Iterator[None]:
        """On an error, the random state is that of the last forward's beginning; who leaves a replay has to do it again."""
        try:
            yield
        except TierError as error:
            error.undo = self._random_state.put_back
            error.undo()
            raise

    def since_forward(self, name: str) -> tuple[int, int]:
        """Bytes that left the device for a tier, and came back, since the last training forward began."""
        (out, back), engine = self._before[name], self.tiers[name].engine
        return engine.bytes_out - out, engine.bytes_back - back

    def call(self, block: str, ahead_bytes: int) -> MovedCall:
        """A call of a block begins."""
        thread = threading.get_ident()
        last = self._last.get(thread)
        made = MovedCall(self, block, ahead_bytes, last() if last is not None else None)
        self._last[thread] = weakref.ref(made)
        return made

    def send(self, tensor: torch.Tensor, name: str, call: MovedCall) -> Moved | None:
        """Begin to move the storage of a tensor.

        Args:
            tensor: on the device.
            name: of the tier.
            call: the block's call that needs it.

        Returns:
            What stands for it, the same for every tensor of this storage with this content; ``None``: it stays, because it is
            a weight, small, no plain tensor, or the tier has no room.
        """
        tier = self.tiers.get(name)
        if tier is None or not self._can_move(tensor, tier):
            return None
        storage = tensor.untyped_storage()
        if (known := self._find(storage, tensor._version)) is not None:
            return known if known.tier is tier and known.geometry.dtype == tensor.dtype else None
        num_bytes = storage.nbytes()
        original = tensor.detach()
        with torch.no_grad():
            flat = original.as_strided((num_bytes // tensor.element_size(),), (1,), 0).view(torch.uint8)
        with self.undoing():
            transfer = tier.engine.send(flat, original, call.block)
        if transfer is None:
            self.stayed[f"the {name} has no room for it"] += 1
            return None
        moved = Moved(self, tier, call, tensor, transfer)
        self._known[storage._cdata] = weakref.ref(storage), tensor._version, weakref.ref(moved)
        return moved

    def _find(self, storage: torch.UntypedStorage, version: int) -> Moved | None:
        """What stands for a storage with this content already; an address may be another storage's by now."""
        ref, known_version, moved = self._known.get(storage._cdata, (None, -1, None))
        if ref is None or moved is None or ref() is not storage or known_version != version:
            return None
        return moved()

    def enter(self, call: MovedCall) -> bool:
        """The backward of a call begins, unless it has; that of another one is over."""
        last = self._entered() if self._entered is not None else None
        if last is call:
            return False
        self._entered = weakref.ref(call)
        if last is not None:
            last.release()
        return True

    def close(self) -> None:
        """No forward will move anything any more; what waits for its backward can still be had."""
        for tier in self.tiers.values():
            tier.engine.close()

    def _can_move(self, tensor: torch.Tensor, tier: Tier) -> bool:
        if type(tensor) is not torch.Tensor and is_traceable_wrapper_subclass(tensor):
            self.stayed[f"{type(tensor).__name__} tensors stay on the device"] += 1
            return False
        if isinstance(tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_inference():
            return False
        if is_lazy(tensor) or tensor.device != tier.device:
            return False
        num_bytes = tensor.untyped_storage().nbytes()
        is_whole = num_bytes % tensor.element_size() == 0
        return num_bytes >= self.least_bytes and is_whole and storage_key(tensor) not in self._owned
