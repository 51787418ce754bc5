"""The tape as data: what one call of a block computes, in order, and what autograd saves of it.

Bytes belong to storages, and a storage's content changes when something is written into it. So the nodes of a tape are not
tensors but *values*: the content of one storage between two writes. An operand is a value seen through a
geometry (shape, strides, offset); views cost nothing and are no operations here. This is static single assignment over
storages: an in-place operation reads one value and makes the next one of the same storage, and every alias sees it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from tapeline.compat import Autocast
from tapeline.tape.nested import leaves

ARGUMENT = "argument"
PARAMETER = "parameter"
BUFFER = "buffer"
ATTRIBUTE = "attribute"
UNKNOWN = "unknown"
OWN_GENERATOR = "it draws from a generator of its own"
COLLECTIVE = "a collective"
WRITES_SOURCE = "it writes into a buffer, a parameter or an argument"


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a tensor looks at its storage; offset and strides in elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Geometry:
        return cls(tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()), tensor.dtype)

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """Look at the storage of `tensor`, which has the same dtype, in this way."""
        return tensor.as_strided(self.shape, self.stride, self.offset)

    def is_dense(self, num_bytes: int) -> bool:
        """Whether a tensor that looks so covers a storage of `num_bytes`, each element once: a clone has the same layout."""
        expected = 1
        for stride, size in sorted(zip(self.stride, self.shape, strict=True)):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return expected * self.dtype.itemsize == num_bytes

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


@dataclass(frozen=True, slots=True)
class Source:
    """Where a value that the call did not make comes from, so that it can be found in any call."""

    kind: str
    """``argument``, ``parameter``, ``buffer``, ``attribute``, or ``unknown``: a tensor that came from nowhere known."""
    place: int = -1
    """Index among the tensors of the arguments, in order."""
    module: str = ""
    """Name of the submodule that holds it."""
    name: str = ""
    """Name of the parameter, buffer or attribute in that submodule, with dots for what hangs on it."""

    def __str__(self) -> str:
        if self.kind == ARGUMENT:
            return f"argument {self.place}"
        path = f"{self.module}.{self.name}".strip(".")
        return f"{self.kind} {path!r}" if path else self.kind


@dataclass(slots=True)
class Value:
    """The content of one storage between two writes."""

    index: int
    storage: int
    """Number of its storage on the tape."""
    num_bytes: int
    """Bytes of the whole storage."""
    base: Geometry
    """How the tensor that replaying yields looks at the storage."""
    producer: int | None = None
    """Index of the op that makes it; ``None`` for a source."""
    output: int = 0
    """Which tensor among the outputs of its producer: counts saved tensors of a Function after its outputs."""
    source: Source | None = None
    """Where it comes from if no op makes it."""
    previous: int | None = None
    """The value that was overwritten to make this one."""
    is_last: bool = True
    """Whether the storage still has this content when the call ends."""
    is_output: bool = False
    """Whether the block returns it: something outside keeps it alive anyway."""
    requires_grad: bool = False
    """For arguments: whether the tensor requires grad."""
    is_unseen: bool = False
    """Memory of which no op has written all: a kernel that the dispatcher does not show may have."""
    is_wrapper: bool = False
    """A wrapper subclass, which cannot be looked at in another geometry."""


@dataclass(frozen=True, slots=True)
class Use:
    """An operand: a value, seen as its base (``None``) or through another geometry."""

    value: int
    geometry: Geometry | None = None

    def __repr__(self) -> str:
        return f"%{self.value}" if self.geometry is None else f"%{self.value}:{self.geometry!r}"


@dataclass(slots=True)
class Op:
    """One operation: an aten or custom op, or a Python `autograd.Function` as a whole."""

    index: int
    func: Any
    """The op overload, or the class of the Function."""
    args: tuple[Any, ...]
    """Positional arguments with a `Use` in place of each tensor."""
    kwargs: dict[str, Any]
    reads: tuple[int, ...]
    """Values it needs."""
    makes: tuple[int, ...] = ()
    """Values it makes, in the order of its outputs; for an in-place op the new content of what it writes."""
    writes: tuple[int, ...] = ()
    """Values whose storage it overwrites."""
    num_outputs: int = 1
    """Tensors it returns, aliases included."""
    module: str = ""
    """Name of the innermost submodule that ran it."""
    kind: str = "memory"
    """Class of its cost, see `tapeline.cost.price.op_class`."""
    flops: int = 0
    moved_bytes: int = 0
    """Bytes read and written."""
    is_random: bool = False
    """Whether it draws from the default generator of its device."""
    is_function: bool = False
    has_grad: bool = True
    """For a Function: whether it was applied with autograd on."""
    autocast: Autocast = ()
    """For an op whose kernel may be Python, and a Function: the autocast that it ran under."""
    grad_flags: tuple[bool, ...] = ()
    """For a Function: which of its tensor arguments required grad."""
    obstacle: str = ""
    """Why it must not be replayed; empty if it may."""

    @property
    def name(self) -> str:
        if self.is_function:
            return str(self.func.__name__)
        return str(self.func).removeprefix("aten.") if self.func is not None else "constant"

    @property
    def label(self) -> str:
        """The name without overload, as `keep` and `drop` take it."""
        return self.name if self.is_function else self.name.split(".")[0].removeprefix("_")


@dataclass(frozen=True, slots=True)
class Pack:
    """One tensor that autograd saved, in the order of saving."""

    value: int
    geometry: Geometry
    position: int
    """Number of ops recorded before it."""
    nodes: int
    """Autograd nodes made since the call began, a witness of the op sequence."""
    made_casts: int
    """How many of these nodes a filled autocast cache would leave out."""
    found_casts: int
    """How many more nodes there were with an empty autocast cache."""


@dataclass(slots=True)
class Tape:
    """What one call of a block computes and saves. Made by `tapeline.tape.record.Recorder`."""

    ops: list[Op] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    packs: list[Pack] = field(default_factory=list)
    outputs: list[tuple[int, Geometry]] = field(default_factory=list)
    """Tensors that the call returned, in order."""
    num_nodes: int = 0
    """Autograd nodes that the whole call makes."""
    made_casts: int = 0
    """As in `Pack`, for the whole call."""
    found_casts: int = 0
    """As in `Pack`, for the whole call."""
    casts: list[Source] = field(default_factory=list)
    """The parameters that autocast may find a copy of in its cache."""
    obstacle: str = ""
    """Why nothing on this tape may be replayed; empty if it may."""
    digest: str = ""
    """Equal for tapes that compute the same in the same way."""

    @property
    def changes_state(self) -> bool:
        """Whether the call changes something that it was given: running it twice would change it twice."""
        return any(op.obstacle in (WRITES_SOURCE, OWN_GENERATOR, COLLECTIVE) for op in self.ops)

    def seal(self) -> Tape:
        """Compute the digest once everything is recorded."""
        text = hashlib.sha256()
        for line in self._lines():
            text.update(line.encode())
        self.digest = text.hexdigest()[:16]
        return self

    def saved_bytes(self) -> int:
        """Bytes of the storages that autograd saves and the call itself made, each counted once."""
        storages = {self.values[pack.value].storage: self.values[pack.value] for pack in self.packs}
        return sum(v.num_bytes for v in storages.values() if v.producer is not None and not v.is_output)

    def _lines(self) -> Iterator[str]:
        for op in self.ops:
            func = f"{op.func}{id(op.func)}" if op.is_function else op.func
            yield f"{func}{_exact((op.args, op.kwargs))}{op.makes}{op.module}{op.grad_flags}{op.autocast}{op.obstacle}\n"
        for value in self.values:
            yield f"{value.num_bytes}{value.base!r}{value.source}{value.previous}{value.is_last}{value.is_output}\n"
        for pack in self.packs:
            yield f"{pack}\n"
        yield f"{self.outputs}{self.num_nodes}{self.obstacle}"


def _exact(argument: Any) -> str:
    """Arguments as text without loss: a tensor prints rounded."""
    if isinstance(argument, torch.Tensor):
        return f"tensor({argument.dtype}{argument.tolist()!r})"
    if isinstance(argument, torch.Generator):
        return "generator"
    if isinstance(argument, list | tuple):
        return f"{type(argument).__name__}({','.join(map(_exact, argument))})"
    if isinstance(argument, dict):
        return f"dict({','.join(f'{name}={_exact(argument[name])}' for name in sorted(argument))})"
    return repr(argument)


def uses(arguments: Any) -> list[Use]:
    """The operands among nested arguments, in order."""
    return [leaf for leaf in leaves(arguments) if isinstance(leaf, Use)]


def first_difference(one: Tape, other: Tape) -> str:
    """Name the first op in which two tapes differ, or say that what they save differs."""
    for before, after in zip(one.ops, other.ops, strict=False):
        left, right = (f"{op.name}{op.args!r}{op.kwargs!r}" for op in (before, after))
        if left != right:
            return f"op {before.index} was {left[:200]} and is {right[:200]}"
    if len(one.ops) != len(other.ops):
        return f"{len(one.ops)} ops before, {len(other.ops)} now"
    return "the same ops, but what autograd saves of them differs"
