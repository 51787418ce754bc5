"""Models, lengths and ways of the benchmark on a GPU: a case is one model and length, a row of it is one way to run the step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench import smoke
from bench.gpu_ways import AUTO, CHECKPOINT, LIGER, NONE, OFFLOAD, OURS, TRANSFORMERS, WAYS, Setting, liger_kernels
from bench.smoke import Config

LORA_R = 16
FULL, LORA = "full", "lora"
_MIB = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model, what of it is trained, and the length of its sequences."""

    size: str
    """One of the sizes of the suite."""
    trained: str
    """``full`` or ``lora``."""
    length: int
    """Tokens of a sequence."""
    liger: bool = False
    """Whether it runs with Liger's kernels."""
    ways: tuple[str, ...] = tuple(WAYS)
    """How it is run."""

    @property
    def name(self) -> str:
        return f"{self.size}-{self.trained}-{self.length}{'-liger' if self.liger else ''}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """What is run, and how long."""

    sizes: dict[str, Config]
    """Models by name."""
    batch_size: int
    """Sequences in a batch."""
    cases: tuple[Case, ...]
    """In this order: the first ones are there if time is short."""
    row_seconds: float
    """Time for the timed steps of a row."""
    link_bytes: tuple[int, ...]
    """Sizes of a copy."""


LLAMA_8B = replace(smoke.LARGE, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
LLAMA_1B = smoke.LARGE
TINY = replace(smoke.QUICK, hidden_size=128, intermediate_size=256, num_hidden_layers=2, vocab_size=256)

_MAIN = (NONE, CHECKPOINT, TRANSFORMERS, *OURS)
_WITHOUT = (CHECKPOINT, TRANSFORMERS, OFFLOAD, AUTO)
"""Where the untouched step does not fit."""

DEFAULT = Suite(
    sizes={"8b": LLAMA_8B, "1b": LLAMA_1B},
    batch_size=1,
    cases=(
        Case(size="8b", trained=LORA, length=4096),
        Case(size="1b", trained=FULL, length=4096, ways=_MAIN),
        Case(size="8b", trained=LORA, length=16384, ways=_WITHOUT),
        Case(size="8b", trained=LORA, length=4096, liger=True, ways=LIGER),
    ),
    row_seconds=10.0,
    link_bytes=(4 * _MIB, 64 * _MIB, 1024 * _MIB),
)
# the longest needs more for its logits than for anything else (128256 classes in float32), unless Liger's loss does without
ALL = replace(
    DEFAULT,
    cases=(
        *(Case(size="8b", trained=LORA, length=length) for length in (4096, 16384, 512)),
        *(Case(size="1b", trained=FULL, length=length) for length in (4096, 16384, 512)),
        *(Case(size="1b", trained=LORA, length=length) for length in (4096, 16384, 512, 65536)),
        Case(size="8b", trained=LORA, length=65536),
        *(Case(size="8b", trained=LORA, length=length, liger=True, ways=LIGER) for length in (4096, 16384)),
        *(Case(size="1b", trained=FULL, length=length, liger=True, ways=LIGER) for length in (4096, 16384)),
        *(Case(size="1b", trained=LORA, length=length, liger=True, ways=LIGER) for length in (4096, 65536)),
        Case(size="8b", trained=LORA, length=65536, liger=True, ways=LIGER),
    ),
)
# inputs of blocks have 64 KiB at least: smaller tensors are not moved
QUICK = Suite(
    sizes={"tiny": TINY, "small": replace(TINY, num_hidden_layers=3)},
    batch_size=8,
    cases=(
        Case(size="tiny", trained=LORA, length=32),
        Case(size="small", trained=FULL, length=64),
        Case(size="tiny", trained=LORA, length=64, liger=True, ways=LIGER),
    ),
    row_seconds=0.2,
    link_bytes=(8 * _MIB, 16 * _MIB),
)


@contextmanager
def built(case: Case, suite: Suite, device: torch.device, folder: Path) -> Iterator[Setting]:
    """The model of a case with a batch."""
    config = suite.sizes[case.size]
    model = smoke.build(config, device, lora=case.trained == LORA, lora_r=LORA_R)
    batch = smoke.make_batch(config, (suite.batch_size, case.length), device)
    with liger_kernels(model) if case.liger else nullcontext():
        yield Setting(model, batch, device, folder)
