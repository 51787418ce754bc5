"""Walking through nested arguments and results, and which of their parts are compared by value."""

from __future__ import annotations

from enum import Enum
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch

PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, Enum, np.generic),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
"""Compared by value."""
FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType, partial)
"""Compared by identity."""


def leaves(value: Any) -> list[Any]:
    """What is in nested tuples, lists and dicts, in order."""
    found: list[Any] = []
    _collect(value, found)
    return found


def tensor_leaves(value: Any) -> list[torch.Tensor]:
    """The tensors in nested tuples, lists and dicts, in order."""
    return [leaf for leaf in leaves(value) if isinstance(leaf, torch.Tensor)]


def _collect(value: Any, found: list[Any]) -> None:
    if isinstance(value, list | tuple):
        for item in value:
            _collect(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            _collect(item, found)
    else:
        found.append(value)
