"""Holding everything, replaying everything, and naming the first op that gives something else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from tapeline.cost.device import nominal_rates
from tapeline.errors import PlanDriftError
from tapeline.runtime.ambient import Ambient
from tapeline.runtime.frame import keep, unpack
from tapeline.runtime.invocation import Invocation
from tapeline.runtime.replaying import replay
from tapeline.runtime.signature import Surroundings
from tapeline.tape.graph import ARGUMENT, UNKNOWN, Tape, Value
from tapeline.tape.options import Limits, block_graph, can_replay
from tapeline.tape.program import NotReplayable, Program, compile_program
from tapeline.tape.record import Recorder
from tapeline.tape.replay import ReplayFailedError
from tapeline.tape.sources import getter
from tapeline.tape.verify import same_bits

if TYPE_CHECKING:
    from tapeline.runtime.block import BlockSeam


class StrictRecorder(Recorder):
    """A recorder that keeps a copy of every value that is made: for debugging, it needs memory for all of them."""

    def __init__(self, module: nn.Module, arguments: Any) -> None:
        super().__init__(module, arguments)
        self.copies: dict[int, torch.Tensor] = {}

    def made(self, value: Value, tensor: torch.Tensor) -> None:
        self.is_paused = True
        base = value.base.apply(tensor.detach()) if value.previous is not None else tensor.detach()
        self.copies[value.index] = base.clone()
        self.is_paused = False

    def keep(self, tensor: torch.Tensor) -> Any:
        """The pack hook: note the tensor and keep it."""
        self.pack(tensor)
        return keep(tensor)


def run_strictly(seam: BlockSeam, invocation: Invocation, tensors: list[torch.Tensor], settings: Surroundings) -> Any:
    """Run a call with everything kept, and then replay it op by op.

    Raises:
        PlanDriftError: naming the first op whose result differs in any bit.
    """
    ambient = Ambient(settings, tensors)
    recorder = StrictRecorder(seam.module, (invocation.args, invocation.kwargs))
    with saved_tensors_hooks(recorder.keep, unpack), recorder:
        out = invocation.run()
    tape = recorder.finish(out)
    seam.note_reason(tape.obstacle)
    if not tape.obstacle:
        _check_every_op(seam.name, seam.module, recorder, tensors, ambient)
    recorder.copies.clear()  # autograd keeps the pack hook, and so the recorder
    return out


def _check_every_op(
    name: str, module: nn.Module, recorder: StrictRecorder, tensors: list[torch.Tensor], ambient: Ambient
) -> None:
    """Replay the tape of a call that has just run, op by op.

    Raises:
        PlanDriftError: naming the first op whose result differs in any bit.
    """
    tape = recorder.tape
    graph = block_graph(tape, nominal_rates(torch.device("cpu")))
    unreplayable = _values_that_stay(tape, recorder.copies)
    held = frozenset(recorder.copies).intersection(unreplayable)
    for value in sorted(set(recorder.copies) - unreplayable):
        sources: dict[Any, int] = {}
        try:
            program = compile_program(
                tape, graph, held | _made_before(recorder, value), [(value, tape.values[value].base)], sources
            )
            result = _run(name, module, program, list(sources), recorder, tensors, ambient)
        except NotReplayable:
            continue
        except ReplayFailedError as error:
            raise PlanDriftError(f"Block {name!r}: {error} ({error.__cause__}).") from error
        if not same_bits(result, recorder.copies[value]):
            raise PlanDriftError(_message(name, tape, value))


def _values_that_stay(tape: Tape, copies: dict[int, torch.Tensor]) -> set[int]:
    """Values that a replay does not make: their op must not be replayed, or reads what is nowhere to be found."""
    limits = Limits()
    stay: set[int] = set()
    known = set(copies)
    for op in tape.ops:
        lost = {i for i in op.reads if i not in known and not _is_found(tape.values[i])}
        if not can_replay(tape, op, limits) or lost or op.is_random or op.name.startswith(("empty", "new_empty")):
            stay.update(op.makes)
    return stay


def _is_found(value: Value) -> bool:
    return value.source is not None and value.is_last and value.source.kind != UNKNOWN


def _made_before(recorder: StrictRecorder, value: int) -> frozenset[int]:
    producer = recorder.tape.values[value].producer or 0
    makes = (made for op in recorder.tape.ops[:producer] for made in op.makes)
    return frozenset(index for index in makes if index in recorder.copies)


def _run(
    name: str,
    module: nn.Module,
    program: Program,
    sources: list[Any],
    recorder: StrictRecorder,
    tensors: list[torch.Tensor],
    ambient: Ambient,
) -> torch.Tensor:
    found = [tensors[s.place].detach() if s.kind == ARGUMENT else getter(module, s)().detach() for s in sources]
    roots = [recorder.copies[value] for value in program.roots]
    return replay(name, program, [found[number] for number in program.sources], roots, ambient)[0]


def _message(name: str, tape: Tape, value: int) -> str:
    op = tape.ops[tape.values[value].producer or 0]
    return (
        f"Block {name!r}: replaying op {op.index}, {op.name} in {op.module!r} ({tape.values[value].base}), gave other bits "
        "than the forward. The kernel is not deterministic (try torch.use_deterministic_algorithms), or it reads something "
        "that the tape does not know. Keep it with keep=[...]."
    )
