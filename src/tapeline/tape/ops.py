"""Facts about single ops and their arguments, as a dispatch mode sees them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from tapeline.cost.device import accelerator_type
from tapeline.tape.beside import beside, keeps_casts
from tapeline.tape.graph import Op
from tapeline.tape.nested import tensor_leaves

COLLECTIVES = ("c10d", "_c10d_functional", "c10d_functional", "fsdp")
"""Namespaces of ops that all ranks must run together, once."""
CHANGES_STORAGE = {"resize_", "resize_as_", "set_"}
"""Ops that give a tensor another storage, or a storage another size."""


def number_generators() -> tuple[Any, ...]:
    """The state of the generators of Python and NumPy: what they give is baked into the tape as a number.

    Empty where another thread may draw from them at the same time.
    """
    if beside() is not None:
        return ()
    state: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - the one that models draw from
    return random.getstate(), state["state"]["key"].tobytes(), state["state"]["pos"]


def is_about_shape(func: Any) -> bool:
    """Whether an op that returns a number looks at the shape of a tensor, and not into it."""
    name = short_name(func)
    return func.namespace != "aten" or name.startswith(
        ("sym_", "is_", "size", "stride", "numel", "dim", "storage_offset")
    )


def is_random(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an op draws from the default generator; attention kernels do only if they drop something."""
    if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
        return False
    if "attention" not in func._schema.name:
        return True
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    return bool(given.get("dropout_p", 0.0))


def is_plain_index(op: Op) -> bool:
    """``x[i]`` has a shape that depends on values only if an index is a mask."""
    return short_name(op.func) == "index" and op.args[1] is not None


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """The tensors that an op writes into. Schemas of collectives do not say: any of their tensors may be."""
    if func.namespace in COLLECTIVES and func._schema.name.endswith("_"):
        yield from tensor_leaves((args, kwargs))
        return
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable or torch.Tag.inplace_view in func.tags:
        return
    for place, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tensor_leaves(args[place] if place < len(args) else kwargs.get(argument.name))


def cached_dtypes() -> set[torch.dtype]:
    """The dtypes in which autocast keeps copies of parameters now."""
    if not keeps_casts():
        return set()
    kinds = ("cpu", accelerator_type())
    return {torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)}


def short_name(func: Any) -> str:
    packet = getattr(func, "_overloadpacket", None)
    return str(packet.__name__) if packet is not None else str(func)
