"""A block as the planner of placements sees it: values with their bytes, operations with their time in both directions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True, kw_only=True, slots=True)
class StageOp:
    """One operation, in forward and in backward."""

    name: str
    seconds: float
    """Time of the forward, and of running it again."""
    backward_seconds: float
    """Time of its backward."""
    reads: tuple[int, ...]
    """Values that the forward reads."""
    makes: tuple[int, ...]
    """Values that the forward makes."""
    needs: tuple[int, ...]
    """Values that the backward reads."""
    incoming_bytes: int
    """Gradients there when the backward begins."""
    backward_bytes: int
    """Gradients and temporaries alive while the backward runs, those included."""
    flops: int = 0
    """Floating-point operations of the forward."""
    temporary_bytes: int = 0
    """Bytes alive only while the forward runs, as Python variables hold them; a replay has none."""
    can_replay: bool = True
    """Whether it may be run again."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One block: value 0 is its input, which the block before it has made; the last value is its output."""

    names: tuple[str, ...]
    """What the values are called."""
    sizes: tuple[int, ...]
    """Bytes of each value."""
    ops: tuple[StageOp, ...]
    """In the order of the forward."""
    halves: tuple[int, ...] = ()
    """Operations at which another part of the block begins; its parts are planned separately."""
    units: tuple[frozenset[int], ...] = ()
    """Values that share one placement, other than the input; none given: each value that backward needs is one."""
    held: frozenset[int] = frozenset()
    """Values that stay on the device whatever is chosen."""
    gradient_bytes: int = 0
    """Gradients of weights that its backward leaves."""
    is_frozen: bool = False
    """Nothing in it or before it is trained: it has no backward and saves nothing."""

    def __post_init__(self) -> None:
        count = len(self.sizes)
        if len(self.names) != count or not self.ops:
            raise ValueError("a stage has as many names as sizes, and at least one operation")
        if any(not 0 <= v < count for op in self.ops for v in (*op.reads, *op.makes, *op.needs)):
            raise ValueError("an operation refers to a value that the stage does not have")

    @cached_property
    def num_parts(self) -> int:
        """Parts that are planned separately."""
        return len(self.halves) + 1

    @cached_property
    def part_of(self) -> tuple[int, ...]:
        """The part of each operation."""
        return tuple(sum(op >= start for start in self.halves) for op in range(len(self.ops)))

    @cached_property
    def producer(self) -> dict[int, int]:
        """The operation that makes each value."""
        return {value: number for number, op in enumerate(self.ops) for value in op.makes}

    @cached_property
    def last_use(self) -> tuple[int, ...]:
        """The last operation of the forward that reads or makes each value; -1 if none does."""
        last = [-1] * len(self.sizes)
        for number, op in enumerate(self.ops):
            for value in (*op.reads, *op.makes):
                last[value] = number
        return tuple(last)

    @cached_property
    def needed(self) -> tuple[int, ...]:
        """The values that backward reads, in order."""
        if self.is_frozen:
            return ()
        return tuple(sorted({value for op in self.ops for value in op.needs}))

    @cached_property
    def needed_from(self) -> tuple[frozenset[int], ...]:
        """The values that backward still reads, from its first operation, which is the last of the forward, to its last."""
        found: list[frozenset[int]] = [frozenset()]
        for op in self.ops:
            found.append(found[-1] | frozenset(op.needs))
        return tuple(reversed(found[1:]))

    @cached_property
    def choices(self) -> tuple[frozenset[int], ...]:
        """Groups of values that are placed together, without the input."""
        if self.is_frozen:
            return ()
        return self.units or tuple(frozenset((value,)) for value in self.needed if value and value not in self.held)

    def forward_seconds(self, part: int) -> float:
        """Time of the forward of a part."""
        return sum(op.seconds for op, place in zip(self.ops, self.part_of, strict=True) if place == part)

    def backward_seconds(self, part: int) -> float:
        """Time of the backward of a part, nothing recomputed."""
        return sum(op.backward_seconds for op, place in zip(self.ops, self.part_of, strict=True) if place == part)
