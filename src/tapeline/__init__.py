"""Fine-tuning of transformer models in a memory budget, with the gradients of the untouched model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tapeline.api import Report, Session, apply, checkpoint, diagnose, explain, fit, forecast, plan
    from tapeline.errors import (
        InfeasibleBudgetError,
        TapelineError,
        UnsupportedModelError,
        UsageError,
    )
    from tapeline.ledger import Ledger
    from tapeline.planner.diagnosis import Diagnosis
    from tapeline.planner.explanation import Explanation
    from tapeline.planner.forecast import Forecast
    from tapeline.planner.schema import Plan
    from tapeline.report.html import to_html

__version__ = "0.1.0"

_HOMES = {
    "Report": "tapeline.api",
    "Session": "tapeline.api",
    "apply": "tapeline.api",
    "checkpoint": "tapeline.api",
    "diagnose": "tapeline.api",
    "explain": "tapeline.api",
    "fit": "tapeline.api",
    "forecast": "tapeline.api",
    "plan": "tapeline.api",
    "Diagnosis": "tapeline.planner.diagnosis",
    "Explanation": "tapeline.planner.explanation",
    "Forecast": "tapeline.planner.forecast",
    "Plan": "tapeline.planner.schema",
    "to_html": "tapeline.report.html",
    "Ledger": "tapeline.ledger",
    "TapelineError": "tapeline.errors",
    "UsageError": "tapeline.errors",
    "InfeasibleBudgetError": "tapeline.errors",
    "UnsupportedModelError": "tapeline.errors",
}

__all__ = [
    "Diagnosis",
    "Explanation",
    "Forecast",
    "InfeasibleBudgetError",
    "Ledger",
    "Plan",
    "Report",
    "Session",
    "TapelineError",
    "UnsupportedModelError",
    "UsageError",
    "__version__",
    "apply",
    "checkpoint",
    "diagnose",
    "explain",
    "fit",
    "forecast",
    "plan",
    "to_html",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that the command line starts without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tapeline' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
