"""Checking the recipe of a tape on a real call, before anything is dropped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tapeline.runtime.ambient import Ambient
from tapeline.runtime.finding import find_sources
from tapeline.runtime.frame import Frame
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


def verify(
    seam: BlockSeam,
    tape: Tape,
    saved: list[torch.Tensor],
    tensors: list[torch.Tensor],
    ambient: Ambient,
    *,
    always: bool = False,
) -> Recipe:
    """A recipe for `tape` of which every phase gives, bit for bit, what autograd saved in this call.

    What comes out wrong is held from then on. One phase runs at a time, and its results are freed before the next.

    Args:
        seam: the block.
        tape: the tape of the call that has just run.
        saved: what autograd saved in it, in order.
        tensors: the tensors of its arguments.
        ambient: the random state at its entry.
        always: also if an equal tape was verified before.
    """
    library = seam.library
    for _ in range(_MAX_ROUNDS):
        recipe = library.recipe(tape, seam.policy)
        if (tape.digest, seam.policy) in library.verified and not always:
            return recipe
        wrong = _wrong_values(seam, recipe, saved, tensors, ambient)
        if wrong == [KEEP]:
            continue
        if not wrong:
            library.verified.add((tape.digest, seam.policy))
            return recipe
        library.keep_instead(tape, set(wrong), _message(seam.name, tape, wrong))
    library.keep_instead(tape, {pack.value for pack in tape.packs}, f"block {seam.name!r}: replays kept differing")
    return library.recipe(tape, seam.policy)


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


def _wrong_values(
    seam: BlockSeam, recipe: Recipe, saved: list[torch.Tensor], tensors: list[torch.Tensor], ambient: Ambient
) -> list[int]:
    sources = find_sources(seam.getters(recipe.sources), tensors)
    frame = Frame(seam.name, recipe, sources, ambient)
    for tensor in saved:
        frame.place(tensor)
    phases = list(frame.phases)
    frame.complete()
    wrong = []
    for number, phase in enumerate(phases):
        try:
            results = phase.replay()
        except ReplayFailedError as error:
            library = seam.library
            library.never_replay(recipe.tape, error.op, f"block {seam.name!r}: {error} ({error.__cause__})")
            return [KEEP]
        for action, tensor, pack in zip(recipe.packs, saved, recipe.tape.packs, strict=True):
            if action.phase == number and not same_bits(results[action.slot], tensor):
                wrong.append(pack.value)
        del results
    return wrong


def _message(name: str, tape: Tape, wrong: list[int]) -> str:
    value = tape.values[min(wrong)]
    op = tape.ops[value.producer] if value.producer is not None else None
    what = f"{op.name} in {op.module!r}" if op is not None else ARGUMENT
    return f"block {name!r}: replaying what {what} makes ({value.base}) gave something else; {len(set(wrong))} kept instead"
