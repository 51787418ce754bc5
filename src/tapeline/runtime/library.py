"""The recipes of a session: one for each distinct tape and policy, shared by all blocks and calls that have it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import nn

from tapeline.cost.rates import Rates
from tapeline.errors import UsageError
from tapeline.planner.block import choose
from tapeline.planner.policy import Policy
from tapeline.runtime.casts import Casts
from tapeline.runtime.fingerprint import Fingerprint
from tapeline.runtime.moving import Mover
from tapeline.runtime.tiers.tier import DISK, HOST
from tapeline.tape.graph import UNKNOWN, Op, Tape
from tapeline.tape.options import Limits, block_graph
from tapeline.tape.program import NotReplayable, Program, Recipe, compile_program, compile_recipe
from tapeline.tape.rules import EVERYTHING, Rules, named_values

Key = TypeVar("Key")
Found = TypeVar("Found")
MAX_CLASSES = 64
"""Classes of calls that are remembered of each block."""
MAX_TAPES = 256
"""Distinct tapes that are remembered in a session."""


def remember(table: dict[Key, Found], key: Key, value: Found, limit: int) -> Found:
    """Add to a table, which forgets its oldest entry beyond `limit`."""
    table[key] = value
    if len(table) > limit:
        del table[next(iter(table))]
    return value


@dataclass(slots=True)
class CallClass:
    """What is known of one class of calls of a block: its tape, or why it has none."""

    tape: Tape | None
    reason: str = ""
    """Why calls of this class are not replayed from a tape."""
    can_rerun: bool = True
    """Without a tape: whether the block may be run again as a whole."""
    shapes: tuple[torch.Size, ...] = ()
    """Of the tensors among the arguments of its first call."""


@dataclass(slots=True)
class BlockRecords:
    """What is known of one block: the states it was seen in, and its classes of calls."""

    fingerprint: Fingerprint
    classes: dict[Any, CallClass] = field(default_factory=dict)
    num_changes: int = 0
    """Recorded calls that changed what the fingerprint reads."""
    num_new: int = 0
    """Calls in a row that were recorded although calls of these shapes had been recorded before."""
    fixed: CallClass | None = None
    """Holds for every call: the block is never the same twice."""


class Library:
    """Finds or makes the recipe for a tape.

    Args:
        rates: rates of the device.
        rules: what the user insists on.
        verifies: trust a recipe only once its replays gave what was saved; tensors without data cannot tell.
    """

    def __init__(self, rates: Rates, rules: Rules | None = None, *, verifies: bool = True) -> None:
        self.rates, self.rules, self.verifies = rates, rules or Rules(), verifies
        self.generation = 0
        """How often recipes were found wrong, and others took their place."""
        self.tapes: dict[str, Tape] = {}
        """Every distinct tape, by digest."""
        self.failures: dict[str, list[str]] = {}
        """What was found wrong when it was verified, and is kept instead, by digest."""
        self.obstacles: dict[Any, CallClass] = {}
        """Classes of calls without a tape, by class of module: what one block has found out holds for its like."""
        self.groups: dict[str, str] = {}
        """Blocks, by name, whose tapes have been equal so far, and of which one is recorded for all: for predictions only."""
        self.shared: dict[Any, CallClass] = {}
        """What was found out of such a group, by group and class of calls."""
        self.blocks: dict[str, BlockRecords] = {}
        """What is known of each block, by name."""
        self.expected: dict[Any, Recipe] = {}
        """The verified recipe that a class of calls, by class of module and policy, had last: its like will have it too."""
        self.verified: set[tuple[str, Policy]] = set()
        self.mover: Mover | None = None
        """What moves what the plan has moved; ``None``: everything stays."""
        self.cache_switch: Any = None
        """What keeps the model from filling caches while blocks are managed."""
        self.verified_outputs: set[str] = set()
        """Tapes whose outputs were found to be made again exactly."""
        self.casts = Casts()
        self.lock = threading.RLock()
        self._limits: dict[str, Limits] = {}
        self._recipes: dict[tuple[str, Policy], Recipe] = {}
        self._outputs: dict[str, Program | None] = {}

    def records(self, name: str, module: nn.Module) -> BlockRecords:
        """What is known of a block."""
        found = self.blocks.get(name)
        if found is None or found.fingerprint.module is not module:
            found = self.blocks[name] = BlockRecords(Fingerprint(module))
        return found

    def canonical(self, tape: Tape) -> Tape:
        """The one copy of a tape that all blocks share; of too many, the oldest is forgotten."""
        with self.lock:
            if tape.digest not in self.tapes and len(self.tapes) >= MAX_TAPES:
                self._drop(next(iter(self.tapes)))
            return self.tapes.setdefault(tape.digest, tape)

    def recipe(self, tape: Tape, policy: Policy) -> Recipe:
        """The recipe for a tape under a policy.

        Raises:
            UsageError: if something that must be dropped cannot be made again.
        """
        key = tape.digest, policy
        with self.lock:
            if key not in self._recipes:
                self._recipes[key] = self._solve(self.canonical(tape), policy)
            return self._recipes[key]

    def keep_instead(self, tape: Tape, values: set[int], reason: str) -> None:
        """Never replay these values again: doing so gave something else."""
        with self.lock:
            limits = self._limits_of(tape)
            self._limits[tape.digest] = replace(limits, held=limits.held | values, dropped=limits.dropped - values)
            self._forget(tape, reason)

    def never_replay(self, tape: Tape, op: Op | None, reason: str) -> None:
        """Never replay this op again: it raised. Without an op, replay nothing of the tape."""
        with self.lock:
            limits = self._limits_of(tape)
            ops = {op.index} if op is not None else {op.index for op in tape.ops}
            self._limits[tape.digest] = replace(limits, unreplayable=limits.unreplayable | ops)
            self._forget(tape, reason)

    def is_verified(self, tape: Tape, policy: Policy) -> bool:
        """Whether the recipe may be relied on without checking it."""
        return not self.verifies or (tape.digest, policy) in self.verified

    def _forget(self, tape: Tape, reason: str) -> None:
        self.failures.setdefault(tape.digest, []).append(reason)
        self.generation += 1
        self._unlearn(tape.digest)

    def _drop(self, digest: str) -> None:
        """Forget a tape; a call that has it is recorded anew."""
        self._unlearn(digest)
        self.verified_outputs.discard(digest)
        for table in (self.tapes, self._limits, self._outputs):
            table.pop(digest, None)

    def _unlearn(self, digest: str) -> None:
        self.verified = {key for key in self.verified if key[0] != digest}
        self._recipes = {key: recipe for key, recipe in self._recipes.items() if key[0] != digest}
        self.expected = {key: recipe for key, recipe in self.expected.items() if recipe.tape.digest != digest}

    def output_program(self, recipe: Recipe) -> Program | None:
        """The calls that make the outputs of a tape from sources alone, which are those of `recipe`; ``None`` if none do."""
        digest = recipe.tape.digest
        if digest not in self._outputs:  # after a failure, something that leads there replays differently
            has_failed = digest in self.failures
            self._outputs[digest] = None if has_failed else _output_program(recipe, self.all_sources(recipe.tape))
        return self._outputs[digest]

    def drop_output_program(self, tape: Tape, reason: str) -> None:
        """The outputs of this tape cannot be made again."""
        with self.lock:
            self._outputs[tape.digest] = None
            self.failures.setdefault(tape.digest, []).append(reason)

    def all_sources(self, tape: Tape) -> list[Any]:
        """The sources that any op of a tape reads, or that the call hands on."""
        read = {index for op in tape.ops for index in op.reads} | {index for index, _ in tape.outputs}
        sources = (tape.values[index].source for index in sorted(read))
        return list(dict.fromkeys(source for source in sources if source is not None and source.kind != UNKNOWN))

    def _solve(self, tape: Tape, policy: Policy) -> Recipe:
        while True:
            limits = self._limits_of(tape)
            tiers = _tiers(tape, policy)
            wanted = {value for value, (_, is_forced) in tiers.items() if is_forced} - limits.dropped
            held = replace(limits, held=limits.held | wanted)
            graph = block_graph(tape, self.rates, held, has_output=policy.has_output)
            try:
                choice = choose(graph, policy)
            except ValueError as error:
                raise UsageError(
                    f"drop={list(self.rules.drop)}: some of it cannot be made again ({_reasons(tape, policy)}), so it cannot be dropped."
                ) from error
            try:
                return compile_recipe(tape, graph, choice, {value: tier for value, (tier, _) in tiers.items()})
            except NotReplayable as error:
                self._limits[tape.digest] = replace(limits, unreplayable=limits.unreplayable | {error.op})

    def _limits_of(self, tape: Tape) -> Limits:
        if tape.digest not in self._limits:
            held, dropped = self.rules.apply(tape)
            self._limits[tape.digest] = Limits(held=held, dropped=dropped)
        return self._limits[tape.digest]


def _output_program(recipe: Recipe, sources: list[Any]) -> Program | None:
    tape, graph = recipe.tape, recipe.graph
    numbers = {source: number for number, source in enumerate(sources)}
    try:
        program = compile_program(tape, graph, frozenset(), tape.outputs, numbers)
    except NotReplayable:
        return None
    is_whole = not program.roots and all(graph.steps[step].can_replay for step in program.steps)
    return program if is_whole else None


def _tiers(tape: Tape, policy: Policy) -> dict[int, tuple[str, bool]]:
    """The values that a policy wants moved if they are held, where to, and whether they must be held for that."""
    found: dict[int, tuple[str, bool]] = {}
    for tier, names in ((DISK, policy.disk), (HOST, policy.host)):
        if EVERYTHING in names:
            found |= dict.fromkeys(named_values(tape, [EVERYTHING]), (tier, False))
    for tier, names in ((DISK, policy.disk), (HOST, policy.host)):
        found |= dict.fromkeys(named_values(tape, [n for n in names if n != EVERYTHING]), (tier, True))
    return found


def _reasons(tape: Tape, policy: Policy) -> str:
    if policy.is_cheap:
        return "mode 'cheap' replays no matrix product and no attention"
    reasons = dict.fromkeys(f"{op.name}: {op.obstacle}" for op in tape.ops if op.obstacle)
    return "; ".join(list(reasons)[:3]) or "nothing leads to it"
