"""A tape as the planner sees it: values with bytes, steps with costs, and what is free, held or fixed."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from tapeline.cost.price import MEMORY, op_seconds
from tapeline.cost.rates import Rates
from tapeline.planner.block import BlockGraph, BlockStep, BlockValue
from tapeline.tape.graph import ARGUMENT, UNKNOWN, Op, Tape, Use, Value


@dataclass(frozen=True, slots=True)
class Limits:
    """What is not open to choice on a tape."""

    held: frozenset[int] = frozenset()
    """Values that must be held: the user wants them kept, or their replay was found wrong."""
    dropped: frozenset[int] = frozenset()
    """Values that must not be held."""
    unreplayable: frozenset[int] = field(default_factory=frozenset)
    """Ops that must not be replayed, beyond those that say so themselves."""


def block_graph(tape: Tape, rates: Rates, limits: Limits | None = None, *, has_output: bool = True) -> BlockGraph:
    """The choice problem of one tape.

    The random state is a value like any other: each random op reads it and makes the next one, so that replaying
    one of them replays those before it, in order.

    Args:
        tape: the tape.
        rates: rates of the device that it runs on.
        limits: what is fixed.
        has_output: what the call returns is held by others until backward.
    """
    limits = limits or Limits()
    saved = {pack.value for pack in tape.packs}
    narrow = narrowings(tape)
    values = [_value(tape, value, saved, limits, narrow, has_output=has_output) for value in tape.values]
    random_state = len(values)
    values.append(BlockValue(num_bytes=0, producer=None, is_free=True))
    stale = {v.index for v in tape.values if not v.is_last and v.index in saved and v.producer is not None}
    steps = []
    for op in tape.ops:
        reads, makes = op.reads, op.makes
        if op.is_random:
            reads, makes = (*reads, random_state), (*makes, len(values))
            random_state = len(values)
            values.append(BlockValue(num_bytes=0, producer=op.index))
        steps.append(
            BlockStep(
                seconds=op_seconds(op.kind, op.flops, op.moved_bytes, rates),
                flops=op.flops,
                reads=reads,
                makes=makes,
                is_costly=op.kind != MEMORY,
                can_replay=can_replay(tape, op, limits) and not stale.intersection(op.reads),
                in_place=bool(op.writes),
            )
        )
    packs = tuple((pack.value, pack.position) for pack in tape.packs)
    return BlockGraph(values=tuple(values), steps=tuple(steps), packs=packs)


def narrowings(tape: Tape) -> dict[int, int]:
    """Values that autograd saves only in a wider dtype, and the number of the saved tensor that each can be had from.

    A norm in a bf16 block casts its input to fp32 and saves that. Casting back gives the input, exactly, at half the bytes.
    """
    saved = {pack.value for pack in tape.packs}
    found: dict[int, int] = {}
    for number, pack in enumerate(tape.packs):
        wide = tape.values[pack.value]
        if wide.producer is None or pack.geometry != wide.base or not (wide.is_last and wide.previous is None):
            continue
        op = tape.ops[wide.producer]
        if op.is_function or op.func is not torch.ops.aten._to_copy.default or not isinstance(op.args[0], Use):
            continue
        narrow = tape.values[op.args[0].value]
        is_same = op.args[0].geometry is None and narrow.base.stride == wide.base.stride
        if is_same and _widens(narrow, wide) and narrow.producer is not None and narrow.index not in saved:
            found.setdefault(narrow.index, number)
    return found


def _widens(narrow: Value, wide: Value) -> bool:
    is_exact = narrow.base.dtype in (torch.bfloat16, torch.float16) and wide.base.dtype == torch.float32
    is_whole = narrow.num_bytes == math.prod(narrow.base.shape) * narrow.base.dtype.itemsize
    return is_exact and is_whole and narrow.is_last and not narrow.is_output and not narrow.base.offset


def can_replay(tape: Tape, op: Op, limits: Limits) -> bool:
    """Whether an op may be run again."""
    return not (op.obstacle or tape.obstacle or op.index in limits.unreplayable)


def is_free(value: Value) -> bool:
    """Whether a value is found at replay without this block holding anything for it."""
    if value.source is None or not value.is_last or value.source.kind == UNKNOWN:
        return False
    return value.source.kind != ARGUMENT or not is_input(value)


def is_input(value: Value) -> bool:
    """An argument that belongs to this block alone: its first tensor, and what requires grad."""
    source = value.source
    return source is not None and source.kind == ARGUMENT and (source.place == 0 or value.requires_grad)


def _value(
    tape: Tape, value: Value, saved: Collection[int], limits: Limits, narrow: Collection[int], *, has_output: bool
) -> BlockValue:
    is_saved = value.index in saved
    made_here = value.producer is not None
    can_hold = (is_saved and made_here) or (is_input(value) and value.is_last) or value.index in narrow
    return BlockValue(
        num_bytes=0 if value.is_output and has_output else value.num_bytes,
        producer=value.producer,
        is_free=is_free(value),
        can_hold=can_hold,
        must_hold=can_hold and (value.index in limits.held or (is_saved and not value.is_last)),
        must_drop=value.index in limits.dropped,
    )
