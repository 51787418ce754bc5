"""A plan in force on a model."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import nn

from tapeline.cost.device import nominal_rates
from tapeline.errors import UsageError, did_you_mean
from tapeline.planner.schema import BlockPlan, Plan
from tapeline.runtime.audit import Audit
from tapeline.runtime.install import Patches, install_blocks, managed_module
from tapeline.runtime.library import Library
from tapeline.runtime.measure import PeakMeter, make_meter
from tapeline.runtime.moving import Mover
from tapeline.runtime.predict import model_device
from tapeline.runtime.session_tiers import ForwardBegins, open_mover
from tapeline.runtime.shape_plans import ShapePlans
from tapeline.runtime.switch import AfterForward, PlanSwitch
from tapeline.runtime.tier_report import TierReport, tier_reports
from tapeline.table import text_table
from tapeline.tape.rules import Rules
from tapeline.units import format_bytes, format_deviation

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What was promised and what happened."""

    mode: str
    """The plan's mode."""
    device: str
    """Device whose bytes are meant."""
    budget_bytes: int | None
    """The promise, less the margin; ``None`` without a budget."""
    margin_bytes: int
    """What the plan stayed below the budget, for the allocator and for others."""
    predicted_peak_bytes: int
    """Predicted peak of a step once the optimizer has its state; of several plans, the largest."""
    predicted_first_step_peak_bytes: int
    """Predicted peak of the very first step."""
    num_plans: int
    """Plans that calls have followed; more than one only with a plan for each shape."""
    measured_peak_bytes: int | None
    """Largest measured peak; ``None`` if nothing was measured."""
    measured_reserved_bytes: int | None
    """On CUDA, the most that torch's allocator reserved; ``None`` elsewhere."""
    recomputed_calls: int
    """Block calls of which something was dropped and replayed."""
    recorded_calls: int
    """Block calls that were recorded: one for each block and each new shape or state."""
    rerun_calls: int
    """Block calls that fell back to running the whole block again."""
    audited_calls: int
    """Block calls that were recorded and verified again."""
    kept_instead: tuple[str, ...]
    """What was found to replay differently, and is kept."""
    notes: tuple[str, ...]
    """Settings that did not take effect, and why."""
    tiers: tuple[TierReport, ...] = ()
    """What was moved, by tier."""

    @property
    def deviation(self) -> float | None:
        """Measured relative to the nearer of the two predictions, minus 1: 0.01 is 1 % more than predicted."""
        if self.measured_peak_bytes is None:
            return None
        predictions = (self.predicted_peak_bytes, self.predicted_first_step_peak_bytes)
        return min((self.measured_peak_bytes / p - 1 for p in predictions), key=abs)

    @property
    def is_within_budget(self) -> bool | None:
        """Whether the measured peak kept the promise; ``None`` without a budget or a measurement.

        Where an allocator reserves memory, the promise is on what it reserved, and on the budget with its margin.
        """
        if self.budget_bytes is None or self.measured_peak_bytes is None:
            return None
        return (self.measured_reserved_bytes or self.measured_peak_bytes) <= self.budget_bytes + self.margin_bytes

    def to_json(self) -> str:
        """Write the report as JSON text."""
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        rows = [("budget", "-" if self.budget_bytes is None else format_bytes(self.budget_bytes))]
        rows.append(("predicted peak, first step", format_bytes(self.predicted_first_step_peak_bytes)))
        rows.append(("predicted peak", format_bytes(self.predicted_peak_bytes)))
        measured = "not measured" if self.measured_peak_bytes is None else format_bytes(self.measured_peak_bytes)
        rows.append(("measured peak", measured))
        if self.deviation is not None:
            rows.append(("measured against predicted", format_deviation(self.deviation)))
        if self.measured_reserved_bytes is not None:
            rows.append(("reserved by the allocator", format_bytes(self.measured_reserved_bytes)))
        if self.num_plans > 1:
            rows.append(("plans in use, by shape of the batch", str(self.num_plans)))
        rows.append(("block calls replayed", str(self.recomputed_calls)))
        rows.append(("recorded", str(self.recorded_calls)))
        rows.append(("run again as a whole", str(self.rerun_calls)))
        rows.append(("audited", str(self.audited_calls)))
        rows += [row for tier in self.tiers for row in tier.rows()]
        table = text_table((f"session {self.mode!r} on {self.device}", "bytes"), rows)
        kept = [f"kept instead: {what}" for what in self.kept_instead]
        return "\n".join([table, *kept, *(f"note: {note}" for note in self.notes)])


