"""Comparing what a recipe makes with what autograd really saved, bit for bit."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal in shape, strides, dtype and every bit; NaNs with the same bits are equal.

    Of tensors without data, all but the bits is compared.
    """
    if not _same_shape(one, other) or any(isinstance(tensor, FakeTensor) for tensor in (one, other)):
        return _same_shape(one, other)
    if is_traceable_wrapper_subclass(one):
        names = one.__tensor_flatten__()[0]
        return all(same_bits(getattr(one, name), getattr(other, name)) for name in names)
    if one.is_complex():
        return same_bits(torch.view_as_real(one), torch.view_as_real(other))
    if one.is_floating_point() and one.dtype.itemsize in _INTEGERS:
        integers = _INTEGERS[one.dtype.itemsize]
        return torch.equal(one.view(integers), other.view(integers))
    return torch.equal(one, other)


def _same_shape(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    return one.stride() == other.stride() or one.numel() <= 1
