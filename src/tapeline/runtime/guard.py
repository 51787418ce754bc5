"""What must not change between the forward of a block and its recompute.

Recomputing reads parameters, buffers and other tensors of the block a second time, and runs dropout by the same train/eval
flags. Autograd's own in-place check does not see that, so it is done here: a change is an error, never a silently different
gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class Source:
    """One tensor of a block as it was: which object, which storage, which version, trained or not."""

    name: str
    tensor: torch.Tensor
    storage: int
    version: int
    requires_grad: bool


@dataclass(frozen=True, slots=True)
class Noted:
    """The state of a block at one time."""

    sources: dict[str, Source]
    training: list[bool]


class BlockGuard:
    """Notes and compares the tensors and train/eval flags of one block.

    The cost is one pass over the attributes of the block's modules per call, without touching a device.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self._modules: list[tuple[str, nn.Module]] = []
        self._children: list[tuple[int, ...]] = []

    def tensors(self) -> list[torch.Tensor]:
        """Parameters, buffers and tensor attributes of the block."""
        return [source.tensor for source in self.note().sources.values()]

    def note(self) -> Noted:
        """The state now."""
        sources = {}
        modules = self._walk()
        for prefix, module in modules:
            for table in (module._parameters, module._buffers, vars(module)):
                for key, tensor in table.items():
                    if isinstance(tensor, torch.Tensor):
                        name = f"{prefix}.{key}" if prefix else key
                        sources[name] = _source(name, tensor)
        return Noted(sources, [module.training for _, module in modules])

    def check(self, before: Noted) -> None:
        """Compare with what was noted.

        Raises:
            RuntimeError: naming the source that changed, as autograd does for a saved tensor.
        """
        now = self.note()
        for name, old in before.sources.items():
            new = now.sources.get(name)
            if new is None or new.tensor is not old.tensor or new.storage != old.storage:
                raise RuntimeError(self._message(name, "was replaced"))
            if new.version != old.version:
                raise RuntimeError(self._message(name, f"is at version {new.version}, expected {old.version}"))
            if new.requires_grad != old.requires_grad:
                raise RuntimeError(self._message(name, "was frozen or unfrozen"))
        if added := sorted(now.sources.keys() - before.sources.keys()):
            raise RuntimeError(self._message(added[0], "was added"))
        if now.training != before.training:
            raise RuntimeError(
                f"Block {self.name!r} was switched between train and eval mode after its forward: recomputing it in "
                "backward would apply dropout differently. Call backward before train() or eval()."
            )

    def _walk(self) -> list[tuple[str, nn.Module]]:
        """The block's modules by name, looked up again if any of them has other children than before."""
        children = [tuple(map(id, module._modules.values())) for _, module in self._modules]
        if not children or children != self._children:
            self._modules = list(self.module.named_modules())
            self._children = [tuple(map(id, module._modules.values())) for _, module in self._modules]
        return self._modules

    def _message(self, name: str, what: str) -> str:
        return (
            "A tensor needed to recompute a block has been modified between forward and backward: "
            f"{name!r} of block {self.name!r} {what}. The gradient would be wrong. Run backward before the optimizer step "
            'or the change, or keep this block (mode="none" keeps all).'
        )


def _source(name: str, tensor: torch.Tensor) -> Source:
    version = -1 if tensor.is_inference() else tensor._version
    return Source(name, tensor, _storage_identity(tensor), version, tensor.requires_grad)


def _storage_identity(tensor: torch.Tensor) -> int:
    """Which storage a tensor has; another one after ``tensor.data = ...``."""
    try:
        identity: Any = tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # wrapper subclasses have no storage of their own
        return 0
    return int(identity)


def changed(tensor: torch.Tensor, version: int, why: str, name: str = "") -> str:
    """The message for a tensor that was written between forward and backward, as autograd words it."""
    return (
        f"One of the variables needed {why} has been modified by an inplace operation: "
        f"{name + ', ' if name else ''}{tensor.dtype} of shape {list(tensor.shape)} is at version {tensor._version}; expected version {version} instead. "
        "Run backward before the optimizer step or the change."
    )