class Session:
    """A plan in force on one model instance; a context manager that restores the model on leaving.

    As a context manager it measures the peak of its whole body: on an accelerator by the allocator's own counters, on a
    CPU by a `Ledger`, which costs some ten microseconds per op (switch it off with ``measure=False``).

    Args:
        model: the model that the plan was made for.
        plan: the plan.
        measure: measure the peak of the ``with`` body.
        optimizer: whose existing state the ``with`` body counts from its start.
        audit_every: record and verify one block again every so many forwards of the model; 0: never. What differs is
            kept from then on, and reported.
        strict: keep everything, replay every op of every call and compare: slow and large, for finding an op that
            does not replay exactly.
        shapes: plans for other shapes of batches, which take the place of `plan` where there is one.
        offload_dir: folder on the disk for what the plan moves there. Files in it have no name: nothing is left behind.
        checksums: compare what is read from the disk with what was written: for finding a bad disk, at some cost in time.

    Raises:
        UsageError: if the plan names blocks that the model does not have, or a session is in force already.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        *,
        measure: bool = True,
        optimizer: torch.optim.Optimizer | None = None,
        audit_every: int = 100,
        strict: bool = False,
        shapes: ShapePlans | None = None,
        offload_dir: Path | str | None = None,
        checksums: bool = False,
    ) -> None:
        if audit_every < 0:
            raise UsageError(f"audit_every must be 0 (never) or a number of forwards, got {audit_every}.")
        if (name := managed_module(model)) is not None:
            raise UsageError(f"A session is already in force on this model (block {name!r}): call its remove() first.")
        _check_blocks(model, plan)
        self.model, self.plan = model, plan
        self._optimizer = optimizer
        self._meter: PeakMeter = make_meter(model, model_device(model))
        self._patches = Patches()
        self._mover: Mover | None = None
        try:
            self._library = Library(nominal_rates(model_device(model)), Rules(plan.keep, plan.drop))
            self._library.mover = self._mover = open_mover(model, plan, offload_dir, checksums=checksums)
            if self._mover is not None:
                self._patches.hook(model, ForwardBegins(self._mover))
            self._seams = install_blocks(self._patches, model, plan.blocks, self._library, every=shapes is not None)
            self._switch = PlanSwitch(plan, shapes, self._seams, self._library)
            if shapes is not None:
                self._patches.hook(model, self._switch)
                self._patches.hook_after(model, AfterForward(self._switch))
            self._audit = Audit(list(self._seams.values()), audit_every)
            self._patches.hook(model, self._audit)
        except BaseException:
            self._patches.undo()
            if self._mover is not None:
                self._mover.close()
            raise
        for seam in self._seams.values():
            seam.is_strict = strict
        self._stack = ExitStack()
        self._measures_body = measure
        self._is_measuring = False
        self._notes: list[str] = []
        num_replayed = sum(not seam.is_idle for seam in self._seams.values())
        logger.info("plan %r in force: %d of %d blocks replayed", plan.mode, num_replayed, len(plan.blocks))

    def __enter__(self) -> Session:
        if self._measures_body:
            self._stack.enter_context(self.measure(self._optimizer))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        self.remove()

    @contextmanager
    def measure(self, optimizer: torch.optim.Optimizer | None = None) -> Iterator[Session]:
        """Measure the peak of what runs inside, for example one step.

        Args:
            optimizer: whose existing state is counted from the start.

        Raises:
            UsageError: inside another measurement, such as the ``with`` body of a measuring session.
        """
        if self._is_measuring:
            raise UsageError(
                "A measurement is running already: create the session with measure=False to measure parts."
            )
        self._is_measuring = True
        try:
            with self._meter.measure(optimizer, [block.name for block in self.plan.blocks]):
                self._switch.calls.clear()
                yield self
        finally:
            self._is_measuring = False

    def wait_for_plans(self, timeout: float | None = None) -> bool:
        """Wait until each shape of batch that was seen has its plan, where there is one for each.

        Args:
            timeout: seconds; ``None``: as long as it takes.

        Returns:
            Whether nothing is left to do.
        """
        return self._switch.wait(timeout)

    @property
    def plans(self) -> dict[str, Plan]:
        """The plans so far, by the largest shape of batch that each holds for."""
        return self._switch.plans()

    @property
    def placements(self) -> list[tuple[BlockPlan, ...]]:
        """What the forwards of the last measurement followed, one entry for each micro-batch."""
        return [plan.blocks for plan in self._switch.calls]

    @property
    def is_measuring_free(self) -> bool:
        """Whether measuring costs nothing here, as with an allocator's own counters."""
        return self._meter.is_free

    @property
    def last_peak_bytes(self) -> int | None:
        """Peak of the last measurement."""
        return self._meter.last_peak_bytes

    def peak_table(self, limit: int = 10) -> str:
        """The largest tensors at the peak of the last measurement; empty where only an allocator was read."""
        return self._meter.peak_table(limit)

    def report(self) -> Report:
        """What was promised, what was measured, and what did not take effect."""
        return Report(
            mode=self.plan.mode,
            device=self.plan.device,
            budget_bytes=self.plan.budget_bytes,
            margin_bytes=self.plan.margin_bytes if self.plan.device != "cpu" else 0,
            predicted_peak_bytes=max(plan.peak_bytes for plan in self._switch.used),
            predicted_first_step_peak_bytes=max(plan.first_step_peak_bytes for plan in self._switch.used),
            num_plans=len(self._switch.used),
            measured_peak_bytes=self._meter.peak_bytes,
            measured_reserved_bytes=self._meter.reserved_bytes,
            recomputed_calls=sum(seam.num_calls for seam in self._seams.values()),
            recorded_calls=sum(seam.num_recorded for seam in self._seams.values()),
            rerun_calls=sum(seam.num_reruns for seam in self._seams.values()),
            audited_calls=self._audit.num_audits,
            kept_instead=tuple(dict.fromkeys(what for found in self._library.failures.values() for what in found)),
            notes=(*self._notes, *self._ineffective()),
            tiers=tier_reports(self._mover, self.plan.moved),
        )

    def remove(self) -> None:
        """Take the plan off and restore every attribute that was set; safe to call twice."""
        try:
            self._switch.stop()
            self._notes += self._ineffective()
        finally:
            self._patches.undo()
            if self._mover is not None:
                self._mover.close()

    def _ineffective(self) -> list[str]:
        notes = self._switch.notes()
        if self._mover is not None:
            notes += [tier.note for tier in self._mover.tiers.values() if tier.note]
            notes += [f"stayed on the device: {count} tensors, {why}" for why, count in self._mover.stayed.items()]
        if replaced := self._patches.replaced():
            notes.append(
                f"someone else has set {', '.join(sorted(set(replaced)))} since: those blocks do not follow the plan"
            )
        notes += [f"block {name!r}: {reason}" for name, seam in self._seams.items() for reason in seam.reasons]
        compiled = [name for name, seam in self._seams.items() if seam.module._compiled_call_impl is not None]
        if compiled:
            notes.append(
                f"compiled by torch.compile, and left alone: {', '.join(compiled[:3])} ({len(compiled)} in all)"
            )
        total = sum(seam.num_calls for seam in self._seams.values())
        idle = [name for name, seam in self._seams.items() if seam.num_calls == 0 and not seam.was_idle]
        if idle and total:
            notes.append(f"planned to be recomputed but never recorded: {', '.join(idle[:3])}")
        elif idle and self._meter.peak_bytes is not None:
            notes.append("no block was recomputed: was the model in training mode, with gradients enabled?")
        return [note for note in notes if note not in self._notes]


