"""Every way to place the values of a block that is worth choosing from.

A value that backward needs is kept on the device, moved to a tier and fetched again, or dropped and recomputed. With the
handful of values that matter in a block, all combinations are listed and the dominated ones left out.
"""

from __future__ import annotations

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

    def find(self, kept: Sequence[int] | frozenset[int], moved: Sequence[int] | frozenset[int] = ()) -> int:
        """The index of a placement.

        Raises:
            KeyError: if it is not among the options.
        """
        wanted = frozenset(kept), frozenset(moved)
        for index, pair in enumerate(_pairs(self)):
            if pair == wanted:
                return index
        raise KeyError(f"no option keeps {sorted(wanted[0])} and moves {sorted(wanted[1])}")


_COPIED = ("moved_input", "produced", "produced_last", "released", "fetched", "fetched_first")
_ARRAYS = (
    *("kept_bytes", "moved_bytes", "seconds", *_COPIED),
    *("forward_peak", "forward_peak_safe", "backward_peak", "backward_peak_safe"),
)


def placements(stage: Stage, like: Options | None = None) -> Options:
    """Every set of saved values, and every split of it into kept and moved, that no other beats.

    Args:
        stage: the block.
        like: take these placements, in their order; their stage has other parts.
    """
    sizes = np.array(stage.sizes, dtype=float)
    tables: list[dict[str, Floats]] = []
    kept: list[frozenset[int]] = []
    moved: list[frozenset[int]] = []
    rebuilds: list[Rebuild] = []
    wanted = None if like is None else set(_pairs(like))
    for groups in _saved_groups(stage):
        saved = stage.held.union(*groups)
        splits = [stage.held.union(*some) for count in range(len(groups) + 1) for some in combinations(groups, count)]
        if wanted is not None:
            splits = [split for split in splits if (split, saved - split) in wanted]
        try:
            plan = rebuild(stage, saved) if splits else None
        except ValueError:
            plan = None
        if plan is None:
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
    if like is None:
        return every.rows(_best(every))
    places = {pair: index for index, pair in enumerate(_pairs(every))}
    return every.rows([places[pair] for pair in _pairs(like)])


def _pairs(options: Options) -> Iterator[tuple[frozenset[int], frozenset[int]]]:
    return zip(options.kept, options.moved, strict=True)


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
    for name in ("seconds", "forward_peak", "forward_peak_safe", "backward_peak", "backward_peak_safe"):
        table[name] = np.full((len(keeps), stage.num_parts), -np.inf)
    table["seconds"][:] = plan.seconds
    for number, op in enumerate(stage.ops):
        part = stage.part_of[number]
        made = np.array([stage.producer.get(v, -1) <= number for v in range(len(sizes))])
        used = np.array([stage.last_use[v] >= number for v in range(len(sizes))]) & made
        released = made & ~used & np.array([stage.part_of[max(last, 0)] == part for last in stage.last_use])
        peak = keeps @ (sizes * made) + (1 - keeps) @ (sizes * used) + op.temporary_bytes
        _raise(table["forward_peak"], part, peak)
        _raise(table["forward_peak_safe"], part, peak + moves @ (sizes * released))
    for part in range(stage.num_parts):
        moments = [pair for pair in enumerate(plan.moments) if stage.part_of[pair[1].op] == part]
        later = {v for _, m in moments for v in m.alive if v in plan.saved}
        for number, moment in moments:
            alive = np.zeros(len(sizes))
            alive[sorted(moment.alive)] = 1.0
            soon = np.zeros(len(sizes))
            soon[sorted(later - moment.alive)] = 1.0
            gone = np.array([plan.last_need.get(value, -1) < number for value in range(len(sizes))])
            peak = moment.extra_bytes + (1 - keeps) @ (sizes * alive) - keeps @ (sizes * gone)
            _raise(table["backward_peak"], part, peak)
            _raise(table["backward_peak_safe"], part, peak + moves @ (sizes * soon))
        if not moments:
            table["backward_peak"][:, part] = table["backward_peak_safe"][:, part] = 0.0
    return table


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


def _raise(column: Floats, part: int, peak: Floats) -> None:
    column[:, part] = np.maximum(column[:, part], peak)


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
