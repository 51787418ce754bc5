"""The public verbs. Each is one call away from `import tapeline`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from tapeline.errors import FullTierError
from tapeline.integrations.forecast import forecast
from tapeline.runtime.checkpoint import checkpoint
from tapeline.runtime.doctor import diagnose
from tapeline.runtime.explain import explain
from tapeline.runtime.search import Search, plan
from tapeline.runtime.session import Report, Session, apply
from tapeline.runtime.session_tiers import less_room
from tapeline.runtime.shape_plans import ShapePlans
from tapeline.runtime.wanted import Wanted
from tapeline.units import Budget

__all__ = ["Report", "Session", "apply", "checkpoint", "diagnose", "explain", "fit", "forecast", "plan"]


def fit(
    model: nn.Module,
    batch: Any,
    budget: str | int | float | Budget | None = None,
    *,
    measure: bool = True,
    audit_every: int = 100,
    strict: bool = False,
    per_shape: bool = False,
    offload_dir: Path | str | None = None,
    checksums: bool = False,
    on_full_tier: Literal["error", "replan"] = "error",
    **options: Any,
) -> Session:
    """Plan for `batch` under `budget` and put the plan in force at once.

    Args:
        model: any module.
        batch: one micro-batch of the largest shape.
        budget: as in `plan`.
        measure: as in `Session`.
        audit_every: as in `Session`.
        strict: as in `Session`.
        per_shape: make a plan for each shape of batch, for all that are up to a fifth smaller. The plan of a shape that
            was not seen before is made in another thread while the plan for the next larger shape serves. Mode ``auto`` only.
        offload_dir: folder for what a plan with a ``disk_budget`` moves to the disk.
        checksums: as in `Session`.
        on_full_tier: what to do if the host or the disk has not the room that the plan needs: ``"error"``, or ``"replan"`` with
            less of it, as often as it takes.
        **options: the other arguments of `plan`.

    Returns:
        The session, with the plan as ``session.plan``. Use it in a ``with`` statement, or call ``remove()``.

    Example:
        >>> import torch, tapeline
        >>> layers = [torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64)) for _ in range(4)]
        >>> model, x = torch.nn.Sequential(*layers), torch.randn(512, 64)
        >>> with tapeline.fit(model, x, "60%", loss_fn=lambda m, x: m(x).sum()) as session:
        ...     model(x).sum().backward()
        >>> session.report().is_within_budget
        True
    """
    optimizer = options.get("optimizer")
    known = optimizer if isinstance(optimizer, torch.optim.Optimizer) else None
    wanted = Wanted(on_full_tier=on_full_tier, **options)
    while True:
        search = Search(model, batch, budget, wanted)
        made = search.plan()
        shapes = ShapePlans(search, made) if per_shape else None
        try:
            return Session(
                model,
                made,
                measure=measure,
                optimizer=known,
                audit_every=audit_every,
                strict=strict,
                shapes=shapes,
                offload_dir=offload_dir,
                checksums=checksums,
            )
        except FullTierError as error:
            if shapes is not None:
                shapes.stop()
            wanted = less_room(wanted, made, error)
