"""What a session has moved, and what that made compute wait for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tapeline.runtime.moving import Mover
from tapeline.units import format_bytes

_SHOWN = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class TierReport:
    """One tier below the device."""

    name: str
    """``host`` or ``disk``."""
    room_bytes: int
    """What was taken for it when the session began."""
    most_used_bytes: int
    """The most of it that was in use."""
    planned_bytes: int
    """Bytes that the plan moves in one forward of the model."""
    out_bytes: int
    """Bytes that left the device in the last training forward."""
    back_bytes: int
    """Bytes that came back since it began; fewer, where they were still there when backward asked."""
    total_out_bytes: int
    """Bytes that left the device in all."""
    total_back_bytes: int
    """Bytes that came back in all."""
    most_in_flight_bytes: int
    """The most that was on the device while it was copied, or had been."""
    num_stalls: int
    """How often compute had to wait for a copy."""
    stall_seconds: float
    """How long, in all."""
    stalls: dict[str, float]
    """Seconds by block and direction, the longest first."""
    stayed: dict[str, int]
    """Tensors that were to be moved and stayed on the device, by reason."""

    def rows(self) -> list[tuple[str, str]]:
        """For a table."""
        worst = ", ".join(f"{where} {seconds:.2g} s" for where, seconds in list(self.stalls.items())[:_SHOWN])
        rows = [
            (
                f"room on the {self.name}, most used",
                f"{format_bytes(self.room_bytes)}, {format_bytes(self.most_used_bytes)}",
            ),
            (
                f"moved to the {self.name} by a forward",
                f"{format_bytes(self.out_bytes)} (planned {format_bytes(self.planned_bytes)})",
            ),
            (f"brought back from the {self.name}", format_bytes(self.back_bytes)),
            ("most in flight", format_bytes(self.most_in_flight_bytes)),
            ("compute waited for copies", f"{self.num_stalls} times, {self.stall_seconds:.2g} s"),
        ]
        return [*rows, ("most of it for", worst)] if worst else rows


def tier_reports(mover: Mover | None, planned: Mapping[str, int]) -> tuple[TierReport, ...]:
    """What a mover has done, by tier."""
    if mover is None:
        return ()
    found = []
    for name, tier in mover.tiers.items():
        engine, stalls = tier.engine, tier.engine.stalls.table()
        out, back = mover.since_forward(name)
        found.append(
            TierReport(
                name=name,
                room_bytes=engine.store.num_bytes,
                most_used_bytes=engine.store.regions.most_used,
                planned_bytes=planned.get(name, 0),
                out_bytes=out,
                back_bytes=back,
                total_out_bytes=engine.bytes_out,
                total_back_bytes=engine.bytes_back,
                most_in_flight_bytes=engine.most_seen_in_flight,
                num_stalls=sum(stall.count for stall in stalls.values()),
                stall_seconds=sum(stall.seconds for stall in stalls.values()),
                stalls={where: stall.seconds for where, stall in stalls.items()},
                stayed=dict(mover.stayed),
            )
        )
    return tuple(found)
