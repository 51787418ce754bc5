"""The plan as data: frozen, printable, and the same after a round trip through JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Literal

from tapeline.errors import UsageError, did_you_mean
from tapeline.planner.policy import KEEP, Policy, Saved
from tapeline.table import text_table
from tapeline.units import format_bytes, format_flops

SCHEMA_VERSION = 3
MODES = ("auto", "none", "cheap", "recompute", "offload", "segments", "least")
Placement = Literal["device", "recompute", "host", "disk"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockPlan:
    """Where one block's tensors go between its forward and its backward."""

    name: str
    """Name of the module in the model."""
    kind: str
    """Name of its class."""
    policy: Policy
    """How much is dropped of what autograd saves inside the block."""
    input: Placement
    """The block's input; ``recompute`` means: run the block before it again; ``host``, ``disk``: it is moved there."""
    held_bytes: int
    """Bytes that the block holds until its backward if everything stays on the device, beyond its output."""
    recompute_flops: int
    """Floating-point operations of recomputing what it saves, once per step."""
    ahead_bytes: int = 0
    """Bytes that earlier blocks have moved and that may be on their way back when this block's backward begins."""
    reason: str = ""
    """Why the block is not replayed from its tape; empty if it is."""

    @property
    def saved(self) -> Saved:
        """What happens to what autograd saves, in a word."""
        return self.policy.saved


