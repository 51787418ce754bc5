"""Text with units at the edge, ``int`` bytes inside."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from tapeline.errors import UsageError, did_you_mean

BYTES_PER_UNIT = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_EXAMPLES = "give bytes (24000000000), a size (22GiB, 500MB), a share of the untouched model's peak (60%), or auto"
_QUANTITY = re.compile(r"([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*(.*)", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """A memory budget as the user said it; exactly one of the three is set."""

    num_bytes: int | None = None
    """Absolute number of bytes."""
    fraction: float | None = None
    """Share of the predicted peak of the untouched model, 0.6 for ``60%``."""
    auto: bool = False
    """What this process may really use on the device."""


def parse_budget(text: str | int | float | Budget | None) -> Budget | None:
    """Read a budget: ``24_000_000_000``, ``"22GiB"``, ``"60%"`` or ``"auto"``.

    Raises:
        UsageError: for anything that is not a positive size, share or ``auto``.
    """
    if text is None or isinstance(text, Budget):
        return text
    if isinstance(text, bool):
        raise UsageError(f"Budget {text!r} is not a size: {_EXAMPLES}.")
    if isinstance(text, int | float):
        return Budget(num_bytes=_positive_bytes(float(text), repr(text)))
    word = text.strip()
    if word.lower() == "auto":
        return Budget(auto=True)
    if word.endswith("%"):
        return Budget(fraction=_number(word[:-1].strip(), text) / 100)
    return Budget(num_bytes=parse_bytes(text))


def parse_bytes(text: str) -> int:
    """Read a size such as ``"22GiB"``, ``"1.5 GB"`` or ``"4096"`` (bytes).

    Raises:
        UsageError: if the number or the unit makes no sense.
    """
    match = _QUANTITY.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"Cannot read {text!r} as a memory size: {_EXAMPLES}.")
    number, unit = match.groups()
    by_lower = {known.lower(): known for known in BYTES_PER_UNIT}
    canonical = by_lower.get(unit.lower()) if unit else "B"
    if canonical is None:
        hint = did_you_mean(unit + "iB" if len(unit) == 1 else unit, BYTES_PER_UNIT)
        raise UsageError(f"Unknown unit {unit!r} in {text!r}{hint}: known units are {', '.join(BYTES_PER_UNIT)}.")
    return _positive_bytes(_number(number, text) * BYTES_PER_UNIT[canonical], text)


def is_zero(text: str | int) -> bool:
    """Whether a size or a share is written as nothing: ``0``, ``"0%"``, ``"0GiB"``."""
    match = _QUANTITY.fullmatch(str(text).strip().removesuffix("%").strip())
    if match is None or match.group(2).lower() not in {"", *(unit.lower() for unit in BYTES_PER_UNIT)}:
        return False
    return not match.group(1).strip("0.") and "0" in match.group(1)


def format_bytes(num_bytes: float) -> str:
    """Write bytes for people: ``1536`` is ``'1.50 KiB'``."""
    if abs(num_bytes) < 1024:
        return f"{num_bytes:.0f} B"
    size = float(num_bytes)
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if abs(size) < 1024:
            return f"{size:.2f} {unit}" if abs(size) < 100 else f"{size:.1f} {unit}"
    return f"{size / 1024:.2f} TiB"


def format_deviation(share: float) -> str:
    """Write a relative difference for people: ``0.0123`` is ``'+1.23%'``, and nothing has no sign to speak of."""
    return f"{round(share, 4) + 0.0:+.2%}"


def format_flops(num_flops: float) -> str:
    """Write floating-point operations for people: ``2.5e12`` is ``'2.50 TFLOP'``."""
    size = float(num_flops)
    for unit in ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP"):
        if abs(size) < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} PFLOP"


def _number(text: str, whole: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UsageError(f"Cannot read {whole!r} as a memory size: {_EXAMPLES}.") from None
    if not math.isfinite(value) or value <= 0:
        raise UsageError(f"A memory size must be more than zero, got {whole!r}: {_EXAMPLES}.")
    return value


def _positive_bytes(value: float, whole: str) -> int:
    if not math.isfinite(value) or value < 1:
        raise UsageError(f"A memory size must be at least one byte, got {whole}: {_EXAMPLES}.")
    return int(value)
