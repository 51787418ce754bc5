"""What a fine-tuning run would need and take on a device, as data: frozen, printable, and written as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from tapeline.table import text_table
from tapeline.units import format_bytes

SCHEMA_VERSION = 1
OURS = "auto"
_CLOSE = 0.03


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One way to run the step."""

    name: str
    words: str
    """How it is asked for."""
    device_bytes: int
    """The smallest device budget under which it runs."""
    fits: bool
    """Whether it keeps to the budgets."""
    seconds: float | None = None
    """Time of a step; ``None`` if it does not fit."""
    slowdown: float | None = None
    """The same as a multiple of a step with nothing recomputed or moved."""
    slowdown_if_it_fits: float = 1.0
    """On a device that has room for it."""
    host_bytes: int = 0
    """Most bytes on the host at once."""
    disk_bytes: int = 0
    """Bytes that pass through the disk."""
    recompute_seconds: float = 0.0
    waiting_seconds: float = 0.0
    longest: int | None = None
    """About how many tokens a sequence may have; ``None`` if it was not asked for."""
    largest_batch: int | None = None
    """About how many sequences of the given length fit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockPlacement:
    """What the plan does with some blocks alike."""

    blocks: str
    """Their numbers: ``0-3, 7``."""
    kept: tuple[str, ...]
    """Operations whose results stay on the device."""
    moved: tuple[str, ...]
    """Operations whose results go to the host, and beyond."""
    num_recomputed: int
    """How many of the tensors that backward needs are made again."""
    kept_bytes: int
    moved_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """The answer of `tapeline.forecast`."""

    model: str
    training: str
    """What is trained, and how the rest is held: ``LoRA r16, 4-bit base``."""
    num_parameters: int
    num_trainable: int
    num_layers: int
    device: str
    dtype: str
    batch_size: int
    max_length: int
    budget_bytes: int
    """Of the device."""
    device_bytes: int
    """All that the device has; what is beyond the budget is left for fragmentation, and for others."""
    host_budget_bytes: int | None
    """``None``: no limit."""
    disk_budget_bytes: int
    memory: dict[str, int]
    """What would fill the device at the peak of the untouched model, bytes by kind."""
    rows: tuple[Row, ...]
    """The known settings, and the plan as the last."""
    bound_seconds: float | None
    """No placement within the budgets takes less; ``None`` if none fits."""
    blocks: tuple[BlockPlacement, ...]
    """Where the plan puts things."""
    next_gib: float | None
    """What one GiB more on the device would save, as a share of the step."""
    phases: dict[str, dict[str, int]]
    """Bytes on the device and on the host while training, evaluating, saving and resuming."""
    provenance: dict[str, str]
    """Origin of the device's numbers."""
    notes: tuple[str, ...] = ()
    schema_version: int = SCHEMA_VERSION

    @property
    def plan(self) -> Row:
        """The row of the plan."""
        return self.rows[-1]

    @property
    def fits(self) -> bool:
        """Whether anything keeps to the budgets."""
        return any(row.fits for row in self.rows)

    @property
    def advice(self) -> str:
        """A setting that is there already and nearly as fast as the plan; empty if there is none."""
        ours = self.plan.seconds
        if ours is None:
            return ""
        for row in self.rows[:-1]:
            if row.seconds is not None and row.seconds <= ours * (1 + _CLOSE):
                return f"{row.name!r} is within {_CLOSE:.0%} of the plan: {row.words}."
        return ""

    @property
    def bound_slowdown(self) -> float | None:
        """The bound as a multiple of a step with nothing recomputed or moved; ``None`` if nothing fits."""
        if self.bound_seconds is None or not self.plan.seconds or not self.plan.slowdown:
            return None
        return self.plan.slowdown * self.bound_seconds / self.plan.seconds

    @property
    def memory_note(self) -> str:
        """What is most of the untouched peak, where that is not the activations; empty where it is."""
        largest = max(self.memory, key=lambda kind: self.memory[kind], default="activations")
        return (
            "" if largest == "activations" else f"Most of it is {largest}, which no placement of activations changes."
        )

    def to_json(self) -> str:
        """Write it as JSON text."""
        return json.dumps(asdict(self), indent=2, allow_nan=False)

    def __str__(self) -> str:
        return "\n\n".join(part for part in (*self._head(), self._table(), self._placed(), *self._tail()) if part)

    def _head(self) -> Iterator[str]:
        tokens = f"{self.batch_size} x {self.max_length} tokens"
        yield (
            f"{self.model}, {self.training}, {self.dtype}, {tokens} on {self.device}: {self.verdict}\n"
            f"{self.num_parameters / 1e9:.2f} B parameters, {self.num_trainable / 1e6:.1f} M trained"
        )
        total = sum(self.memory.values()) or 1
        rows = [(kind, format_bytes(size), f"{size / total:.0%}") for kind, size in self.memory.items() if size]
        said = [note for note in (self.memory_note, self.spare_note) if note]
        yield "\n".join([text_table(("untouched peak", format_bytes(total), "share"), rows), *said])

    @property
    def spare_note(self) -> str:
        """What is left of the device; empty if nothing is."""
        spare = self.device_bytes - self.budget_bytes
        if spare <= 0:
            return ""
        return (
            f"{format_bytes(spare)} of {format_bytes(self.device_bytes)} are left free, for what the allocator loses to "
            "fragmentation and for others."
        )

    @property
    def verdict(self) -> str:
        """In a sentence whether it fits, and what it costs."""
        budget = format_bytes(self.budget_bytes)
        plan = self.plan
        if plan.slowdown is None:
            return f"does not fit {budget}; the smallest budget that does is {format_bytes(plan.device_bytes)}"
        host = f", {format_bytes(plan.host_bytes)} on the host" if plan.host_bytes else ""
        disk = f", {format_bytes(plan.disk_bytes)} on the disk" if plan.disk_bytes else ""
        return f"fits {budget} at {plan.slowdown:.3f}x{host}{disk}"

    def _table(self) -> str:
        has_longest = any(row.longest is not None for row in self.rows)
        header = ["setting", "smallest budget", *(["longest", "batch"] if has_longest else [])]
        header += ["step", "slowdown", "host", "recompute", "waits", "asked for as"]
        lines = []
        for row in self.rows:
            cells = [row.name, format_bytes(row.device_bytes)]
            cells += [str(row.longest), str(row.largest_batch)] if has_longest else []
            if row.seconds is None or row.slowdown is None:
                cells += ["does not fit", "", "", "", ""]
            else:
                cells += [f"{row.seconds:.3f} s", f"{row.slowdown:.3f}x", format_bytes(row.host_bytes)]
                cells += [f"{row.recompute_seconds / row.seconds:.1%}", f"{row.waiting_seconds / row.seconds:.1%}"]
            lines.append([*cells, row.words])
        if self.bound_slowdown is not None:
            empty = [""] * (3 if has_longest else 1)
            bound = [f"{self.bound_seconds:.3f} s", f"{self.bound_slowdown:.3f}x"]
            lines.append(["lower bound", *empty, *bound, "", "", "", ""])
        last = max(len(line[-1]) for line in lines)
        lines = [[*line[:-1], line[-1].ljust(last)] for line in lines]
        return text_table([*header[:-1], header[-1].ljust(last)], lines)

    def _placed(self) -> str:
        lines = []
        for block in self.blocks:
            parts = []
            if block.kept_bytes:
                parts.append(f"{format_bytes(block.kept_bytes)} on the device ({', '.join(block.kept)})")
            if block.moved_bytes:
                parts.append(f"{format_bytes(block.moved_bytes)} to the host ({', '.join(block.moved)})")
            parts.append(f"{block.num_recomputed} tensors recomputed" if block.num_recomputed else "nothing recomputed")
            lines.append(f"  blocks {block.blocks}: {'; '.join(parts)}")
        return "\n".join(["Where the plan puts what each block saves:", *lines]) if lines else ""

    def _tail(self) -> Iterator[str]:
        if self.next_gib is not None:
            yield f"One GiB more on the device would save {self.next_gib:.1%} of the step."
        phases = [(name, format_bytes(b["device"]), format_bytes(b["host"])) for name, b in self.phases.items()]
        yield text_table(("phase", "device", "host"), phases)
        if self.advice:
            yield self.advice
        sure = sum(origin == "measured" for origin in self.provenance.values())
        yield "\n".join(
            (
                f"Numbers of {self.device}: {sure} measured, {len(self.provenance) - sure} from data sheets or assumed.",
                *(f"note: {note}" for note in self.notes),
            )
        )
