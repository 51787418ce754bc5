"""Every way to place the values of a block that is worth choosing from.

A value that backward needs is kept on the device, moved to a tier and fetched again, or dropped and recomputed. With the
handful of values that matter in a block, all combinations are listed and the dominated ones left out.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tapeline.planner.rebuild import Rebuild, rebuild
from tapeline.planner.schedule import Schedule, schedule
from tapeline.planner.stage import Stage

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Placements of one stage, one row each."""

    stage: Stage = field(repr=False)
    kept: tuple[frozenset[int], ...]
    """Values kept on the device."""
    moved: tuple[frozenset[int], ...]
    """Values moved to a tier."""
    rebuilds: tuple[Rebuild, ...] = field(repr=False)
    kept_bytes: Floats
    moved_bytes: Floats
    seconds: Floats
    """Recomputation, (options, parts)."""
    moved_input: Floats
    """Bytes of the input, if it is moved."""
    produced: Floats
    """Bytes to be moved that each part of the forward makes, (options, parts), without the input."""
    released: Floats
    """Bytes to be moved that the forward no longer needs after each part, (options, parts)."""
    produced_last: Floats
    """Those of them that the last operation of each part makes, (options, parts)."""
    fetched: Floats
    """Moved bytes that each part of the backward is the first to need, (options, parts)."""
    fetched_first: Floats
    """Those of them that it needs at once, (options, parts)."""
    counts: dict[str, Floats]
    """For `moved_input` to `fetched_first`, the number of values beside their bytes."""
    forward_peak: Floats
    """Bytes alive in each part of the forward, what is kept included and what is moved only while in use."""
    forward_peak_safe: Floats
    """The same with what is moved never gone before the part ends."""
    backward_peak: Floats
    """Bytes alive in each part of the backward beyond all that the stage keeps, of which some is gone already; what is moved
    counts from when it is needed."""
    backward_peak_safe: Floats
    """The same with all that the part needs there from its beginning."""
    schedules: dict[int, Schedule] = field(default_factory=dict, repr=False, compare=False)
    """Those that were asked for."""

    def __len__(self) -> int:
        return len(self.kept)

    def rows(self, indices: Sequence[int] | NDArray[np.intp]) -> Options:
        """Some of the options."""
        places = np.asarray(indices, dtype=np.intp)
        arrays: dict[str, Any] = {name: getattr(self, name)[places] for name in _ARRAYS}
        return Options(
            stage=self.stage,
            kept=tuple(self.kept[i] for i in places),
            moved=tuple(self.moved[i] for i in places),
            rebuilds=tuple(self.rebuilds[i] for i in places),
            counts={name: table[places] for name, table in self.counts.items()},
            **arrays,
        )

    def schedule(self, index: int) -> Schedule:
        """What an option does in order; worked out once."""
        if index not in self.schedules:
            self.schedules[index] = schedule(self.stage, self.rebuilds[index], self.kept[index], self.moved[index])
        return self.schedules[index]

    def pairs(self) -> Iterator[tuple[frozenset[int], frozenset[int]]]:
        """Values kept and values moved, by option."""
        return zip(self.kept, self.moved, strict=True)

    def find(self, kept: Sequence[int] | frozenset[int], moved: Sequence[int] | frozenset[int] = ()) -> int:
        """The index of a placement.

        Raises:
            KeyError: if it is not among the options.
        """
        wanted = frozenset(kept), frozenset(moved)
        for index, pair in enumerate(self.pairs()):
            if pair == wanted:
                return index
        raise KeyError(f"no option keeps {sorted(wanted[0])} and moves {sorted(wanted[1])}")


_COPIED = ("moved_input", "produced", "produced_last", "released", "fetched", "fetched_first")
_ARRAYS = (
    *("kept_bytes", "moved_bytes", "seconds", *_COPIED),
    *("forward_peak", "forward_peak_safe", "backward_peak", "backward_peak_safe"),
)


Pair = tuple[frozenset[int], frozenset[int]]


