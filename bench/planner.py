"""Plans over device, host and disk on paper: how far they are from a bound that no plan beats, and how long they take to make.

Blocks are Llama-shaped, by formula (`tapeline.planner.synthetic`); times are those of the planner's own simulator, on devices
given by achieved rates. The first table holds the plans for one model against the numbers that are expected of them; the second
draws models, shapes, devices and budgets at random.

Run: ``python -m bench.planner``. Writes ``bench/results/cpu/planner.json``.
"""

from __future__ import annotations

import argparse
import functools
import math
import platform
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.smoke import PACKAGES, device_name, hardware, save
from tapeline.planner.hybrid import Hybrid, solve
from tapeline.planner.route import Budgets, Links, Route
from tapeline.planner.synthetic import (
    LLAMA_2_7B,
    LLAMA_3_2_1B,
    LLAMA_3_8B,
    LLAMA_3_70B,
    LlamaBlock,
    Shape,
    Speed,
    Training,
)
from tapeline.planner.tightest import smallest
from tapeline.planner.timeline import simulate
from tapeline.table import text_table
from tapeline.units import format_bytes

CPU = torch.device("cpu")
GIB = 2**30
SEED = 0
LOSS_BYTES = GIB // 2
"""What a loss in chunks needs at its peak."""
DISK_WRITE, DISK_READ = 5e9, 6e9

MODELS: dict[str, Shape] = {
    "Llama-2-7B": LLAMA_2_7B,
    "Llama-3.2-1B": LLAMA_3_2_1B,
    "Llama-3-8B": LLAMA_3_8B,
    "Llama-3-70B": LLAMA_3_70B,
}
TRAININGS: tuple[Training, ...] = ("full", "lora")
LENGTHS = tuple(512 * 2**power for power in range(8))
BATCHES = (1, 2, 4, 8)
NEAREST = 1.02
"""Random budgets begin at this multiple of the smallest feasible one."""
HOST_SHARES = (0.1, 0.6)
"""Random host limits, as shares of the bytes that all blocks save."""

GOALS = {"median": 0.003, "p90": 0.01}
"""The certified gap that is asked for: half of the instances within the first, nine of ten within the second."""


def _device(matmul_flops: float, memory_bytes: float, link: float) -> tuple[Speed, Links]:
    """Achieved rates: four fifths of the memory's nominal bandwidth, one copy engine each way."""
    speed = Speed(matmul_flops=matmul_flops, memory_bytes=0.8 * memory_bytes)
    return speed, Links(to_host=link, to_device=link, disk_write=DISK_WRITE, disk_read=DISK_READ)


DEVICES: dict[str, tuple[Speed, Links]] = {
    "H200@700": _device(700e12, 4.8e12, 50e9),
    "H200@450": _device(450e12, 4.8e12, 50e9),
    "RTX 4090": _device(150e12, 1.008e12, 25e9),
    "GH200": _device(700e12, 4.0e12, 300e9),
}

