"""Putting seams into one model instance, and taking them out again without a trace."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from tapeline.errors import UsageError
from tapeline.planner.schema import BlockPlan
from tapeline.runtime.block import BlockSeam
from tapeline.runtime.blocks import is_transformers_layer
from tapeline.runtime.inputs import Chain

_MISSING = object()
_CACHE_NAMES = ("past_key_values", "layer_past", "past_key_value")


class Patches:
    """Instance attributes and hooks that were set, and what was there before."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any]] = []
        self._expected: list[tuple[Any, str, Any]] = []
        self._handles: list[RemovableHandle] = []

    def hook(self, module: nn.Module, hook: Any) -> None:
        """Add a forward pre-hook with keyword arguments to this one module."""
        self._handles.append(module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))

    def set(self, target: Any, name: str, value: Any) -> None:
        """Set an attribute of this one object."""
        self._undo.append((target, name, vars(target).get(name, _MISSING)))
        self._expected.append((target, name, value))
        setattr(target, name, value)

    def replaced(self) -> list[str]:
        """Attributes that somebody else has set since, as ``Class.attribute``."""
        return [f"{type(target).__name__}.{name}" for target, name, _ in self._changed()]

    def undo(self) -> None:
        """Put everything back, but for objects that somebody else has set anew since; safe to call twice."""
        taken_over = {id(target) for target, _, _ in self._changed()}
        while self._undo:
            target, name, before = self._undo.pop()
            if id(target) in taken_over:
                continue
            if before is _MISSING:
                vars(target).pop(name, None)
            else:
                setattr(target, name, before)
        for handle in self._handles:
            handle.remove()
        self._expected.clear()
        self._handles.clear()

    def _changed(self) -> list[tuple[Any, str, Any]]:
        last = {(id(target), name): (target, name, value) for target, name, value in self._expected}
        return [(t, name, value) for t, name, value in last.values() if getattr(t, name, None) != value]


class InstanceForward:
    """The `forward` of one instance, run through its seam. Copies with its module."""

    def __init__(self, module: nn.Module, seam: BlockSeam, before: Any = None) -> None:
        self.module, self.seam, self.before = module, seam, before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.before if self.before is not None else self._class_forward
        return self.seam(forward, *args, **kwargs)

    def _class_forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)


def install_blocks(patches: Patches, model: nn.Module, blocks: Sequence[BlockPlan]) -> dict[str, BlockSeam]:
    """Put a plan's blocks in force on `model`; returns the seams of the blocks that are recomputed."""
    switch_off_checkpointing(patches, model)
    recomputed = [block for block in blocks if block.saved == "recompute"]
    if not recomputed:
        return {}
    switch_off_cache(patches, model)
    droppers = {block.name for block in recomputed if block.input == "recompute"}
    following = {block.name: after.name for block, after in pairwise(blocks)}
    chain = Chain()
    seams = {}
    for block in recomputed:
        module = model.get_submodule(block.name)
        seam = BlockSeam(
            block.name,
            module,
            chain,
            drops_input=block.name in droppers,
            feeds_next=following.get(block.name) in droppers,
        )
        install_seam(patches, module, seam)
        seams[block.name] = seam
    return seams


def managed_module(model: nn.Module) -> str | None:
    """The name of a block that already runs through a seam, if there is one."""
    name: str
    for name, module in model.named_modules():
        function = vars(module).get("_gradient_checkpointing_func")
        forward = vars(module).get("forward")
        seam = forward.seam if isinstance(forward, InstanceForward) else getattr(function, "__self__", None)
        if isinstance(seam, BlockSeam) and seam.is_in_force:
            return name
    return None


def install_seam(patches: Patches, module: nn.Module, seam: BlockSeam) -> None:
    """Make `module` run through `seam`, by the per-layer function of transformers or by its own `forward`."""
    if is_transformers_layer(module):
        patches.set(module, "_gradient_checkpointing_func", seam.from_partial)
        patches.set(module, "gradient_checkpointing", True)
        patches.hook(module, _refuse_filled_cache)
    else:
        patches.set(module, "forward", InstanceForward(module, seam, vars(module).get("forward")))


def switch_off_checkpointing(patches: Patches, model: nn.Module) -> list[nn.Module]:
    """Switch off what transformers itself was told to checkpoint, so that the plan decides alone."""
    switched = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]
    for module in switched:
        patches.set(module, "gradient_checkpointing", False)
    return switched


def switch_off_cache(patches: Patches, model: nn.Module) -> None:
    """Pass ``use_cache=False`` to every part that would make a cache by its configuration; the configuration stays."""
    for module in model.modules():
        if hasattr(module, "config") and "use_cache" in inspect.signature(type(module).forward).parameters:
            patches.hook(module, _without_cache)


def has_filled_cache(kwargs: dict[str, Any]) -> bool:
    """Whether a layer is called with a cache that already holds keys and values, such as a learned prefix."""
    caches = (kwargs.get(name) for name in _CACHE_NAMES)
    return any(cache.get_seq_length() > 0 for cache in caches if cache is not None and hasattr(cache, "get_seq_length"))


def _without_cache(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    if not (module.training and torch.is_grad_enabled()) or kwargs.get("use_cache") is not None:
        return None
    return args, kwargs | {"use_cache": False}


def _refuse_filled_cache(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """transformers drops the cache of a layer that is recomputed: the result would be another one."""
    if module.training and torch.is_grad_enabled() and has_filled_cache(kwargs):
        raise UsageError(
            f"{type(module).__name__} is to be recomputed and was called with a filled cache, which cannot be replayed: "
            "plan with a batch that has the cache, so that the layers are kept, or leave the cache out."
        )
