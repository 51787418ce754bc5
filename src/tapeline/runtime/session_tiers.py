"""The tiers of a session: opened before anything is computed, looked after at each forward, closed with the session."""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tapeline.cost.limits import local_processes
from tapeline.errors import FullTierError, UsageError
from tapeline.planner.schema import Plan
from tapeline.runtime.install import Inert
from tapeline.runtime.moving import LEAST_BYTES, Mover
from tapeline.runtime.predict import model_device
from tapeline.runtime.tiers.opening import open_disk, open_host
from tapeline.runtime.tiers.tier import HOST, Tier
from tapeline.runtime.wanted import Wanted
from tapeline.units import format_bytes


def open_mover(
    model: nn.Module, plan: Plan, offload_dir: Path | str | None, *, checksums: bool = False
) -> Mover | None:
    """Open the tiers that a plan uses; ``None`` if it uses none.

    Raises:
        TierError: if one cannot be had.
        UsageError: if the plan uses the disk and no folder was named.
    """
    device, in_flight = model_device(model), plan.in_flight_bytes
    if plan.disk_bytes and offload_dir is None:
        raise UsageError('The plan moves tensors to the disk: say where with offload_dir="...".')
    tiers: list[Tier] = []
    try:
        if plan.host_bytes:
            tiers.append(open_host(device, plan.host_bytes, in_flight))
            if tiers[-1].note:
                warnings.warn(tiers[-1].note, stacklevel=4)
        if plan.disk_bytes:
            folder = offload_dir or ""
            tiers.append(open_disk(device, plan.disk_bytes, in_flight, folder, has_checksums=checksums))
    except BaseException:
        for tier in tiers:
            with suppress(Exception):
                tier.engine.close()
        raise
    return Mover({tier.name: tier for tier in tiers}, model) if tiers else None


def less_room(wanted: Wanted, plan: Plan, error: FullTierError) -> Wanted:
    """The same wish with half of the room that the plan wanted of the full tier and did not get.

    Raises:
        FullTierError: if the user wants to be told instead, or there is next to nothing left to halve.
    """
    room = plan.rooms[error.tier] // 2
    if wanted.on_full_tier == "error" or room < LEAST_BYTES:
        raise error
    warnings.warn(f"{error} Planning again with {format_bytes(room)}.", stacklevel=4)
    budget = room * local_processes()
    return replace(wanted, host_budget=budget) if error.tier == HOST else replace(wanted, disk_budget=budget)


class ForwardBegins:
    """A forward pre-hook of the model: in training, its weights may have other storages than before."""

    def __init__(self, mover: Mover) -> None:
        self._mover = mover

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if module.training and torch.is_grad_enabled():
            self._mover.begin_forward()

    def __reduce__(self) -> tuple[type[Inert], tuple[()]]:
        return Inert, ()  # a copied model belongs to no session
