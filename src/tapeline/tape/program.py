"""From a choice to what runs: for each saved tensor what to do with it, for each phase a straight list of calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from tapeline.planner.block import BlockChoice, BlockGraph, steps_for
from tapeline.tape.functions import run_function, under_autocast
from tapeline.tape.graph import ARGUMENT, UNKNOWN, Geometry, Op, Source, Tape, Use, uses
from tapeline.tape.options import narrowings
from tapeline.tape.straight import Register, Script, Writer

KEEP = -1


class NotReplayable(Exception):  # noqa: N818 - caught inside the package, never shown
    """An op that seemed replayable is not; carries its index."""

    def __init__(self, op: int) -> None:
        super().__init__(op)
        self.op = op


@dataclass(slots=True)
class Program:
    """What one phase replays."""

    script: Script
    checked: Callable[[], Script]
    """The same calls, with each tensor compared and freed after its last use: checking needs no more memory than that."""
    sources: tuple[int, ...]
    """Numbers of the sources among those of the recipe."""
    roots: tuple[int, ...]
    """Held values that it starts from."""
    is_random: bool
    steps: tuple[int, ...]
    """The ops that it replays, by index on the tape."""
    origins: tuple[str, ...] = ()
    """Names of what it starts from: its sources, then its roots."""

    @property
    def num_ops(self) -> int:
        """Recorded ops that are replayed; looking at a storage in another geometry is not counted."""
        return len(self.steps)


class PackAction(NamedTuple):
    """What to expect of one saved tensor, and what happens to it. A tuple, because the pack hook has little time."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    least_nodes: int
    most_nodes: int
    is_plain: bool = True
    """Kept as it is, or dropped: nothing starts from it, and no other block has it."""
    phase: int = KEEP
    """`KEEP`, or the phase that replays it."""
    slot: int = 0
    """Which result of the phase."""
    root: int = KEEP
    """The held value, if a phase starts from it."""
    value: int = KEEP
    """The value that it is of."""
    tier: str = ""
    """Where what is held of it is moved; empty: nowhere."""
    narrow: tuple[int, torch.dtype] | None = None
    """Hold what it was cast from: that value, made by casting back to its dtype."""


@dataclass(slots=True)
class Recipe:
    """All that the runtime needs for calls of one class under one policy."""

    tape: Tape
    graph: BlockGraph
    choice: BlockChoice
    packs: tuple[PackAction, ...]
    programs: tuple[Program, ...]
    sources: tuple[Source, ...]
    """Sources that some phase reads, each named once."""
    tiers: dict[int, str]
    """Held values that are moved, and where."""
    input_packs: dict[int, Geometry | None]
    """Saved tensors that are the block's input: number, and how they look at it."""
    least_nodes: int
    most_nodes: int

    @property
    def needs_input(self) -> bool:
        """Whether backward, or a replay, reads the block's input."""
        return bool(self.input_packs) or any(s.kind == ARGUMENT and s.place == 0 for s in self.sources)


def compile_recipe(
    tape: Tape, graph: BlockGraph, choice: BlockChoice, tiers: Mapping[int, str] | None = None
) -> Recipe:
    """Prepare the replay of everything that a choice drops.

    Args:
        tape: the tape.
        graph: the same tape for the planner.
        choice: what is held.
        tiers: of what is held, what is moved, and where.

    Raises:
        NotReplayable: if an op writes in place into memory that cannot be copied first.
    """
    sources: dict[Source, int] = {}
    tiers = {value: tier for value, tier in (tiers or {}).items() if value in choice.held}
    actions = [_action(tape, index) for index in range(len(tape.packs))]
    programs = []
    for number, (first, last) in enumerate(choice.groups):
        dropped = [i for i in range(first, last) if _is_replayed(graph, choice, tape.packs[i].value)]
        for slot, index in enumerate(dropped):
            actions[index] = actions[index]._replace(phase=number, slot=slot)
        targets = [(tape.packs[index].value, tape.packs[index].geometry) for index in dropped]
        programs.append(compile_program(tape, graph, choice.held, targets, sources))
    _mark_roots(tape, actions, {value for program in programs for value in program.roots})
    input_packs = _input_packs(tape)
    for index, action in enumerate(actions):
        tier = tiers.get(action.value, "") if action.phase == KEEP else ""
        is_plain = action.root == KEEP and action.narrow is None and index not in input_packs and not tier
        actions[index] = action._replace(is_plain=is_plain, tier=tier)
    return Recipe(
        tape=tape,
        graph=graph,
        choice=choice,
        packs=tuple(actions),
        programs=tuple(programs),
        sources=tuple(sources),
        tiers=tiers,
        input_packs=input_packs,
        least_nodes=tape.num_nodes - tape.made_casts,
        most_nodes=tape.num_nodes + tape.found_casts,
    )


