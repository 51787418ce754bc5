"""A forecast or a plan as one HTML page that needs nothing else: no network, no script, no torch.

It is a function and not a method of the data: the data is at the bottom of the house and knows nothing of what is made of it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tapeline.errors import UsageError
from tapeline.planner.forecast import Forecast
from tapeline.planner.schema import Plan
from tapeline.report.chart import slowdown_chart
from tapeline.report.file import write_text
from tapeline.report.svg import line, percent, pieces, placed, width_for
from tapeline.units import format_bytes, format_flops

_TEMPLATES = Path(__file__).with_name("templates")
_ORIGINS = {
    "measured": "on the device itself",
    "catalogue": "published by its maker",
    "assumed": "a share or a rate usual for its kind",
}
_FILTERS: dict[str, Callable[[Any], str]] = {
    "bytes": format_bytes,
    "flops": format_flops,
    "seconds": lambda seconds: f"{seconds:.3f} s",
    "times": lambda factor: f"{factor:.3f}x",
    "percent": lambda share: f"{share:.1%}",
}


def to_html(result: Forecast | Plan, path: str | os.PathLike[str]) -> Path:
    """Write a forecast or a plan as one self-contained HTML page.

    The page has its style and its charts inside, and everything in the charts is in a table too. It follows the reader's
    choice of light or dark, and can be printed.

    Args:
        result: what `tapeline.forecast` or `tapeline.plan` returned.
        path: of the page; a file of that name is replaced, whole or not at all.

    Returns:
        Where the page is.

    Raises:
        UsageError: if `result` is neither, or the file cannot be written.

    Example:
        >>> import pathlib, tempfile, torch, tapeline
        >>> layers = [torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64)) for _ in range(4)]
        >>> model, x = torch.nn.Sequential(*layers), torch.randn(512, 64)
        >>> plan = tapeline.plan(model, x, mode="recompute", loss_fn=lambda m, x: m(x).sum())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tapeline.to_html(plan, pathlib.Path(folder, "plan.html")).name
        'plan.html'
    """
    return write_text(path, render(result))


def render(result: Forecast | Plan) -> str:
    """The page as text.

    Raises:
        UsageError: if `result` is neither a forecast nor a plan.
    """
    page = _PAGES.get(type(result))
    if page is None:
        raise UsageError(
            f"Cannot make a page of a {type(result).__name__}: give what tapeline.forecast or tapeline.plan returned."
        )
    template, view = page
    return _environment().get_template(template).render(view(result))


@functools.cache
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= _FILTERS
    return made


def _forecast_view(forecast: Forecast) -> dict[str, Any]:
    memory = {kind: size for kind, size in forecast.memory.items() if size}
    total = sum(memory.values())
    most = width_for(total, forecast.budget_bytes)
    return {
        "forecast": forecast,
        "memory": memory,
        "total": total,
        "pieces": pieces(memory, most),
        "budget": line(percent(forecast.budget_bytes, most), "budget", forecast.budget_bytes),
        "chart": slowdown_chart(forecast),
        "bars": placed(forecast.blocks),
        "has_longest": any(row.longest is not None for row in forecast.rows),
        "has_disk": any(row.disk_bytes for row in forecast.rows),
        "origins": _origins(forecast.provenance),
    }


def _origins(provenance: Mapping[str, str]) -> list[tuple[str, str, list[str]]]:
    """Each origin with its meaning and the numbers that have it, the surest first."""
    found = dict.fromkeys([*_ORIGINS, *provenance.values()])
    return [(origin, _ORIGINS.get(origin, ""), [n for n, o in provenance.items() if o == origin]) for origin in found]


def _plan_view(plan: Plan) -> dict[str, Any]:
    kinds = list(dict.fromkeys([*plan.untouched_memory, *plan.memory]))
    before = {kind: plan.untouched_memory.get(kind, 0) for kind in kinds}
    after = {kind: plan.memory.get(kind, 0) for kind in kinds}
    budget = plan.budget_bytes
    most = width_for(sum(before.values()), sum(after.values()), budget)
    return {
        "plan": plan,
        "before": before,
        "after": after,
        "bars": (("untouched", pieces(before, most)), ("this plan", pieces(after, most))),
        "budget": None if budget is None else line(percent(budget, most), "budget", budget),
    }


_PAGES: dict[type, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    Forecast: ("forecast.html.j2", _forecast_view),
    Plan: ("plan.html.j2", _plan_view),
}
