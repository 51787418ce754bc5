"""One row of the benchmark on a GPU: a step in one way, timed, with its peak, what it moved, and whether its gradients are right."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

import tapeline
from bench.gpu_cases import Case
from bench.gpu_ways import AUTO, CHECKPOINT, NONE, OFFLOAD, WAYS, InForce, Setting, first_line, needed_bytes
from bench.smoke import Batch, are_equal, deterministic, gradients, measure_peak, quantiles, step, synchronize, timed

SHORT = 2048
"""Tokens at which gradients are compared where the untouched step does not fit with all of them."""
LEAST_STEPS, MOST_STEPS = 3, 30
DEVICE_LOST = "device_lost"
"""Of a row: why this process cannot use the device any more."""
_NUM_GRADIENTS = 2
"""tapeline records the first step and replays from a known tape in the second."""
_TIER_FIELDS = (
    *("name", "room_bytes", "most_used_bytes", "planned_bytes", "out_bytes", "back_bytes", "most_in_flight_bytes"),
    *("num_stalls", "stall_seconds"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """The gradients that every way should have."""

    gradients: dict[str, torch.Tensor]
    """Copies on the host, by name."""
    against: str
    """The way that they are of."""
    batch: Batch
    """What they were computed on."""


class Rows:
    """The rows of one case.

    Args:
        case: what it is.
        setting: its model and batch.
        seconds: time for the timed steps of a row.
    """

    def __init__(self, case: Case, setting: Setting, seconds: float) -> None:
        self.case, self.setting, self.seconds = case, setting, seconds
        self.model, self.batch, self.device = setting.model, setting.batch, setting.device
        self.expected = self._expected()

    def row(self, way: str) -> dict[str, Any]:
        """Run the case in one way; what goes wrong is part of the answer."""
        begin = time.perf_counter()
        row: dict[str, Any] = {"case": self.case.name, "way": way}
        try:
            with WAYS[way](self.setting) as running:
                self._measure(row, running)
        except Exception as error:  # noqa: BLE001 - a way that fails is a result, too
            row["failed"] = f"{type(error).__name__}: {first_line(error)}"
        row |= lost(self.device)
        if DEVICE_LOST not in row:
            free(self.model, self.device)
        return row | {"row_seconds": round(time.perf_counter() - begin, 1)}

    def _measure(self, row: dict[str, Any], running: InForce) -> None:
        session = running.session
        if session is not None:
            row |= _promised(session, running.plan_seconds)
            if row["way"] == AUTO:
                row["budget_bytes"] = needed_bytes(self.setting.plan(OFFLOAD))
        with running.around():
            timed(self.model, self.batch, self.device)
        _reset_pinned(self.device)
        with running.around():
            row |= measure_peak(self.model, self.batch, self.device)
        if session is None:
            row["host_bytes"] = _pinned_bytes(self.device)
        elif row["measured_bytes"] is not None:
            row["deviation"] = round(row["measured_bytes"] / row["predicted_bytes"] - 1, 4)
        row |= self._timed(running)
        row |= self._compared(running)
        if session is not None:
            row["notes"] = [*session.plan.notes, *session.report().notes]

    def _timed(self, running: InForce) -> dict[str, Any]:
        """Seconds of as many steps as there is time for, and what they moved and waited for."""
        with running.around():
            one = timed(self.model, self.batch, self.device)
        number = max(LEAST_STEPS, min(MOST_STEPS, int(self.seconds / one)))
        before, seconds = _tiers(running.session), []
        for _ in range(number):
            with running.around():
                seconds.append(timed(self.model, self.batch, self.device))
        tiers = _tiers(running.session)
        for tier, earlier in zip(tiers, before, strict=True):
            for what in ("num_stalls", "stall_seconds"):
                tier[f"{what}_per_step"] = round((tier.pop(what) - earlier[what]) / number, 6)
        return {"seconds": quantiles(seconds), "num_steps": number} | ({"tiers": tiers} if tiers else {})

    def _compared(self, running: InForce) -> dict[str, Any]:
        """Whether all gradients are the expected ones, bit for bit."""
        if self.expected is None:
            return {"gradients_equal": None}
        equal = []
        with deterministic(self.device) as obstacles:
            for _ in range(_NUM_GRADIENTS):
                with running.around():
                    step(self.model, self.expected.batch)
                equal.append(are_equal(self.model, self.expected.gradients))
        length = self.expected.batch["input_ids"].shape[1]
        found = {"gradients_equal": all(equal), "gradients_against": self.expected.against, "gradients_length": length}
        return found | ({"without_deterministic_kernel": obstacles} if obstacles else {})

    def _expected(self) -> Expected | None:
        """Of the untouched model at the case's length, or at a shorter one, or else of torch's checkpoint: the first that fits."""
        short = {name: tensor[:, :SHORT].contiguous() for name, tensor in self.batch.items()}
        attempts = [(NONE, self.batch), (NONE, short), (CHECKPOINT, short)]
        for way, batch in attempts if self.case.length > SHORT else attempts[::2]:
            try:
                with WAYS[way](self.setting) as running, deterministic(self.device), running.around():
                    step(self.model, batch)
                return Expected(gradients=gradients(self.model), against=way, batch=batch)
            except torch.OutOfMemoryError:
                pass
            finally:
                free(self.model, self.device)
        return None


def _promised(session: tapeline.Session, plan_seconds: float) -> dict[str, Any]:
    """What a plan says."""
    plan = session.plan
    return {
        "predicted_bytes": plan.peak_bytes,
        "predicted_first_step_bytes": plan.first_step_peak_bytes,
        "untouched_bytes": plan.untouched_peak_bytes,
        "predicted_flops_ratio": round(plan.slowdown, 4),
        "host_bytes": plan.host_bytes,
        "disk_bytes": plan.disk_bytes,
        "plan_seconds": round(plan_seconds, 2),
    }


def _tiers(session: tapeline.Session | None) -> list[dict[str, Any]]:
    """What the session has moved in its last step, and waited for since it began."""
    tiers = () if session is None else session.report().tiers
    return [{name: value for name, value in asdict(tier).items() if name in _TIER_FIELDS} for tier in tiers]


def _reset_pinned(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_host_memory_stats()


def _pinned_bytes(device: torch.device) -> int | None:
    """The most pinned memory in use since the last reset, in blocks as torch rounds them; `None` where there is none."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.host_memory_stats().get("active_bytes.peak", 0))


def free(model: nn.Module, device: torch.device) -> None:
    """Give back what a row has left behind, so that it is no part of the next one."""
    model.zero_grad(set_to_none=True)
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()


def lost(device: torch.device) -> dict[str, str]:
    """Why this process cannot use the device any more, as after an access to a wrong address; empty if it can."""
    try:
        synchronize(device)
    except RuntimeError as error:
        return {DEVICE_LOST: first_line(error)}
    return {}


def completed(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows in the order of their ways, with what follows from the others: slowdowns, and the untouched model's prediction."""
    found = {row["way"]: dict(row) for row in rows}
    base = next((way for way in (NONE, CHECKPOINT) if "seconds" in found.get(way, {})), None)
    untouched = next((row["untouched_bytes"] for row in found.values() if "untouched_bytes" in row), None)
    for row in found.values():
        if base is not None and "seconds" in row:
            row["slowdown"] = round(row["seconds"]["median"] / found[base]["seconds"]["median"], 4)
            row["slowdown_against"] = base
        if row["way"] == NONE and untouched is not None:
            row["predicted_bytes"] = untouched
            if row.get("measured_bytes"):
                row["deviation"] = round(row["measured_bytes"] / untouched - 1, 4)
    return [found[way] for way in WAYS if way in found]
