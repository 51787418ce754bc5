"""The dynamic programme of nested recomputation: intervals of stages, and the memory that each may use.

An interval is run forward and backward from the input of its first stage, which is there; so is the gradient at its end,
unless it ends with the last stage: then the loss is in it. After Beaumont, Eyraud-Dubois, Herrmann, Joly, Shilova 2019, "Optimal
checkpointing for heterogeneous chains", with the options of each stage in the place of "save everything".
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tapeline.planner.nested_schedule import BACKWARD, CHECKPOINT, FORWARD, LOSS, SAVE, Operation
from tapeline.planner.placements import Floats
from tapeline.planner.saving import Amounts, Line

_DIRECT, _SPLIT = "direct", "split"
Places = NDArray[np.intp]


class Interval(NamedTuple):
    """Stages to run, and in what."""

    first: int
    last: int
    memory: float
    """In the unit of the table."""
    is_stored: bool = False
    """Whether the input of the first stage is kept already."""


class Table(Protocol):
    """What is known of intervals."""

    def up(self, num_bytes: Floats) -> Amounts:
        """Bytes in the unit of memory, rounded up."""

    def look(self, first: Places, last: Places, memory: Amounts) -> Floats:
        """Seconds of running intervals again; infinite if they do not fit. One that ends before it begins is empty."""


class Recursion:
    """The ways to run an interval, each with its seconds.

    Memory is what the interval may use beyond what is stored outside of it. Gradients of weights that are there when its
    backward begins count as outside, so that intervals of equal stages are equal. Seconds are those of running stages again:
    the first forward of each belongs to the intervals that end with the last stage, and is not counted.
    """

    def __init__(self, line: Line, table: Table) -> None:
        self.line, self.table = line, table
        self.last = len(line.savings) - 1
        self.again = np.array([saving.again_seconds for saving in line.savings])

    def seconds(self, first: int, last: int, memory: Amounts) -> Floats:
        """The fewest seconds for each memory."""
        ways = (self.save(first, last, memory), self.direct(first, last, memory), self.split(first, last, memory))
        best: Floats = np.min([way.min(axis=0, initial=np.inf) for way in ways], axis=0)
        return best

    def save(self, first: int, last: int, memory: Amounts) -> Floats:
        """The first stage saves what one of its options keeps, and the rest follows; (options, memory)."""
        saving, up = self.line.savings[first], self.table.up
        need, kept = up(self.save_needs(first, last))[:, None], up(saving.kept)[:, None]
        rest = self.table.look(np.array(first + 1), np.array(last), np.where(memory >= need, memory - kept, -1))
        again = saving.again_seconds if last < self.last else 0.0
        total: Floats = rest + (saving.seconds + again)[:, None]
        return total

    def direct(self, first: int, last: int, memory: Amounts) -> Floats:
        """A single stage runs backward from its input alone; (options, memory)."""
        if first < last or last == self.last:
            return np.empty((0, len(memory)))
        saving = self.line.savings[first]
        seconds = np.where(saving.is_input_only, saving.seconds, np.inf)
        return np.where(memory >= self.table.up(self.direct_needs(first))[:, None], seconds[:, None], np.inf)

    def split(self, first: int, last: int, memory: Amounts) -> Floats:
        """The input of the first stage is kept until the stages from the split on are done; (splits, memory)."""
        if first == last:
            return np.empty((0, len(memory)))
        up, starts = self.table.up, np.arange(first + 1, last + 1)
        need, kept = up(self.split_needs(first, last))[:, None], up(np.array(self.line.savings[first].input_bytes))
        gradients = up(self.line.gradients[starts] - self.line.gradients[last + 1])[:, None]
        after = self.table.look(starts[:, None], np.array(last), np.where(memory >= need, memory - kept, -1))
        before = self.table.look(np.array(first), starts[:, None] - 1, memory - gradients)
        total: Floats = after + before
        if last < self.last:
            total += np.cumsum(self.again[first:last])[:, None]
        return total

    def save_needs(self, first: int, last: int) -> Floats:
        """Bytes of the forward and the backward of the first stage, for each of its options."""
        saving = self.line.savings[first]
        gradients = self.line.gradients[first] - self.line.gradients[last + 1]
        waiting = self._waiting(first, last)
        need: Floats = np.maximum(saving.forward + waiting[0], saving.backward + gradients)
        return np.maximum(need, saving.kept)

    def direct_needs(self, stage: int) -> Floats:
        """Bytes of the backward of a stage, for each of its options."""
        saving = self.line.savings[stage]
        return saving.backward + saving.gradient_bytes

    def split_needs(self, first: int, last: int) -> Floats:
        """Bytes of running forward from the first stage to each split."""
        stages = self.line.savings[first:last]
        forward = [stages[0].held_forward, *(stages[0].input_bytes + stage.plain_forward for stage in stages[1:])]
        need: Floats = np.maximum.accumulate(forward + self._waiting(first, last)[: last - first])
        return need

    def operations(self, memory: float) -> tuple[Operation, ...]:
        """The schedule of all stages that takes the seconds of the table."""
        line, done = self.line, list[Operation]()
        todo: list[Operation | Interval] = [Interval(0, self.last, memory)]
        while todo:
            item = todo.pop()
            if isinstance(item, Operation):
                done.append(item)
            elif item.first > item.last:
                done += [line.operation(LOSS, item.first)] if item.last == self.last else []
            else:
                todo += reversed(self._steps(item))
        return (*line.frozen_forwards(), *done)

    def _steps(self, interval: Interval) -> list[Operation | Interval]:
        """The best way to run an interval."""
        line, (first, last, memory, is_stored), at = self.line, interval, np.array([interval.memory])
        ways = {
            SAVE: self.save(first, last, at),
            _DIRECT: self.direct(first, last, at),
            _SPLIT: self.split(first, last, at),
        }
        labels = [(way, row) for way, seconds in ways.items() for row in range(len(seconds))]
        way, row = labels[int(np.argmin(np.concatenate(list(ways.values()))))]
        up = self.table.up
        if way == _DIRECT:
            return [line.operation(BACKWARD, first, row)]
        if way == SAVE:
            rest = Interval(first + 1, last, memory - float(up(line.savings[first].kept[row])))
            return [line.operation(SAVE, first, row), rest, line.operation(BACKWARD, first, row)]
        start = first + 1 + row
        kept = float(up(np.array(line.savings[first].input_bytes)))
        gradients = float(up(line.gradients[start] - line.gradients[last + 1]))
        return [
            *([] if is_stored else [line.operation(CHECKPOINT, first)]),
            *(line.operation(FORWARD, stage) for stage in range(first, start)),
            Interval(start, last, memory - kept),
            Interval(first, start - 1, memory - gradients, is_stored=True),
        ]

    def _waiting(self, first: int, last: int) -> Floats:
        """Bytes beside each forward of an interval: the gradient at its end; infinite where the stage must not be run again."""
        if last == self.last:
            return np.zeros(last + 1 - first)
        again = self.again[first : last + 1]
        return np.where(np.isfinite(again), self.line.savings[last].output_bytes, np.inf)


class Slots:
    """Intervals for every number of slots of memory up to `count`.

    Args:
        line: the stages.
        slot: bytes of a slot.
        count: how many there are.
    """

    def __init__(self, line: Line, slot: float, count: int) -> None:
        self.slot, self.count, stages = slot, count, len(line.savings)
        self.recursion = Recursion(line, self)
        # the column after the last is for memory below zero
        self.width, self.starts = count + 2, stages + 1
        self.table = np.full((stages, stages + 1, count + 2), np.inf)
        self.flat = self.table.reshape(-1)
        memory = np.arange(count + 1)
        for first, last, known in intervals(line):
            if first > last:
                need = line.loss_bytes if last == stages - 1 else 0.0
                self.table[last, first, :-1] = np.where(memory >= self.up(np.array(need)), 0.0, np.inf)
            elif known is not None:
                self.table[last, first] = self.table[known[1], known[0]]
            else:
                self.table[last, first, :-1] = self.recursion.seconds(first, last, memory)

    @property
    def seconds(self) -> float:
        """Of running stages again, with all memory."""
        return float(self.table[-1, 0, self.count])

    def up(self, num_bytes: Floats) -> Amounts:
        slots: Amounts = np.ceil(np.minimum(num_bytes / self.slot, self.count + 1)).astype(np.intp)
        return slots

    def look(self, first: Places, last: Places, memory: Amounts) -> Floats:
        places = np.where(memory < 0, self.width - 1, memory).astype(np.intp, copy=False)
        places += (last * self.starts + first) * self.width
        return self.flat.take(places)


class Least:
    """The fewest bytes in which each interval fits, to the byte, and seconds that are enough in them."""

    def __init__(self, line: Line) -> None:
        stages = len(line.savings)
        self.recursion = Recursion(line, self)
        self.least = np.full((stages, stages + 1), np.inf)
        self.most = np.full((stages, stages + 1), np.inf)
        for first, last, known in intervals(line):
            if first > last:
                self.least[last, first] = line.loss_bytes if last == stages - 1 else 0.0
                self.most[last, first] = 0.0
            elif known is not None:
                self.least[last, first] = self.least[known[1], known[0]]
                self.most[last, first] = self.most[known[1], known[0]]
            else:
                self.least[last, first] = self._bytes(line, first, last)
                memory = self.least[last, first, None]
                self.most[last, first] = self.recursion.seconds(first, last, memory)[0]

    @property
    def bytes(self) -> float:
        """Of all stages."""
        return float(self.least[-1, 0])

    def up(self, num_bytes: Floats) -> Amounts:
        return num_bytes

    def look(self, first: Places, last: Places, memory: Amounts) -> Floats:
        return np.where(memory >= self.least[last, first], self.most[last, first], np.inf)

    def _bytes(self, line: Line, first: int, last: int) -> float:
        recursion, saving = self.recursion, line.savings[first]
        saved = np.maximum(recursion.save_needs(first, last), saving.kept + self.least[last, first + 1])
        ways = [float(saved.min())]
        if first < last:
            starts = np.arange(first + 1, last + 1)
            after = saving.input_bytes + self.least[last, starts]
            before = self.least[starts - 1, first] + line.gradients[starts] - line.gradients[last + 1]
            ways.append(float(np.maximum(recursion.split_needs(first, last), np.maximum(after, before)).min()))
        elif last < recursion.last:
            ways += recursion.direct_needs(first)[saving.is_input_only].tolist()
        return min(ways)


def intervals(line: Line) -> list[tuple[int, int, tuple[int, int] | None]]:
    """All intervals, first and last stage, those they are made of before them; third: an equal one that came before."""
    number = {id(saving): place for place, saving in reversed(list(enumerate(line.savings)))}
    kinds = tuple(number[id(saving)] for saving in line.savings)
    known: dict[tuple[tuple[int, ...], bool], tuple[int, int]] = {}
    found: list[tuple[int, int, tuple[int, int] | None]] = []
    for last in range(len(kinds)):
        found.append((last + 1, last, None))
        for first in reversed(range(last + 1)):
            key = kinds[first : last + 1], last == len(kinds) - 1
            found.append((first, last, known.get(key)))
            known.setdefault(key, (first, last))
    return found
