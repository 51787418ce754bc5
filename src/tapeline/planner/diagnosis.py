"""What trying a model has shown, mode by mode, as data: frozen, printable, and written as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tapeline.table import text_table
from tapeline.units import format_bytes

Verdict = Literal["exact on the tape", "exact by fall-back", "wrong", "not supported", "not deterministic"]
_NUM_SHOWN = 3
_HEADER = (
    "mode",
    "exact",
    "on the tape",
    "run again",
    "kept",
    "peak",
    "predicted",
    "of untouched",
    "first step",
    "predicted",
    "FLOPs",
)
_MEANINGS = {
    "exact on the tape": "loss, gradients, buffers and random state are those of the untouched model, bit for bit",
    "exact by fall-back": "every bit is that of the untouched model, but not every block could be replayed from a tape",
    "wrong": "something differs from the untouched model",
    "not supported": "a mode could not be tried",
    "not deterministic": "two runs of the untouched model differ already, so nothing can be said of a managed one",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockReason:
    """Why some blocks are not replayed from a tape."""

    reason: str
    """The reason."""
    blocks: tuple[str, ...]
    """Names of the blocks that it holds for."""

    def __str__(self) -> str:
        return f"{_listed(self.blocks)}: {self.reason}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModeDiagnosis:
    """What one mode did with the model."""

    mode: str
    """The mode tried."""
    is_exact: bool | None
    """Whether every compared tensor was equal in every step; ``None`` if nothing can be said."""
    num_compared: int = 0
    """Things compared in each step: loss, gradients, buffers, random states."""
    num_different: int = 0
    """How many of them differed in some step."""
    different: tuple[str, ...] = ()
    """The first few of these by name."""
    num_taped: int = 0
    """Blocks that were replayed from their tape."""
    num_rerun: int = 0
    """Blocks that were run again as a whole."""
    num_kept: int = 0
    """Blocks of which everything was kept because they have no tape."""
    num_spared: int = 0
    """Blocks of which everything was kept although they have a tape: dropping would not have lowered the peak."""
    num_idle: int = 0
    """Blocks in which autograd records nothing, so that there is nothing to drop."""
    reasons: tuple[BlockReason, ...] = ()
    """Why blocks were not replayed from a tape."""
    kept_instead: tuple[str, ...] = ()
    """What replayed differently when it was verified, and is kept."""
    notes: tuple[str, ...] = ()
    """What else the plan and the session had to say."""
    predicted_first_step_peak_bytes: int | None = None
    """Predicted peak of the first step."""
    measured_first_step_peak_bytes: int | None = None
    """The same, measured."""
    predicted_peak_bytes: int | None = None
    """Predicted peak of a later step."""
    measured_peak_bytes: int | None = None
    """The same, measured."""
    flops_ratio: float | None = None
    """Floating-point operations of a step relative to the untouched model, predicted."""
    error: str = ""
    """Why the mode could not be tried; empty if it could."""

    @property
    def is_on_tape(self) -> bool:
        """Whether no block fell back."""
        return not self.num_rerun and not self.num_kept

    @property
    def verdict(self) -> Verdict:
        """The same in words."""
        if self.error:
            return "not supported"
        if self.is_exact is None:
            return "not deterministic"
        if not self.is_exact:
            return "wrong"
        return "exact on the tape" if self.is_on_tape else "exact by fall-back"


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """What tapeline does with a model on this machine. Made by `tapeline.diagnose`."""

    model: str
    """Name of the model's class."""
    device: str
    """Device whose bytes are meant, and that the steps ran on."""
    num_blocks: int
    """Blocks found in the model."""
    num_parameters: int
    """All parameters, as numbers."""
    num_trainable: int
    """Those that require gradients."""
    untouched_peak_bytes: int
    """Measured peak of a step of the untouched model, forward and backward."""
    is_deterministic: bool
    """Whether two runs of the untouched model from the same seed gave the same bits."""
    num_compared: int
    """Things that were compared in these two runs."""
    num_different: int
    """How many of them differed."""
    different: tuple[str, ...]
    """The first few of these by name."""
    rows: tuple[ModeDiagnosis, ...]
    """One entry for each mode, in the order asked for."""
    notes: tuple[str, ...] = ()
    """What weakens the result."""

    @property
    def is_exact(self) -> bool:
        """Whether every mode could be tried and gave the bits of the untouched model."""
        return self.verdict in ("exact on the tape", "exact by fall-back")

    @property
    def verdict(self) -> Verdict:
        """The worst of the rows: one wrong mode makes it ``wrong``, else one that could not be tried ``not supported``."""
        found = {row.verdict for row in self.rows} | (set() if self.is_deterministic else {"not deterministic"})
        order: tuple[Verdict, ...] = ("wrong", "not deterministic", "not supported", "exact by fall-back")
        has_taped = any(row.num_taped for row in self.rows)
        return next((one for one in order if one in found), "exact on the tape" if has_taped else "exact by fall-back")

    def to_json(self) -> str:
        """Write it as JSON text, verdicts included."""
        data: dict[str, Any] = {"verdict": self.verdict, "is_exact": self.is_exact} | asdict(self)
        for row, written in zip(self.rows, data["rows"], strict=True):
            written["verdict"] = row.verdict
        return json.dumps(data, indent=2, allow_nan=False)

    def __str__(self) -> str:
        parts = [self._headline(), self._table(), "\n".join(self._remarks())]
        return "\n\n".join(part for part in parts if part)

    def _headline(self) -> str:
        trained = "all" if self.num_trainable == self.num_parameters else f"{self.num_trainable:,}"
        return (
            f"{self.model} on {self.device}: {self.num_blocks} blocks, {self.num_parameters:,} parameters "
            f"({trained} trained), untouched peak {format_bytes(self.untouched_peak_bytes)}\n"
            f"{self.verdict}: {_MEANINGS[self.verdict]}"
        )

    def _table(self) -> str:
        return text_table(_HEADER, [self._cells(row) for row in self.rows])

    def _cells(self, row: ModeDiagnosis) -> tuple[str, ...]:
        if row.error:
            return (row.mode, "-", *("-" for _ in _HEADER[2:]))
        share = (row.measured_peak_bytes or 0) / self.untouched_peak_bytes if self.untouched_peak_bytes else 0.0
        return (
            row.mode,
            {True: "yes", False: "NO", None: "?"}[row.is_exact],
            str(row.num_taped),
            str(row.num_rerun),
            str(row.num_kept + row.num_spared),
            _bytes(row.measured_peak_bytes),
            _bytes(row.predicted_peak_bytes),
            f"{share:.1%}",
            _bytes(row.measured_first_step_peak_bytes),
            _bytes(row.predicted_first_step_peak_bytes),
            "-" if row.flops_ratio is None else f"{row.flops_ratio:.3f}x",
        )

    def _remarks(self) -> Iterable[str]:
        """What the table has no room for; modes that have the same to say are named together."""
        if not self.is_deterministic:
            yield (
                f"not deterministic: {self.num_different} of {self.num_compared} differ between two runs of the untouched "
                f"model from the same seed: {_named(self.different, self.num_different)}"
            )
        modes_by_remark: dict[str, list[str]] = {}
        for row in self.rows:
            for remark in _remarks_on(row):
                modes_by_remark.setdefault(remark, []).append(row.mode)
        for remark, modes in modes_by_remark.items():
            yield remark if len(modes) == len(self.rows) > 1 else f"{', '.join(modes)}: {remark}"
        yield from (f"note: {note}" for note in self.notes)


def _remarks_on(row: ModeDiagnosis) -> Iterable[str]:
    if row.error:
        yield f"not supported: {row.error}"
    if row.is_exact is False:
        yield f"WRONG: {row.num_different} of {row.num_compared} differ: {_named(row.different, row.num_different)}"
    yield from (f"not on the tape: {reason}" for reason in row.reasons)
    if row.num_spared:
        yield f"kept by choice in {row.num_spared} blocks: dropping something would not lower the peak"
    if row.num_idle:
        yield f"nothing to drop in {row.num_idle} blocks: autograd records nothing there"
    yield from (f"kept instead: {what}" for what in row.kept_instead)
    yield from (f"note: {note}" for note in row.notes)


def _bytes(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else format_bytes(num_bytes)


def _named(names: tuple[str, ...], number: int) -> str:
    return ", ".join(names) + (", ..." if number > len(names) else "")


def _listed(names: tuple[str, ...]) -> str:
    if len(names) <= _NUM_SHOWN:
        return ", ".join(names)
    return f"{', '.join(names[:_NUM_SHOWN])}, ... ({len(names)} in all)"
