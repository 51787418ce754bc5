"""Rates that weigh operations against each other; plain numbers, no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Rates that a device reaches on large operands, for one dtype."""

    matmul_flops: float
    """Floating-point operations per second of a matrix product."""
    attention_flops: float
    """The same for the forward of a fused attention kernel."""
    attention_backward_flops: float
    """The same for its backward."""
    memory_bytes: float
    """Bytes per second that elementwise ops read and write."""
    dequantise_bytes: float
    """Bytes per second that dequantising weights reads and writes."""
    op_seconds: float
    """Seconds that launching or replaying one op takes at least."""
