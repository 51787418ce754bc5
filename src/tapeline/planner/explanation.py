"""What happens to each saved value of one block, as data: frozen, printable, and written as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from tapeline.table import text_table
from tapeline.units import format_bytes, format_flops

DEVICE = "device"


@dataclass(frozen=True, kw_only=True, slots=True)
class ValueRow:
    """One value that autograd saves, or that is held for replays to start from."""

    value: int
    """Its number on the tape; reasons name other values by theirs: ``%12``."""
    storage: int
    """Number of its storage on the tape."""
    made_by: str
    """The op that made it, by the name that `keep` and `drop` take, or its source: ``argument 0``, ``parameter 'weight'``."""
    module: str
    """Submodule whose forward ran the op, or that has the source; empty for the block itself."""
    dtype: str
    """Such as ``bfloat16``."""
    shape: tuple[int, ...]
    """As the op made it; autograd may save another view."""
    num_saved: int
    """How many of the saved tensors look at it; 0 if it is only held."""
    storage_bytes: int
    """Bytes of its storage; 0 if an earlier row has the same storage."""
    held_bytes: int
    """Bytes that holding it costs; 0 if it is not held, or if something outside the block holds it anyway."""
    replay_ops: int | None
    """Ops that make it from what else is held; ``None`` for sources, and where an op must not be replayed."""
    replay_flops: int | None
    """Floating-point operations of these ops."""
    placement: str
    """``device``, ``held as bf16``, ``recompute in phase k``, or the kind of a source that is never held."""
    reason: str
    """Why it is placed so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FrontRow:
    """One choice for the tape that no other beats in bytes, replay time and working set at once."""

    name: str
    """The mode that makes it, or the price in seconds per byte."""
    held_bytes: int
    """Bytes held between forward and backward."""
    replay_flops: int
    """Floating-point operations of all replays."""
    working_set_bytes: int
    """Most bytes alive at once while the backward of the block runs."""
    num_phases: int
    """Phases of replay."""
    is_chosen: bool
    """Whether it is the one explained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TapeExplanation:
    """One class of calls of the block, and the choice for its tape."""

    digest: str
    """Equal for tapes that compute the same in the same way."""
    num_ops: int
    """Operations on the tape."""
    num_saved: int
    """Tensors that autograd saves."""
    saved_bytes: int
    """Bytes of the storages that they lie in, each once: those that the block makes and does not return."""
    held_bytes: int
    """Bytes that stay until backward under this choice: the sum over the rows."""
    input_bytes: int
    """The part of it that is arguments of the block."""
    replayed_ops: dict[str, int]
    """Ops of all replays by kind: ``memory``, ``matmul``, ``attention``, ``other``."""
    replay_flops: int
    """Floating-point operations of all replays."""
    forward_flops: int
    """Floating-point operations of the block's forward."""
    num_phases: int
    """Phases of replay; backward runs the last one first."""
    working_set_bytes: int
    """Most bytes alive at once while the backward of the block runs, what it holds included."""
    rows: tuple[ValueRow, ...]
    """One row per value: what the block is given and makes in order, then what is never held."""
    front: tuple[FrontRow, ...]
    """The choices that could be made instead, most bytes first."""
    failures: tuple[str, ...] = ()
    """What was found wrong when replays were verified, and is held instead."""

    @property
    def held_share(self) -> float:
        """Held bytes relative to what autograd saves."""
        return self.held_bytes / self.saved_bytes if self.saved_bytes else 0.0

    def header(self) -> str:
        """Sizes and costs of the tape and its choice."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.replayed_ops.items())
        share = f", {self.replay_flops / self.forward_flops:.1%} of its forward" if self.forward_flops else ""
        facts = (
            ("recorded", f"{self.num_ops} ops, {format_flops(self.forward_flops)}"),
            ("autograd saves", f"{self.num_saved} tensors, {format_bytes(self.saved_bytes)} that the block makes"),
            (
                "held",
                f"{format_bytes(self.held_bytes)} ({self.held_share:.1%}), {format_bytes(self.input_bytes)} of it input",
            ),
            (
                "replayed",
                f"{sum(self.replayed_ops.values())} ops"
                + (f" ({kinds})" if kinds else "")
                + f", {format_flops(self.replay_flops)}{share}",
            ),
            ("phases", str(self.num_phases)),
            ("working set", format_bytes(self.working_set_bytes)),
        )
        return "\n".join(f"{name:<15}{text}" for name, text in facts)

    def values_table(self) -> str:
        """The rows as text."""
        header = ("value", "made by", "in", "tensor", "saved", "bytes", "ops", "FLOPs", "placement", "reason")
        return _table(header, [_cells(row) for row in self.rows], right=("value", "saved", "bytes", "ops", "FLOPs"))

    def front_table(self) -> str:
        """The front as text; the choice explained has an arrow."""
        header = ("choice", "held bytes", "replayed FLOPs", "working set", "phases")
        rows = [
            (
                row.name + (" <-" if row.is_chosen else ""),
                format_bytes(row.held_bytes),
                format_flops(row.replay_flops),
                format_bytes(row.working_set_bytes),
                str(row.num_phases),
            )
            for row in self.front
        ]
        return text_table(header, rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """What a mode does with each saved tensor of one block, and why. Made by `tapeline.explain`."""

    block: str
    """Name of the block in the model."""
    kind: str
    """Name of its class."""
    mode: str
    """The mode asked for."""
    keep: tuple[str, ...]
    """What the user wants held."""
    drop: tuple[str, ...]
    """What the user wants dropped."""
    tapes: tuple[TapeExplanation, ...]
    """One entry per class of calls; empty if the block is not replayed from a tape."""
    reason: str = ""
    """Why some or all calls of the block are not replayed from a tape; empty if all are."""
    fallback: str = ""
    """What is done with these calls instead."""

    def to_json(self) -> str:
        """Write it as JSON text."""
        return json.dumps(asdict(self), indent=2, allow_nan=False)

    def text(self, *, front: bool = True) -> str:
        """Write it for people; `front`: with the table of other choices."""
        parts = [f"Block {self.block!r} ({self.kind}), mode {self.mode!r}"]
        if self.reason:
            parts.append(f"Not replayed from a tape: {self.reason}. {self.fallback}".strip())
        for number, tape in enumerate(self.tapes, 1):
            if len(self.tapes) > 1:
                parts.append(f"Tape {number} of {len(self.tapes)}")
            parts += [tape.header(), tape.values_table()]
            parts += [f"found when verifying: {failure}" for failure in tape.failures]
            parts += [tape.front_table()] if front else []
        return "\n\n".join(parts)

    def __str__(self) -> str:
        return self.text()


def _cells(row: ValueRow) -> tuple[str, ...]:
    return (
        f"%{row.value}",
        row.made_by,
        row.module,
        f"{row.dtype}{list(row.shape)}",
        str(row.num_saved),
        format_bytes(row.storage_bytes),
        "-" if row.replay_ops is None else str(row.replay_ops),
        "-" if row.replay_flops is None else format_flops(row.replay_flops),
        row.placement,
        row.reason,
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str]) -> str:
    """A table with text on both sides of its numbers: `right` names the columns of numbers."""
    cells = [list(header), *map(list, rows)]
    for column, name in enumerate(header):
        if name in right:
            width = max(len(line[column]) for line in cells)
            for line in cells:
                line[column] = line[column].rjust(width)
    return text_table(cells[0], cells[1:], left=len(header))
