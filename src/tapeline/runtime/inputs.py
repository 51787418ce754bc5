"""Block inputs that are not kept: rebuilt in backward by replaying the blocks before them.

With every k-th input kept (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"), the inputs in between
are the outputs of earlier blocks. Dropping an input is one more replay: its recipe is the tape of the block before, as far
as that block's output. The first block of a segment that backward reaches replays its predecessors, once, and leaves
their outputs for the replay of each.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from tapeline.runtime.ambient import Ambient
from tapeline.runtime.moving import Moved
from tapeline.runtime.replaying import replay
from tapeline.tape.nested import tensor_leaves
from tapeline.tape.program import Program


class OutputRecipe:
    """How to make the outputs of one call again.

    Args:
        block: name of the block.
        program: makes the outputs from sources alone.
        sources: a tensor for each source, or an input that is itself not there.
        ambient: the random state at entry.
    """

    def __init__(self, block: str, program: Program, sources: Sequence[torch.Tensor | Away], ambient: Ambient) -> None:
        self.block, self.program, self.sources, self.ambient = block, program, sources, ambient
        self.versions = [_version(sources[number]) for number in program.sources]

    def before(self) -> RebuiltInput | None:
        """The rebuilt input that this call itself needs."""
        return next((source for source in self.sources if isinstance(source, RebuiltInput)), None)

    def run(self, index: int) -> torch.Tensor:
        """Output `index`; the input must be there."""
        used = [self.sources[number] for number in self.program.sources]
        if [_version(source) for source in used] != self.versions:
            raise RuntimeError(
                "One of the variables needed to recompute a block's input has been modified by an inplace operation between "
                "forward and backward. Run backward before the optimizer step or the change."
            )
        tensors = [source if isinstance(source, torch.Tensor) else source.tensor() for source in used]
        return replay(self.block, self.program, tensors, (), self.ambient)[index]


class RebuiltInput:
    """An input that was dropped: output `index` of the call before."""

    def __init__(self, recipe: OutputRecipe, index: int) -> None:
        self.recipe, self.index = recipe, index
        self._tensor: torch.Tensor | None = None
        self._stream: Any = None
        before = recipe.before()
        self.lock: threading.RLock = before.lock if before is not None else threading.RLock()
        """One for the whole segment: rebuilding one input fills in those before it."""

    def tensor(self) -> torch.Tensor:
        """The value; what is missing is rebuilt from the last kept input on, and stays as long as this object."""
        with self.lock:
            for missing in self._missing():
                missing._tensor = missing.recipe.run(missing.index)
                missing._stream = current_stream(missing._tensor)
            assert self._tensor is not None, "rebuilt just now"
            if self._stream is not None:
                hand_over(self._tensor, self._stream)
            return self._tensor

    def _missing(self) -> list[RebuiltInput]:
        missing: list[RebuiltInput] = []
        at: RebuiltInput | None = self
        while at is not None and at._tensor is None:
            missing.append(at)
            at = at.recipe.before()
        return missing[::-1]


Away = RebuiltInput | Moved
"""An input that is not on the device, and comes back when it is asked for."""


class Chain:
    """Remembers the last block call of each thread, for as long as its output lives."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[list[tuple[weakref.ref[torch.Tensor], int]], OutputRecipe | None]] = {}

    def note(self, out: Any, recipe: OutputRecipe | None) -> None:
        """Remember what a block returned, and how to compute it again (``None``: only that it did)."""
        thread = threading.get_ident()
        chain = weakref.ref(self)
        refs = [
            (weakref.ref(tensor, lambda _: _forget(chain, thread)), tensor._version) for tensor in tensor_leaves(out)
        ]
        self._last[thread] = (refs, recipe)

    def match(self, tensor: torch.Tensor | None) -> tuple[OutputRecipe | None, int] | None:
        """The recipe and output index that `tensor` is, unchanged; ``None`` if it is something else."""
        refs, recipe = self._last.get(threading.get_ident(), ([], None))
        for index, (ref, version) in enumerate(refs):
            if tensor is not None and ref() is tensor and tensor._version == version:
                return recipe, index
        return None

    def __reduce__(self) -> tuple[type[Chain], tuple[()]]:
        return Chain, ()


def _version(source: torch.Tensor | Away) -> int:
    return source._version if isinstance(source, torch.Tensor) else -1


def _forget(chain: weakref.ref[Chain], thread: int) -> None:
    alive = chain()
    if alive is not None and thread in alive._last and all(ref() is None for ref, _ in alive._last[thread][0]):
        del alive._last[thread]


def current_stream(tensor: torch.Tensor) -> Any:
    """The stream that operations on a tensor run on now; ``None`` on a CPU."""
    return None if tensor.device.type in ("cpu", "meta") else torch.accelerator.current_stream(tensor.device)


def hand_over(tensor: torch.Tensor, produced_on: Any) -> None:
    """Make the present stream wait for the one that the phase was replayed on."""
    current = torch.accelerator.current_stream(tensor.device)
    if current != produced_on:
        current.wait_stream(produced_on)
        tensor.record_stream(current)