def placements(stage: Stage, only: Sequence[Pair] | None = None, *, is_lazy: bool = True) -> Options:
    """Every set of saved values, and every split of it into kept and moved, that no other beats.

    Args:
        stage: the block.
        only: these placements, values kept and values moved, in this order.
        is_lazy: recompute each value when it is first needed; otherwise a block's all at once, as checkpoints do.

    Raises:
        KeyError: if one of them cannot be carried out.
    """
    sizes = np.array(stage.sizes, dtype=float)
    tables: list[dict[str, Floats]] = []
    kept: list[frozenset[int]] = []
    moved: list[frozenset[int]] = []
    rebuilds: list[Rebuild] = []
    for saved, splits in _all_splits(stage) if only is None else _given_splits(only):
        try:
            plan = rebuild(stage, saved, is_lazy=is_lazy)
        except ValueError:
            continue
        keeps = np.zeros((len(splits), len(sizes)))
        for row, split in enumerate(splits):
            keeps[row, sorted(split)] = 1.0
        tables.append(_table(stage, plan, keeps, sizes))
        kept += splits
        moved += [saved - split for split in splits]
        rebuilds += [plan] * len(splits)
    arrays: dict[str, Any] = {name: np.concatenate([table[name] for table in tables]) for name in _ARRAYS}
    counts = {name: np.concatenate([table[f"{name}_count"] for table in tables]) for name in _COPIED}
    every = Options(
        stage=stage, kept=tuple(kept), moved=tuple(moved), rebuilds=tuple(rebuilds), counts=counts, **arrays
    )
    if only is None:
        return every.rows(_best(every))
    places = {pair: index for index, pair in enumerate(every.pairs())}
    return every.rows([places[pair] for pair in only])


def _all_splits(stage: Stage) -> Iterator[tuple[frozenset[int], list[frozenset[int]]]]:
    for groups in _saved_groups(stage):
        some = (part for count in range(len(groups) + 1) for part in combinations(groups, count))
        yield stage.held.union(*groups), [stage.held.union(*part) for part in some]


def _given_splits(only: Sequence[Pair]) -> Iterator[tuple[frozenset[int], list[frozenset[int]]]]:
    found: dict[frozenset[int], list[frozenset[int]]] = {}
    for kept, moved in dict.fromkeys(only):
        found.setdefault(kept | moved, []).append(kept)
    yield from found.items()


def _saved_groups(stage: Stage) -> Iterator[tuple[frozenset[int], ...]]:
    """Sets of groups to save, with the input and without: what is recomputed may need it though backward does not."""
    for count in range(len(stage.choices) + 1):
        for chosen in combinations(stage.choices, count):
            yield chosen
            if not stage.is_frozen:
                yield (frozenset((0,)), *chosen)


def _table(stage: Stage, plan: Rebuild, keeps: Floats, sizes: Floats) -> dict[str, Floats]:
    """The numbers of all splits of one saved set."""
    saved = np.zeros(len(sizes))
    saved[sorted(plan.saved)] = 1.0
    moves = saved - keeps
    table = _copied(stage, plan, moves, sizes)
    table |= {f"{name}_count": column for name, column in _copied(stage, plan, moves, np.ones(len(sizes))).items()}
    table |= {"kept_bytes": keeps @ sizes, "moved_bytes": moves @ sizes}
    table["seconds"] = np.tile(plan.seconds, (len(keeps), 1))
    forward = _forward_bytes(stage)
    table["forward_peak"] = forward.peaks(stage, keeps, moves, is_safe=False)
    table["forward_peak_safe"] = forward.peaks(stage, keeps, moves, is_safe=True)
    backward = _backward_bytes(stage, plan, sizes)
    table["backward_peak"] = backward.peaks(stage, keeps, moves, is_safe=False)
    table["backward_peak_safe"] = backward.peaks(stage, keeps, moves, is_safe=True)
    return table


@dataclass(frozen=True, slots=True)
class _Instants:
    """Bytes at instants of a stage, by what the placement of each value adds."""

    fixed: Floats
    """(instants,): whatever is chosen."""
    if_kept: Floats
    """(instants, values): more, if the value is kept."""
    if_moved: Floats
    """(instants, values): more, if it is moved and no copy has ended before its part does."""
    parts: tuple[int, ...]
    """The part of each instant."""

    def peaks(self, stage: Stage, keeps: Floats, moves: Floats, *, is_safe: bool) -> Floats:
        """The most of each part, (splits, parts); 0 for a part without instants."""
        some = np.flatnonzero(keeps.any(axis=0) | moves.any(axis=0))
        table = self.fixed + keeps[:, some] @ self.if_kept[:, some].T
        if is_safe:
            table = table + moves[:, some] @ self.if_moved[:, some].T
        found = np.zeros((len(keeps), stage.num_parts))
        for part in range(stage.num_parts):
            columns = [number for number, place in enumerate(self.parts) if place == part]
            if columns:
                found[:, part] = table[:, columns].max(axis=1)
        return found


