"""Putting seams into one model instance, and taking them out again without a trace."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from tapeline.planner.schema import BlockPlan
from tapeline.runtime.block import BlockSeam
from tapeline.runtime.inputs import Chain
from tapeline.runtime.library import Library
from tapeline.runtime.role import roles

_MISSING = object()


class Patches:
    """Instance attributes and hooks that were set, and what was there before."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any]] = []
        self._expected: list[tuple[Any, str, Any]] = []
        self._handles: list[RemovableHandle] = []

    def hook(self, module: nn.Module, hook: Any) -> None:
        """Add a forward pre-hook with keyword arguments to this one module."""
        self._handles.append(module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))

    def hook_after(self, module: nn.Module, hook: Any) -> None:
        """Add a forward hook to this one module, which is called after an exception too."""
        self._handles.append(module.register_forward_hook(hook, always_call=True))

    def set(self, target: Any, name: str, value: Any) -> None:
        """Set an attribute of this one object."""
        self._undo.append((target, name, vars(target).get(name, _MISSING)))
        self._expected.append((target, name, value))
        setattr(target, name, value)

    def replaced(self) -> list[str]:
        """Attributes that somebody else has set since, as ``Class.attribute``."""
        return [f"{type(target).__name__}.{name}" for target, name, _ in self._changed()]

    def undo(self) -> None:
        """Put everything back, but for attributes that somebody else has set since; safe to call twice."""
        taken_over = {(id(target), name) for target, name, _ in self._changed()}
        while self._undo:
            target, name, before = self._undo.pop()
            if (id(target), name) in taken_over:
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


class Inert:
    """What a copy of a model has in the place of its hooks."""

    def __call__(self, *_: Any, **__: Any) -> None: ...


class InstanceForward:
    """The `forward` of one instance, run through its seam. Copies with its module, and does not keep it alive."""

    def __init__(self, module: nn.Module, seam: BlockSeam, before: Any = None) -> None:
        self._module, self.seam, self.before = weakref.ref(module), seam, before

    @property
    def module(self) -> nn.Module:
        module = self._module()
        assert module is not None, "it runs as the module's forward"
        return module

    def __deepcopy__(self, memo: dict[int, Any]) -> InstanceForward:
        module = copy.deepcopy(self.module, memo)  # the copy that is being made
        return InstanceForward(module, copy.deepcopy(self.seam, memo), copy.deepcopy(self.before, memo))

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "seam": self.seam, "before": self.before}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.before if self.before is not None else self._class_forward
        return self.seam(forward, *args, **kwargs)

    def _class_forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)


def install_blocks(
    patches: Patches,
    model: nn.Module,
    blocks: Sequence[BlockPlan],
    library: Library,
    *,
    records: bool = False,
    every: bool = False,
) -> dict[str, BlockSeam]:
    """Put a plan's blocks in force on `model`; returns the seams of the blocks that drop something.

    Args:
        patches: notes what is set.
        model: the model.
        blocks: the blocks of a plan.
        library: tapes and recipes.
        records: also give seams to blocks that keep everything, to record them.
        every: also give seams to blocks that keep everything, so that `place_blocks` can change that.
    """
    switch_off_checkpointing(patches, model)
    managed = {name: role for name, role in roles(blocks, library.rules, records) if every or not role.is_idle}
    if not managed:
        return {}
    library.cache_switch = CacheSwitch(patches, model, [block.name for block in blocks])
    chain = Chain()
    seams = {}
    for name, role in managed.items():
        module = model.get_submodule(name)
        seams[name] = BlockSeam(name, module, library, chain, role)
        patches.set(module, "forward", InstanceForward(module, seams[name], vars(module).get("forward")))
    return seams


def place_blocks(seams: Mapping[str, BlockSeam], blocks: Sequence[BlockPlan], library: Library) -> None:
    """Let calls from now on follow other placements of the same blocks; `install_blocks` gave each of them a seam."""
    for name, role in roles(blocks, library.rules):
        seams[name].place(role)


def managed_module(model: nn.Module) -> str | None:
    """The name of a block that already runs through a seam, if there is one."""
    name: str
    for name, module in model.named_modules():
        forward = vars(module).get("forward")
        if isinstance(forward, InstanceForward) and forward.seam.is_in_force:
            return name
    return None


def switch_off_checkpointing(patches: Patches, model: nn.Module) -> list[nn.Module]:
    """Switch off what transformers itself checkpoints, so that the plan decides alone.

    It is set also where it is off, so that `Patches.replaced` notices when somebody switches it on later.
    """
    switches = [m for m in model.modules() if isinstance(getattr(m, "gradient_checkpointing", None), bool)]
    for module in switches:
        patches.set(module, "gradient_checkpointing", False)
    return switches


class CacheSwitch:
    """Passes ``use_cache=False`` to every part that would make a cache by its configuration; the configuration stays.

    Parts inside a block get what the block is given; a hook on them would be part of what its tape takes for granted.
    """

    def __init__(self, patches: Patches, model: nn.Module, blocks: Sequence[str]) -> None:
        self.was_on = False
        """Whether any part would have made one."""
        inside = tuple(f"{name}." for name in blocks)
        for name, module in model.named_modules():
            if name.startswith(inside):
                continue
            if hasattr(module, "config") and "use_cache" in inspect.signature(type(module).forward).parameters:
                patches.hook(module, self)

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if not (module.training and torch.is_grad_enabled()) or kwargs.get("use_cache") is not None:
            return None
        self.was_on = self.was_on or bool(getattr(module.config, "use_cache", False))
        return args, kwargs | {"use_cache": False}
