"""The dynamic programme of segments: stage by stage, the memory that is left, and the stage at which the segment began."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import numpy as np

from tapeline.planner.placements import Floats
from tapeline.planner.saving import Amounts, Line

Rebuilds = Literal["each", "once"]


class Pick(NamedTuple):
    """What is chosen for a stage."""

    head: int
    """The first stage of its segment, which keeps its input."""
    row: int
    """Of the numbers of its options."""


class Table(Protocol):
    """What is known of the stages from `stage` on, in a segment that began at `head`, or begins if that is `stage` itself."""

    def up(self, num_bytes: Floats) -> Amounts:
        """Bytes in the unit of memory, rounded up."""

    def look(self, stage: int, head: int, memory: Amounts) -> Floats:
        """Seconds of recomputation; infinite if they do not fit."""


class Recursion:
    """What a stage needs of the memory that the stages before have left, and what it costs.

    Args:
        line: the stages.
        rebuilds: when inputs are made again.
        table: what is known of the stages after.
    """

    def __init__(self, line: Line, rebuilds: Rebuilds, table: Table) -> None:
        self.line, self.is_once, self.table = line, rebuilds == "once", table
        savings = line.savings
        again = np.array([saving.again_seconds for saving in savings])
        can_run_again = np.isfinite(again)
        self.again = np.where(can_run_again, again, 0.0)
        self.inputs = np.cumsum([0.0, *(saving.input_bytes for saving in savings)])
        # of another forward, from an input that is on its way, and from one that is kept
        self.plain = np.where(can_run_again, [saving.plain_forward for saving in savings], np.inf)
        self.held = np.where(can_run_again, [saving.held_forward - saving.input_bytes for saving in savings], np.inf)

    def head_needs(self, stage: int) -> Floats:
        """Bytes of each option of a stage that keeps its input."""
        saving = self.line.savings[stage]
        need: Floats = np.maximum(saving.forward, saving.backward + self.line.gradients[stage])
        return np.maximum(need, saving.kept)

    def inner_needs(self, stage: int) -> Floats:
        """Bytes of each option of a stage that does not, for each head before it; (options, heads)."""
        saving, gradients = self.line.savings[stage], self.line.gradients
        backward = (saving.backward + gradients[stage])[:, None] + np.zeros(stage)
        if self.is_once:
            backward = backward + self.inputs[stage] - self.inputs[1 : stage + 1]
        else:
            peaks = np.maximum(self.held[:stage], _largest_after(self.plain[1:stage]))
            again = saving.inner[:, None] + peaks + saving.output_bytes + gradients[stage + 1]
            backward = np.maximum(backward, np.where(saving.keeps_input[:, None], again, 0.0))
        need: Floats = np.maximum(backward, np.maximum(saving.inner_forward, saving.inner)[:, None])
        return need

    def inner_seconds(self, stage: int) -> Floats:
        """Recomputation of the same; (options, heads)."""
        saving = self.line.savings[stage]
        if self.is_once:
            again = np.full((len(saving.seconds), stage), self.again[stage - 1])
        else:
            again = np.outer(saving.keeps_input, np.cumsum(self.again[:stage][::-1])[::-1])
        total: Floats = saving.seconds[:, None] + again
        return total

    def end_needs(self, stage: int) -> Floats:
        """Bytes of making all inputs of a segment again, for each head of one that ends before `stage`."""
        if not self.is_once or stage < 2:
            return np.zeros(stage)
        made = self.inputs[1:stage] + self.held[: stage - 1]
        largest = np.maximum.accumulate(made[::-1])[::-1] - self.inputs[1:stage]
        waiting = self.line.savings[stage - 1].output_bytes + self.line.gradients[stage]
        return np.array([*(largest + waiting), 0.0])

    def head_ways(self, stage: int, memory: Amounts) -> Floats:
        """Seconds from a stage on that keeps its input; (options, memory)."""
        saving, up, look = self.line.savings[stage], self.table.up, self.table.look
        left = np.where(memory >= up(self.head_needs(stage))[:, None], memory - up(saving.kept)[:, None], -1)
        after = look(stage + 1, stage, left)
        if not saving.keeps_input.all():  # an input that is not kept begins no segment
            after = np.where(saving.keeps_input[:, None], after, look(stage + 1, stage + 1, left))
        total: Floats = after + saving.seconds[:, None]
        return total

    def inner_ways(self, stage: int, head: int, memory: float) -> Floats:
        """Seconds from a stage on that does not; last: the segment ends before it."""
        up, look = self.table.up, self.table.look
        need, kept = up(self.inner_needs(stage)[:, head]), up(self.line.savings[stage].inner)
        inside = look(stage + 1, head, np.where(memory >= need, memory - kept, -1)) + self.inner_seconds(stage)[:, head]
        ends = memory >= up(self.end_needs(stage)[head : head + 1])
        return np.array([*inside, *look(stage, stage, np.where(ends, memory, -1))])

    def picks(self, memory: float) -> list[Pick]:
        """What the seconds of the table stand for."""
        picked: list[Pick] = []
        head = 0
        for stage, saving in enumerate(self.line.savings):
            if head < stage:
                row = int(np.argmin(self.inner_ways(stage, head, memory)))
                if row < len(saving.inner):
                    picked.append(Pick(head, row))
                    memory -= float(self.table.up(saving.inner[row]))
                    continue
            row = int(np.argmin(self.head_ways(stage, np.array([memory]))[:, 0]))
            head = stage if saving.keeps_input[row] else stage + 1
            picked.append(Pick(stage, row))
            memory -= float(self.table.up(saving.kept[row]))
        return picked


class Slots:
    """Seconds for every number of slots of memory up to `count`.

    Args:
        line: the stages.
        rebuilds: when inputs are made again.
        slot: bytes of a slot.
        count: how many there are.
    """

    def __init__(self, line: Line, rebuilds: Rebuilds, slot: float, count: int) -> None:
        self.slot, self.count = slot, count
        self.recursion = Recursion(line, rebuilds, self)
        stages, memory = len(line.savings), np.arange(count + 1)
        # the column after the last is for memory below zero
        self.table = np.full((stages + 1, stages + 1, count + 2), np.inf)
        loss = np.append(self.recursion.end_needs(stages), 0.0)
        self.table[-1, :, :-1][memory >= self.up(np.maximum(loss, line.loss_bytes))[:, None]] = 0.0
        for stage in reversed(range(stages)):
            self.table[stage, stage, :-1] = self.recursion.head_ways(stage, memory).min(axis=0)
            self._fill(stage, memory)

    @property
    def seconds(self) -> float:
        """With all memory."""
        return float(self.table[0, 0, self.count])

    def up(self, num_bytes: Floats) -> Amounts:
        slots: Amounts = np.ceil(np.minimum(num_bytes / self.slot, self.count + 1)).astype(np.intp)
        return slots

    def look(self, stage: int, head: int, memory: Amounts) -> Floats:
        places = np.where(memory < 0, self.count + 1, memory).astype(np.intp, copy=False)
        found: Floats = self.table[stage, head].take(places)
        return found

    def _fill(self, stage: int, memory: Amounts) -> None:
        """The seconds from a stage within a segment, for all heads before it."""
        recursion, best = self.recursion, self.table[stage, :stage, :-1]
        ends = memory >= self.up(recursion.end_needs(stage))[:, None]
        best[...] = np.where(ends, self.table[stage, stage, :-1], np.inf)
        needs, kept = self.up(recursion.inner_needs(stage)), self.up(recursion.line.savings[stage].inner)
        for need, seconds, gone in zip(needs, recursion.inner_seconds(stage), kept, strict=True):
            start = max(int(need.min(initial=self.count + 1)), int(gone))
            if start > self.count:
                continue
            way = self.table[stage + 1, :stage, start - gone : self.count + 1 - gone] + seconds[:, None]
            way[memory[start:] < need[:, None]] = np.inf
            np.minimum(best[:, start:], way, out=best[:, start:])


class Least:
    """The fewest bytes, and seconds that are enough in them."""

    def __init__(self, line: Line, rebuilds: Rebuilds) -> None:
        self.recursion = recursion = Recursion(line, rebuilds, self)
        stages = len(line.savings)
        self.least = np.zeros((stages + 1, stages + 1))
        self.most = np.zeros((stages + 1, stages + 1))
        self.least[-1] = np.maximum(np.append(recursion.end_needs(stages), 0.0), line.loss_bytes)
        for stage in reversed(range(stages)):
            saving, after = line.savings[stage], self.least[stage + 1]
            rest = np.where(saving.keeps_input, after[stage], after[stage + 1])
            own = self.least[stage, stage] = np.maximum(recursion.head_needs(stage), saving.kept + rest).min()
            self.most[stage, stage] = recursion.head_ways(stage, own[None]).min()
            inside = np.maximum(recursion.inner_needs(stage), saving.inner[:, None] + after[:stage]).min(axis=0)
            self.least[stage, :stage] = np.minimum(inside, np.maximum(recursion.end_needs(stage), own))
            for head in range(stage):
                self.most[stage, head] = recursion.inner_ways(stage, head, float(self.least[stage, head])).min()

    @property
    def bytes(self) -> float:
        """Of all stages."""
        return float(self.least[0, 0])

    def up(self, num_bytes: Floats) -> Amounts:
        return num_bytes

    def look(self, stage: int, head: int, memory: Amounts) -> Floats:
        return np.where(memory >= self.least[stage, head], self.most[stage, head], np.inf)


def _largest_after(values: Floats) -> Floats:
    """For each place, the largest value from there on; one more for the end, where there is none."""
    largest = np.maximum.accumulate(values[::-1])[::-1]
    return np.array([*largest, 0.0])
