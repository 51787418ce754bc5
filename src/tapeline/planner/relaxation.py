"""The placement problem with fractions allowed: a lower bound that no plan beats, and where a good plan lies.

A linear programme over the parts of a step: bytes kept, bytes copied each way, stalls, and for each stage a mixture of its
options. It is solved in two readings. The *bound* takes every effect of time within a part at its best, so that its optimum is below
every plan; the *safe* reading takes it at its worst, so that what it allows can be carried out. Options enter by column generation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import highspy
import numpy as np

from tapeline.planner.placements import Floats, Options
from tapeline.planner.route import Budgets, Links, Route

_MAX_ROUNDS = 12
_PER_ROUND = 3
_TILT = 1e-7
_PENALTY = 1e3
_TINY = 1e-7


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """The answer: for each stage the options it mixes, and what the step then takes."""

    shares: tuple[dict[int, float], ...]
    seconds: float
    """Optimum of the programme."""
    lower_bound: float
    """No plan takes less; equal to `seconds` once no further option would help."""
    excess_bytes: float
    """By how much the device budget is too small; 0 if the programme has a solution."""
    reduced_costs: tuple[Floats, ...]
    """For each stage, how much worse each option is than those in the mixture, in seconds."""


class _Rows:
    """Rows under construction, sparse."""

    def __init__(self) -> None:
        self.lower: list[float] = []
        self.upper: list[float] = []
        self.entries: list[list[tuple[int, float]]] = []

    def add(self, terms: Iterable[tuple[int, float]], *, lower: float = -math.inf, upper: float = math.inf) -> int:
        self.entries.append(list(terms))
        self.lower.append(lower)
        self.upper.append(upper)
        return len(self.lower) - 1


class Relaxation:
    """The programme of one step.

    Args:
        route: the step.
        budgets: bytes of each tier.
        links: bytes per second.
        is_safe: the pessimistic reading; otherwise the bound.
        columns: options of each stage to begin with, as found in another reading.
    """

    def __init__(
        self, route: Route, budgets: Budgets, links: Links, *, is_safe: bool, columns: list[set[int]] | None = None
    ) -> None:
        self.route, self.budgets, self.links, self.is_safe = route, budgets, links, is_safe
        self.byte = 1.0 / max(1.0, *(sum(stage.sizes) for stage in route.stages))
        self.second = 1.0 / max(route.base_seconds / max(1, len(route.stages)), 1e-12)
        self.steps = route.steps
        slower, faster = sorted((links.to_host, links.to_device))
        self.latency_bytes = links.latency * (faster if is_safe else slower)
        smallest = min(
            (stage.sizes[v] for stage in route.stages for v in (0, *stage.needed) if stage.sizes[v]), default=1
        )
        self.own = 1.0 if is_safe else smallest / (smallest + self.latency_bytes)
        """Share of the bytes on a link that are there in memory, at least."""
        self.columns = columns or [set(_first_columns(options)) for options in route.choices]
        self.num_vars = 0
        self.costs: list[float] = []
        self.rows = _Rows()
        self._build()

    def solve(self) -> Mixture:
        """Add options until none would help."""
        solver = self._solver()
        taken = [sorted(columns) for columns in self.columns]
        order = [(stage, option) for stage, options in enumerate(taken) for option in options]
        self._add_columns(solver, order)
        best = -math.inf
        for _ in range(_MAX_ROUNDS):
            solver.run()
            if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
                raise RuntimeError(f"the linear programme was not solved: {solver.getModelStatus()}")
            duals = np.array(solver.getSolution().row_dual)
            reduced = [self._reduced(stage, duals) for stage in range(len(self.route.stages))]
            value = solver.getObjectiveValue()
            best = max(best, value + sum(min(0.0, float(costs.min())) for costs in reduced))
            new = self._improving(reduced)
            if not new or value - best < _TINY * abs(value):
                break
            self._add_columns(solver, new)
            order += new
        return self._mixture(solver, order, best, reduced)

    # -- building --------------------------------------------------------------------------------------------------

    def _var(self, cost: float = 0.0) -> int:
        self.costs.append(cost)
        self.num_vars += 1
        return self.num_vars - 1

    def _build(self) -> None:
        stages, steps = self.route.stages, self.steps
        self.over = self._var(_PENALTY)
        self.stall = [self._var(1.0) for _ in steps]
        self.out, self.back = self._series(), self._series()
        """Bytes that have left for the host, and come back, by the end of each step."""
        self.left, self.early = self._series(), self._series()
        """Bytes still on the device though the forward is done with them, and there already though nothing needs them."""
        made, gone, asked = self._series(), self._series(), self._series()
        kept = [self._var() for _ in stages]
        self.convex = [self.rows.add([], lower=1.0, upper=1.0) for _ in stages]
        self.kept_rows = self._sums(kept)
        self.made_rows, self.gone_rows, self.asked_rows = self._sums(made), self._sums(gone), self._sums(asked)
        self.loss = next(t for t, step in enumerate(steps) if step.stage is None)
        self.flows = [self._flow(self.out, self.links.to_host), self._flow(self.back, self.links.to_device)]
        if self.links.both < 2.0:
            self._take_turns()
        self.late_rows: list[int] = []
        self.first_rows: dict[int, int] = {}
        for t in range(len(steps)):
            self._leave(t, made, gone)
            self._return(t, asked)
        self.rows.add([(self.out[self.loss], 1.0), (made[self.loss], -1.0)], lower=0.0)
        self._limit_device(kept)
        self._limit_host()

    def _series(self) -> list[int]:
        return [self._var() for _ in self.steps]

    def _sums(self, variables: list[int]) -> list[int]:
        """Rows in which each variable is the one before and what the options add."""
        return [
            self.rows.add([(variable, 1.0)] + ([(variables[t - 1], -1.0)] if t else []), lower=0.0, upper=0.0)
            for t, variable in enumerate(variables)
        ]

    def _flow(self, variables: list[int], bytes_per_second: float) -> tuple[list[int], float]:
        """Rows that let a sum grow no faster than a link carries, and never shrink."""
        rate, found = bytes_per_second * self.byte / self.second, []
        for t, step in enumerate(self.steps):
            change = [(variables[t], 1.0)] + ([(variables[t - 1], -1.0)] if t else [])
            found.append(self.rows.add([*change, (self.stall[t], -rate)], upper=rate * step.seconds * self.second))
            self.rows.add(change, lower=0.0)
        return found, rate

    def _leave(self, t: int, made: list[int], gone: list[int]) -> None:
        """Copies to the host: of what has been made; what the forward is done with is there until then."""
        earlier = t - 1 if self.is_safe and t <= self.loss else t
        before = [(made[earlier], -1.0)] if earlier >= 0 else []
        self.late_rows.append(self.rows.add([(self.out[t], 1.0), *before], upper=0.0))
        released = t if self.is_safe else t - 1
        if released < 0:
            return
        terms = [(self.left[t], 1.0), (gone[released], -1.0)]
        if t != self.loss or self.is_safe:
            terms.append((self.out[t], 1.0))
        else:  # the loss is one operation: what it waits for is copied before it begins
            terms += [(self.out[released], 1.0), (self.stall[t], self.flows[0][1])]
        self.rows.add(terms, lower=0.0)

    def _return(self, t: int, asked: list[int]) -> None:
        """Copies from the host: of what is there, from the loss on, in time for what needs them."""
        self.rows.add([(self.back[t], 1.0), (self.out[t], -1.0)], upper=0.0)
        if t < self.loss:
            self.rows.add([(self.back[t], 1.0)], upper=0.0)
        if t > self.loss:
            fetched = t - 1 if self.is_safe else t
            self.rows.add([(self.back[fetched], 1.0), (asked[t], -1.0)], lower=0.0)
            self.first_rows[t] = self.rows.add([(self.back[t - 1], 1.0), (asked[t - 1], -1.0)], lower=0.0)
        arrived = t if self.is_safe else t - 1
        if t >= self.loss and arrived >= 0:
            self.rows.add([(self.early[t], 1.0), (self.back[arrived], -1.0), (asked[t], 1.0)], lower=0.0)

    def _take_turns(self) -> None:
        """Both directions at once are slower than each alone."""
        both, shared = self.links.both, []
        series = [(self.out, 1 / self.flows[0][1]), (self.back, 1 / self.flows[1][1])]
        for t, step in enumerate(self.steps):
            terms = [(variables[t], share) for variables, share in series] + [(self.stall[t], -both)]
            terms += [(variables[t - 1], -share) for variables, share in series if t]
            shared.append(self.rows.add(terms, upper=both * step.seconds * self.second))
        self.flows.append((shared, both))

    def _limit_device(self, kept: list[int]) -> None:
        route, left, early = self.route, self.left, self.early
        self.device_rows = []
        for t, step in enumerate(self.steps):
            limit = self.budgets.device - route.base_bytes
            terms = [(self.over, -1.0)]
            place = t - 1 if self.is_safe else t
            if step.stage is None:
                limit -= route.boundary_bytes + route.loss_bytes
                terms += [(kept[-1], 1.0), (left[place], self.own)]
                terms += [(early[t], self.own)] if self.is_safe else []
            elif step.is_backward:
                limit -= route.gradient_bytes[step.stage]
                terms += [(kept[step.stage], 1.0), (early[t], self.own)]
                terms += [] if self.is_safe else [(left[t], self.own)]
            else:
                terms += [(kept[step.stage - 1], 1.0)] if step.stage else []
                terms += [(left[place], self.own)] if place >= 0 else []
            self.device_rows.append(self.rows.add(terms, upper=limit * self.byte))

    def _limit_host(self) -> None:
        """The host, and the disk behind it: bytes written to it and read again, in time with the rest."""
        most = sum(float(options.moved_bytes.max()) for options in self.route.choices)
        if self.budgets.host >= most:
            return
        host, disk = (budget * self.byte / self.own for budget in (self.budgets.host, self.budgets.disk))
        has_disk = disk > 0 and self.links.disk_write > 0 and self.links.disk_read > 0
        if self.is_safe:
            self.rows.add([(self.out[self.loss], 1.0)], upper=host + (disk if has_disk else 0.0))
        if not has_disk:
            for out, back in zip(self.out, self.back, strict=True):
                self.rows.add([(out, 1.0), (back, -1.0)], upper=host)
            return
        written, read = self._series(), self._series()
        self.flows += [self._flow(written, self.links.disk_write), self._flow(read, self.links.disk_read)]
        for t in range(len(self.steps)):
            stays = [(self.out[t], 1.0), (written[t], -1.0), (read[t], 1.0), (self.back[t], -1.0)]
            self.rows.add(stays, lower=0.0, upper=host)
            self.rows.add([(written[t], 1.0), (self.out[t], -1.0)], upper=0.0)
            self.rows.add([(read[t], 1.0), (written[t], -1.0)], upper=0.0)
            self.rows.add([(written[t], 1.0), (read[t], -1.0)], upper=disk)
            if t <= self.loss and self.is_safe:
                self.rows.add([(read[t], 1.0)], upper=0.0)

    # -- options ---------------------------------------------------------------------------------------------------

    def _terms(self, stage: int) -> list[tuple[int, Floats]]:
        """Rows that the options of a stage enter, with the entry of each option."""
        options, byte, second = self.route.choices[stage], self.byte, self.second
        safe = self.is_safe
        forward = options.forward_peak_safe if safe else options.forward_peak
        backward = options.backward_peak_safe if safe else options.backward_peak
        found = [(self.convex[stage], np.ones(len(options))), (self.kept_rows[stage], -options.kept_bytes * byte)]
        for t, step in enumerate(self.steps):
            if step.stage != stage:
                continue
            if step.is_backward:
                again = options.seconds[:, step.part] * second
                found.append((self.asked_rows[t], -self._on_link(options, "fetched")[:, step.part]))
                found.append((self.first_rows[t], -self._on_link(options, "fetched_first")[:, step.part]))
                found.append((self.device_rows[t], backward[:, step.part] * byte))
                found += [(rows[t], -rate * again) for rows, rate in self.flows]
            else:
                found.append((self.made_rows[t], -self._on_link(options, "produced")[:, step.part]))
                if not safe:  # what is made at the end cannot leave before
                    found.append((self.late_rows[t], self._on_link(options, "produced_last")[:, step.part]))
                found.append((self.gone_rows[t], -self._on_link(options, "released")[:, step.part]))
                found.append((self.device_rows[t], forward[:, step.part] * byte))
                if step.part == 0:
                    place = max(0, t - 1) if safe else t
                    found.append((self.made_rows[place], -self._on_link(options, "moved_input")))
        return found

    def _on_link(self, options: Options, name: str) -> Floats:
        """Bytes that copies keep a link busy for: their own, and those that would have passed before they begin."""
        table: Floats = (getattr(options, name) + self.latency_bytes * options.counts[name]) * self.byte
        return table

    def _cost(self, stage: int) -> Floats:
        options = self.route.choices[stage]
        tilt = _TILT * (len(self.route.stages) - stage) * options.kept_bytes * self.byte
        total: Floats = options.seconds.sum(axis=1) * self.second + tilt
        return total

    def _reduced(self, stage: int, duals: Floats) -> Floats:
        total = self._cost(stage)
        for row, entries in self._terms(stage):
            if duals[row]:
                total = total - duals[row] * entries
        return total

    def _improving(self, reduced: list[Floats]) -> list[tuple[int, int]]:
        found = []
        for stage, costs in enumerate(reduced):
            for option in np.argsort(costs)[:_PER_ROUND]:
                if costs[option] < -1e-9 and int(option) not in self.columns[stage]:
                    self.columns[stage].add(int(option))
                    found.append((stage, int(option)))
        return found

    # -- the solver ------------------------------------------------------------------------------------------------

    def _solver(self) -> highspy.Highs:
        solver = highspy.Highs()
        solver.setOptionValue("output_flag", False)
        solver.setOptionValue("threads", 1)
        solver.setOptionValue("random_seed", 0)
        size = self.num_vars
        solver.addVars(size, np.zeros(size), np.full(size, highspy.kHighsInf))
        solver.changeColsCost(size, np.arange(size, dtype=np.int32), np.array(self.costs))
        starts = np.cumsum([0, *(len(entries) for entries in self.rows.entries[:-1])]).astype(np.int32)
        flat = [term for entries in self.rows.entries for term in entries]
        solver.addRows(
            len(self.rows.lower),
            np.array(self.rows.lower),
            np.array(self.rows.upper),
            len(flat),
            starts,
            np.array([column for column, _ in flat], dtype=np.int32),
            np.array([factor for _, factor in flat]),
        )
        return solver

    def _add_columns(self, solver: highspy.Highs, new: list[tuple[int, int]]) -> None:
        terms = {stage: (self._cost(stage), self._terms(stage)) for stage in {stage for stage, _ in new}}
        costs: list[float] = []
        starts: list[int] = []
        rows: list[int] = []
        factors: list[float] = []
        for stage, option in new:
            cost, entries = terms[stage]
            costs.append(cost[option])
            starts.append(len(rows))
            merged: dict[int, float] = {}
            for row, values in entries:
                merged[row] = merged.get(row, 0.0) + float(values[option])
            rows += list(merged)
            factors += list(merged.values())
        size = len(new)
        solver.addCols(
            size,
            np.array(costs),
            np.zeros(size),
            np.full(size, highspy.kHighsInf),
            len(rows),
            np.array(starts, dtype=np.int32),
            np.array(rows, dtype=np.int32),
            np.array(factors),
        )

    def _mixture(
        self, solver: highspy.Highs, order: list[tuple[int, int]], best: float, reduced: list[Floats]
    ) -> Mixture:
        values = solver.getSolution().col_value
        shares: list[dict[int, float]] = [{} for _ in self.route.stages]
        for (stage, option), value in zip(order, values[self.num_vars :], strict=True):
            if value > 1e-7:
                shares[stage][option] = value
        over = float(values[self.over])
        tilts = _TILT * sum(
            (len(shares) - stage) * float(self.route.choices[stage].kept_bytes.max()) * self.byte
            for stage in range(len(shares))
        )
        base = self.route.base_seconds
        return Mixture(
            shares=tuple(shares),
            seconds=base + solver.getObjectiveValue() / self.second,
            lower_bound=base + max(0.0, best - tilts) / self.second,
            excess_bytes=over / self.byte if over > 1e-6 else 0.0,
            reduced_costs=tuple(np.maximum(costs, 0.0) / self.second for costs in reduced),
        )


def _first_columns(options: Options) -> set[int]:
    """The extremes: least kept, most kept, least moved, fastest, smallest working set, and the lower hull between them."""
    times = options.seconds.sum(axis=1)
    tables = (options.kept_bytes, options.moved_bytes, times, options.backward_peak.max(axis=1))
    chosen = {int(np.argmin(table)) for table in tables} | {int(np.argmax(options.kept_bytes))}
    scale = [float(table.max()) or 1.0 for table in tables[:3]]
    for a in np.geomspace(0.01, 100.0, 9):
        for b in np.geomspace(0.01, 100.0, 9):
            chosen.add(int(np.argmin(tables[0] / scale[0] * a + tables[1] / scale[1] * b + times / scale[2])))
    return chosen
