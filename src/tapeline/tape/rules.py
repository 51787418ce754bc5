"""What the user insists on keeping or dropping: by the name of a submodule, or by the kind of an operation."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from tapeline.errors import UsageError, did_you_mean
from tapeline.tape.graph import ARGUMENT, Op, Tape

EVERYTHING = "*"


@dataclass(slots=True)
class Rules:
    """Names given as ``keep=`` and ``drop=``; a name that matches nothing anywhere is an error in the end.

    A name is that of a submodule of the block (``self_attn``, ``mlp.act_fn``, with ``*`` for any part), of an operation
    (``softmax``, ``mm``, ``native_dropout``, the name of a Function), or of a class of operations (``matmul``,
    ``attention``).
    """

    keep: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    matched: set[str] = field(default_factory=set)
    known: set[str] = field(default_factory=set)

    def apply(self, tape: Tape) -> tuple[frozenset[int], frozenset[int]]:
        """The saved values of a tape that must be held, and those that must not."""
        if not (self.keep or self.drop):
            return frozenset(), frozenset()
        saved = {pack.value for pack in tape.packs if tape.values[pack.value].producer is not None}
        held, dropped = set(), set()
        for op in tape.ops:
            made = saved.intersection(op.makes)
            if not made:
                continue
            self.known |= {op.module, op.kind, op.label}
            if self._match(self.drop, op):
                dropped |= made
            if self._match(self.keep, op):
                held |= made
        if both := held & dropped:
            op = tape.ops[tape.values[min(both)].producer or 0]
            raise UsageError(f"keep and drop both name what {op.label} in {op.module!r} makes: leave one out.")
        return frozenset(held), frozenset(dropped)

    def check(self) -> None:
        """Raise if a name has matched nothing.

        Raises:
            UsageError: with the nearest name that would.
        """
        for name in (*self.keep, *self.drop):
            if name not in self.matched:
                known = sorted(self.known - {""})
                raise UsageError(
                    f"keep/drop: {name!r} matches nothing that backward needs{did_you_mean(name, known)}. Known here: "
                    f"{', '.join(known[:20])}."
                )

    def _match(self, names: tuple[str, ...], op: Op) -> bool:
        found = [name for name in names if matches(name, op)]
        self.matched.update(found)
        return bool(found)


def named_values(tape: Tape, names: Collection[str]) -> frozenset[int]:
    """The saved values of a tape that are meant by names.

    Those that the block returns are left out, copies of weights, and what is written over later in the call.
    """
    saved = {pack.value for pack in tape.packs if tape.values[pack.value].is_last} - _of_weights(tape)
    made = (value for op in tape.ops if any(matches(name, op) for name in names) for value in op.makes)
    return frozenset(value for value in made if value in saved and not tape.values[value].is_output)


def _of_weights(tape: Tape) -> set[int]:
    """What is made of weights and tables alone, whatever the block is called with: casts, and weights unpacked."""
    found = {value.index for value in tape.values if value.source is not None and value.source.kind != ARGUMENT}
    others = {value.index for value in tape.values if value.source is not None and value.source.kind == ARGUMENT}
    for op in tape.ops:
        if not others.isdisjoint(op.reads):
            others.update(op.makes)
        elif not found.isdisjoint(op.reads):
            found.update(op.makes)
    return found - others


def matches(name: str, op: Op) -> bool:
    """Whether a name of ``keep=`` or ``drop=`` means what this op makes."""
    if name in (op.kind, op.label, op.name, EVERYTHING):
        return True
    parts = op.module.split(".")
    inside = (".".join(parts[start:end]) for start in range(len(parts)) for end in range(start + 1, len(parts) + 1))
    return any(fnmatchcase(path, name) for path in inside)
