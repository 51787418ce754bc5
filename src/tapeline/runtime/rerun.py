"""The whole-block fall-back: saved tensors come back by running the block again, as checkpointing does.

Used where a block cannot be replayed from a tape, and where a call did something else than what was recorded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from tapeline.errors import PlanDriftError
from tapeline.ledger import RECOMPUTE, active_ledgers
from tapeline.runtime.ambient import Ambient
from tapeline.runtime.fingerprint import Fingerprint
from tapeline.runtime.guard import BlockGuard, changed
from tapeline.runtime.invocation import Invocation
from tapeline.runtime.replaying import OBSERVERS
from tapeline.runtime.signature import check_numerics
from tapeline.tape.functions import never
from tapeline.tape.replay import only_modes, other_modes
from tapeline.tape.sources import storage_key
from tapeline.tape.verify import same_bits


class _EverythingSavedError(Exception):
    """Raised inside a rerun once the last saved tensor is there: nothing after it is needed."""


class Rerun:
    """The call of a block, kept so that everything it saves can be made again.

    Args:
        guard: notes and checks the tensors of the block.
        fingerprint: tells whether anything else of the block has changed.
        invocation: what was run, with which arguments.
        ambient: random and autocast state at entry.
    """

    def __init__(self, guard: BlockGuard, fingerprint: Fingerprint, invocation: Invocation, ambient: Ambient) -> None:
        self.guard, self.fingerprint, self.ambient = guard, fingerprint, ambient
        self.noted, self.token = guard.note(), fingerprint.token()
        self.given = {storage_key(tensor) for tensor in guard.tensors()}
        self.given |= {storage_key(tensor) for tensor in invocation.tensors()}
        self.invocation, self.modes = invocation.detached(), other_modes(OBSERVERS)
        self.versions = [_version(tensor) for tensor in self.invocation.tensors()]
        self.num_saved = 0
        self.expected: dict[int, tuple[torch.Size, torch.dtype]] = {}
        self.ready: dict[int, tuple[torch.Tensor, int]] = {}
        self.lock = threading.Lock()

    def drop(self, number: int, tensor: torch.Tensor) -> Any:
        """Leave a place for saved tensor `number`; what the block was given is there anyway and stays as it is."""
        self.num_saved = max(self.num_saved, number + 1)
        if storage_key(tensor) in self.given:
            return None
        self.expected[number] = tensor.shape, tensor.dtype
        return self, number

    def take(self, number: int) -> torch.Tensor:
        """Saved tensor `number`; the first to ask runs the block again.

        Raises:
            RuntimeError: if the block or an argument has been changed since.
            PlanDriftError: if the block does not save the same again.
        """
        with self.lock:
            if number not in self.ready:
                self._run(self._make_ready)
            tensor, version = self.ready.pop(number)
        if tensor._version != version:
            raise RuntimeError(changed(tensor, version, f"to recompute block {self.guard.name!r}", "a saved tensor"))
        return tensor

    def is_exact(self, saved: Sequence[torch.Tensor]) -> bool:
        """Whether running the block now gives what it saved in forward, bit for bit."""
        is_same = []
        try:
            self._run(lambda number, tensor: is_same.append(same_bits(tensor, saved[number])))
        except PlanDriftError:
            return False
        return all(is_same)

    def _run(self, note: Callable[[int, torch.Tensor], None]) -> None:
        self.guard.check(self.noted)
        check_numerics(self.guard.name, self.ambient.settings.numerics)
        if self.fingerprint.token() != self.token:
            raise PlanDriftError(
                f"Block {self.guard.name!r} must be run again in backward, and a number, a hook or a module of it has changed "
                "between forward and backward: what was dropped cannot be made again. Run backward before the change."
            )
        if [_version(tensor) for tensor in self.invocation.tensors()] != self.versions:
            raise RuntimeError(
                f"One of the variables needed to recompute block {self.guard.name!r} has been modified by an inplace "
                "operation: an argument of the block is at another version than in forward. Run backward before the change."
            )
        number = -1

        def pack(tensor: torch.Tensor) -> None:
            nonlocal number
            number += 1
            if number in self.expected:
                if self.expected[number] != (tensor.shape, tensor.dtype):
                    raise PlanDriftError(self._message(f"saved tensor {number} is {tensor.dtype} {list(tensor.shape)}"))
                note(number, tensor.detach())
            if number + 1 == self.num_saved:
                raise _EverythingSavedError

        with ExitStack() as stack:
            stack.enter_context(only_modes(OBSERVERS, self.modes))
            for ledger in active_ledgers():
                stack.enter_context(ledger.scope(RECOMPUTE, self.guard.name))
            stack.enter_context(self.ambient.restored())
            stack.enter_context(torch.enable_grad())
            stack.enter_context(saved_tensors_hooks(pack, never))
            try:
                self.invocation.detached().run()
            except _EverythingSavedError:
                return
        raise PlanDriftError(self._message(f"it saved {number + 1} tensors"))

    def _make_ready(self, number: int, tensor: torch.Tensor) -> None:
        self.ready[number] = tensor, tensor._version

    def _message(self, what: str) -> str:
        return (
            f"Block {self.guard.name!r} did something else when it was run again in backward: {what}, in forward it saved "
            f"{self.num_saved} tensors, this one {self.expected.get(self.num_saved - 1)}. What was dropped cannot be made "
            "again. Keep this block."
        )


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
