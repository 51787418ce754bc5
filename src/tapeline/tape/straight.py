"""A program as one Python function: a straight line of calls, with locals for registers.

Interpreting a list of calls costs as much as a small kernel; the function does not look anything up. Its text is kept with the
program, and says in which call an error was raised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from tapeline.tape.graph import Geometry, Op
from tapeline.tape.nested import tensor_leaves

Check = Callable[[int, torch.Tensor], None]
Replay = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor], Check | None], list[torch.Tensor]]


class Script(NamedTuple):
    """A program as a function."""

    function: Replay
    """Makes the tensor of each slot, given the tensors of the sources and of the roots."""
    text: str
    """The function as Python code."""
    ops: tuple[Op | None, ...]
    """The recorded op of each line of the function's body."""


class Register:
    """An operand: the result of an earlier call, a source or a root."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"r{self.number}"


class Writer:
    """Writes the function of one program, line by line."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.ops: list[Op | None] = []
        """The recorded op of each line, if it has one."""
        self._constants: dict[str, Any] = {}
        self._names: dict[Any, str] = {}

    def load(self, register: int, place: str) -> None:
        """Put a source or a root into a register."""
        self._line(f"r{register} = {place}")

    def call(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any], results: Any, op: Op | None) -> None:
        """Call an op; `results` are pairs of output number and register, or one register for an op of one output."""
        given = [self._text(arg) for arg in args]
        given += [f"{name}={self._text(arg)}" for name, arg in kwargs.items()]
        called = f"{self._constant(function)}({', '.join(given)})"
        if isinstance(results, int):
            self._line(f"r{results} = {called}", op)
        elif not results:
            self._line(called, op)
        else:
            self._line(f"out = {self._constant(tensor_leaves)}({called})", op)
            for number, register in results:
                self._line(f"r{register} = out[{number}]", op)
            self._line("del out")

    def view(self, result: int, register: int, geometry: Geometry) -> None:
        """Look at a storage in another geometry: the method is three times as quick as the op."""
        self._line(f"r{result} = {self._look(register, geometry)}")

    def free(self, registers: Sequence[int]) -> None:
        """Nothing needs these any more."""
        if registers:
            self._line("del " + ", ".join(f"r{register}" for register in registers))

    def check(self, slot: int, register: int, geometry: Geometry | None) -> None:
        """Hand the tensor of a slot to the function that compares it."""
        self._line(f"check({slot}, {f'r{register}' if geometry is None else self._look(register, geometry)})")

    def finish(self, results: Sequence[tuple[int, Geometry | None]]) -> Script:
        """The function, which returns `results`."""
        looks = (f"r{r}" if geometry is None else self._look(r, geometry) for r, geometry in results)
        self._line(f"return [{', '.join(looks)}]")
        arguments = ", ".join(["sources", "roots", "check", *(f"{name}={name}" for name in self._constants)])
        text = "\n    ".join([f"def replay({arguments}):", *self.lines])
        scope = dict(self._constants)
        exec(compile(text, "<replay>", "exec"), scope)  # noqa: S102 - the text is made above, of names and numbers alone
        return Script(scope["replay"], text, tuple(self.ops))

    def _line(self, text: str, op: Op | None = None) -> None:
        self.lines.append(text)
        self.ops.append(op)

    def _look(self, register: int, geometry: Geometry) -> str:
        return f"r{register}.as_strided({tuple(geometry.shape)!r}, {tuple(geometry.stride)!r}, {geometry.offset})"

    def _text(self, arg: Any) -> str:
        if isinstance(arg, Register):
            return f"r{arg.number}"
        if isinstance(arg, list):
            return f"[{', '.join(map(self._text, arg))}]"
        if arg is None or isinstance(arg, bool | int):
            return repr(arg)
        return self._constant(arg)

    def _constant(self, value: Any) -> str:
        name = self._names.setdefault(id(value), f"c{len(self._constants)}")
        self._constants[name] = value
        return name
