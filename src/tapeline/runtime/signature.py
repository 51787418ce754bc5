"""The class of a call: everything about its arguments and surroundings that a tape takes for granted."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from tapeline.compat import attention_kernels
from tapeline.cost.device import accelerator_type
from tapeline.runtime.fingerprint import slot_names
from tapeline.tape.nested import FUNCTIONS, PLAIN


def arguments_key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], list[torch.Tensor]]:
    """A hashable description of arguments without their numbers' contents, and the tensors among them in order.

    Of tensors: shape, strides, dtype, device, whether they require grad, and which of them share a storage. Of numbers and
    texts: the value. Of other objects: the type.
    """
    key: list[Any] = []
    tensors: list[torch.Tensor] = []
    for value in args:
        _describe(value, key, tensors)
    for name, value in kwargs.items():
        key.append(name)
        _describe(value, key, tensors)
    if len(tensors) > 1:
        first: dict[Any, int] = {}
        for place, tensor in enumerate(tensors):
            key.append(first.setdefault(_storage(tensor), place))
    return tuple(key), tensors


def has_objects(key: tuple[Any, ...]) -> bool:
    """Whether the arguments had objects, such as a cache, that a call may have changed."""
    return any(isinstance(part, type) for part in key)


class Surroundings(NamedTuple):
    """Settings that decide which kernels the forward calls, and how they compute."""

    autocast_cpu: tuple[bool, torch.dtype]
    """Whether autocast is on for the CPU, and its dtype, which an autocast inside the block takes over also when it is off."""
    autocast_accelerator: tuple[bool, torch.dtype]
    is_cache_enabled: bool
    """Whether autocast keeps its copies of parameters."""
    default_dtype: torch.dtype
    attention: tuple[bool, ...]
    """Which attention kernels are allowed."""
    numerics: tuple[Any, ...]
    """How kernels compute; a replay must find these settings as the forward had them."""


def surroundings() -> Surroundings:
    """The settings now."""
    accelerator = accelerator_type()
    return Surroundings(
        (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        (torch.is_autocast_enabled(accelerator), torch.get_autocast_dtype(accelerator)),
        torch.is_autocast_cache_enabled(),
        torch.get_default_dtype(),
        attention_kernels(),
        numerics(),
    )


def numerics() -> tuple[Any, ...]:
    """Settings that decide how a kernel computes."""
    return (
        torch._C._get_deterministic_algorithms(),
        torch.get_float32_matmul_precision(),
        torch._C._get_cublas_allow_tf32(),
        torch._C._get_cudnn_allow_tf32(),
        torch._C._get_cublas_allow_bf16_reduced_precision_reduction(),
        torch._C._get_cublas_allow_fp16_reduced_precision_reduction(),
    )


def check_numerics(block: str, before: tuple[Any, ...]) -> None:
    """Compare with the settings of the forward.

    Raises:
        RuntimeError: if they have changed, so that recomputing would give another gradient.
    """
    now = numerics()
    if before != now:
        raise RuntimeError(
            "A setting that decides how kernels compute was changed between forward and backward of block "
            f"{block!r}: {before} then, {now} now (deterministic algorithms, matmul precision, TF32, "
            "reduced precision). Recomputing would give another gradient. Change it before the forward."
        )


def _describe(value: Any, key: list[Any], tensors: list[torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        layout: Any = value.layout
        is_strided = layout is torch.strided
        place = (value.stride(), value.storage_offset()) if is_strided else (layout, 0)
        key.append((type(value), value.shape, *place, value.dtype, value.device, value.requires_grad))
    elif isinstance(value, PLAIN):
        key.append((type(value), value))
    elif isinstance(value, list | tuple):
        key.append((type(value), len(value)))
        for item in value:
            _describe(item, key, tensors)
    elif isinstance(value, dict):
        key.append((type(value), *value))
        for item in value.values():
            _describe(item, key, tensors)
    elif isinstance(value, set | frozenset):
        key.append((type(value), frozenset(map(repr, value))))
    elif isinstance(value, slice):
        key.append((slice, repr(value)))
    elif isinstance(value, (*FUNCTIONS, type)):
        key.append(_Same(value))
    else:
        key.append(type(value))
        attributes = plain_attributes(value)
        key.append(tuple((name, item) for name, item in attributes if isinstance(item, PLAIN)))
        key.extend(_Same(item) for _, item in attributes if isinstance(item, (*FUNCTIONS, type)))


class _Same:
    """Equal to itself only; holds the object, so that no other gets its address."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def plain_attributes(value: Any) -> list[tuple[str, Any]]:
    """The attributes of an object, those in slots included."""
    found = list(getattr(value, "__dict__", {}).items())
    return found + [(name, getattr(value, name)) for name in slot_names(value)]


def _storage(tensor: torch.Tensor) -> int:
    try:
        identity: Any = tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # wrapper subclasses have no storage of their own
        return id(tensor)
    return int(identity)
