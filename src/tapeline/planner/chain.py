"""Which option each block takes, so that the fewest operations are recomputed under a byte budget.

A step is a sequence of points in time. Each option of a block adds bytes to some of them; each block takes exactly one
option. Choosing the cheapest set under the budget is a small 0/1 linear programme, solved exactly by HiGHS. Bytes that are moved cost nothing as
long as the link is quicker than the forward, and than the backward; beyond that, compute waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import highspy

_LATE_TILT = 1e-7
_MOVE_TILT = 1e-5
_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One way to run one block, in all its calls."""

    block: int
    """Index of the block it decides for."""
    kind: str
    """``keep`` or ``recompute``."""
    flops: int
    """Operations recomputed in a step."""
    added_bytes: dict[int, int]
    """Bytes alive at each point (by index) beyond the points' base."""
    moved_bytes: int = 0
    """Bytes that leave the device in a step, and come back."""
    num_moved: int = 0
    """How many tensors they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """What moves bytes to the tier below, in units of operations: what the device computes meanwhile."""

    room_bytes: int
    """What may be there."""
    out_flops: float
    """Operations that the device does while one byte leaves."""
    back_flops: float
    """The same while one comes back."""
    copy_flops: float
    """The same while one copy is started."""
    forward_flops: float
    """What the forward does anyway: bytes leave for nothing as long as it takes longer."""
    backward_flops: float
    """The same of the backward."""
    overflow: Link | None = None
    """Where the rest goes when there is no room."""

    def wait_flops(self, moved_bytes: int, num_moved: int) -> float:
        """Operations that the device could do while it waits in a step that moves so much."""
        spilled = 0 if self.overflow is None else max(0, moved_bytes - self.room_bytes)
        copies, here = self.copy_flops * num_moved, moved_bytes - spilled
        waits = max(0.0, self.out_flops * here + copies - self.forward_flops)
        waits += max(0.0, self.back_flops * here + copies - self.backward_flops)
        return waits + (0.0 if self.overflow is None else self.overflow.wait_flops(spilled, 0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
    """A step to decide for."""

    base_bytes: tuple[int, ...]
    """Bytes alive at each point whatever is chosen."""
    num_blocks: int
    """Number of blocks; each has at least one option."""
    options: tuple[Option, ...]
    """All options."""
    link: Link | None = None
    """Where moved bytes go; ``None``: no option moves any."""

    def without_moves(self) -> Chain:
        """The same with everything on the device."""
        if self.link is None:
            return self
        return replace(self, link=None, options=tuple(option for option in self.options if not option.moved_bytes))

    def peak_bytes(self, chosen: Sequence[Option]) -> int:
        """Largest number of bytes alive at any point under a choice."""
        live = list(self.base_bytes)
        for option in chosen:
            for point, added in option.added_bytes.items():
                live[point] += added
        return max(live, default=0)


def solve(chain: Chain, budget_bytes: int) -> list[Option] | None:
    """Choose the options with the fewest recomputed operations whose peak is within the budget.

    Among equals, later blocks are kept rather than earlier ones: their memory is free again sooner.

    Returns:
        One option per block, in their order; ``None`` if nothing fits.
    """
    model = _Model(chain)
    total = sum(option.flops for option in chain.options) or 1
    for column, option in enumerate(chain.options):
        tilt = _LATE_TILT * (chain.num_blocks - option.block) if option.kind == "keep" else 0.0
        if option.moved_bytes:  # not without need, and the first to leave are needed last
            tilt += _MOVE_TILT + _LATE_TILT * option.block
        model.highs.changeColCost(column, option.flops / total * chain.num_blocks + tilt)
    if chain.link is not None:
        model.add_link(chain.link, chain.num_blocks / total)
    model.limit_points(budget_bytes)
    return model.run()


def smallest(chain: Chain, tolerance: float = 1e-3) -> list[Option]:
    """Choose the options with the smallest peak; among equals, those with fewer operations.

    Found by bisection over `solve`: minimising the peak directly has a weak relaxation and takes minutes at 80 blocks.

    Args:
        chain: the step to decide for.
        tolerance: how far above the smallest peak the answer may be, as a share of it.
    """
    floor = min(chain.base_bytes, default=0)
    best = solve(chain, max(chain.base_bytes, default=0) + sum(_largest(option) for option in chain.options))
    assert best is not None, "every block has an option"
    peak = chain.peak_bytes(best)
    while peak - floor > max(1, tolerance * peak):
        middle = (peak + floor) // 2
        found = solve(chain, middle)
        if found is None or chain.peak_bytes(found) > middle:
            floor = middle
        else:
            best, peak = found, chain.peak_bytes(found)
    return best


def _largest(option: Option) -> int:
    return max(0, *option.added_bytes.values()) if option.added_bytes else 0


class _Model:
    """The linear programme: a 0/1 column per option, a row per block and per point; bytes are in units of the peak."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.highs = highspy.Highs()
        self.highs.setOptionValue("output_flag", False)
        self.highs.setOptionValue("mip_rel_gap", 0.0)
        self.highs.setOptionValue("time_limit", _SECONDS)
        self.highs.setOptionValue("random_seed", 0)
        self.highs.setOptionValue("threads", 1)
        self.scale = 1.0 / max(1, *(abs(base) for base in chain.base_bytes), 1)
        for _ in chain.options:
            self.highs.addVar(0.0, 1.0)
        for column in range(len(chain.options)):
            self.highs.changeColIntegrality(column, highspy.HighsVarType.kInteger)
        covers: list[list[int]] = [[] for _ in range(chain.num_blocks)]
        for column, option in enumerate(chain.options):
            covers[option.block].append(column)
        for columns in covers:
            self.highs.addRow(1.0, 1.0, len(columns), columns, [1.0] * len(columns))

    def add_link(self, link: Link, cost: float) -> None:
        """Compute waits for what the link cannot move beside forward and backward; there is room for so much below."""
        moving = [(column, option) for column, option in enumerate(self.chain.options) if option.moved_bytes]
        unit = max(1, link.room_bytes)
        columns, room = [column for column, _ in moving], [option.moved_bytes / unit for _, option in moving]
        spilled = self._continuous(0.0 if link.overflow is None else link.overflow.room_bytes / unit)
        self._at_most(1.0, [*columns, spilled], [*room, -1.0])
        for there, back in ((False, False), (False, True), (True, False), (True, True)):
            one = link.overflow if there else link
            if one is None:
                continue
            per_byte, hidden = (one.back_flops, one.backward_flops) if back else (one.out_flops, one.forward_flops)
            wait = self._continuous(highspy.kHighsInf)
            self.highs.changeColCost(wait, 1.0)
            if there:
                self._at_most(cost * hidden, [spilled, wait], [cost * per_byte * unit, -1.0])
            else:
                times = [cost * (per_byte * o.moved_bytes + link.copy_flops * o.num_moved) for _, o in moving]
                self._at_most(cost * hidden, [*columns, spilled, wait], [*times, -cost * per_byte * unit, -1.0])

    def _continuous(self, upper: float) -> int:
        self.highs.addVar(0.0, upper)
        return int(self.highs.getNumCol()) - 1

    def _at_most(self, bound: float, columns: list[int], values: list[float]) -> None:
        self.highs.addRow(-highspy.kHighsInf, bound, len(columns), columns, values)

    def limit_points(self, budget_bytes: int) -> None:
        for base, columns, added in self._points():
            self.highs.addRow(-highspy.kHighsInf, (budget_bytes - base) * self.scale, len(columns), columns, added)

    def run(self) -> list[Option] | None:
        self.highs.run()
        if self.highs.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            return None
        values = self.highs.getSolution().col_value
        chosen = [option for option, value in zip(self.chain.options, values, strict=False) if value > 0.5]
        return sorted(chosen, key=lambda option: option.block)

    def _points(self) -> list[tuple[int, list[int], list[float]]]:
        rows: list[tuple[int, list[int], list[float]]] = [(base, [], []) for base in self.chain.base_bytes]
        for column, option in enumerate(self.chain.options):
            for point, added in option.added_bytes.items():
                rows[point][1].append(column)
                rows[point][2].append(added * self.scale)
        return rows
