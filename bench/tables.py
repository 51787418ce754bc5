"""The tables that people quote about checkpointing, computed: activations of Llama-2, LoRA on it, shares saved, longest sequences.

Steps are recorded as `tapeline.forecast` records them: the model's code on tensors without data, two layers of each kind, rates of
devices from data sheets. docs/tables.md says what differs from the figures that are quoted, and why.

Run: ``python -m bench.tables`` (some thirty minutes on two cores; interrupted, it goes on where it was). Writes
``bench/results/cpu/tables.json`` and the tables of docs/tables.md; with ``--print`` it only prints those of the record that is there.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench import longest
from bench.pages import renewed, tables
from bench.planner import LOSS_BYTES
from bench.quoted import ACTIVATIONS, GB, LORA_GB
from bench.smoke import PACKAGES, SEED, device_name, hardware, save
from bench.steps import (
    CHUNK,
    CHUNKED,
    DTYPE,
    HOST_BYTES,
    NO_HOST,
    PLAN,
    SETTINGS,
    STOCK,
    Case,
    Curve,
    Point,
    Recorded,
    at,
    blocks_only,
    fastest,
    needs,
    point,
    reach,
    record,
)
from bench.store import Store, source_digest
from tapeline.cost.catalogue import find_device
from tapeline.cost.links import links_of

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
RECORD = ROOT / "bench" / "results" / "cpu" / "tables.json"
PAGE = ROOT / "docs" / "tables.md"
BYTES_DEVICE = "h100"
"""Bytes do not depend on the device; its rates are needed all the same."""
TIMED = ("h100", "rtx-4090")
LORA_R = 16
LENGTHS = (4096, 8192)
"""The longest that Llama-2 was trained for, and twice that, for the slope."""
LORA_LENGTHS = (512, 2048, 8192)
SHARE_LENGTHS = (512, 2048, 8192, 32768)
SHARE_MODEL = "llama-3.1-8b"


# -- activations of Llama-2 --------------------------------------------------------------------------------------------


def activations(store: Store) -> list[dict[str, Any]]:
    """Bytes of activations, whole models trained: blocks and logits apart, at the quoted figures and at given lengths."""
    rows = []
    for model, quoted in ACTIVATIONS.items():
        points = [
            store.get(f"activations {model} {n}", lambda m=model, n=n: blocks(record(Case(model=m, length=n))))
            for n in LENGTHS
        ]
        curves = {name: _curve(points, name) for name in SETTINGS}
        tokens = reach(curves["none"], quoted[0] * GB)
        there = {name: round(at(each, tokens)) for name, each in curves.items()}
        row = {"model": model, "quoted_gb": quoted, "tokens_of_quoted": tokens, "at_quoted": there, "points": points}
        rows.append(row | {"tokens_of_quoted_checkpointed": reach(curves["recompute"], quoted[1] * GB)})
    return rows


def blocks(recorded: Recorded) -> Point:
    """What the blocks of a step have on the device, and the logits."""
    device = find_device(BYTES_DEVICE)
    work = recorded.on(device)
    return {
        "tokens": recorded.case.length,
        "num_parameters": recorded.num_parameters,
        "loss_bytes": work.route.loss_bytes,
        "rows": needs(blocks_only(work.route), links_of(device)),
    }


def _curve(points: Sequence[Point], name: str) -> Curve:
    return [(p["tokens"], p["rows"][name]["device_bytes"]) for p in points]


# -- LoRA on Llama-2-7B ------------------------------------------------------------------------------------------------


def lora(store: Store) -> list[dict[str, Any]]:
    """All bytes of the device for a base of 16 and of 4 bits, stock head and chunks, where each quoted figure would be met."""
    rows = []
    for is_4bit in (False, True):
        for head in (STOCK, CHUNKED):
            points = [
                store.get(f"lora {is_4bit} {head} {n}", lambda a=(is_4bit, head, n): _lora(*a)) for n in LORA_LENGTHS
            ]
            curves = {name: _curve(points, name) for name in SETTINGS}
            found = {}
            for name, gigabytes in zip(("none", "offload"), LORA_GB, strict=True):
                tokens = reach(curves[name], gigabytes * GB)
                found[name] = {"tokens": tokens} | (
                    {n: round(at(c, tokens)) for n, c in curves.items()} if tokens else {}
                )
            rows.append({"bits": 4 if is_4bit else 16, "head": head, "where": found, "points": points})
    return rows


def _lora(is_4bit: bool, head: str, length: int) -> Point:
    case = Case(model="llama-2-7b", length=length, lora_r=LORA_R, load_in_4bit=is_4bit, head=head)
    return point(record(case), find_device(BYTES_DEVICE))


# -- shares saved and time added ---------------------------------------------------------------------------------------


def shares(store: Store) -> list[dict[str, Any]]:
    """What each setting saves of all bytes, and adds to a step, by length and by what is trained."""
    rows = []
    for head in (STOCK, CHUNKED):
        for lora_r, is_4bit in ((0, False), (LORA_R, False), (LORA_R, True)):
            for length in SHARE_LENGTHS:
                case = Case(model=SHARE_MODEL, length=length, lora_r=lora_r, load_in_4bit=is_4bit, head=head)
                rows.append(store.get(f"shares {case}", lambda case=case: share(case)))
    return rows


def share(case: Case) -> dict[str, Any]:
    """One row: bytes, slowdowns on two devices, and the plan that has no more of the device than `offload`."""
    recorded = record(case)
    there = point(recorded, find_device(BYTES_DEVICE), (NO_HOST,))
    budget = there["rows"]["offload"]["device_bytes"] * 1.001
    timed = {}
    for name in TIMED:
        device = find_device(name)
        route, links = recorded.on(device).route, links_of(device)
        known = {setting: row["slowdown"] for setting, row in needs(route, links).items()}
        plan = fastest(route, links, device=budget)
        timed[name] = {"seconds": route.base_seconds, "slowdown": known, PLAN: plan}
    return asdict(case) | {"trained": case.trained, "timed": timed} | there


# -- the record --------------------------------------------------------------------------------------------------------


def run(store: Store, code: str) -> dict[str, Any]:
    """The whole record."""
    begin = time.perf_counter()
    found = {
        "activations": activations(store),
        "lora": lora(store),
        "shares": shares(store),
        "longest": longest.table(longest.Wanted(), store),
    }
    return {
        "case": "tables",
        "device": device_name(CPU),
        "hardware": hardware(CPU),
        "packages": {name: version(name) for name in (*PACKAGES, "bitsandbytes", "highspy")}
        | {"python": platform.python_version()},
        "code": code,
        "config": {
            "dtype": DTYPE,
            "optimizer": "AdamW",
            "batch_size": 1,
            "seed": SEED,
            "chunk_tokens": CHUNK,
            "loss_bytes_of_fused": LOSS_BYTES,
            "host_bytes_of_plans": HOST_BYTES,
            "margin": longest.MARGIN,
            "cards": longest.CARDS,
        },
        **found,
        "seconds": round(time.perf_counter() - begin, 1),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__)
    parser.add_argument("--out", type=Path, default=RECORD, help="where to write the record")
    parser.add_argument("--print", action="store_true", help="only print the tables of the record")
    options = parser.parse_args(arguments)
    if not options.print:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        code = source_digest()
        store = Store(options.out.with_suffix(".part.json"), code)
        save(run(store, code), options.out)
        store.remove()
    found = tables(json.loads(options.out.read_text()))
    if options.out == RECORD and not options.print:
        PAGE.write_text(renewed(PAGE.read_text(), found.values()))
    print("\n\n".join(found.values()))


if __name__ == "__main__":
    main()