COLUMNS = tuple((device, training) for device in ("H200@700", "H200@450", "RTX 4090") for training in TRAININGS)
EXPECTED: dict[float, tuple[float, ...]] = {
    1.53: (16.6, 21.7, 11.4, 14.8, 3.9, 3.3),
    2.29: (15.7, 20.6, 10.5, 13.6, 3.1, 2.2),
    3.06: (14.8, 19.2, 9.6, 12.4, 2.2, 1.5),
    4.58: (13.0, 16.7, 7.8, 10.1, 1.1, 1.2),
    6.11: (11.3, 14.4, 6.1, 7.5, 0.9, 0.9),
    9.17: (7.9, 9.6, 2.8, 2.9, 0.4, 0.4),
    12.23: (4.4, 5.2, 0.7, 0.8, 0.1, 0.0),
    18.34: (0.7, 0.9, 0.1, 0.1, 0.0, 0.0),
}
"""Slowdown in percent of Llama-2-7B at 2 x 4096 tokens, by GiB of activations on the device, in the order of `COLUMNS`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Instance:
    """A step to be planned."""

    model: str
    device: str
    training: Training
    length: int
    batch: int
    device_bytes: float
    host_bytes: float | None = None
    """``None``: as much as it takes."""
    disk_bytes: float = 0.0
    place: float | None = None
    """Where a random budget lies, on a logarithmic scale: 0 is near the smallest feasible one, 1 keeps everything."""

    @property
    def budgets(self) -> Budgets:
        """What each tier may hold."""
        host = math.inf if self.host_bytes is None else self.host_bytes
        return Budgets(device=self.device_bytes, host=host, disk=self.disk_bytes)

    @property
    def kind(self) -> str:
        """What beside the device is limited."""
        return "host and disk" if self.disk_bytes else "no host limit" if self.host_bytes is None else "host limit"


@functools.lru_cache(maxsize=8)
def route_of(model: str, device: str, training: Training, length: int, batch: int) -> Route:
    """The step of a model: equal blocks, then the head and a loss in chunks."""
    shape = MODELS[model]
    block = LlamaBlock(shape, DEVICES[device][0], length=length, batch=batch, training=training)
    return Route(stages=(block.stage(),) * shape.num_layers, loss_seconds=block.head_seconds(), loss_bytes=LOSS_BYTES)


def route(instance: Instance) -> Route:
    """The step of an instance."""
    return route_of(instance.model, instance.device, instance.training, instance.length, instance.batch)


def everything_kept(step: Route, links: Links) -> float:
    """Device bytes with nothing moved and nothing recomputed."""
    chosen = [int(np.argmax(options.kept_bytes)) for options in step.choices]
    return simulate(step, chosen, Budgets(device=math.inf), links).device_peak


def draw(generator: random.Random) -> Instance | None:
    """A random step whose device budget lies between the smallest that is feasible and keeping everything."""
    instance = Instance(
        model=generator.choice(tuple(MODELS)),
        device=generator.choice(tuple(DEVICES)),
        training=generator.choice(TRAININGS),
        length=generator.choice(LENGTHS),
        batch=generator.choice(BATCHES),
        device_bytes=0.0,
    )
    step, links = route(instance), DEVICES[instance.device][1]
    saved = sum(sum(stage.sizes[value] for value in stage.needed) for stage in step.stages)
    share, tier, place = generator.uniform(*HOST_SHARES), generator.random(), generator.random()
    if tier < 0.4:
        instance = replace(instance, host_bytes=share * saved, disk_bytes=saved if tier < 0.2 else 0.0)
    least = smallest(step, instance.budgets, links)
    if least is None:
        return None
    low, high = NEAREST * least.device_bytes, everything_kept(step, links)
    return replace(instance, device_bytes=low * (max(low, high) / low) ** place, place=place)


def instances(count: int, seed: int = SEED) -> Iterator[Instance]:
    """Random steps, the same ones for the same seed."""
    generator, found = random.Random(seed), 0  # noqa: S311 - no secret is made of it
    while found < count:
        if (instance := draw(generator)) is not None:
            found += 1
            yield instance


def planned(instance: Instance) -> dict[str, Any]:
    """One row: the plan of an instance."""
    step, links = route(instance), DEVICES[instance.device][1]
    step.choices  # noqa: B018 - options are listed once for each block, not for each plan
    begin = time.process_time()
    plan = solve(step, instance.budgets, links)
    seconds = time.process_time() - begin
    return asdict(instance) | {"kind": instance.kind, "num_blocks": len(step.stages)} | _outcome(step, plan, seconds)


def _outcome(step: Route, plan: Hybrid, seconds: float) -> dict[str, Any]:
    timeline, base = plan.timeline, step.base_seconds
    return {
        "step_seconds": base,
        "overhead": timeline.seconds / base - 1,
        "bound": plan.lower_bound / base - 1,
        "gap": plan.gap,
        "recompute": timeline.recompute_seconds / base,
        "waits": sum(timeline.waits.values()) / base,
        "device_peak": round(timeline.device_peak),
        "host_peak": round(timeline.host_peak),
        "disk_peak": round(timeline.disk_peak),
        "planning_seconds": round(seconds, 3),
    }


def headline(budgets: Sequence[float] = tuple(EXPECTED)) -> list[dict[str, Any]]:
    """The plans of one model on three devices, beside what is expected."""
    rows = []
    for column, (device, training) in enumerate(COLUMNS):
        for gib in budgets:
            instance = Instance(
                model="Llama-2-7B", device=device, training=training, length=4096, batch=2, device_bytes=gib * GIB
            )
            rows.append(planned(instance) | {"gib": gib, "expected": EXPECTED[gib][column] / 100})
    return rows


def sweep(count: int, *, show: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Plans of random instances."""
    rows = []
    for instance in instances(count):
        rows.append(planned(instance))
        if len(rows) % 20 == 0:
            show(f"{len(rows)} of {count}")
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Gap and time of planning over some rows."""
    gaps, seconds = ([row[key] for row in rows] for key in ("gap", "planning_seconds"))
    return {
        "instances": len(rows),
        "gap": {"median": float(np.median(gaps)), "p90": float(np.quantile(gaps, 0.9)), "max": max(gaps)},
        "planning_seconds": {"median": float(np.median(seconds)), "max": max(seconds)},
    }


def groups(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The summary of each kind of instance."""
    ways: tuple[Callable[[dict[str, Any]], str], ...] = (
        lambda _: "all",
        lambda row: ("low", "middle", "high")[min(2, int(3 * row["place"]))] + " budgets",
        lambda row: str(row["kind"]),
        lambda row: str(row["device"]),
        lambda row: str(row["model"]),
        lambda row: str(row["training"]),
        lambda row: "up to 2048 tokens" if row["length"] * row["batch"] <= 2048 else "more than 2048 tokens",
    )
    found: dict[str, dict[str, Any]] = {}
    for way in ways:
        for name in sorted({way(row) for row in rows}):
            found[name] = summary([row for row in rows if way(row) == name])
    return found


