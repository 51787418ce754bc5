"""From a choice to what runs: for each saved tensor what to do with it, for each phase a straight list of calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from tapeline.planner.block import BlockChoice, BlockGraph, steps_for
from tapeline.tape.graph import ARGUMENT, Geometry, Op, Source, Tape, Use, uses
from tapeline.tape.options import narrowings

_as_strided = torch.Tensor.as_strided  # the method: calling the op boxes its lists, which takes three times as long
_clone = torch.ops.aten.clone.default

KEEP = -1


class NotReplayable(Exception):  # noqa: N818 - caught inside the package, never shown
    """An op that seemed replayable is not; carries its index."""

    def __init__(self, op: int) -> None:
        super().__init__(op)
        self.op = op


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a replay. Registers hold tensors; `fills` says which arguments come from which registers."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    fills: tuple[tuple[int, Any], ...]
    """Place among `args`, and a register or a nested list of registers and constants."""
    keyword_fills: tuple[tuple[str, Any], ...]
    results: tuple[tuple[int, int], ...]
    """Which output goes to which register; empty where the call writes into a register in place."""
    is_single: bool
    """Whether the op returns one tensor and not a tuple."""
    frees: tuple[int, ...]
    """Registers that nothing needs any more."""
    op: Op | None = None
    """The recorded op, for Functions and for messages."""


@dataclass(frozen=True, slots=True)
class Register:
    """An operand that stands for a register in nested arguments."""

    number: int


@dataclass(slots=True)
class Program:
    """What one phase replays."""

    calls: tuple[Call, ...]
    num_registers: int
    sources: tuple[tuple[int, int], ...]
    """Register, and number of the source among those of the recipe."""
    roots: tuple[tuple[int, int], ...]
    """Register, and the held value."""
    results: tuple[tuple[int, Geometry | None], ...]
    """For each slot: register, and how the saved tensor looks at it."""
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
    phase: int = KEEP
    """`KEEP`, or the phase that replays it."""
    slot: int = 0
    """Which result of the phase."""
    root: int = KEEP
    """The held value, if a phase starts from it."""
    narrow: torch.dtype | None = None
    """Hold it in this dtype, in which it was before: the cast is replayed."""


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
    input_packs: dict[int, Geometry | None]
    """Saved tensors that are the block's input: number, and how they look at it."""
    is_random: bool
    least_nodes: int
    most_nodes: int


