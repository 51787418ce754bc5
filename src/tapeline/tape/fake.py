"""A step on fake tensors: the real code of the model, with shapes instead of numbers.

Parameters and activations are fake: they have a shape, a dtype and a device, and no bytes. Small integer tensors (token ids,
masks, positions) stay real, because models branch on them (an all-ones mask is skipped, padding is not), and those
branches decide which ops run.
"""

from __future__ import annotations

import copy
import random
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch._functorch import config
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from tapeline.cost.device import accelerator_type
from tapeline.errors import UnsupportedModelError, UsageError
from tapeline.ledger import DEVICE_OF
from tapeline.tape.beside import Beside, SharedStateError
from tapeline.tape.ops import number_generators
from tapeline.tape.shape_cache import ShapeCache

T = TypeVar("T")
aten = torch.ops.aten
_MAX_REAL_NUMEL = 2**25
_UNKNOWN = object()
_INTEGERS = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


# factories in the shape of an argument: the value they fill with, from the arguments
_FILLS: dict[Any, Callable[[Sequence[Any]], Any]] = {
    aten.ones_like: lambda _: 1,
    aten.new_ones: lambda _: 1,
    aten.zeros_like: lambda _: 0,
    aten.new_zeros: lambda _: 0,
    aten.full_like: itemgetter(1),
    aten.new_full: itemgetter(2),
}


