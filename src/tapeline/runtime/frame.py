"""One call of a block: what was held, and what brings the rest back.

Lifetimes follow references: autograd's saved variables hold either a tensor or a place in a `Phase`; a phase holds what its
replay starts from. When the graph goes, all of it goes. There is no table of tensors anywhere.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from tapeline.errors import PlanDriftError, TierError
from tapeline.runtime.ambient import Ambient
from tapeline.runtime.guard import changed
from tapeline.runtime.inputs import Away, current_stream, hand_over
from tapeline.runtime.invocation import Hooks
from tapeline.runtime.moving import Moved, MovedCall
from tapeline.runtime.replaying import replay
from tapeline.runtime.rerun import Rerun
from tapeline.runtime.signature import check_numerics
from tapeline.tape.graph import Geometry
from tapeline.tape.program import KEEP, Program, Recipe
from tapeline.tape.straight import Check

_count_nodes = torch.autograd._get_sequence_nr


class Phase:
    """What one phase of one call needs to run: its program, tensors with the versions they had, the random state."""

    __slots__ = (
        *("ambient", "block", "is_complete", "lock", "lost", "program", "ready", "rerun", "roots"),
        *("sources", "stream", "versions"),
    )

    def __init__(self, block: str, program: Program, ambient: Ambient) -> None:
        self.block, self.program, self.ambient = block, program, ambient
        self.sources: Sequence[torch.Tensor | Away] = ()
        self.roots: Sequence[torch.Tensor | Place] = ()
        self.versions: list[int] = []
        self.ready: dict[int, torch.Tensor] = {}
        self.rerun: dict[int, tuple[Rerun, int]] | None = None
        self.lock = threading.RLock()
        self.is_complete = False
        self.lost = ""
        self.stream: Any = None

    def complete(self, sources: Sequence[torch.Tensor | Away], roots: Sequence[torch.Tensor | Place]) -> None:
        """The call has ended: from now on this phase can be replayed."""
        self.sources, self.roots = sources, roots
        self.versions = [tensor._version for tensor in self._origins()]
        self.is_complete = True

    def take(self, slot: int) -> torch.Tensor:
        """The tensor of one slot; the first to ask replays the phase, and the others wait until they are asked for."""
        with self.lock:
            if self.rerun is not None:
                rerun, number = self.rerun[slot]
                return rerun.take(number)
            if slot not in self.ready:
                self.ready.update(enumerate(self.replay()))
                self.stream = current_stream(self.ready[slot])
            tensor = self.ready.pop(slot)
            if self.stream is not None:
                hand_over(tensor, self.stream)
            return tensor

    def replay(self, check: Check | None = None) -> list[torch.Tensor]:
        """Run the program once; returns the tensor of each slot, or hands one after the other to `check`.

        Raises:
            RuntimeError: if a tensor that it starts from has been changed in place since.
            PlanDriftError: if the forward has not ended.
        """
        if self.lost:
            raise PlanDriftError(f"{self.lost} What was dropped cannot be made again. Keep this block.")
        if not self.is_complete:
            raise PlanDriftError(
                f"The forward of block {self.block!r} did not end, or it ran backward inside itself, which it did not do when "
                "it was recorded: what was dropped cannot be made. Keep this block."
            )
        if [tensor._version for tensor in self._origins()] != self.versions:
            self._raise_changed()
        check_numerics(self.block, self.ambient.settings.numerics)
        sources = [_there(self.sources[number]) for number in self.program.sources]
        return replay(self.block, self.program, sources, [_there(root) for root in self.roots], self.ambient, check)

    def _raise_changed(self) -> None:
        used = [self.sources[number] for number in self.program.sources]
        named = zip([*used, *self.roots], self.program.origins, strict=True)
        tensors = [(tensor, name) for tensor, name in named if isinstance(tensor, torch.Tensor)]
        for (tensor, name), version in zip(tensors, self.versions, strict=True):
            if tensor._version != version:
                raise RuntimeError(changed(tensor, version, f"to recompute block {self.block!r}", name))

    def _origins(self) -> list[torch.Tensor]:
        used = (*(self.sources[number] for number in self.program.sources), *self.roots)
        return [tensor for tensor in used if isinstance(tensor, torch.Tensor)]


class Frame:
    """The hook pair of one call.

    Args:
        block: name of the block.
        recipe: what to do with each saved tensor.
        sources: the tensors of the recipe's sources, as they are now, or an input that will be brought back.
        ambient: the random state and the settings at entry.
        foreign: the hook pair that was in force before, which gets everything that is kept.
        away: the block's input, if it is not kept.
        call: what moves what the recipe moves; ``None``: it stays.
    """

    __slots__ = (
        *("actions", "away", "block", "call", "cursor", "drift", "first_node", "foreign", "moved"),
        *("num_found", "num_placed", "phases", "recipe", "roots", "sources", "versions"),
    )

    def __init__(
        self,
        block: str,
        recipe: Recipe,
        sources: Sequence[torch.Tensor | Away],
        ambient: Ambient,
        foreign: Hooks | None = None,
        away: Away | None = None,
        call: MovedCall | None = None,
    ) -> None:
        self.block, self.recipe, self.actions = block, recipe, recipe.packs
        self.sources, self.foreign, self.away, self.call = sources, foreign, away, call
        self.versions = self._source_versions()
        self.phases = [Phase(block, program, ambient) for program in recipe.programs]
        self.roots: dict[int, torch.Tensor | Moved] = {}
        self.moved: dict[int, Moved] = {}
        self.cursor = 0
        self.num_found = 0
        """How many copies of parameters autocast had from an earlier call."""
        self.drift = ""
        """What was different from the tape; empty as long as nothing was."""
        self.num_placed = len(self.actions)
        """How many tensors were treated as the recipe says before the drift."""
        self.first_node = _count_nodes()

    def pack(self, tensor: torch.Tensor) -> Any:
        """The pack hook: keep the tensor, or leave a place in a phase. Written out, because it runs for every saved tensor."""
        cursor = self.cursor
        self.cursor = cursor + 1
        if self.drift:
            return keep(tensor, self.foreign)
        try:
            shape, stride, dtype, least, most, is_plain, phase, slot, *_ = self.actions[cursor]
        except IndexError:
            self._begin_drift(cursor, f"it saved more than {len(self.actions)} tensors")
        else:
            if (
                tensor.shape != shape
                or tensor.dtype != dtype
                or not least <= _count_nodes() - self.first_node <= most
                or tensor.stride() != stride
            ):
                self._begin_drift(cursor, f"saved tensor {cursor} is another one ({tensor.dtype} {list(tensor.shape)})")
            elif not is_plain:
                return self._settle(tensor, cursor)
            elif phase != KEEP:
                return self.phases[phase], slot
            elif self.foreign is None:
                return (tensor if tensor.grad_fn is None else tensor.detach()), tensor._version
        return keep(tensor, self.foreign)

    def place(self, tensor: torch.Tensor) -> Any:
        """Do with the next saved tensor what the recipe says, without comparing it."""
        self.cursor += 1
        return self._settle(tensor, self.cursor - 1)

    def _settle(self, tensor: torch.Tensor, number: int) -> Any:
        action = self.actions[number]
        if action.narrow is not None:
            value, dtype = action.narrow
            narrow = tensor.detach().to(dtype)
            self.roots[value] = self._move(narrow, value, self.recipe.tiers.get(value, "")) or narrow
        if self._is_away(number):
            assert self.away is not None, "checked just now"
            return Place(self.away, self.recipe.input_packs[number]), 0
        if action.phase != KEEP:
            return self.phases[action.phase], action.slot
        moved = self._move(tensor, action.value, action.tier)
        if action.root != KEEP:
            self.roots[action.root] = moved or tensor.detach()
        if moved is not None:
            return Place(moved, Geometry.of(tensor)), 0
        return keep(tensor, self.foreign)

    def _move(self, tensor: torch.Tensor, value: int, tier: str) -> Moved | None:
        """Let a held value leave the device, once; ``None`` if it stays."""
        if not tier or self.call is None or self.foreign is not None:
            return None
        if value not in self.moved and (moved := self.call.send(tensor, tier)) is not None:
            self.moved[value] = moved
        return self.moved.get(value)

    def _is_away(self, number: int) -> bool:
        return self.away is not None and number in self.recipe.input_packs

    def _begin_drift(self, number: int, reason: str) -> None:
        self.drift, self.num_placed = reason, number

    def _dropped(self) -> Iterator[tuple[Phase, int, int]]:
        """Phase, slot and number of every tensor that was dropped before the drift."""
        for number, action in enumerate(self.actions[: min(self.num_placed, self.cursor)]):
            if action.phase != KEEP and not self._is_away(number):
                yield self.phases[action.phase], action.slot, number

    def finish(self) -> bool:
        """The forward has ended; returns whether it did what was recorded. If not, `drift` says what was different."""
        recipe = self.recipe
        nodes = _count_nodes() - self.first_node
        self.num_found = recipe.most_nodes - nodes
        if not self.drift:
            if self.cursor != len(self.actions):
                self.drift = f"it saved {self.cursor} tensors instead of {len(self.actions)}"
            elif not recipe.least_nodes <= nodes <= recipe.most_nodes:
                self.drift = f"it made {nodes} autograd nodes instead of {recipe.most_nodes}"
        return not self.drift

    def complete(self) -> bool:
        """Make the phases ready to be replayed, unless a source has changed while the call ran."""
        if self._source_versions() != self.versions or (isinstance(self.away, Moved) and not self.away.look()):
            self.drift = "it changed one of its sources in place"
            return False
        values = self.recipe.tape.values
        for phase in self.phases:
            roots = (_based(self.roots[value], values[value].base) for value in phase.program.roots)
            phase.complete(self.sources, list(roots))
        self._let_go()
        return True

    def recover(self, rerun: Rerun, tensors_saved: int) -> None:
        """Bring what was dropped before the drift back by running the whole block again."""
        rerun.num_saved = tensors_saved
        for phase, slot, number in self._dropped():
            action = self.actions[number]
            rerun.expected[number] = action.shape, action.dtype
            phase.rerun = (phase.rerun or {}) | {slot: (rerun, number)}
        self._let_go()

    def lose(self, reason: str) -> None:
        """What was dropped before the drift cannot be made again: asking for it raises."""
        for phase, _, _ in self._dropped():
            phase.lost = reason
        self._let_go()

    def _let_go(self) -> None:
        """Autograd keeps the pack hook, and so this object, as long as any tensor that went through it is saved."""
        self.roots, self.moved, self.phases, self.sources, self.num_placed = {}, {}, [], (), 0
        self.away = self.call = None

    def _source_versions(self) -> list[int]:
        return [source._version for source in self.sources if isinstance(source, torch.Tensor)]


class Place:
    """A saved tensor that is not there: a view of one that is rebuilt, or brought back from where it was moved."""

    __slots__ = ("away", "geometry")

    def __init__(self, away: Away, geometry: Geometry | None) -> None:
        self.away, self.geometry = away, geometry

    def tensor(self) -> torch.Tensor:
        tensor = self.away.tensor()
        return tensor if self.geometry is None else self.geometry.apply(tensor)

    def take(self, _: int) -> torch.Tensor:
        return self.tensor()


class Late:
    """A saved tensor of a call that is still being recorded: it is settled when the call has ended."""

    __slots__ = ("is_unpacked", "packed")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.packed: Any = keep(tensor)
        self.is_unpacked = False

    def settle(self, packed: Any) -> None:
        """Put in place what is to be kept of it; what stays as it is has the version that it had when it was saved."""
        version = self.packed[1]
        is_tensor = type(packed) is tuple and isinstance(packed[0], torch.Tensor)
        self.packed = (packed[0], version) if is_tensor else packed


class _Kept:
    """A tensor that the hook pair of somebody else has packed."""

    __slots__ = ("packed", "unpack")

    def __init__(self, packed: Any, unpack: Callable[[Any], torch.Tensor]) -> None:
        self.packed, self.unpack = packed, unpack


def keep(tensor: torch.Tensor, foreign: Hooks | None = None) -> Any:
    """Pack a tensor that stays as it is.

    Without its graph: an output that its own node saves would keep itself alive. The version is shared with the original.
    """
    if foreign is None:
        return (tensor if tensor.grad_fn is None else tensor.detach()), tensor._version
    return _Kept(foreign[0](tensor), foreign[1])


def unpack(packed: Any) -> torch.Tensor:
    """The unpack hook.

    Raises:
        RuntimeError: if a tensor that was kept has been changed in place since; autograd does not look when hooks are set.
        TierError: if a tensor that was moved cannot be had; the random state is then as it was before the forward.
    """
    try:
        return _unpacked(packed)
    except TierError as error:
        if error.undo is not None:  # outside of every replay, which would put its own state back
            error.undo()
        raise


def _unpacked(packed: Any) -> torch.Tensor:
    while type(packed) is Late:
        packed.is_unpacked = True
        packed = packed.packed
    if type(packed) is _Kept:
        return packed.unpack(packed.packed)
    first, second = packed
    if not isinstance(first, torch.Tensor):
        tensor: torch.Tensor = first.take(second)  # a phase, a rerun, or the place of an input
        return tensor
    if first._version != second:
        raise RuntimeError(changed(first, second, "for gradient computation"))
    return first


def _there(value: torch.Tensor | Away | Place) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else value.tensor()


def _based(root: torch.Tensor | Moved, base: Geometry) -> torch.Tensor | Place:
    """A root as the tape looks at its storage."""
    if isinstance(root, Moved):
        return Place(root, base)
    return root if root.shape == base.shape and root.stride() == base.stride else base.apply(root)
