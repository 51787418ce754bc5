"""Measuring the peak of real steps: by the allocator's counters where there are some, by a ledger elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import nn

from tapeline.ledger import Ledger
from tapeline.runtime.step import track_training_state


class PeakMeter(Protocol):
    """Remembers the largest peak over all its measurements."""

    peak_bytes: int | None
    """Largest number of bytes alive; ``None`` before the first measurement."""
    last_peak_bytes: int | None
    """The same for the last measurement alone."""
    is_free: bool
    """Whether measuring costs nothing, so that every step may be measured."""
    reserved_bytes: int | None
    """Most bytes that torch's allocator held from the device; ``None`` where there is no such allocator."""

    def measure(
        self, optimizer: torch.optim.Optimizer | None, block_names: Sequence[str]
    ) -> AbstractContextManager[None]:
        """Measure what runs inside."""

    def peak_table(self, limit: int) -> str:
        """The largest tensors at the last peak."""


def make_meter(model: nn.Module, device: torch.device) -> PeakMeter:
    """The meter for a device."""
    return LedgerMeter(model, device) if device.type == "cpu" else AllocatorMeter(device)


class LedgerMeter:
    """Counts live bytes op by op."""

    is_free = False

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = model
        self.ledger = Ledger(device)
        self.peak_bytes: int | None = None
        self.last_peak_bytes: int | None = None
        self.reserved_bytes: int | None = None

    @contextmanager
    def measure(self, optimizer: torch.optim.Optimizer | None, block_names: Sequence[str]) -> Iterator[None]:
        track_training_state(self.ledger, self.model, optimizer)
        self.ledger.begin_window()
        try:
            with self.ledger, self.ledger.watch(self.model, block_names):
                yield
        finally:
            self.last_peak_bytes = self.ledger.peak_bytes()
            self.peak_bytes = max(self.peak_bytes or 0, self.last_peak_bytes)

    def peak_table(self, limit: int) -> str:
        return self.ledger.peak_table(limit)


class AllocatorMeter:
    """Reads the peak counters of torch's caching allocator; it resets them at the start of each measurement."""

    is_free = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.module = torch.get_device_module(device)
        self.peak_bytes: int | None = None
        self.last_peak_bytes: int | None = None
        self.reserved_bytes: int | None = None

    @contextmanager
    def measure(self, optimizer: torch.optim.Optimizer | None, block_names: Sequence[str]) -> Iterator[None]:
        self.module.reset_peak_memory_stats(self.device)
        try:
            yield
        finally:
            self.last_peak_bytes = int(self.module.max_memory_allocated(self.device))
            self.peak_bytes = max(self.peak_bytes or 0, self.last_peak_bytes)
            self.reserved_bytes = max(self.reserved_bytes or 0, int(self.module.max_memory_reserved(self.device)))

    def peak_table(self, limit: int) -> str:
        return ""
