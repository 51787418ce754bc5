"""Random state and settings at the entry of a call, and how to run under them again."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch.utils.checkpoint import get_device_states, set_device_states

from tapeline.compat import allow_attention_kernels, attention_kernels, autocast_state
from tapeline.runtime.signature import Surroundings
from tapeline.tape.beside import beside

_LOCK = threading.RLock()
"""The default generators are shared by all threads: one replay at a time may set them back."""


class RandomState:
    """The state of torch's generators when it was made.

    Args:
        tensors: the generators of their devices are noted beside the CPU's.
    """

    __slots__ = ("cpu_state", "device_states", "device_type", "devices")

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.cpu_state = torch.default_generator.get_state()
        self.devices: list[int] = []
        self.device_states: list[torch.Tensor] = []
        self.device_type = ""
        on_device = [tensor for tensor in tensors if not (tensor.is_cpu or tensor.is_meta)]
        if on_device:
            self.device_type = on_device[0].device.type
            self.devices, self.device_states = get_device_states(*on_device)

    def put_back(self) -> None:
        """Let the generators be as they were then."""
        torch.set_rng_state(self.cpu_state)
        if self.devices:
            set_device_states(self.devices, self.device_states, device_type=self.device_type)


class Ambient(RandomState):
    """The state of the generators when it was made, and the settings of then.

    Args:
        settings: the surroundings of the call.
        tensors: the arguments of the call.
    """

    __slots__ = ("settings",)

    def __init__(self, settings: Surroundings, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__(tensors)
        self.settings = settings

    @contextmanager
    def random_state(self) -> Iterator[None]:
        """Draw as the call drew, and put today's state back."""
        if beside() is not None:  # tensors without data draw nothing, and the generators are those of a real step
            yield
            return
        with _LOCK, torch.random.fork_rng(self.devices, device_type=self.device_type or "cuda"):
            self.put_back()
            yield

    @contextmanager
    def dtype_restored(self) -> Iterator[None]:
        """Make new tensors in the default dtype of then."""
        if beside() is not None:  # the setting is that of the whole process
            yield
            return
        now = torch.get_default_dtype()
        torch.set_default_dtype(self.settings.default_dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(now)

    @contextmanager
    def _attention_restored(self) -> Iterator[None]:
        """Allow the attention kernels that were allowed then."""
        if beside() is not None:
            yield
            return
        now = attention_kernels()
        allow_attention_kernels(self.settings.attention)
        try:
            yield
        finally:
            allow_attention_kernels(now)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Run under the noted random state and autocast, and put today's back."""
        with ExitStack() as stack:
            stack.enter_context(self.random_state())
            stack.enter_context(self.dtype_restored())
            stack.enter_context(self._attention_restored())
            autocast = {"cpu": self.settings.autocast_cpu}
            if self.device_type:
                autocast[self.device_type] = self.settings.autocast_accelerator
            for kind, (is_enabled, dtype) in autocast.items():
                stack.enter_context(
                    torch.autocast(kind, dtype=dtype, enabled=is_enabled, cache_enabled=self.settings.is_cache_enabled)
                )
            yield


@contextmanager
def outside_autocast() -> Iterator[None]:
    """Leave every autocast context for a while, as a training loop does before it runs backward."""
    kinds = [kind for kind, _ in autocast_state()]
    torch.autocast_increment_nesting()
    depth = torch.autocast_decrement_nesting()
    if beside() is not None:
        depth = 0  # at none, leaving a context inside would clear the cache that a real step uses
    try:
        for kind in kinds:
            torch.set_autocast_enabled(kind, False)
        for _ in range(depth):
            torch.autocast_decrement_nesting()
        yield
    finally:
        for _ in range(depth):
            torch.autocast_increment_nesting()
        for kind in kinds:
            torch.set_autocast_enabled(kind, True)
