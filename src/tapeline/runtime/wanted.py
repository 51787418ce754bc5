"""What the user wants of a plan, checked; the arguments are documented at `tapeline.plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tapeline.errors import UsageError
from tapeline.planner.schema import parse_mode
from tapeline.runtime.predict import OptimizerSpec
from tapeline.runtime.step import LossFn, model_loss
from tapeline.tape.rules import Rules
from tapeline.units import is_zero, parse_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """The arguments of `tapeline.plan` beside the model, the batch and the budget.

    Raises:
        UsageError: for arguments that make no sense.
    """

    mode: str | bool = "auto"
    blocks: Sequence[str] | None = None
    keep: Sequence[str] = ()
    drop: Sequence[str] = ()
    optimizer: OptimizerSpec = None
    loss_fn: LossFn = model_loss
    accumulation: int = 1
    margin: str | int | None = None
    reserve: str | int = 0
    on_infeasible: Literal["error", "warn"] = "error"
    host_budget: str | int | None = None
    disk_budget: str | int | None = None
    on_full_tier: Literal["error", "replan"] = "error"

    def __post_init__(self) -> None:
        parse_mode(self.mode)
        if self.accumulation < 1:
            raise UsageError(f"accumulation must be at least 1, got {self.accumulation}.")
        if self.on_infeasible not in ("error", "warn"):
            raise UsageError(f"on_infeasible must be 'error' or 'warn', got {self.on_infeasible!r}.")
        if self.on_full_tier not in ("error", "replan"):
            raise UsageError(f"on_full_tier must be 'error' or 'replan', got {self.on_full_tier!r}.")
        for argument in ("keep", "drop"):
            if isinstance(names := getattr(self, argument), str):
                raise UsageError(
                    f"{argument} must be a list of names, got the string {names!r}: use {argument}=[{names!r}]."
                )

    @property
    def name(self) -> str:
        """The mode without its number."""
        return parse_mode(self.mode)[0]

    @property
    def segment_length(self) -> int | None:
        """The number of mode ``segments:k``."""
        return parse_mode(self.mode)[1]

    @property
    def mode_text(self) -> str:
        """The mode as it was given."""
        return self.mode if isinstance(self.mode, str) else self.name

    @property
    def reserve_bytes(self) -> int:
        return _size(self.reserve)

    @property
    def host_bytes(self) -> int:
        return _size(self.host_budget)

    @property
    def disk_bytes(self) -> int:
        return _size(self.disk_budget)

    def rules(self) -> Rules:
        """What is to be kept or dropped whatever the mode."""
        return Rules(tuple(self.keep), tuple(self.drop))


def _size(text: str | int | None) -> int:
    return 0 if text is None or is_zero(text) else parse_bytes(str(text))
