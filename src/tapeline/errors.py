"""Errors that tapeline raises on purpose: each says what, the numbers, the cause and the next step.

Every class carries the exit code that the command line ends with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches


class TapelineError(Exception):
    """Base class of every error that tapeline raises itself."""

    exit_code = 1


class UsageError(TapelineError, ValueError):
    """An argument, a setting or an input file that cannot be used."""

    exit_code = 2


class InfeasibleBudgetError(TapelineError):
    """No plan fits the budget.

    Attributes:
        budget_bytes: what was asked for.
        smallest_feasible_bytes: the smallest budget for which there is a plan.
    """

    exit_code = 3

    def __init__(self, message: str, *, budget_bytes: int, smallest_feasible_bytes: int) -> None:
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self.smallest_feasible_bytes = smallest_feasible_bytes


class BudgetExceededError(TapelineError):
    """The measured peak is above the budget that the plan promised."""

    exit_code = 4


class PlanDriftError(TapelineError, RuntimeError):
    """A block did something else than what was recorded, and a tensor that was dropped cannot be made again."""

    exit_code = 4


class OutOfMemoryError(TapelineError):
    """The device ran out of memory although the plan fits."""

    exit_code = 5


class TierError(TapelineError, RuntimeError):
    """Bytes could not be moved to the host or the disk, or back.

    Weights, the optimizer and torch's random state are as they were before the forward; gradients may have been added up in part.

    Attributes:
        undo: puts the random state back.
    """

    exit_code = 5
    undo: Callable[[], None] | None = None


class FullTierError(TierError):
    """The host or the disk has not as much room as the plan needs; nothing has been computed yet.

    Attributes:
        tier: ``host`` or ``disk``.
    """

    def __init__(self, message: str, *, tier: str) -> None:
        super().__init__(message)
        self.tier = tier


class UnsupportedModelError(TapelineError):
    """The model cannot be planned: no blocks, no loss, or a forward that depends on data."""

    exit_code = 6


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest known word, or an empty string."""
    close = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