@dataclass(frozen=True, kw_only=True, slots=True)
class Alternative:
    """What another way to run the step would cost, predicted in the same manner."""

    name: str
    """``none``, ``recompute``, ``segments:k``, or the chosen mode."""
    peak_bytes: int
    """Largest number of bytes alive at once in a step."""
    flops: int
    """Floating-point operations of one step, recomputation included."""
    fits: bool | None
    """Whether the peak is within the budget; ``None`` without a budget."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A decision for every block, with what it will cost. Made by `tapeline.plan`, used by `tapeline.apply`."""

    mode: str
    """The mode asked for."""
    device: str
    """Device of the model, ``cpu`` or ``cuda:0``."""
    budget_bytes: int | None
    """Bytes that the peak may reach, the margin taken off; ``None`` if no budget was given."""
    peak_bytes: int
    """Predicted peak of a step once the optimizer has its state."""
    first_step_peak_bytes: int
    """Predicted peak of the very first step, while the optimizer has no state yet."""
    untouched_peak_bytes: int
    """Predicted peak of the model without checkpointing."""
    flops: int
    """Floating-point operations of one step under this plan."""
    untouched_flops: int
    """Floating-point operations of one step without checkpointing."""
    memory: dict[str, int]
    """What fills the device at the predicted peak: bytes by kind."""
    untouched_memory: dict[str, int]
    """The same without checkpointing."""
    blocks: tuple[BlockPlan, ...]
    """One entry per block, in the order of the model."""
    alternatives: tuple[Alternative, ...]
    """What the usual settings would give."""
    keep: tuple[str, ...] = ()
    """Submodules and operations whose results are kept whatever it costs."""
    drop: tuple[str, ...] = ()
    """Submodules and operations whose results are dropped whatever it costs."""
    host_bytes: int = 0
    """Host memory for what is moved there, pinned for the whole session."""
    disk_bytes: int = 0
    """Room on the disk for what is moved there."""
    moved: dict[str, int] = field(default_factory=dict)
    """Bytes that leave the device in one forward of the model, by tier; backward brings them back."""
    in_flight_bytes: int = 0
    """Of them, what may still be on the device while it is copied, for each tier; compute waits rather than exceed it."""
    margin_bytes: int = 0
    """What the peak stays below the budget that was asked for."""
    notes: tuple[str, ...] = ()
    """What the user should know: settings that took no effect, blocks that could not be managed."""
    schema_version: int = SCHEMA_VERSION
    """Version of this layout."""

    @property
    def rooms(self) -> dict[str, int]:
        """What is taken of each tier below the device for the whole session, in bytes."""
        return {"host": self.host_bytes, "disk": self.disk_bytes}

    @property
    def moved_bytes(self) -> int:
        """Bytes that leave the device in one forward of the model."""
        return sum(self.moved.values())

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is dropped."""
        return not self.drop and all(block.policy.keeps_all and block.input == "device" for block in self.blocks)

    @property
    def slowdown(self) -> float:
        """Floating-point operations of a step relative to the untouched model: 1.0 is no recomputation."""
        return self.flops / self.untouched_flops if self.untouched_flops else 1.0

    @property
    def recomputed_flops(self) -> int:
        """Floating-point operations that are done again in backward."""
        return self.flops - self.untouched_flops

    def to_json(self) -> str:
        """Write the plan as JSON text."""
        data = asdict(self)
        for block in data["blocks"]:  # JSON knows no infinity
            block["policy"] = {k: "inf" if v == math.inf else v for k, v in block["policy"].items() if k in _POLICY}
        return json.dumps(data, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan written by `to_json`.

        Raises:
            UsageError: if the text is not a plan, or one of another schema version.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise UsageError(f"Not a plan: the text is not JSON ({error}).") from error
        if not isinstance(data, dict) or "schema_version" not in data:
            raise UsageError("Not a plan: the JSON has no 'schema_version'.")
        if data["schema_version"] != SCHEMA_VERSION:
            raise UsageError(
                f"The plan has schema version {data['schema_version']}, this release reads {SCHEMA_VERSION}: "
                "make the plan again."
            )
        data = _known(cls, data)
        data["blocks"] = tuple(_block(block) for block in data["blocks"])
        data["alternatives"] = tuple(Alternative(**_known(Alternative, row)) for row in data["alternatives"])
        for name in ("keep", "drop", "notes"):
            data[name] = tuple(data.get(name, ()))
        return cls(**data)

    def __str__(self) -> str:
        tables = [_memory_table(self), *([_tiers_table(self)] if self.moved else []), _alternatives_table(self)]
        return "\n\n".join([self.headline, *tables, *(f"note: {note}" for note in self.notes)])

    @property
    def headline(self) -> str:
        """The plan in a sentence: its peak, its cost, and how many blocks it touches."""
        num_managed = sum(block.saved != "device" for block in self.blocks)
        num_dropped = sum(block.input == "recompute" for block in self.blocks)
        budget = "no budget" if self.budget_bytes is None else f"budget {format_bytes(self.budget_bytes)}"
        dropped = f", {num_dropped} inputs rebuilt" if num_dropped else ""
        for tier, size in self.moved.items():
            dropped += f", {format_bytes(size)} moved to the {tier}"
        return (
            f"Plan {self.mode!r} on {self.device}: peak {format_bytes(self.peak_bytes)} ({budget}), "
            f"{self.slowdown:.3f}x FLOPs; {num_managed} of {len(self.blocks)} blocks replayed{dropped}"
        )


def parse_mode(mode: str | bool) -> tuple[str, int | None]:
    """Read a mode; returns its name and, for ``segments:k``, k.

    ``False`` and ``True`` are read as ``none`` and ``recompute``.

    Raises:
        UsageError: for an unknown mode or a k that is not a whole number above 0.
    """
    if isinstance(mode, bool):
        return ("recompute" if mode else "none"), None
    name, colon, length = mode.partition(":")
    if name not in MODES or (colon and name != "segments"):
        raise UsageError(f"Unknown mode {mode!r}{did_you_mean(name, MODES)}: use {', '.join(MODES)} or segments:k.")
    if not colon:
        return name, None
    if not length.isdecimal() or int(length) < 1:
        raise UsageError(
            f"In {mode!r}, k must be a whole number of at least 1: segments:4 keeps every 4th block input."
        )
    return name, int(length)


_POLICY = ("price", "is_cheap", "rerun", "host", "disk")
"""What a plan says of a policy; the rest follows from the blocks around it."""


def _block(data: dict[str, Any]) -> BlockPlan:
    known = _known(BlockPlan, data)
    policy = asdict(KEEP) | _known(Policy, known["policy"], _POLICY)
    price, rerun = (math.inf if policy[name] == "inf" else float(policy[name]) for name in ("price", "rerun"))
    host, disk = (tuple(policy[name]) for name in ("host", "disk"))
    known["policy"] = Policy(price=price, is_cheap=bool(policy["is_cheap"]), rerun=rerun, host=host, disk=disk)
    return BlockPlan(**known)


def _known(cls: type, data: dict[str, Any], names: Collection[str] = ()) -> dict[str, Any]:
    """Check the names in `data` against those of `cls`, or those of them that a plan has."""
    names = names or {f.name for f in fields(cls)}
    for name in data:
        if name not in names:
            raise UsageError(f"Not a plan: unknown field {name!r}{did_you_mean(name, names)}.")
    required = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    if missing := sorted(required - set(data)):
        raise UsageError(f"Not a plan: missing {', '.join(missing)}.")
    return dict(data)


def _memory_table(plan: Plan) -> str:
    kinds = list(dict.fromkeys([*plan.untouched_memory, *plan.memory]))
    rows = [
        (kind, format_bytes(plan.untouched_memory.get(kind, 0)), format_bytes(plan.memory.get(kind, 0)))
        for kind in kinds
    ]
    rows.append(("peak", format_bytes(plan.untouched_peak_bytes), format_bytes(plan.peak_bytes)))
    return text_table(("where the memory goes", "untouched", "this plan"), rows)


def _tiers_table(plan: Plan) -> str:
    rows = [(tier, format_bytes(plan.rooms[tier]), format_bytes(size)) for tier, size in plan.moved.items()]
    return text_table(("below the device", "room taken", "moved by a forward"), rows)


def _alternatives_table(plan: Plan) -> str:
    rows = [
        (
            row.name,
            format_bytes(row.peak_bytes),
            format_flops(row.flops),
            f"{row.flops / plan.untouched_flops:.3f}x" if plan.untouched_flops else "-",
            {True: "yes", False: "no", None: "-"}[row.fits],
        )
        for row in plan.alternatives
    ]
    return text_table(("way to run", "predicted peak", "FLOPs of a step", "of untouched", "fits"), rows)
