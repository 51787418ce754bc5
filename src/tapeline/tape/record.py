"""Recording the tape of one call while it runs, on real tensors or on tensors without data.

The recorder is a dispatch mode for the ops, a pack hook for what autograd saves, and a `CallWatch` for Functions and modules.
It holds no tensor: recording a call needs no more memory than the call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tapeline.compat import autocast_of_caller, autocast_state, is_native, run_op
from tapeline.cost.price import MATMUL, MEMORY, OTHER, count_flops, op_class
from tapeline.ledger import DEVICE_OF
from tapeline.tape.graph import (
    ARGUMENT,
    BUFFER,
    COLLECTIVE,
    OWN_GENERATOR,
    UNKNOWN,
    WRITES_SOURCE,
    Geometry,
    Op,
    Pack,
    Source,
    Tape,
    Use,
    Value,
    uses,
)
from tapeline.tape.nested import PLAIN, leaves, tensor_leaves
from tapeline.tape.ops import (
    CHANGES_STORAGE,
    COLLECTIVES,
    cached_dtypes,
    is_about_shape,
    is_plain_index,
    is_random,
    number_generators,
    short_name,
    written,
)
from tapeline.tape.sources import has_storage, module_sources
from tapeline.tape.values import ValueTable, is_lazy
from tapeline.tape.watch import CallWatch

aten = torch.ops.aten
_GIVEN = (torch.Tensor, type, *PLAIN)
DRAWS_NUMBERS = "it draws from the generators of Python or NumPy"
_READS_VALUES = {aten._local_scalar_dense.default, aten.equal.default}
_UNANNOTATED_WRITES = {"native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"}  # they update running statistics
_UNINITIALISED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted"}
_OVERWRITES = {"copy_", "fill_", "zero_", "bernoulli_", "normal_", "uniform_", "random_", "exponential_"}
_MAX_CONSTANT_BYTES = 1024
_count_nodes = torch.autograd._get_sequence_nr


class _Region:
    """A Function that is being applied: what it does inside belongs to it."""

    def __init__(self, func: type, operands: list[torch.Tensor], args: Any) -> None:
        self.func, self.args = func, args
        self.flags = tuple(tensor.requires_grad for tensor in operands)
        self.versions = [(tensor, tensor._version) for tensor in operands if not tensor.is_inference()]
        self.saved: list[Value] = []
        self.num_packs = 0
        self.flops = 0
        self.is_random = False
        self.has_grad = torch.is_grad_enabled()
        self.autocast = autocast_state()
        self.obstacle = ""


class Recorder(TorchDispatchMode):
    """Records the ops of what runs inside; `pack` is to be called for every tensor that autograd saves there.

    Args:
        module: the block, whose parameters, buffers and tensor attributes are known by name.
        arguments: the arguments of the call; their tensors are known by their place.
    """

    def __init__(self, module: nn.Module, arguments: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape = Tape()
        self.is_paused = False
        """True while the runtime itself computes something."""
        self.table = ValueTable(self.tape)
        self._region: _Region | None = None
        self._watch = CallWatch(
            {id(part): name for name, part in module.named_modules()},
            self._begin_function,
            self._end_function,
            self._values_read,
        )
        self._parameters: dict[int, nn.Parameter] = {}
        for source, tensor in module_sources(module):
            if isinstance(tensor, nn.Parameter):
                self._parameters[id(tensor)] = tensor
            if has_storage(tensor) and self.table.find(tensor) is None:
                self.table.add(tensor, source=source)
        for place, tensor in enumerate(tensor_leaves(arguments)):
            self._add_argument(tensor, place)
        self.cached_dtypes = cached_dtypes()
        self._first_node = _count_nodes()
        self._numbers: tuple[Any, ...] = ()

    def __enter__(self) -> Recorder:
        super().__enter__()  # type: ignore[no-untyped-call]
        self._first_node = _count_nodes()
        if not self._watch.start():
            self.refuse("a profiler is running, so that Functions cannot be seen")
        self._numbers = number_generators()
        return self

    def __exit__(self, *exc: object) -> None:
        self._watch.stop()
        self._region = None
        if number_generators() != self._numbers:
            self.refuse(DRAWS_NUMBERS)
        self.tape.num_nodes = _count_nodes() - self._first_node
        super().__exit__(*exc)  # type: ignore[no-untyped-call]

    def pack(self, tensor: torch.Tensor) -> int:
        """Note a tensor that autograd saves; returns its number."""
        value = self.table.find(tensor)
        region = self._region
        position = len(self.tape.ops)
        if region is not None:
            if value is None:
                value = self.table.add(tensor, producer=position, output=-1 - region.num_packs)
                region.saved.append(value)
            region.num_packs += 1
            position += 1
        elif value is None:
            value = self._value(tensor)
        self._must_be_seen(value)
        if value.base.dtype != tensor.dtype or is_lazy(tensor):  # the real view of a complex tensor: it stays as it is
            value = self.tape.values[self.table.use(tensor, value).value]
        nodes = _count_nodes() - self._first_node
        casts = self.tape.made_casts, self.tape.found_casts
        self.tape.packs.append(Pack(value.index, Geometry.of(tensor), position, nodes, *casts))
        return len(self.tape.packs) - 1

    def finish(self, out: Any) -> Tape:
        """Say what the call returned; nothing more is recorded."""
        for tensor in tensor_leaves(out):
            if not has_storage(tensor):
                continue
            value = self._value(tensor)
            self._must_be_seen(value)
            for other in self.tape.values:
                other.is_output = other.is_output or other.storage == value.storage
            self.tape.outputs.append((value.index, Geometry.of(tensor)))
        return self.tape.seal()

    def made(self, value: Value, tensor: torch.Tensor) -> None:
        """Called for every value that an op outside Functions makes; does nothing here."""

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing for a while: the runtime itself, or a hook of somebody else, computes something."""
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False

    def refuse(self, reason: str) -> None:
        """Nothing on this tape may be replayed; the first reason stays."""
        self.tape.obstacle = self.tape.obstacle or reason

    # -- ops -------------------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.is_paused or func is DEVICE_OF:
            return func(*args, **kwargs)
        if self._region is not None:
            out = run_op(func, args, kwargs)
            _see_inside(self._region, func, args, kwargs, out)
            return out
        if func is aten.lift_fresh.default and self._note_constant(args[0]):
            return func(*args, **kwargs)
        operands = tensor_leaves((args, kwargs))
        if short_name(func) in CHANGES_STORAGE:
            self.refuse(f"it changes the size of a storage ({func})")
        spec, reads = (self._spec(args), self._spec(kwargs)), [self._value(tensor) for tensor in operands]
        versions = [0 if tensor.is_inference() else tensor._version for tensor in operands]
        out = self._run(func, args, kwargs)
        wrote = list(written(func, args, kwargs))
        outputs = tensor_leaves(out)
        fresh = [(place, tensor) for place, tensor in enumerate(outputs) if self.table.find(tensor) is None]
        if not wrote and any(t._version != v for t, v in zip(operands, versions, strict=True) if not t.is_inference()):
            self.refuse(f"{func} writes without saying so")
        if reads and (func in _READS_VALUES or (isinstance(out, bool | int | float) and not is_about_shape(func))):
            self.refuse(f"it reads the values of tensors ({func})")
        if fresh or wrote:
            op = Op(len(self.tape.ops), func, *spec, tuple(dict.fromkeys(use.value for use in uses(spec))))
            op.flops = count_flops(func, args, kwargs, out)
            op.is_random = is_random(func, args, kwargs)
            op.num_outputs = len(outputs)
            op.autocast = () if is_native(func) else autocast_of_caller()
            op.moved_bytes = sum(t.nbytes for t in (*operands, *(t for _, t in fresh)) if t.layout == torch.strided)
            self._note(op, reads, wrote, fresh)
        return out

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._watch.is_inside_op = True
        try:
            return run_op(func, args, kwargs)
        finally:
            self._watch.is_inside_op = False

    def _note(
        self, op: Op, reads: list[Value], wrote: list[torch.Tensor], fresh: list[tuple[int, torch.Tensor]]
    ) -> None:
        name = short_name(op.func)
        op.module, op.kind = self._watch.modules[-1], op_class(op.func)
        self.tape.ops.append(op)
        op.obstacle = self._obstacle(op, name, wrote)
        written = [self._value(tensor) for tensor in wrote]
        for value in reads:
            if not (value in written and name in _OVERWRITES):
                self._must_be_seen(value)
        if name in _UNANNOTATED_WRITES:
            for value in reads:
                value.is_last = value.is_last and not (value.source is not None and value.source.kind == BUFFER)
        op.writes = tuple(value.index for value in written)
        makes = [self.table.overwrite(tensor, op.index) for tensor in wrote]
        for before, after, tensor in zip(written, makes, wrote, strict=True):
            is_whole = name in _OVERWRITES and tensor.nbytes == before.num_bytes
            after.is_unseen = before.is_unseen and not is_whole
        for place, tensor in fresh:
            if self.table.find(tensor) is None:  # two outputs may share a storage
                makes.append(self.table.add(tensor, producer=op.index, output=place))
                makes[-1].is_unseen = name in _UNINITIALISED
        op.makes = tuple(value.index for value in makes)
        for value, tensor in zip(makes, (*wrote, *(tensor for _, tensor in fresh)), strict=False):
            self.made(value, tensor)
        if op.func is aten._to_copy.default:
            self._note_cast(reads[0], makes[0])

    def _obstacle(self, op: Op, name: str, wrote: list[torch.Tensor]) -> str:
        if not hasattr(op.func, "_schema"):
            return "a higher-order operator"
        if op.func.namespace in COLLECTIVES:
            return COLLECTIVE
        if torch.Tag.dynamic_output_shape in op.func.tags and not is_plain_index(op):
            self.refuse(f"shapes depend on the values of tensors ({op.func})")
        if name in _UNANNOTATED_WRITES or any(self.table.root(self._value(t)).source is not None for t in wrote):
            return WRITES_SOURCE
        if op.kwargs.get("generator") is not None:
            return OWN_GENERATOR
        return ""

    def _must_be_seen(self, value: Value) -> None:
        """Memory that is read before ops have written all of it was filled by a kernel that the dispatcher does not show."""
        if value.is_unseen:
            first = self.table.root(value)
            assert first.producer is not None, "made by an op"
            self.tape.ops[first.producer].obstacle = "memory that a kernel out of sight may have filled"

    def _note_constant(self, tensor: torch.Tensor) -> bool:
        """``torch.tensor(3.0)`` in a forward: a number that is written in the code."""
        is_small = tensor.nbytes <= _MAX_CONSTANT_BYTES and (tensor.dim() == 0 or not tensor.is_floating_point())
        if isinstance(tensor, FakeTensor) or not is_small or self.table.find(tensor) is not None:
            return False
        op = Op(len(self.tape.ops), aten.clone.default, (tensor.detach().clone(),), {}, ())
        op.module = self._watch.modules[-1]
        self.tape.ops.append(op)
        op.makes = (self.table.add(tensor, producer=op.index).index,)
        return True

    # -- Functions -------------------------------------------------------------------------------------------------

    def _begin_function(self, func: type, args: tuple[Any, ...]) -> None:
        """A Function is one op, if it can be called again with what is on the tape; otherwise its ops are recorded."""
        if not all(isinstance(arg, _GIVEN) for arg in leaves(args)):
            return  # an object, such as the quantisation state of a weight: another block has another one
        if any(isinstance(arg, list | tuple | dict) and tensor_leaves(arg) for arg in args):
            return
        operands = [arg for arg in args if isinstance(arg, torch.Tensor)]
        for tensor in operands:
            self._must_be_seen(self._value(tensor))
        self._region = _Region(func, operands, self._spec(args))

    def _end_function(self, out: Any) -> None:
        region, self._region = self._region, None
        if region is None:
            return
        index, outputs = len(self.tape.ops), tensor_leaves(out)
        op = Op(index, region.func, region.args, {}, tuple(dict.fromkeys(use.value for use in uses(region.args))))
        op.module, op.kind, op.flops = self._watch.modules[-1], MATMUL if region.flops else OTHER, region.flops
        op.is_function, op.is_random, op.obstacle = True, region.is_random, region.obstacle
        op.grad_flags, op.has_grad, op.num_outputs = region.flags, region.has_grad, len(outputs)
        op.autocast = region.autocast
        self.tape.ops.append(op)
        makes = []
        for tensor, version in region.versions:
            if tensor._version != version:
                op.obstacle = "a Function that writes into its arguments"
                makes.append(self.table.overwrite(tensor, index))
        for value in region.saved:
            value.output = len(outputs) - 1 - value.output
        for place, tensor in enumerate(outputs):
            known = self.table.find(tensor)
            if known is None:
                makes.append(self.table.add(tensor, producer=index, output=place))
            elif known in region.saved:  # the Function saves what it returns
                known.output, known.base = place, Geometry.of(tensor)
        op.makes = tuple(dict.fromkeys(value.index for value in (*makes, *region.saved)))
        op.moved_bytes = sum(self.tape.values[value].num_bytes for value in (*op.reads, *op.makes))

    def _values_read(self, name: str) -> None:
        """Values have left through Python, where nothing follows them."""
        if self._region is None:
            self.refuse(f"it reads the values of tensors (Tensor.{name})")
        elif name == "tolist":
            self._region.obstacle = "a Function that reads the values of tensors"

    # -- values ----------------------------------------------------------------------------------------------------

    def _value(self, tensor: torch.Tensor) -> Value:
        """The present content of the storage of `tensor`, whatever it is."""
        return self.table.find(tensor) or self._cached_cast(tensor) or self.table.add(tensor, source=Source(UNKNOWN))

    def _spec(self, arguments: Any) -> Any:
        """The arguments with a `Use` in place of every tensor."""
        if isinstance(arguments, torch.Tensor):
            return self.table.use(arguments, self._value(arguments))
        if isinstance(arguments, tuple) and not isinstance(arguments, torch.Size):
            return tuple(map(self._spec, arguments))
        if isinstance(arguments, list):
            return [self._spec(item) for item in arguments]
        if isinstance(arguments, dict):
            return {name: self._spec(value) for name, value in arguments.items()}
        return arguments

    def _add_argument(self, tensor: torch.Tensor, place: int) -> None:
        known = self.table.find(tensor) if has_storage(tensor) else None
        if known is None:
            self.table.add(tensor, source=Source(ARGUMENT, place=place))
        elif known.source is not None and known.source.kind != ARGUMENT:
            self.refuse(f"argument {place} shares its storage with {known.source}")

    # -- autocast --------------------------------------------------------------------------------------------------

    def _note_cast(self, read: Value, made: Value) -> None:
        """Autocast may find this cast of a parameter in its cache the next time; then it makes no node."""
        is_single = read.base.dtype == torch.float32 and made.base.dtype in self.cached_dtypes
        if read.requires_grad and read.source is not None and is_single:
            self.tape.made_casts += 1
            self.tape.casts.append(read.source)

    def _cached_cast(self, tensor: torch.Tensor) -> Value | None:
        """A copy of a parameter that autocast has kept from an earlier call: as if it were cast here."""
        node = tensor.grad_fn
        if node is None or not self.cached_dtypes or node.name() != "ToCopyBackward0":
            return None
        parameter = self._parameters.get(id(getattr(node.next_functions[0][0], "variable", None)))
        if parameter is None or Geometry.of(parameter).stride != Geometry.of(tensor).stride:
            return None
        read = self._value(parameter)
        op = Op(len(self.tape.ops), aten._to_copy.default, (Use(read.index),), {"dtype": tensor.dtype}, (read.index,))
        op.kind, op.module, op.moved_bytes = MEMORY, self._watch.modules[-1], parameter.nbytes + tensor.nbytes
        self.tape.ops.append(op)
        made = self.table.add(tensor, producer=op.index)
        op.makes = (made.index,)
        self.tape.found_casts += 1
        assert read.source is not None, "it is a parameter"
        self.tape.casts.append(read.source)
        return made


def _see_inside(region: _Region, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    region.flops += count_flops(func, args, kwargs, out)
    region.is_random = region.is_random or is_random(func, args, kwargs)
    if func in _READS_VALUES:
        region.obstacle = "a Function that reads the values of tensors"
    if kwargs.get("generator") is not None:
        region.obstacle = OWN_GENERATOR
    if getattr(func, "namespace", "") in COLLECTIVES:
        region.obstacle = COLLECTIVE
