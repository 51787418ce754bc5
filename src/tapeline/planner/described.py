"""Where a plan puts what each block saves, in words."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from tapeline.planner.forecast import BlockPlacement
from tapeline.planner.hybrid import Hybrid
from tapeline.planner.route import Route
from tapeline.planner.stage import Stage

_NAMES = 5
_SHOWN = 20


def described(route: Route, plan: Hybrid) -> list[BlockPlacement]:
    """Blocks that do the same, together, those that move most first."""
    rows = []
    for number, index in enumerate(plan.chosen):
        options = route.choices[number]
        stage, kept, moved = options.stage, options.kept[index], options.moved[index]
        named = [_names(stage, [v for v in sorted(values) if stage.sizes[v]]) for values in (kept, moved)]
        gone = len(set(stage.needed) - kept - moved)
        rows.append((named[0], named[1], gone, int(options.kept_bytes[index]), int(options.moved_bytes[index]), number))
    found = []
    for key, members in groupby(sorted(rows), key=lambda row: row[:5]):
        numbers = [row[5] for row in members]
        found.append((numbers[0], key, _ranges(numbers)))
    return [
        BlockPlacement(
            blocks=text, kept=key[0], moved=key[1], num_recomputed=key[2], kept_bytes=key[3], moved_bytes=key[4]
        )
        for _, key, text in sorted(found)
    ]


def _names(stage: Stage, values: Sequence[int]) -> tuple[str, ...]:
    """The largest by name, the rest counted."""
    large = sorted(values, key=lambda value: -stage.sizes[value])
    shown = [stage.names[value] for value in large[:_NAMES] if stage.sizes[value] * _SHOWN > stage.sizes[large[0]]]
    rest = len(values) - len(shown)
    return (*shown, *([f"{rest} more"] if rest else []))


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