def run(count: int, budgets: Sequence[float] = tuple(EXPECTED)) -> dict[str, Any]:
    """The whole record."""
    begin = time.perf_counter()
    table, rows = headline(budgets), sweep(count)
    return {
        "case": "planner",
        "device": device_name(CPU),
        "hardware": hardware(CPU),
        "packages": {package: version(package) for package in (*PACKAGES, "highspy", "numpy")}
        | {"python": platform.python_version()},
        "config": {"seed": SEED, "instances": count, "loss_bytes": LOSS_BYTES, "goals": GOALS},
        "headline": table,
        "groups": groups(rows),
        "rows": rows,
        "seconds": round(time.perf_counter() - begin, 1),
    }


def text(record: dict[str, Any]) -> str:
    """The record in short."""
    by_budget: dict[float, list[str]] = {}
    for row in record["headline"]:
        cell = f"{row['overhead']:+.1%} ({row['expected']:+.1%})"
        by_budget.setdefault(row["gib"], []).append(cell)
    columns = [f"{device} {training}" for device, training in COLUMNS]
    first = text_table(("GiB", *columns), [(str(gib), *cells) for gib, cells in by_budget.items()])
    rows = [
        (
            name,
            str(found["instances"]),
            *(f"{found['gap'][key]:.2%}" for key in ("median", "p90", "max")),
            *(f"{found['planning_seconds'][key]:.2f} s" for key in ("median", "max")),
        )
        for name, found in record["groups"].items()
    ]
    second = text_table(("kind", "instances", "gap", "p90", "max", "planning", "max"), rows)
    missed = [
        f"missed: {key} of the gap {record['groups']['all']['gap'][key]:.2%}, asked for {goal:.2%}"
        for key, goal in GOALS.items()
        if record["groups"]["all"]["gap"][key] > goal
    ]
    worst = [
        f"{row['gap']:.2%}: {row['model']} {row['training']} {row['batch']} x {row['length']} on {row['device']}, "
        f"{format_bytes(int(row['device_bytes']))}, {row['kind']}"
        for row in sorted(record["rows"], key=lambda row: -row["gap"])[:5]
    ]
    return "\n".join([first, "", second, "", *missed, "largest gaps:", *worst])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.planner", description=__doc__)
    parser.add_argument("--instances", type=int, default=200, help="random instances; default: 200")
    parser.add_argument("--out", type=Path, help="where to write the record; default: bench/results/cpu/planner.json")
    parser.add_argument("--gib", nargs="+", type=float, choices=EXPECTED, default=list(EXPECTED), metavar="GIB")
    options = parser.parse_args(arguments)
    if options.instances < 1:
        parser.error("at least one instance")
    if options.out is None and set(options.gib) != set(EXPECTED):
        parser.error("a record of some budgets needs a place of its own: --out FILE")
    record = run(options.instances, options.gib)
    print(text(record))
    save(record, options.out)


if __name__ == "__main__":
    main()