def _input_packs(tape: Tape) -> dict[int, Geometry | None]:
    found: dict[int, Geometry | None] = {}
    for index, pack in enumerate(tape.packs):
        value = tape.values[pack.value]
        if value.source is not None and value.source.kind == ARGUMENT and value.source.place == 0 and value.is_last:
            found[index] = None if pack.geometry == value.base else pack.geometry
    return found


def _mark_roots(tape: Tape, actions: list[PackAction], roots: set[int]) -> None:
    """Say of which saved tensor each root is taken: one that looks at its storage as the tape does, if there is one."""
    for wants_base in (True, False):
        for index, pack in enumerate(tape.packs):
            is_base = pack.geometry == tape.values[pack.value].base
            if pack.value in roots and actions[index].phase == KEEP and is_base >= wants_base:
                actions[index] = actions[index]._replace(root=pack.value)
                roots.discard(pack.value)
    for value, index in narrowings(tape).items():
        if value in roots:
            actions[index] = actions[index]._replace(narrow=(value, tape.values[value].base.dtype))


def _is_replayed(graph: BlockGraph, choice: BlockChoice, value: int) -> bool:
    known = graph.values[value]
    return value not in choice.held and not known.is_free and known.producer is not None


def _action(tape: Tape, index: int) -> PackAction:
    pack = tape.packs[index]
    return PackAction(
        shape=torch.Size(pack.geometry.shape),
        stride=pack.geometry.stride,
        dtype=pack.geometry.dtype,
        least_nodes=pack.nodes - pack.made_casts,
        most_nodes=pack.nodes + pack.found_casts,
        value=pack.value,
    )


def compile_program(
    tape: Tape,
    graph: BlockGraph,
    held: frozenset[int],
    targets: Sequence[tuple[int, Geometry]],
    sources: dict[Source, int],
) -> Program:
    """The calls that make `targets` (values and how to look at them) from what is held or free.

    Args:
        tape: the tape.
        graph: the same tape for the planner.
        held: values that are there.
        targets: what to make.
        sources: numbers of the sources by name; new ones are added.
    """
    steps = steps_for(graph, held, [value for value, _ in targets])
    return _Compiler(tape, steps, targets, sources).program()


