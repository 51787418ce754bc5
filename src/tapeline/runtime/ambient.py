"""Random state and autocast state at the entry of a call, and how to run under them again."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch.utils.checkpoint import get_device_states, set_device_states

_LOCK = threading.RLock()
"""The default generators are shared by all threads: one replay at a time may set them back."""


class Ambient:
    """The state of the generators, and of autocast, when it was made.

    Args:
        tensors: the arguments of the call; the generators of their devices are noted beside the CPU's.
    """

    __slots__ = (
        "autocast",
        "cpu_state",
        "default_dtype",
        "device_states",
        "device_type",
        "devices",
        "is_cache_enabled",
    )

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.cpu_state = torch.get_rng_state()
        kinds = {tensor.device.type for tensor in tensors} - {"cpu", "meta"}
        self.device_type = min(kinds, default="cuda")
        self.devices, self.device_states = get_device_states(*tensors) if kinds else ([], [])
        self.autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", *sorted(kinds))
        ]
        self.is_cache_enabled = torch.is_autocast_cache_enabled()
        self.default_dtype = torch.get_default_dtype()

    @contextmanager
    def random_state(self) -> Iterator[None]:
        """Draw as the call drew, and put today's state back."""
        with _LOCK, torch.random.fork_rng(devices=self.devices, device_type=self.device_type):
            torch.set_rng_state(self.cpu_state)
            if self.devices:
                set_device_states(self.devices, self.device_states, device_type=self.device_type)
            yield

    @contextmanager
    def dtype_restored(self) -> Iterator[None]:
        """Make new tensors in the default dtype of then."""
        now = torch.get_default_dtype()
        torch.set_default_dtype(self.default_dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(now)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Run under the noted random state and autocast, and put today's back."""
        with ExitStack() as stack:
            stack.enter_context(self.random_state())
            stack.enter_context(self.dtype_restored())
            for kind, is_enabled, dtype in self.autocast:
                stack.enter_context(
                    torch.autocast(kind, dtype=dtype, enabled=is_enabled, cache_enabled=self.is_cache_enabled)
                )
            yield
