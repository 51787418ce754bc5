"""Why each value of a tape is where it is: the recipe read backwards, row by row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from tapeline.cost.price import ATTENTION, MATMUL, MEMORY, OTHER
from tapeline.planner.block import BlockChoice, BlockGraph, choose, front, steps_for
from tapeline.planner.explanation import DEVICE, FrontRow, TapeExplanation, ValueRow
from tapeline.planner.policy import CHEAP, KEEP, LEAST, RECOMPUTE, Policy
from tapeline.tape.graph import UNKNOWN, Op, Source, Value
from tapeline.tape.options import narrowings
from tapeline.tape.program import Recipe
from tapeline.tape.rules import Rules, matches

NAMED_POLICIES = {"cheap": CHEAP, "recompute": RECOMPUTE, "least": LEAST, "none": KEEP}
_SHORT_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_COSTLY = {MATMUL: "matrix product", ATTENTION: "attention call", OTHER: "costly op"}
_MAX_ROOTS = 3


def explain_tape(recipe: Recipe, policy: Policy, rules: Rules, failures: Iterable[str] = ()) -> TapeExplanation:
    """Say of every value that autograd saves, or that is held, what happens to it and why.

    Args:
        recipe: the recipe for the tape.
        policy: the policy that it was solved for.
        rules: what the user insists on.
        failures: what was found wrong when the recipe was verified.
    """
    tape, choice = recipe.tape, recipe.choice
    rows = _Rows(recipe, policy, rules).rows()
    replayed = [tape.ops[step] for program in recipe.programs for step in program.steps]
    return TapeExplanation(
        digest=tape.digest,
        num_ops=len(tape.ops),
        num_saved=len(tape.packs),
        saved_bytes=tape.saved_bytes(),
        held_bytes=sum(row.held_bytes for row in rows),
        input_bytes=sum(row.held_bytes for row in rows if tape.values[row.value].source is not None),
        replayed_ops=dict(Counter(op.kind for op in replayed).most_common()),
        replay_flops=sum(op.flops for op in replayed),
        forward_flops=sum(op.flops for op in tape.ops),
        num_phases=len(recipe.programs),
        working_set_bytes=choice.working_set_bytes,
        rows=rows,
        front=_front(recipe.graph, choice),
        failures=tuple(failures),
    )


class _Rows:
    """Builds the rows of one recipe."""

    def __init__(self, recipe: Recipe, policy: Policy, rules: Rules) -> None:
        self.tape, self.graph, self.policy, self.rules = recipe.tape, recipe.graph, policy, rules
        self.held = _held(recipe.graph, recipe.choice)
        self.num_saved = Counter(pack.value for pack in self.tape.packs)
        self.narrow = narrowings(self.tape)
        self.phases: dict[int, list[int]] = {}
        for pack, action in zip(self.tape.packs, recipe.packs, strict=True):
            if action.phase >= 0 and action.phase + 1 not in self.phases.setdefault(pack.value, []):
                self.phases[pack.value].append(action.phase + 1)

    def rows(self) -> tuple[ValueRow, ...]:
        """What is held or replayed, in the order of the tape, then what is never held; each storage is counted once."""
        shown = sorted(self.held | set(self.num_saved), key=lambda v: (not self._is_placed(v), v))
        seen: set[int] = set()
        rows = []
        for index in shown:
            rows.append(self._row(self.tape.values[index], is_first=self.tape.values[index].storage not in seen))
            seen.add(self.tape.values[index].storage)
        return tuple(rows)

    def _is_placed(self, index: int) -> bool:
        return index in self.held or self.tape.values[index].producer is not None

    def _row(self, value: Value, *, is_first: bool) -> ValueRow:
        op = self._producer(value)
        steps = self._steps(value)
        is_held = value.index in self.held
        costs = steps if op is not None and self._blocked(steps) is None else None
        return ValueRow(
            value=value.index,
            storage=value.storage,
            made_by=op.label if op is not None else _origin(value.source),
            module=op.module if op is not None else _home(value.source),
            dtype=str(value.base.dtype).removeprefix("torch."),
            shape=value.base.shape,
            num_saved=self.num_saved[value.index],
            storage_bytes=value.num_bytes if is_first else 0,
            held_bytes=self.graph.values[value.index].num_bytes if is_held and is_first else 0,
            replay_ops=None if costs is None else len(costs),
            replay_flops=None if costs is None else sum(step.flops for step in costs),
            placement=self._placement(value),
            reason=self._why_held(value, steps) if is_held else self._why_not_held(value, steps),
        )

    def _placement(self, value: Value) -> str:
        if value.index in self.held:
            is_narrow = value.index in self.narrow and value.index not in self.num_saved
            return f"held as {_SHORT_DTYPES[value.base.dtype]}" if is_narrow else DEVICE
        if value.source is not None:
            return value.source.kind
        phases = self.phases.get(value.index, [])
        return f"recompute in phase{'s' * (len(phases) > 1)} {', '.join(map(str, phases))}"

    def _steps(self, value: Value) -> list[Op]:
        """The ops that make a value from what else is held."""
        return [self.tape.ops[step] for step in steps_for(self.graph, self.held - {value.index}, [value.index])]

    def _producer(self, value: Value) -> Op | None:
        return self.tape.ops[value.producer] if value.producer is not None else None

    def _blocked(self, steps: Sequence[Op]) -> Op | None:
        """The last of these ops that must not be replayed."""
        return next((op for op in reversed(steps) if not self.graph.steps[op.index].can_replay), None)

    # -- reasons ---------------------------------------------------------------------------------------------------

    def _why_held(self, value: Value, steps: Sequence[Op]) -> str:
        op = self._producer(value)
        is_saved = value.index in self.num_saved
        if op is None:
            return (
                "the block's input, and autograd saves it" if is_saved else "the block's input: replays start from it"
            )
        if value.index in self.narrow and not is_saved:
            wide = self.tape.packs[self.narrow[value.index]].value
            return f"autograd saves only a wider copy of it, %{wide}: casting this one gives the same bits"
        return self._why_fixed(value, op) or self._why_dear(op, steps)

    def _why_fixed(self, value: Value, op: Op) -> str:
        """Why a value is held whatever it costs; empty if it was a choice."""
        if names := [name for name in self.rules.keep if matches(name, op)]:
            return f"keep={names}"
        if value.is_output:
            return "the block returns it: something else holds it anyway"
        if not value.is_last:
            return "its storage is overwritten before the call ends"
        return "replayed it gave other bits" if self.graph.values[value.index].must_hold else ""

    def _why_dear(self, op: Op, steps: Sequence[Op]) -> str:
        """Why the choice fell on holding."""
        blocked = self._blocked(steps)
        if blocked is op:
            return f"its op must not be replayed: {self._obstacle(op)}"
        if self.policy.keeps_all:
            return "autograd saves it, and this mode replays nothing"
        if blocked is not None:
            return f"it comes from {_where(blocked)}, which must not be replayed: {self._obstacle(blocked)}"
        if self.policy.is_cheap and any(step.kind != MEMORY for step in steps):
            return f"autograd saves it; replaying it takes {_costly(steps)}"
        return "autograd saves it; dearer to replay than to hold"

    def _why_not_held(self, value: Value, steps: Sequence[Op]) -> str:
        op = self._producer(value)
        if op is None:
            return _never_held(value.source)
        roots = self._roots(value, steps)
        start = ", ".join(f"%{root}" for root in roots[:_MAX_ROOTS]) + (", ..." if len(roots) > _MAX_ROOTS else "")
        text = (
            f"replays from {start or 'parameters and shared arguments'} in {_count(len(steps), 'op')}, {_costly(steps)}"
        )
        if any(step.is_random for step in steps):
            text += ", with the random state of the call"
        names = [name for name in self.rules.drop if matches(name, op)]
        return f"drop={names}: {text}" if names else text

    def _roots(self, value: Value, steps: Sequence[Op]) -> list[int]:
        """What these ops start from, other than what is found by name."""
        made = {index for op in steps for index in op.makes}
        read = sorted({index for op in steps for index in op.reads} - made - {value.index})
        return [index for index in read if not self.graph.values[index].is_free]

    def _obstacle(self, op: Op) -> str:
        if op.obstacle:
            return op.obstacle
        values = [self.tape.values[index] for index in op.reads]
        if any(not v.is_last and v.index in self.num_saved and v.producer is not None for v in values):
            return "what it reads is saved and overwritten later"
        return "it failed when it was replayed, or writes into memory that cannot be copied first"


def _front(graph: BlockGraph, chosen: BlockChoice) -> tuple[FrontRow, ...]:
    """The front, and the choice itself where it is not on it."""
    names: dict[object, str] = {}
    found: dict[object, tuple[Policy, BlockChoice]] = {}
    try:
        for name, policy in NAMED_POLICIES.items():
            names.setdefault(_identity(graph, choose(graph, policy)), name)
        found = {_identity(graph, choice): (policy, choice) for policy, choice in front(graph)}
    except ValueError:  # some mode cannot do without what must be dropped: there is no front to compare with
        names[_identity(graph, chosen)] = "this choice"
    found.setdefault(_identity(graph, chosen), (CHEAP, chosen))
    rows = [
        FrontRow(
            name=names.get(key) or f"{policy.price:.2g} s/B" + (", more phases" if policy.rerun else ""),
            held_bytes=sum(graph.values[value].num_bytes for value in _held(graph, choice)),
            replay_flops=choice.replay_flops,
            working_set_bytes=choice.working_set_bytes,
            num_phases=len(choice.groups),
            is_chosen=key == _identity(graph, chosen),
        )
        for key, (policy, choice) in found.items()
    ]
    return tuple(sorted(rows, key=lambda row: (-row.held_bytes, row.replay_flops)))


def _identity(graph: BlockGraph, choice: BlockChoice) -> object:
    return _held(graph, choice), choice.groups


def _held(graph: BlockGraph, choice: BlockChoice) -> frozenset[int]:
    """Without what is found by name: a choice that holds all that autograd saves names parameters too."""
    return frozenset(value for value in choice.held if not graph.values[value].is_free)


def _never_held(source: Source | None) -> str:
    if source is None or source.kind == UNKNOWN:
        return "a tensor that came from nowhere known: autograd holds it"
    return f"{source.kind}: never held, found again at replay"


def _costly(steps: Sequence[Op]) -> str:
    counts = Counter(op.kind for op in steps if op.kind != MEMORY)
    if not counts:
        return "no matrix product"
    return ", ".join(_count(count, _COSTLY[kind]) for kind, count in counts.items())


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


def _where(op: Op) -> str:
    return f"{op.label} in {op.module!r}" if op.module else op.label


def _origin(source: Source | None) -> str:
    return str(replace(source, module="")) if source is not None else UNKNOWN


def _home(source: Source | None) -> str:
    return source.module if source is not None else ""
