"""A minute on whatever device is there: are gradients equal, are peaks as predicted, and what does it cost?

Llama with and without LoRA, run untouched, under torch's checkpoint, and in three modes of tapeline; then the hooks, the replay
and the guard alone (`bench.micro`).

Run: ``python -m bench.smoke``. Writes ``bench/results/<device>/smoke.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

import tapeline
from bench.micro import Rounds, microbenchmarks
from tapeline.cost.price import ATTENTION, MATMUL, count_flops, op_class
from tapeline.integrations.peft import add_lora
from tapeline.ledger import Ledger
from tapeline.planner.schema import Plan
from tapeline.runtime.blocks import find_blocks
from tapeline.runtime.install import InstanceForward
from tapeline.runtime.measure import make_meter
from tapeline.table import text_table
from tapeline.units import format_bytes

MODES = ("cheap", "recompute", "least")
PACKAGES = ("torch", "transformers", "peft", "tapeline")
LORA_R, LORA_ALPHA = 8, 16
SEED = 0

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Sizes of a run."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    batch: tuple[int, int]
    """Sequences and tokens of each, for gradients, peaks and operations."""
    timed_batch: tuple[int, int]
    """The same for timing."""
    num_pairs: int
    """Steps timed untouched and in another way, in turns."""
    num_threads: int | None
    """Threads of torch on a CPU, where waiting for a busy core costs more than a second thread gains; `None`: torch decides."""
    rounds: int
    """Repetitions of each microbenchmark."""


# Llama 3.2 1B
LARGE = Config(
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    batch=(1, 2048),
    timed_batch=(1, 2048),
    num_pairs=15,
    num_threads=None,
    rounds=100,
)
SMALL = Config(
    hidden_size=512,
    intermediate_size=1792,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=1000,
    batch=(2, 256),
    timed_batch=(1, 64),
    num_pairs=15,
    num_threads=1,
    rounds=100,
)
QUICK = replace(
    SMALL,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    vocab_size=100,
    batch=(2, 32),
    timed_batch=(1, 16),
    num_pairs=2,
    rounds=3,
)


# -- what is run -------------------------------------------------------------------------------------------------------


def build(config: Config, device: torch.device, *, lora: bool, lora_r: int = LORA_R) -> nn.Module:
    """A Llama in bfloat16 with random weights; with adapters in float32 that are not zero, so that every path has a gradient."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(SEED)
    llama = LlamaConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        vocab_size=config.vocab_size,
        use_cache=False,
    )
    with device:
        model: nn.Module = AutoModelForCausalLM.from_config(llama, dtype=torch.bfloat16)
        if lora:
            model = add_lora(model, r=lora_r, alpha=LORA_ALPHA, dropout=0.0, target_modules="all-linear")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.to(device).train()


def make_batch(config: Config, shape: tuple[int, int], device: torch.device) -> Batch:
    ids = torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(SEED)).to(device)
    return {"input_ids": ids, "labels": ids.clone()}


class Way(Protocol):
    """A way to run a step; it can be switched on and off from step to step."""

    def switch(self, *, on: bool) -> None:
        """Put it in force on the model, or take it off."""


class Untouched:
    def switch(self, *, on: bool) -> None:
        pass


class Checkpoint:
    """torch's checkpoint for every block, as transformers switches it on."""

    def __init__(self, model: nn.Module) -> None:
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        # transformers before 5.23 has the old name only; remove when it is no longer supported
        names = ("activation_checkpointing", "gradient_checkpointing")
        name = next(name for name in names if hasattr(base, f"{name}_enable"))
        self._enable: Callable[..., None] = getattr(base, f"{name}_enable")
        self._disable: Callable[[], None] = getattr(base, f"{name}_disable")

    def switch(self, *, on: bool) -> None:
        if on:
            self._enable({"use_reentrant": False})
        else:
            self._disable()


class Managed:
    """A session; while it is off, its blocks run their own forward."""

    def __init__(self, model: nn.Module, plan: Plan, *, offload_dir: Path | None = None) -> None:
        self.session = tapeline.apply(model, plan, measure=False, offload_dir=offload_dir)
        forwards = ((module, vars(module).get("forward")) for module in model.modules())
        self._forwards = [(module, own) for module, own in forwards if isinstance(own, InstanceForward)]
        self.switch(on=False)

    def switch(self, *, on: bool) -> None:
        for module, forward in self._forwards:
            vars(module).pop("forward", None)
            if on:
                vars(module)["forward"] = forward

    def remove(self) -> None:
        self.switch(on=True)
        self.session.remove()


@contextmanager
def switched(way: Way) -> Iterator[None]:
    way.switch(on=True)
    try:
        yield
    finally:
        way.switch(on=False)


