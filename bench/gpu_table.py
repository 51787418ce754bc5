"""The record of the benchmark on a GPU as text."""

from __future__ import annotations

from typing import Any

from bench.gpu_cases import ALL, QUICK
from tapeline.table import text_table
from tapeline.units import format_bytes

_HEADER = ("case", "way", "equal", "step", "p20", "p80", "slowdown")
_BYTES = ("peak", "reserved", "predicted", "off by", "below", "out", "waits")
_ORDER = {case.name: number for number, case in enumerate((*ALL.cases, *QUICK.cases))}
_NOTHING = "-"


def table(record: dict[str, Any]) -> str:
    """Links, rows that were measured, and the reasons of those that were not."""
    cases = sorted(record["cases"], key=lambda case: _ORDER.get(case["case"], len(_ORDER)))
    rows = [row for case in cases for row in case["rows"] if "way" in row]
    links = [row for case in cases for row in case["rows"] if "link" in row]
    parts = [
        text_table(("link", "copy", "off the device", "to it", "both"), [_link(row) for row in links]),
        text_table((*_HEADER, *_BYTES), [_row(row) for row in rows if "seconds" in row], left=3),
        "\n".join(_reason(row) for row in rows if "skipped" in row or "failed" in row),
    ]
    if len({case["code"] for case in cases}) > 1:
        parts.append("Not all of it was measured with the same code.")
    return "\n\n".join(part for part in parts if part)


def _link(row: dict[str, Any]) -> tuple[str, ...]:
    rates = (f"{row[way] / 1e9:.2f} GB/s" for way in ("out_bandwidth", "back_bandwidth"))
    both = f"{row['duplex_factor']:.2f}x" if "duplex_factor" in row else _NOTHING
    return row["link"], format_bytes(row["bytes"]), *rates, both


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    tiers = row.get("tiers", [])
    out, waits = sum(tier["out_bytes"] for tier in tiers), sum(tier["stall_seconds_per_step"] for tier in tiers)
    below = (row.get("host_bytes") or 0) + (row.get("disk_bytes") or 0)
    return (
        row["case"],
        row["way"],
        {True: "yes", False: "NO", None: _NOTHING}[row.get("gradients_equal")],
        *(f"{row['seconds'][at]:.4g} s" for at in ("median", "p20", "p80")),
        f"{row['slowdown']:.3f}x" if "slowdown" in row else _NOTHING,
        *(
            format_bytes(row[what]) if row.get(what) else _NOTHING
            for what in ("measured_bytes", "reserved_bytes", "predicted_bytes")
        ),
        f"{100 * row['deviation']:+.1f} %" if "deviation" in row else _NOTHING,
        format_bytes(below) if below else _NOTHING,
        format_bytes(out) if out else _NOTHING,
        f"{waits:.2g} s" if tiers else _NOTHING,
    )


def _reason(row: dict[str, Any]) -> str:
    what = "skipped" if "skipped" in row else "failed"
    return f"{row['case']} {row['way']}: {what}: {row[what]}"
