"""Checking the recipe of a tape on a real call, before anything is dropped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from tapeline.runtime.ambient import Ambient
from tapeline.runtime.finding import Prepared, find_sources
from tapeline.runtime.frame import Frame, Late, keep
from tapeline.runtime.replaying import replay
from tapeline.runtime.rerun import Rerun
from tapeline.tape.graph import ARGUMENT, Tape
from tapeline.tape.nested import tensor_leaves
from tapeline.tape.program import KEEP, Program
from tapeline.tape.replay import ReplayFailedError
from tapeline.tape.sources import has_storage
from tapeline.tape.verify import same_bits

if TYPE_CHECKING:
    from tapeline.runtime.block import BlockSeam

_MAX_ROUNDS = 8


def settle(seam: BlockSeam, frame: Frame, places: list[Late], *, is_audit: bool = False) -> bool:
    """Do with every saved tensor of a recorded call what the recipe says; drop it only once its replay gave the same bits.

    One phase runs at a time. Each tensor is let go as soon as it has been compared, so that checking a recipe needs little
    more memory than the call itself. What comes out wrong is kept, in this call and in all that follow.

    Args:
        seam: the block.
        frame: the call, nothing of it placed yet.
        places: what autograd holds, in the order of saving.
        is_audit: check a recipe that was checked before.

    Returns:
        Whether the recipe may be used from now on. If not, the next call is recorded again.
    """
    library, recipe = seam.library, frame.recipe
    tape = recipe.tape
    packed = [frame.place(place.packed[0]) for place in places]
    phases = list(frame.phases)
    frame.complete()
    is_known = not is_audit and library.is_verified(tape, seam.policy)
    checks = [_Check() for _ in phases]
    for index, action in enumerate(recipe.packs):
        if action.phase == KEEP or is_known:
            places[index].settle(packed[index])
        else:
            checks[action.phase].add(action.slot, index, places[index], packed[index])
    has_failed = False
    for check, phase in zip(checks, phases if not is_known else (), strict=False):
        try:
            phase.replay(check.compare)
        except ReplayFailedError as error:
            has_failed = True
            library.never_replay(tape, error.op, f"block {seam.name!r}: {error} ({error.__cause__})")
            with suppress(ReplayFailedError):  # up to the same op, for what has been let go already
                phase.replay(check.restore)
    wrong = {tape.packs[index].value for check in checks for index in check.keep_the_rest()}
    if not (wrong or has_failed):
        library.verified.add((tape.digest, seam.policy))
        return True
    if wrong and not has_failed:
        library.keep_instead(tape, wrong, _message(seam.name, tape, wrong))
    if len(library.failures[tape.digest]) >= _MAX_ROUNDS:
        everything = {pack.value for pack in tape.packs}
        library.keep_instead(tape, everything, f"block {seam.name!r}: replays kept differing")
    return False


def settle_rerun(rerun: Rerun | None, places: list[Late], *, verifies: bool) -> bool:
    """Drop what running the whole block again gives; keep everything without a rerun, or if it gives something else.

    Returns:
        False if it gave something else.
    """
    saved = [place.packed[0] for place in places]
    left = [rerun.drop(number, tensor) if rerun is not None else None for number, tensor in enumerate(saved)]
    is_exact = rerun is None or not verifies or rerun.is_exact(saved)
    for place, tensor, dropped in zip(places, saved, left, strict=True):
        place.settle(dropped if dropped is not None and is_exact else keep(tensor))
    return is_exact


class _Check:
    """Compares what one phase makes with what autograd saved, and lets go of what is the same."""

    def __init__(self) -> None:
        self._slots: dict[int, tuple[int, Late, Any]] = {}
        self._same: set[int] = set()

    def add(self, slot: int, number: int, place: Late, packed: Any) -> None:
        """Expect in `slot` what was saved as `number`, and put `packed` in its place once it is the same."""
        self._slots[slot] = number, place, packed

    def compare(self, slot: int, tensor: torch.Tensor) -> None:
        _, place, packed = self._slots[slot]
        if same_bits(tensor, place.packed[0]):
            place.settle(packed)
            self._same.add(slot)

    def restore(self, slot: int, tensor: torch.Tensor) -> None:
        """Keep what was let go: the phase cannot be replayed to its end."""
        if slot in self._same:
            self._slots[slot][1].packed = keep(tensor)

    def keep_the_rest(self) -> Iterator[int]:
        """Keep what was not the same; returns the numbers."""
        for slot, (number, place, _) in self._slots.items():
            if slot not in self._same:
                place.settle(keep(place.packed[0]))
                yield number


def output_program(
    seam: BlockSeam, prepared: Prepared, out: Any, tensors: list[torch.Tensor], ambient: Ambient
) -> Program | None:
    """What makes the outputs of a call again from its sources, checked in the first call that has the tape.

    ``None`` if nothing does: then the next block keeps its input.
    """
    library, recipe = seam.library, prepared.recipe
    assert recipe is not None, "asked for calls that have a tape"
    program = library.output_program(recipe)
    if program is None or recipe.tape.digest in library.verified_outputs:
        return program
    sources = find_sources(prepared.output_getters, tensors)
    try:
        used = [sources[number] for number in program.sources]
        results = replay(seam.name, program, [s for s in used if isinstance(s, torch.Tensor)], (), ambient)
    except ReplayFailedError as error:
        library.drop_output_program(recipe.tape, f"block {seam.name!r}: {error} ({error.__cause__})")
        return None
    leaves = [tensor.detach() for tensor in tensor_leaves(out) if has_storage(tensor)]
    if not all(same_bits(one, other) for one, other in zip(results, leaves, strict=True)):
        library.drop_output_program(recipe.tape, f"block {seam.name!r}: replaying its outputs gave something else")
        return None
    library.verified_outputs.add(recipe.tape.digest)
    return program


def _message(name: str, tape: Tape, wrong: set[int]) -> str:
    value = tape.values[min(wrong)]
    op = tape.ops[value.producer] if value.producer is not None else None
    what = f"{op.name} in {op.module!r}" if op is not None else ARGUMENT
    return f"block {name!r}: replaying what {what} makes ({value.base}) gave something else; {len(wrong)} kept instead"
