"""Rates that the operations of a real step reached, in place of those of a benchmark or a data sheet."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tapeline.cost.catalogue import MEASURED, Device
from tapeline.cost.price import ATTENTION, MATMUL, MEMORY, count_flops, op_class
from tapeline.errors import UsageError

_MIN_FLOPS = 1e6
_MIN_BYTES = 2**18
"""Smaller operations say how long a launch takes, not what a device reaches."""
_CAUSAL = 0.5
_BACKWARD = "backward"
Kind = tuple[str, str]
"""Class of operations and dtype; attention and its backward are told apart."""


class OpTimer(TorchDispatchMode):
    """Times every operation that runs inside, each for itself: on an accelerator it waits for the one before.

    Args:
        device: where the operations run.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._wait: Callable[[], None] = torch.get_device_module(device).synchronize
        self.seconds: defaultdict[Kind, float] = defaultdict(float)
        self.work: Counter[Kind] = Counter()
        """Floating-point operations, or bytes, of the operations that are large enough."""
        self.all_seconds: defaultdict[str, float] = defaultdict(float)
        """Time by class, of small operations too."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._wait()
        start = time.perf_counter()
        out = func(*args, **kwargs)
        self._wait()
        seconds = time.perf_counter() - start
        kind = op_class(func)
        self.all_seconds[kind] += seconds
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        least: float
        if kind == MEMORY:
            work, least = sum(t.nbytes for t in tensors if t.layout == torch.strided), _MIN_BYTES
        else:
            work, least = count_flops(func, args, kwargs, out), _MIN_FLOPS
            if kind == ATTENTION and any(isinstance(leaf, bool) and leaf for leaf in tree_leaves((args, kwargs))):
                work = int(work * _CAUSAL)
        if tensors and work >= least:
            dtype = str(tensors[0].dtype).removeprefix("torch.")
            key = (f"{kind} {_BACKWARD}" if kind == ATTENTION and _BACKWARD in str(func) else kind), dtype
            self.seconds[key] += seconds
            self.work[key] += work
        return out

    def rates(self, kind: str) -> Iterator[tuple[str, float]]:
        """What a class of operations reached in each dtype, per second."""
        for (found, dtype), seconds in self.seconds.items():
            if found == kind and seconds > 0:
                yield dtype, self.work[found, dtype] / seconds


def with_rates(entry: Device, timer: OpTimer, name: str) -> Device:
    """A device's entry with what a step has reached in the place of what was known.

    Args:
        entry: what is known of the device.
        timer: has timed the step.
        name: of the model, for the note.

    Raises:
        UsageError: if no matrix product of the step was large enough to tell anything.
    """
    matmul = dict(timer.rates(MATMUL))
    if not matmul:
        raise UsageError(
            "No matrix product of this step takes more than a million operations, so it says nothing about the device: use longer "
            "sequences or a larger batch (--max_length 1024)."
        )
    found: dict[str, Any] = {"matmul_flops": dict(entry.matmul_flops) | matmul}
    names = {f"matmul_flops.{dtype}" for dtype in matmul}
    for field, kind in (("attention_share", ATTENTION), ("attention_backward_share", f"{ATTENTION} {_BACKWARD}")):
        shares = [rate / matmul[dtype] for dtype, rate in timer.rates(kind) if dtype in matmul]
        if shares:
            found[field] = shares[0]
            names.add(field)
    memory = sum(timer.seconds[key] for key in timer.seconds if key[0] == MEMORY)
    if memory:
        found["memory_bandwidth"] = sum(timer.work[key] for key in timer.work if key[0] == MEMORY) / memory
        names.add("memory_bandwidth")
    provenance = dict(entry.provenance) | dict.fromkeys(names, MEASURED)
    return replace(entry, **found, provenance=provenance, note=f"Rates of a step of {name}.")