def apply(
    model: nn.Module,
    plan: Plan,
    *,
    measure: bool = True,
    optimizer: torch.optim.Optimizer | None = None,
    audit_every: int = 100,
    strict: bool = False,
    offload_dir: Path | str | None = None,
    checksums: bool = False,
) -> Session:
    """Put a plan in force on `model`; see `Session`.

    Example:
        >>> import torch, tapeline
        >>> layers = [torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64)) for _ in range(4)]
        >>> model, x = torch.nn.Sequential(*layers), torch.randn(512, 64)
        >>> plan = tapeline.plan(model, x, mode="recompute", loss_fn=lambda m, x: m(x).sum())
        >>> with tapeline.apply(model, plan) as session:
        ...     model(x).sum().backward()
        >>> abs(session.report().deviation) < 0.02
        True
    """
    return Session(
        model,
        plan,
        measure=measure,
        optimizer=optimizer,
        audit_every=audit_every,
        strict=strict,
        offload_dir=offload_dir,
        checksums=checksums,
    )


def _check_blocks(model: nn.Module, plan: Plan) -> None:
    modules = dict(model.named_modules())
    for block in plan.blocks:
        module = modules.get(block.name)
        if module is None:
            raise UsageError(
                f"The plan is for another model: it has no block {block.name!r}{did_you_mean(block.name, modules)}."
            )
        if block.kind not in {cls.__name__ for cls in type(module).__mro__}:  # FSDP2 derives a class from it
            raise UsageError(
                f"The plan is for another model: block {block.name!r} is a {type(module).__name__}, planned as {block.kind}."
            )
