"""Running one row of the matrix: untouched, planned, and three steps of a session."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import tapeline
from tests.exact.rows import Row, build, forward_context, step


@dataclass(frozen=True)
class Outcome:
    """What a row gave."""

    different: tuple[str, ...]
    """Gradients, losses and random states that are not those of the untouched model in some step."""
    kept_instead: tuple[str, ...]
    """What was found to replay differently."""
    fall_back: str
    """Why blocks are not on the tape; empty if all are."""
    untouched_peak: int
    predicted: int
    predicted_first: int
    peaks: tuple[int, ...]
    """Of the three steps."""


def run_row(row: Row) -> Outcome:
    """Compare three managed steps with an untouched one.

    Three, because a block that is not like the one before it is recorded in the second.
    """
    model, batch = build(row)
    start = {name: buffer.clone() for name, buffer in model.named_buffers()}
    expected = step(model, batch, row)
    assert len(expected) > 2, "something is trained"
    with forward_context(row):
        plan = tapeline.plan(model, batch, mode=row.mode, accumulation=row.accumulation)
    different: dict[str, None] = {}
    peaks = []
    with tapeline.apply(model, plan, measure=False) as session:
        for _ in range(3):
            for name, buffer in model.named_buffers():
                buffer.copy_(start[name])
            got = step(model, batch, row, session.measure())
            different |= dict.fromkeys(got.keys() ^ expected.keys())
            different |= {n: None for n in got.keys() & expected.keys() if not torch.equal(got[n], expected[n])}
            peaks.append(session.last_peak_bytes or 0)
        report = session.report()
    return Outcome(
        different=tuple(different),
        kept_instead=report.kept_instead,
        fall_back=" ".join(note for note in plan.notes if "not replayed" in note),
        untouched_peak=plan.untouched_peak_bytes,
        predicted=plan.peak_bytes,
        predicted_first=plan.first_step_peak_bytes,
        peaks=tuple(peaks),
    )
