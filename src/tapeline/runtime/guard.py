"""What must not change between the forward of a block and its recompute.

Recomputing reads parameters and buffers a second time, and runs dropout by the same train/eval flags. Autograd's own
in-place check does not see that, so it is done here: a change is an error, never a silently different gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

Noted = tuple[list[tuple[torch.Tensor | None, int]], list[bool]]


class BlockGuard:
    """Notes and compares the parameters, buffers and train/eval flags of one block.

    The cost is one pass over the block's tensors per call, without touching a device.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.modules = list(module.modules())
        self.sources: list[tuple[dict[str, Any], str]] = []
        self.names: list[str] = []
        for prefix, part in module.named_modules():
            for table in (part._parameters, part._buffers):
                self.sources += [(table, key) for key in table]
                self.names += [f"{prefix}.{key}" if prefix else key for key in table]

    def has_trainable(self) -> bool:
        """Whether any parameter of the block requires a gradient."""
        return any((tensor := table.get(key)) is not None and tensor.requires_grad for table, key in self.sources)

    def note(self) -> Noted:
        """Identity and version of every source, and every train/eval flag, as they are now."""
        tensors = [table.get(key) for table, key in self.sources]
        return [(t, _version(t)) for t in tensors], [module.training for module in self.modules]

    def check(self, noted: Noted) -> None:
        """Compare with what was noted.

        Raises:
            RuntimeError: naming the source that changed, as autograd does for a saved tensor.
        """
        for (table, key), name, (tensor, version) in zip(self.sources, self.names, noted[0], strict=True):
            if table.get(key) is not tensor:
                raise RuntimeError(self._message(name, "was replaced"))
            if _version(tensor) != version:
                raise RuntimeError(self._message(name, f"is at version {_version(tensor)}, expected {version}"))
        if noted[1] != [module.training for module in self.modules]:
            raise RuntimeError(
                f"Block {self.name!r} was switched between train and eval mode after its forward: recomputing it in "
                "backward would apply dropout differently. Call backward before train() or eval()."
            )

    def _message(self, name: str, what: str) -> str:
        return (
            "A tensor needed to recompute a block has been modified between forward and backward: "
            f"{name!r} of block {self.name!r} {what}. The gradient would be wrong. Run backward before the optimizer step "
            'or the change, or keep this block (mode="none" keeps all).'
        )


def _version(tensor: torch.Tensor | None) -> int:
    return -1 if tensor is None or tensor.is_inference() else tensor._version