class ShapeMode(TorchDispatchMode):
    """Runs ops on fake tensors, and ops on small integer tensors for real.

    Unlike a plain `FakeTensorMode`, a factory or an op without a fake argument gives a real tensor if that is a
    small integer one or a scalar, so that ``mask.all()`` has an answer. The indices of the largest activations, which
    route tokens to experts, are taken to be spread evenly.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        with config.patch(fake_tensor_allow_unsafe_data_ptr_access=False):  # a kernel would be given the address 0
            self.fake_mode = FakeTensorMode(allow_non_fake_inputs=False)
        self.assumes_scalars = False
        """Answer the value of a fake scalar with 1, as an optimizer may ask for it; forwards must not."""
        self.beside: Beside | None = None
        """Set while a training step may be running in another thread."""
        self._own: dict[int, weakref.ref[Any]] = {}
        self._cache = ShapeCache(self.fake_mode)

    def __enter__(self) -> ShapeMode:
        # only while the mode is active: a fake tensor that escaped (a cached table) must not mix with real ones later
        self.fake_mode.allow_non_fake_inputs = True
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        self.fake_mode.allow_non_fake_inputs = False

    def adopt(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a real tensor, so that the step may write into it."""
        copied = tensor.detach().clone()
        self._own_storage(copied)
        return copied

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is DEVICE_OF and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        if self.beside is not None:
            self.beside.check()
            if func is aten._to_copy.default:
                return self.beside.cast(lambda: self._dispatch(func, args, kwargs), args[0], kwargs.get("dtype"))
        return self._dispatch(func, args, kwargs)

    def _dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        has_real, has_fake, wants_grad = _kinds_of_tensors(args, kwargs)
        if wants_grad and torch.is_grad_enabled():
            raise UsageError(
                f"The step reads a real tensor that requires grad ({func}): it uses a model of its own instead of the one it "
                "is given. In loss_fn, use the model argument: loss_fn=lambda model, batch: model(**batch).loss."
            )
        if has_fake:
            return self._with_fake_arguments(func, args, kwargs)
        if func is aten.lift_fresh.default and not has_fake:
            self._own_storage(args[0])  # `torch.tensor(...)` made it just now
        if func._schema.is_mutable:
            self._check_own(func, args)
        if has_real and func is aten._local_scalar_dense.default:
            return func(*args, **kwargs)
        shape_only = self._fake(func, args, kwargs, may_depend_on_data=has_real)
        if shape_only is _UNKNOWN or _is_small_integer(shape_only) or _is_scalar(shape_only):
            return self._real(func, args, kwargs)
        return shape_only

    def _real(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an op for real; a storage it makes belongs to this mode."""
        if self.beside is not None and torch.Tag.nondeterministic_seeded in func.tags:
            raise SharedStateError(f"it draws numbers that decide what it does ({func})")
        out = func(*args, **kwargs)
        given = {t.untyped_storage()._cdata for t in _real_tensors((*args, *kwargs.values()))}
        for tensor in _real_tensors(out if isinstance(out, list | tuple) else [out]):
            if tensor.untyped_storage()._cdata not in given:
                self._own_storage(tensor)
        return out

    def _own_storage(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        self._own[key] = weakref.ref(storage, lambda _: self._own.pop(key, None))

    def _check_own(self, func: Any, args: Any) -> None:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in _real_tensors(value if isinstance(value, list | tuple) else [value]) if is_written else ():
                if tensor.untyped_storage()._cdata not in self._own:
                    raise UsageError(
                        f"The step changes a tensor in place that belongs neither to the model nor to the batch ({func}, "
                        f"{tensor.dtype} of shape {list(tensor.shape)}): planning would change it for real. Make it a buffer "
                        "of the model, or keep it out of loss_fn."
                    )

    def _with_fake_arguments(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            return _empty_grouped_product(*args, **kwargs)
        out = self._fake(func, args, kwargs)
        if func is aten.topk.default and _is_small_integer(out[1]):
            dim = args[2] if len(args) > 2 else kwargs.get("dim", -1)
            return out[0], self._spread(out[1], args[0].shape[dim], dim)
        fill = _FILLS.get(func._overloadpacket)
        if fill is not None and _is_small_integer(out):  # a mask of ones in the shape of an activation
            return torch.full(out.shape, fill(args), dtype=out.dtype, device=out.device)
        return out

    def _spread(self, indices: torch.Tensor, size: int, dim: int) -> torch.Tensor:
        """Indices that come up equally often, those of one token all different."""
        moved = indices.movedim(dim, -1).shape
        made = torch.arange(indices.numel(), device=indices.device).remainder_(size).view(moved).movedim(-1, dim)
        made = made.contiguous()
        self._own_storage(made)
        return made

    def _fake(self, func: Any, args: Any, kwargs: Any, may_depend_on_data: bool = False) -> Any:
        known = self._cache.key(func, args, kwargs)
        if known is not None and (out := self._cache.find(*known)) is not None:
            return out
        try:
            with self.fake_mode:
                out = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            if may_depend_on_data:
                return _UNKNOWN  # a real integer tensor: run it for real
            if self.assumes_scalars and func is aten._local_scalar_dense.default:
                return 1.0
            raise UnsupportedModelError(
                f"The forward depends on the values of activations ({func}), so its memory cannot be predicted "
                "without running it. For mixture-of-experts models choose grouped experts "
                "(config: experts_implementation='grouped_mm'), whose shapes do not depend on the routing."
            ) from error
        if known is not None:
            self._cache.remember(*known, out)
        return out


def _empty_grouped_product(
    first: torch.Tensor, second: torch.Tensor, offs: torch.Tensor | None = None, *_: Any, **__: Any
) -> torch.Tensor:
    """The result of a grouped matrix product in a dtype that its kernel takes and its shape function does not.

    For torch 2.11 to 2.13; groups are a dimension of an operand, or ranges of a shared one that `offs` ends.
    """
    rows, columns = first.shape[-2], second.shape[-1]
    if first.dim() == second.dim():
        groups = first.shape[0] if offs is None else offs.shape[0]
        return first.new_empty((groups, rows, columns))
    return first.new_empty((rows, columns))


@contextmanager
def preserved_random_state(on_change: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Put the random state of Python, NumPy, the CPU and every initialised accelerator back on leaving.

    Args:
        on_change: called if Python, NumPy or the CPU's generator was drawn from.
    """
    python_state = random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002 - the global state is the one models draw from
    before = number_generators()
    cpu_state = torch.default_generator.get_state()
    try:
        with torch.random.fork_rng(devices=_initialized_devices(), device_type=accelerator_type()):
            try:
                yield
            finally:
                if number_generators() != before or not torch.equal(torch.default_generator.get_state(), cpu_state):
                    on_change()
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


def fake_copy(mode: ShapeMode, thing: T, memo: dict[int, Any] | None = None) -> T:
    """Deep-copy any object graph with every tensor replaced by a fake one; the original is not touched.

    Tensors that are the same object stay the same object (tied weights, an optimizer's parameters).

    Args:
        mode: the mode that the copies belong to.
        thing: a module, an optimizer, or a tuple of them.
        memo: fake tensors for originals, by `id`, as in `copy.deepcopy`.

    Raises:
        UnsupportedModelError: if some attribute cannot be copied.
    """
    memo = {} if memo is None else memo
    try:
        with torch.no_grad(), FakeCopyMode(mode.fake_mode):
            if isinstance(thing, nn.Module):
                _copy_parameters(mode, thing, memo)
            return copy.deepcopy(thing, memo)
    except (TypeError, RuntimeError, NotImplementedError, AttributeError) as error:
        raise UnsupportedModelError(
            f"Cannot make a weightless copy of {type(thing).__name__} to plan on: {error}. "
            "An attribute of the model cannot be copied (a lock, a file, a tensor that is part of a graph)."
        ) from error


def _copy_parameters(mode: ShapeMode, model: nn.Module, memo: dict[int, Any]) -> None:
    """Put a fake parameter for each real one into `memo`, with its Python attributes (quantisation state)."""
    copied = []
    for parameter in model.parameters():
        fake = nn.Parameter(mode.fake_mode.from_tensor(parameter.data, static_shapes=True), parameter.requires_grad)
        memo[id(parameter)] = fake
        copied.append((parameter, fake))
    for parameter, fake in copied:  # attributes may lead back to the module, and so to any parameter
        for name, value in vars(parameter).items():
            if name not in vars(fake):
                vars(fake)[name] = copy.deepcopy(value, memo)


def fake_batch(mode: ShapeMode, batch: Any) -> Any:
    """Copy a batch: floating-point tensors become fake, small integer tensors stay real."""
    if isinstance(batch, Mapping) and not isinstance(batch, dict):  # such as a BatchEncoding
        batch = dict(batch)
    with torch.inference_mode(mode=False):
        return tree_map(lambda leaf: _fake_input(mode, leaf), batch)


def _fake_input(mode: ShapeMode, tensor: Any) -> Any:
    if not isinstance(tensor, torch.Tensor):
        is_plain = tensor is None or isinstance(tensor, str | bytes | int | float | type) or callable(tensor)
        return tensor if is_plain else fake_copy(mode, tensor)
    if isinstance(tensor, FakeTensor):
        return tensor
    if _is_small_integer(tensor):
        return mode.adopt(tensor)
    fake = mode.fake_mode.from_tensor(tensor.detach(), static_shapes=True)
    return fake.requires_grad_(tensor.requires_grad)


def _kinds_of_tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, bool, bool]:
    has_real = has_fake = wants_grad = False
    stack: list[Any] = [*args, *kwargs.values()]
    while stack:
        value = stack.pop()
        if isinstance(value, FakeTensor):
            has_fake = True
        elif isinstance(value, torch.Tensor):
            has_real = True
            wants_grad = wants_grad or value.requires_grad
        elif isinstance(value, list | tuple):
            stack.extend(value)
    return has_real, has_fake, wants_grad


def _real_tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _real_tensors(value)


def _is_small_integer(value: Any) -> bool:
    tensors = value if isinstance(value, list | tuple) else [value]
    return all(
        not isinstance(t, torch.Tensor) or (t.dtype in _INTEGERS and t.numel() <= _MAX_REAL_NUMEL) for t in tensors
    )


def _is_scalar(value: Any) -> bool:
    """A number without shape, such as an optimizer's step count or the coin of a layer drop."""
    return isinstance(value, torch.Tensor) and value.dim() == 0


def _initialized_devices() -> list[int]:
    module = torch.get_device_module(accelerator_type())
    is_initialized = getattr(module, "is_initialized", None)
    if is_initialized is None or not is_initialized():
        return []
    return list(range(module.device_count()))
