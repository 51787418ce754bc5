"""Checking the recipe of a tape on a real call, before anything is dropped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tapeline.runtime.ambient import Ambient
from tapeline.runtime.finding import find_sources
from tapeline.runtime.frame import Frame, Late, keep
from tapeline.runtime.replaying import replay
from tapeline.tape.graph import ARGUMENT, Tape
from tapeline.tape.nested import tensor_leaves
from tapeline.tape.program import KEEP, Recipe
from tapeline.tape.replay import ReplayFailedError
from tapeline.tape.sources import has_storage
from tapeline.tape.verify import same_bits

if TYPE_CHECKING:
    from tapeline.runtime.block import BlockSeam

_MAX_ROUNDS = 8


def settle(
    seam: BlockSeam, frame: Frame, places: list[Late], saved: list[torch.Tensor], *, is_audit: bool = False
) -> bool:
    """Do with every saved tensor of a recorded call what the recipe says; drop it only once its replay gave the same bits.

    One phase runs at a time. Each tensor is let go as soon as it has been compared, so that checking a recipe needs little
    more memory than the call itself. What comes out wrong is kept, in this call and in all that follow.

    Args:
        seam: the block.
        frame: the call, nothing of it placed yet.
        places: what autograd holds, in the order of saving.
        saved: the tensors in these places; emptied.
        is_audit: check a recipe that was checked before.

    Returns:
        Whether the recipe may be used from now on. If not, the next call is recorded again.
    """
    library, recipe = seam.library, frame.recipe
    tape = recipe.tape
    packed = [frame.place(tensor) for tensor in saved]
    saved.clear()
    phases = list(frame.phases)
    frame.complete()
    is_known = not is_audit and library.is_verified(tape, seam.policy)
    waiting = {index for index, action in enumerate(recipe.packs) if action.phase != KEEP and not is_known}
    for index in set(range(len(packed))) - waiting:
        places[index].settle(packed[index])
    wrong: list[int] = []
    for number, phase in enumerate(phases if waiting else ()):
        slots = {recipe.packs[index].slot: index for index in waiting if recipe.packs[index].phase == number}

        def check(slot: int, tensor: torch.Tensor, slots: dict[int, int] = slots) -> None:
            index = slots[slot]
            if same_bits(tensor, places[index].packed[0]):
                places[index].settle(packed[index])
                waiting.discard(index)
            else:
                wrong.append(tape.packs[index].value)

        try:
            phase.replay(check)
        except ReplayFailedError as error:
            library.never_replay(tape, error.op, f"block {seam.name!r}: {error} ({error.__cause__})")
    for index in waiting:
        places[index].settle(keep(places[index].packed[0]))
    if len(library.failures.get(tape.digest, ())) >= _MAX_ROUNDS:
        everything = {pack.value for pack in tape.packs}
        library.keep_instead(tape, everything, f"block {seam.name!r}: replays kept differing")
    elif wrong:
        library.keep_instead(tape, set(wrong), _message(seam.name, tape, wrong))
    elif not waiting:
        library.verified.add((tape.digest, seam.policy))
    return not waiting


def verify_outputs(seam: BlockSeam, recipe: Recipe, out: Any, tensors: list[torch.Tensor], ambient: Ambient) -> None:
    """Check that the outputs of a call can be made again from its sources; where not, the next block keeps its input."""
    library = seam.library
    program = library.output_program(recipe)
    if program is None or recipe.tape.digest in library.verified_outputs:
        return
    sources = find_sources(seam.getters(library.all_sources(recipe.tape)), tensors)
    try:
        results = replay(seam.name, program, [s for s in sources if isinstance(s, torch.Tensor)], (), ambient)
    except ReplayFailedError as error:
        library.drop_output_program(recipe.tape, f"block {seam.name!r}: {error} ({error.__cause__})")
        return
    leaves = [tensor.detach() for tensor in tensor_leaves(out) if has_storage(tensor)]
    if all(same_bits(one, other) for one, other in zip(results, leaves, strict=True)):
        library.verified_outputs.add(recipe.tape.digest)
    else:
        library.drop_output_program(recipe.tape, f"block {seam.name!r}: replaying its outputs gave something else")


def _message(name: str, tape: Tape, wrong: list[int]) -> str:
    value = tape.values[min(wrong)]
    op = tape.ops[value.producer] if value.producer is not None else None
    what = f"{op.name} in {op.module!r}" if op is not None else ARGUMENT
    return f"block {name!r}: replaying what {what} makes ({value.base}) gave something else; {len(set(wrong))} kept instead"
