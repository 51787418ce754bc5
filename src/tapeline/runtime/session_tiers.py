"""The tiers of a session: opened before anything is computed, looked after at each forward, closed with the session."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tapeline.errors import UsageError
from tapeline.planner.schema import Plan
from tapeline.runtime.install import Inert
from tapeline.runtime.moving import Mover
from tapeline.runtime.predict import model_device
from tapeline.runtime.tiers.opening import open_disk, open_host
from tapeline.runtime.tiers.tier import Tier


def open_mover(model: nn.Module, plan: Plan, offload_dir: Path | str | None) -> Mover | None:
    """Open the tiers that a plan uses; ``None`` if it uses none.

    Raises:
        TierError: if one cannot be had.
        UsageError: if the plan uses the disk and no folder was named.
    """
    device = model_device(model)
    if plan.disk_bytes and offload_dir is None:
        raise UsageError('The plan moves tensors to the disk: say where with offload_dir="...".')
    tiers: list[Tier] = []
    try:
        if plan.host_bytes:
            tiers.append(open_host(device, plan.host_bytes, plan.in_flight_bytes))
        if plan.disk_bytes:
            tiers.append(open_disk(device, plan.disk_bytes, plan.in_flight_bytes, offload_dir or ""))
    except BaseException:
        for tier in tiers:
            with suppress(Exception):
                tier.engine.close()
        raise
    return Mover({tier.name: tier for tier in tiers}, model) if tiers else None


class ForwardBegins:
    """A forward pre-hook of the model: in training, its weights may have other storages than before."""

    def __init__(self, mover: Mover) -> None:
        self._mover = mover

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if module.training and torch.is_grad_enabled():
            self._mover.begin_forward()

    def __reduce__(self) -> tuple[type[Inert], tuple[()]]:
        return Inert, ()  # a copied model belongs to no session
