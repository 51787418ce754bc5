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