@functools.lru_cache(maxsize=64)
def _forward_bytes(stage: Stage) -> _Instants:
    """Each operation of the forward: what it reads, makes and leaves for later ones, and what is kept."""
    sizes = np.array(stage.sizes, dtype=float)
    producer = np.array([stage.producer.get(value, -1) for value in range(len(sizes))])
    last = np.array(stage.last_use)
    part_of_last = np.array([stage.part_of[max(number, 0)] for number in stage.last_use])
    numbers = np.arange(len(stage.ops))[:, None]
    made = producer[None] <= numbers
    used = made & (last[None] >= numbers)
    released = made & ~used & (part_of_last[None] == np.array(stage.part_of)[:, None])
    temporary = np.array([op.temporary_bytes for op in stage.ops], dtype=float)
    return _Instants(used @ sizes + temporary, (made & ~used) * sizes, released * sizes, stage.part_of)


def _backward_bytes(stage: Stage, plan: Rebuild, sizes: Floats) -> _Instants:
    """Each moment of the backward, beyond all that is kept: what is kept is counted apart, until it goes."""
    alive = np.zeros((len(plan.moments), len(sizes)), dtype=bool)
    for number, moment in enumerate(plan.moments):
        alive[number, sorted(moment.alive)] = True
    last = np.array([plan.last_need.get(value, -1) for value in range(len(sizes))])
    gone = last[None] < np.arange(len(plan.moments))[:, None]
    parts = tuple(stage.part_of[moment.op] for moment in plan.moments)
    saved = np.array([value in plan.saved for value in range(len(sizes))])
    soon = np.zeros_like(alive)
    for part in set(parts):
        rows = [number for number, place in enumerate(parts) if place == part]
        soon[rows] = alive[rows].any(axis=0) & saved & ~alive[rows]
    extra = np.array([moment.extra_bytes for moment in plan.moments], dtype=float)
    return _Instants(alive @ sizes + extra, -((alive | gone) * sizes), soon * sizes, parts)


def _copied(stage: Stage, plan: Rebuild, moves: Floats, sizes: Floats) -> dict[str, Floats]:
    """What is moved, by the part that makes it, lets go of it, and needs it again."""
    table = {name: np.zeros((len(moves), stage.num_parts)) for name in _COPIED[1:]}
    table["moved_input"] = moves[:, 0] * sizes[0]
    for value in plan.saved:
        column = moves[:, value] * sizes[value]
        if value in stage.producer:
            producer = stage.producer[value]
            table["produced"][:, stage.part_of[producer]] += column
            if producer + 1 in (*stage.halves, len(stage.ops)):
                table["produced_last"][:, stage.part_of[producer]] += column
        table["released"][:, stage.part_of[max(stage.last_use[value], 0)]] += column
        if value in plan.first_need:
            need = plan.first_need[value]
            part = stage.part_of[plan.moments[need].op]
            table["fetched"][:, part] += column
            if not need or stage.part_of[plan.moments[need - 1].op] != part:
                table["fetched_first"][:, part] += column
    return table


def _best(options: Options) -> list[int]:
    """Options that none beats in bytes kept, bytes moved, time and working sets alike."""
    columns = (
        *(options.kept_bytes, options.moved_bytes, options.seconds.sum(axis=1)),
        *(options.backward_peak.max(axis=1), options.forward_peak.max(axis=1)),
    )
    points = np.stack(columns, axis=1)
    chosen: list[int] = []
    front = np.empty((0, len(columns)))
    for index in np.lexsort(columns[::-1]):
        if len(front) and bool(np.any(np.all(front <= points[index] * (1 + 1e-9) + 1e-12, axis=1))):
            continue
        chosen.append(int(index))
        front = np.vstack([front, points[index]])
    return chosen