def step(model: nn.Module, batch: Batch) -> None:
    """Forward and backward; gradients stay."""
    model(**batch).loss.backward()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- gradients ---------------------------------------------------------------------------------------------------------


@contextmanager
def deterministic(device: torch.device) -> Iterator[list[str]]:
    """Deterministic kernels on an accelerator; yields a list that will name the ops that have none."""
    obstacles: list[str] = []
    if device.type == "cpu":
        yield obstacles
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield obstacles
        finally:
            torch.use_deterministic_algorithms(False)
            texts = (str(warning.message) for warning in caught)
            obstacles += dict.fromkeys(text.splitlines()[0] for text in texts if "deterministic" in text)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies on the host, so that they are no part of a peak; the model's own are dropped."""
    found = {name: p.grad.to("cpu", copy=True) for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def are_equal(model: nn.Module, expected: dict[str, torch.Tensor]) -> bool:
    """Whether every gradient is the expected one, bit for bit; the model's own are dropped."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found.keys() == expected.keys() and all(torch.equal(g.cpu(), expected[name]) for name, g in found.items())


# -- operations, bytes, seconds ----------------------------------------------------------------------------------------


class Operations:
    """What a step computes, counted call by call."""

    def __init__(self) -> None:
        self.flops = 0
        self.calls: Counter[str] = Counter()

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, _: Any) -> None:
        self.flops += count_flops(func, args, kwargs, out)
        self.calls[op_class(func)] += 1


def count(model: nn.Module, batch: Batch, device: torch.device) -> Operations:
    operations = Operations()
    with Ledger(device, observe=operations):
        step(model, batch)
    return operations


def measure_peak(model: nn.Module, batch: Batch, device: torch.device) -> dict[str, int | None]:
    """The peak of one step: on a CPU by a ledger, on an accelerator by the allocator's counters."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    meter = make_meter(model, device)
    with meter.measure(None, find_blocks(model, None)):
        step(model, batch)
        synchronize(device)
    model.zero_grad()
    return {"measured_bytes": meter.last_peak_bytes, "reserved_bytes": meter.reserved_bytes}


def timed(model: nn.Module, batch: Batch, device: torch.device) -> float:
    """Seconds of a step; gradients are dropped after it."""
    synchronize(device)
    begin = time.perf_counter()
    step(model, batch)
    synchronize(device)
    seconds = time.perf_counter() - begin
    model.zero_grad()
    return seconds


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, and the fifths below and above."""
    at = torch.quantile(torch.tensor(values, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return dict(zip(("p20", "median", "p80"), (round(float(value), 4) for value in at), strict=True))


def time_pairs(model: nn.Module, batch: Batch, device: torch.device, way: Way, num_pairs: int) -> dict[str, Any]:
    """The step in one way relative to the untouched one, measured in turns."""
    with switched(way):
        for _ in range(2):
            timed(model, batch, device)
    timed(model, batch, device)
    untouched, ratios = [], []
    for _ in range(num_pairs):
        untouched.append(timed(model, batch, device))
        with switched(way):
            ratios.append(timed(model, batch, device) / untouched[-1])
    return {"time_ratio": quantiles(ratios), "untouched_seconds": quantiles(untouched)}


# -- rows --------------------------------------------------------------------------------------------------------------


class Bench:
    """All ways to run one model.

    Args:
        name: of the model.
        model: the model.
        config: sizes.
        device: where it is.
    """

    def __init__(self, name: str, model: nn.Module, config: Config, device: torch.device) -> None:
        self.name, self.model, self.config, self.device = name, model, config, device
        self.batch = make_batch(config, config.batch, device)
        self.timed_batch = make_batch(config, config.timed_batch, device)
        self.expected: dict[str, torch.Tensor] = {}
        self.untouched = Operations()

    def rows(self) -> list[dict[str, Any]]:
        """One row for each way."""
        with deterministic(self.device):
            step(self.model, self.batch)
            self.expected = gradients(self.model)
        self.untouched = count(self.model, self.batch, self.device)
        self.model.zero_grad()
        managed = [self._managed(mode) for mode in MODES]
        untouched_bytes = managed[0].pop("untouched_bytes")
        untouched = self._row("none", Untouched()) | {"predicted_bytes": untouched_bytes}
        return [untouched, self._row("checkpoint", Checkpoint(self.model)), *managed]

    def _managed(self, mode: str) -> dict[str, Any]:
        begin = time.perf_counter()
        plan = tapeline.plan(self.model, self.batch, mode=mode)
        seconds = time.perf_counter() - begin
        way = Managed(self.model, plan)
        try:
            row = self._row(mode, way)
        finally:
            way.remove()
        row |= {"predicted_bytes": plan.peak_bytes, "predicted_flops_ratio": round(plan.slowdown, 4)}
        row |= {"plan_seconds": round(seconds, 2), "notes": [*plan.notes, *way.session.report().notes]}
        return row | ({"untouched_bytes": plan.untouched_peak_bytes} if mode == MODES[0] else {})

    def _row(self, name: str, way: Way) -> dict[str, Any]:
        row: dict[str, Any] = {"model": self.name, "way": name, "predicted_bytes": None}
        with switched(way):
            row |= self._check()
            if self.device.type == "cuda":  # kernels were chosen by another setting until now: blocks are recorded anew
                step(self.model, self.batch)
                self.model.zero_grad()
            operations = count(self.model, self.batch, self.device)
            self.model.zero_grad()
            row |= measure_peak(self.model, self.batch, self.device)
        row["flops_ratio"] = round(operations.flops / self.untouched.flops, 4)
        row["matmuls_replayed"] = operations.calls[MATMUL] - self.untouched.calls[MATMUL]
        row["attentions_replayed"] = operations.calls[ATTENTION] - self.untouched.calls[ATTENTION]
        row |= time_pairs(self.model, self.timed_batch, self.device, way, self.config.num_pairs)
        print(f"{self.name} {name}: {row['time_ratio']['median']:.3f}x time, {row['flops_ratio']:.3f}x operations")
        return row

    def _check(self) -> dict[str, Any]:
        """Gradients of two steps: tapeline records the first and replays from a known tape in the second."""
        with deterministic(self.device) as obstacles:
            equal = []
            for _ in range(2):
                step(self.model, self.batch)
                equal.append(are_equal(self.model, self.expected))
        return {"gradients_equal": all(equal), "without_deterministic_kernel": obstacles}


# -- the record --------------------------------------------------------------------------------------------------------


def device_name(device: torch.device) -> str:
    """How the folder of the results is called."""
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device).lower().replace(" ", "-")


def hardware(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"machine": platform.machine(), "cores": os.cpu_count()}
    if (cpus := Path("/proc/cpuinfo")).exists():
        models = (line.split(":")[1].strip() for line in cpus.read_text().splitlines() if line.startswith("model name"))
        found["processor"] = next(models, "")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"accelerator": properties.name, "accelerator_bytes": properties.total_memory}
        found["cuda"] = torch.version.cuda
    return found


def run(config: Config, device: torch.device) -> dict[str, Any]:
    """The whole record."""
    begin = time.perf_counter()
    rows = []
    for name in ("llama", "llama-lora"):
        model = build(config, device, lora=name.endswith("lora"))
        rows += Bench(name, model, config, device).rows()
        del model
    micro = microbenchmarks(device, Rounds(config.rounds))
    return {
        "case": "smoke",
        "device": device_name(device),
        "hardware": hardware(device),
        "packages": {package: version(package) for package in PACKAGES},
        "config": asdict(config) | {"dtype": "bfloat16", "lora_r": LORA_R, "threads": torch.get_num_threads()},
        "rows": rows,
        "micro": micro,
        "seconds": round(time.perf_counter() - begin, 1),
    }


def table(record: dict[str, Any]) -> str:
    """The record in short."""
    header = ("model", "way", "equal", "time", "p20", "p80", "operations", "mm", "attn", "predicted", "measured")
    rows = [
        (
            row["model"],
            row["way"],
            "yes" if row["gradients_equal"] else "NO",
            *(f"{row['time_ratio'][at]:.3f}x" for at in ("median", "p20", "p80")),
            f"{row['flops_ratio']:.3f}x",
            f"+{row['matmuls_replayed']}",
            f"+{row['attentions_replayed']}",
            "-" if row["predicted_bytes"] is None else format_bytes(row["predicted_bytes"]),
            format_bytes(row["measured_bytes"]),
        )
        for row in record["rows"]
    ]
    micro = [(name, f"{value:.2f}") for name, value in record["micro"].items()]
    return f"{text_table(header, rows, left=3)}\n\n{text_table(('microbenchmark', 'median'), micro)}"


def save(record: dict[str, Any], path: Path | None = None) -> None:
    """Write a record where it was asked for, or to its place among the results of its device."""
    path = path or Path(__file__).parent / "results" / record["device"] / f"{record['case']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{record['seconds']} s, record: {path}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.smoke", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model and few repetitions, to see that it works")
    parser.add_argument(
        "--output", type=Path, help="where to write the record; default: bench/results/<device>/smoke.json"
    )
    options = parser.parse_args(arguments)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product runs
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    config = QUICK if options.quick else LARGE if device.type == "cuda" else SMALL
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    record = run(config, device)
    print(table(record))
    save(record, options.output)


if __name__ == "__main__":
    main()