class _Compiler:
    """Writes the calls of one program. Registers hold tensors; each is freed after its last use."""

    def __init__(
        self, tape: Tape, steps: Sequence[int], targets: Sequence[tuple[int, Geometry]], sources: dict[Source, int]
    ) -> None:
        self.tape, self.ops, self.targets, self.all_sources = tape, [tape.ops[step] for step in steps], targets, sources
        self.registers: dict[int, int] = {}
        self.views: dict[tuple[int, Geometry], int] = {}
        self.owned: set[int] = set()
        self.sources: list[tuple[int, int]] = []
        self.roots: list[tuple[int, int]] = []
        self.calls: list[_Line] = []
        self.num_registers = 0
        self.kept = {value for value, _ in targets}
        self.last_read = {value: op.index for op in self.ops for value in op.reads}

    def program(self) -> Program:
        for op in self.ops:
            self._add(op)
        results = []
        for value, geometry in self.targets:
            base = self.tape.values[value].base
            results.append((self._register(value), None if geometry == base else geometry))
        return Program(
            script=self._script(results),
            checked=partial(self._checked_script, results),
            sources=tuple(number for _, number in self.sources),
            roots=tuple(value for _, value in self.roots),
            is_random=any(op.is_random for op in self.ops),
            steps=tuple(op.index for op in self.ops),
            origins=self._origins(),
        )

    def _script(self, results: list[tuple[int, Geometry | None]]) -> Script:
        writer, kept = self._loaded(), {register for register, _ in results}
        last = self._last_uses()
        for number, call in enumerate(self.calls):
            call.write(writer)
            writer.free([register for register in last.get(number, ()) if register not in kept])
        return writer.finish(results)

    def _checked_script(self, results: list[tuple[int, Geometry | None]]) -> Script:
        writer, last = self._loaded(), self._last_uses()
        for number, call in enumerate(self.calls):
            call.write(writer)
            for slot, (register, geometry) in enumerate(results):
                if register in last.get(number, ()):
                    writer.check(slot, register, geometry)
            writer.free(last.get(number, ()))
        return writer.finish(())

    def _loaded(self) -> Writer:
        """A writer whose registers have the sources and the roots."""
        writer = Writer()
        for place, (register, _) in enumerate(self.sources):
            writer.load(register, f"sources[{place}]")
        for place, (register, _) in enumerate(self.roots):
            writer.load(register, f"roots[{place}]")
        return writer

    def _last_uses(self) -> dict[int, list[int]]:
        """The registers that no call needs any more, by the number of the last call that did; views count as their base."""
        last: dict[int, int] = {}
        for number, call in enumerate(self.calls):
            last.update(dict.fromkeys(call.registers(), number))
        for call in reversed(self.calls):
            if isinstance(call.function, Geometry):
                base = call.args[0].number
                last[base] = max(last[base], last[call.results])
        found: dict[int, list[int]] = {}
        for register, number in last.items():
            found.setdefault(number, []).append(register)
        return found

    def _origins(self) -> tuple[str, ...]:
        names = {number: source for source, number in self.all_sources.items()}
        sources = [str(names[number]) for _, number in self.sources]
        return (*sources, *(f"what was kept of it ({self.tape.values[value].base})" for _, value in self.roots))

    def _add(self, op: Op) -> None:
        replaced = {value: self._buffer(op, value) for value in op.writes}
        args = [self._operand(arg, replaced) for arg in op.args]
        kwargs = {name: self._operand(arg, replaced) for name, arg in op.kwargs.items()}
        for value, made in zip(op.writes, op.makes, strict=False):
            self.registers[made] = replaced[value]
            self.owned.add(made)
        fresh = op.makes[len(op.writes) :]
        results: Any = [(self.tape.values[made].output, self._new(made)) for made in fresh]
        self.owned.update(fresh)
        if len(results) == 1 and op.num_outputs == 1 and not op.is_function and not _returns_list(op.func):
            results = results[0][1]
        function = partial(run_function, op) if op.is_function else callable_of(op)
        self.calls.append(_Line(function, [args] if op.is_function else args, kwargs, results, op))

    def _buffer(self, op: Op, value: int) -> int:
        """A register with the content of `value` that may be overwritten."""
        register = self._register(value)
        is_needed_later = value in self.kept or self.last_read.get(value, -1) > op.index
        if value in self.owned and not is_needed_later:
            return register
        base = self.tape.values[value].base
        if base.offset or not base.is_dense(self.tape.values[value].num_bytes):
            raise NotReplayable(op.index)
        copied = self._fresh()
        self.calls.append(_Line(torch.ops.aten.clone.default._op, [Register(register)], {}, copied, None))
        return copied

    def _operand(self, arg: Any, replaced: dict[int, int]) -> Any:
        if isinstance(arg, Use):
            return Register(self._look(arg, replaced))
        if isinstance(arg, list | tuple) and uses(arg):
            return [self._operand(item, replaced) for item in arg]
        return arg

    def _look(self, use: Use, replaced: dict[int, int]) -> int:
        if use.value in replaced:
            return replaced[use.value] if use.geometry is None else self._view(replaced[use.value], use.geometry)
        register = self._register(use.value)
        if use.geometry is None:
            return register
        key = (use.value, use.geometry)
        if key not in self.views:
            self.views[key] = self._view(register, use.geometry)
        return self.views[key]

    def _view(self, register: int, geometry: Geometry) -> int:
        view = self._fresh()
        self.calls.append(_Line(geometry, [Register(register)], {}, view, None))
        return view

    def _register(self, value: int) -> int:
        if value in self.registers:
            return self.registers[value]
        register, source = self._new(value), self.tape.values[value].source
        if source is not None and source.kind != UNKNOWN:
            self.sources.append((register, self.all_sources.setdefault(source, len(self.all_sources))))
        else:
            self.roots.append((register, value))
        return register

    def _new(self, value: int) -> int:
        self.registers[value] = self._fresh()
        return self.registers[value]

    def _fresh(self) -> int:
        self.num_registers += 1
        return self.num_registers - 1


class _Line(NamedTuple):
    """One call; a geometry in place of the function looks at a register in it."""

    function: Any
    args: list[Any]
    kwargs: dict[str, Any]
    results: Any
    op: Op | None

    def write(self, writer: Writer) -> None:
        if isinstance(self.function, Geometry):
            writer.view(self.results, self.args[0].number, self.function)
        else:
            writer.call(self.function, self.args, self.kwargs, self.results, self.op)

    def registers(self) -> Iterator[int]:
        yield from _registers([*self.args, *self.kwargs.values()])
        if isinstance(self.results, int):
            yield self.results
        else:
            yield from (register for _, register in self.results)


def callable_of(op: Op) -> Any:
    """What a replay calls: the op without the Python wrapper around it."""
    return under_autocast(op, getattr(op.func, "_op", op.func))


def _registers(arg: Any) -> Iterator[int]:
    if isinstance(arg, Register):
        yield arg.number
    elif isinstance(arg, list):
        for item in arg:
            yield from _registers(item)


def _returns_list(func: Any) -> bool:
    schema = getattr(func, "_schema", None)
    return (
        schema is None
        or len(schema.returns) != 1
        or "[]" in str(schema.returns[0])
        or "List" in str(schema.returns[0].type)
    )
