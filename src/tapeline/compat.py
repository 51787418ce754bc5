"""Differences between supported releases of torch, in one place. Each says which release removes it."""

from __future__ import annotations

import inspect
from typing import Any

import torch.utils.checkpoint

_CHECKPOINT_PARAMETERS = inspect.signature(torch.utils.checkpoint.checkpoint).parameters

# torch 2.14 lets the caller say whether tensors that selective checkpointing caches go through saved-tensor hooks, and
# will change its default. Remove when torch < 2.14 is no longer supported, and pass the argument always.
CHECKPOINT_DEFAULTS: dict[str, Any] = (
    {"respect_saved_tensors_hooks": True} if "respect_saved_tensors_hooks" in _CHECKPOINT_PARAMETERS else {}
)


def foreign_hooks() -> tuple[tuple[Any, Any] | None, bool]:
    """The saved-tensor hook pair of somebody else that is in force now, and whether it can be composed with.

    Those of torch's checkpoint cannot: it counts what is packed, and recomputes the block itself. torch has no public
    way to ask; remove when it does.
    """
    if torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is not None:
        return None, False
    top = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if top is None:
        return None, True
    return (top[0], top[1]), not getattr(top[0], "__module__", "").startswith("torch.utils.checkpoint")


def has_transforms() -> bool:
    """Whether a functorch transform (vmap, grad, jvp) is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None
