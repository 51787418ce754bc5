"""The figures that people quote, as they are quoted, and what can be read off them without computing anything.

Shares of memory and time that guides promise are in `tapeline.planner.rules`. Nothing here was measured by us.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

GB = 10**9
GIB = 2**30

ACTIVATIONS = {"llama-2-7b": (28, 8), "llama-2-13b": (52, 12), "llama-2-70b": (280, 32)}
"""GB without checkpointing and with it; one sequence in fp16, its length not given (guide for Unsloth users: principle)."""

LORA_GB = (22, 11)
"""Llama-2-7B without and with ``"unsloth"``: no length, no batch, no dtype of the base given (the same guide: tip)."""

AGGRESSIVE = ((0.6, 0.8), (0.4, 0.5))
"""Memory saved and time added by an "aggressive" setting that is not named (the same guide: decision table)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quote:
    """Longest sequence that is said to fit a card."""

    model: str
    gigabytes: int
    """Of the card, as it is sold."""
    offloaded: int
    """Tokens with Unsloth, which moves the inputs of blocks to the host."""
    checkpointed: int
    """Tokens with transformers, its checkpointing and FlashAttention-2; 0: out of memory."""


def _quotes(model: str, rows: Mapping[int, tuple[int, int]]) -> tuple[Quote, ...]:
    return tuple(
        Quote(model=model, gigabytes=size, offloaded=ours, checkpointed=theirs) for size, (ours, theirs) in rows.items()
    )


LONGEST = (
    *_quotes(
        "llama-3.1-8b",
        {
            8: (2_972, 0),
            12: (21_848, 932),
            16: (40_724, 2_551),
            24: (78_475, 5_789),
            40: (153_977, 12_264),
            48: (191_728, 15_502),
            80: (342_733, 28_454),
        },
    ),
    *_quotes("llama-3.1-70b", {48: (12_106, 0), 80: (89_389, 6_916)}),
)
"""4-bit base, rank 32 on all linear layers, one sequence (page of Unsloth). The larger model is called Llama-3.3-70B there;
3.1 has the same shape."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """Gigabytes of a card as a straight line over tokens."""

    bytes_per_token: float
    """If the card's GB are 10^9 bytes."""
    fixed_gb: float
    """What is left of the card at no tokens."""
    largest_residual: float
    """Tokens that any of the figures is off the line."""

    @property
    def gib_bytes_per_token(self) -> float:
        """If the card's GB are GiB."""
        return self.bytes_per_token * GIB / GB


def line(quoted: Mapping[int, int]) -> Line:
    """The straight line through quoted tokens by gigabytes of the card; those out of memory are left out.

    Raises:
        ValueError: for fewer than two figures.
    """
    there = {size: tokens for size, tokens in quoted.items() if tokens}
    if len(there) < 2:
        raise ValueError(f"a line needs two figures, got {there}")
    sizes, tokens = np.array(list(there), dtype=float), np.array(list(there.values()), dtype=float)
    slope, start = (float(value) for value in np.polyfit(sizes, tokens, 1))
    off = float(np.abs(slope * sizes + start - tokens).max())
    return Line(bytes_per_token=GB / slope, fixed_gb=-start / slope, largest_residual=off)


def lines(quotes: Sequence[Quote]) -> dict[str, dict[str, float]]:
    """The straight lines that the quoted figures lie on, where there are at least two."""
    found = {}
    for name in ("offloaded", "checkpointed"):
        figures = {quote.gigabytes: getattr(quote, name) for quote in quotes if getattr(quote, name)}
        if len(figures) > 1:
            fit = line(figures)
            found[name] = asdict(fit) | {"gib_bytes_per_token": fit.gib_bytes_per_token, "figures": len(figures)}
    return found