def compile_recipe(tape: Tape, graph: BlockGraph, choice: BlockChoice) -> Recipe:
    """Prepare the replay of everything that a choice drops.

    Raises:
        NotReplayable: if an op writes in place into memory that cannot be copied first.
    """
    sources: dict[Source, int] = {}
    actions = [_action(tape, index) for index in range(len(tape.packs))]
    programs = []
    for number, (first, last) in enumerate(choice.groups):
        dropped = [i for i in range(first, last) if _is_replayed(graph, choice, tape.packs[i].value)]
        for slot, index in enumerate(dropped):
            actions[index] = actions[index]._replace(phase=number, slot=slot)
        targets = [(tape.packs[index].value, tape.packs[index].geometry) for index in dropped]
        programs.append(compile_program(tape, graph, choice.held, targets, sources))
    _mark_roots(tape, actions, {value for program in programs for _, value in program.roots})
    return Recipe(
        tape=tape,
        graph=graph,
        choice=choice,
        packs=tuple(actions),
        programs=tuple(programs),
        sources=tuple(sources),
        input_packs=_input_packs(tape),
        is_random=any(program.is_random for program in programs),
        least_nodes=tape.num_nodes - max(0, tape.cached_casts),
        most_nodes=tape.num_nodes - min(0, tape.cached_casts),
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
            actions[index] = actions[index]._replace(root=value, narrow=tape.values[value].base.dtype)


def _is_replayed(graph: BlockGraph, choice: BlockChoice, value: int) -> bool:
    known = graph.values[value]
    return value not in choice.held and not known.is_free and known.producer is not None


def _action(tape: Tape, index: int) -> PackAction:
    pack = tape.packs[index]
    return PackAction(
        shape=torch.Size(pack.geometry.shape),
        stride=pack.geometry.stride,
        dtype=pack.geometry.dtype,
        least_nodes=pack.nodes - max(0, pack.cached_casts),
        most_nodes=pack.nodes - min(0, pack.cached_casts),
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
    def __init__(
        self, tape: Tape, steps: Sequence[int], targets: Sequence[tuple[int, Geometry]], sources: dict[Source, int]
    ) -> None:
        self.tape, self.ops, self.targets, self.all_sources = tape, [tape.ops[step] for step in steps], targets, sources
        self.registers: dict[int, int] = {}
        self.views: dict[tuple[int, Geometry], int] = {}
        self.owned: set[int] = set()
        self.sources: list[tuple[int, int]] = []
        self.roots: list[tuple[int, int]] = []
        self.calls: list[list[Any]] = []
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
            calls=self._with_frees({register for register, _ in results}),
            num_registers=self.num_registers,
            sources=tuple(self.sources),
            roots=tuple(self.roots),
            results=tuple(results),
            is_random=any(op.is_random for op in self.ops),
            steps=tuple(op.index for op in self.ops),
            origins=self._origins(),
        )

    def _origins(self) -> tuple[str, ...]:
        names = {number: source for source, number in self.all_sources.items()}
        sources = [str(names[number]) for _, number in self.sources]
        return (*sources, *(f"what was kept of it ({self.tape.values[value].base})" for _, value in self.roots))

    def _add(self, op: Op) -> None:
        replaced = {}
        for value in op.writes:
            replaced[value] = self._buffer(op, value)
        args = [self._operand(arg, replaced) for arg in op.args]
        kwargs = {name: self._operand(arg, replaced) for name, arg in op.kwargs.items()}
        results = []
        overwritten = dict(zip(op.writes, op.makes, strict=False))
        for value, made in overwritten.items():
            self.registers[made] = replaced[value]
            self.owned.add(made)
        for made in op.makes[len(op.writes) :]:
            register = self._new(made)
            self.owned.add(made)
            results.append((self.tape.values[made].output, register))
        is_single = op.num_outputs == 1 and not op.is_function and not _returns_list(op.func)
        self._call(op.func, args, kwargs, results, is_single=is_single, op=op)

    def _buffer(self, op: Op, value: int) -> int:
        """A register with the content of `value` that may be overwritten."""
        register = self._register(value)
        is_needed_later = value in self.kept or self.last_read.get(value, -1) > op.index
        if value in self.owned and not is_needed_later:
            return register
        base = self.tape.values[value].base
        if base.offset or not _is_dense(base, self.tape.values[value].num_bytes):
            raise NotReplayable(op.index)
        copied = self._fresh()
        self._call(_clone, [Register(register)], {}, [(0, copied)], is_single=True)
        return copied

    def _operand(self, arg: Any, replaced: dict[int, int]) -> Any:
        if isinstance(arg, Use):
            return Register(self._look(arg, replaced))
        if isinstance(arg, list | tuple) and any(True for _ in uses(arg)):
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
        args = [Register(register), geometry.shape, geometry.stride, geometry.offset]
        self._call(_as_strided, args, {}, [(0, view)], is_single=True)
        return view

    def _register(self, value: int) -> int:
        if value in self.registers:
            return self.registers[value]
        register, source = self._new(value), self.tape.values[value].source
        if source is not None:
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

    def _call(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        results: Any,
        *,
        is_single: bool,
        op: Op | None = None,
    ) -> None:
        self.calls.append([func, args, kwargs, results, is_single, op])

    def _with_frees(self, results: set[int]) -> tuple[Call, ...]:
        """Say after which call each register is needed no more."""
        last: dict[int, int] = {}
        for number, (_, args, kwargs, outputs, _, _) in enumerate(self.calls):
            for register in (*_registers(args), *_registers(list(kwargs.values())), *(r for _, r in outputs)):
                last[register] = number
        frees: dict[int, list[int]] = {}
        for register, number in last.items():
            if register not in results:
                frees.setdefault(number, []).append(register)
        return tuple(
            Call(
                func=func,
                args=tuple(args),
                kwargs=kwargs,
                fills=tuple((place, _fill(arg)) for place, arg in enumerate(args) if _has_register(arg)),
                keyword_fills=tuple((name, _fill(arg)) for name, arg in kwargs.items() if _has_register(arg)),
                results=tuple(outputs),
                is_single=is_single,
                frees=tuple(frees.get(number, ())),
                op=op,
            )
            for number, (func, args, kwargs, outputs, is_single, op) in enumerate(self.calls)
        )


def _fill(arg: Any) -> Any:
    return arg.number if isinstance(arg, Register) else arg


def _has_register(arg: Any) -> bool:
    return any(True for _ in _registers(arg))


def _registers(arg: Any) -> Iterable[int]:
    if isinstance(arg, Register):
        yield arg.number
    elif isinstance(arg, list | tuple):
        for item in arg:
            yield from _registers(item)


def _returns_list(func: Any) -> bool:
    schema = getattr(func, "_schema", None)
    return (
        schema is None
        or len(schema.returns) != 1
        or "[]" in str(schema.returns[0].type)
        or "List" in str(schema.returns[0].type)
    )


def _is_dense(base: Geometry, num_bytes: int) -> bool:
    """Whether the tensor covers its storage, each element once, so that a clone has the same layout."""
    expected = 1
    for stride, size in sorted(zip(base.stride, base.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return expected * base.dtype.itemsize == num_bytes
