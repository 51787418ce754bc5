"""Forecasts and plans made by hand, and what a page of them says."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser

from tapeline.planner.forecast import BlockPlacement, Forecast, Row
from tapeline.planner.policy import CHEAP, KEEP, RECOMPUTE, Policy
from tapeline.planner.schema import Alternative, BlockPlan, Plan

GIB, MIB = 2**30, 2**20
EVIL = '<script>alert("1")</script>&amp;\''
VOID = {"meta", "br", "link", "img", "input", "hr"}

NONE = Row(name="none", words="no activation checkpointing", device_bytes=90 * GIB, fits=False)
RECOMPUTED = Row(
    name="recompute",
    words="transformers activation_checkpointing=True",
    device_bytes=21 * GIB,
    fits=True,
    seconds=5.182,
    slowdown=1.337,
    slowdown_if_it_fits=1.337,
    recompute_seconds=1.3,
)
AUTO = Row(
    name="auto",
    words='tapeline mode="auto"',
    device_bytes=19 * GIB,
    fits=True,
    seconds=4.06,
    slowdown=1.047,
    host_bytes=34 * GIB,
    recompute_seconds=0.18,
    waiting_seconds=0.1,
)
BLOCKS = (
    BlockPlacement(
        blocks="0-3, 7",
        kept=("self_attn.attention", "2 more"),
        moved=("mlp.up_proj.add",),
        num_recomputed=10,
        kept_bytes=160 * MIB,
        moved_bytes=576 * MIB,
    ),
    BlockPlacement(blocks="4-6", kept=(), moved=(), num_recomputed=0, kept_bytes=0, moved_bytes=0),
)
FITS = Forecast(
    model="llama-3.1-8b",
    training="LoRA r16, 4-bit base",
    num_parameters=8_072_204_288,
    num_trainable=41_943_040,
    num_layers=8,
    device="rtx-4090",
    dtype="bfloat16",
    batch_size=1,
    max_length=8192,
    budget_bytes=22 * GIB,
    device_bytes=24 * GIB,
    host_budget_bytes=None,
    disk_budget_bytes=0,
    memory={"context": 512 * MIB, "weights": 6 * GIB, "tables": 0, "activations": 72 * GIB, "head and loss": 12 * GIB},
    rows=(NONE, RECOMPUTED, AUTO),
    bound_seconds=4.04,
    blocks=BLOCKS,
    next_gib=0.013,
    phases={"train": {"device": 22 * GIB, "host": 34 * GIB}, "save": {"device": 7 * GIB, "host": 480 * MIB}},
    provenance={"memory_bytes": "measured", "op_seconds": "assumed", "peak_flops.float16": "catalogue"},
    notes=("step times are estimates",),
)
LONGEST = replace(FITS, rows=tuple(replace(row, longest=1583 * n, largest_batch=n) for n, row in enumerate(FITS.rows)))
DISK = replace(FITS, rows=(NONE, RECOMPUTED, replace(AUTO, disk_bytes=3 * GIB)), disk_budget_bytes=50 * GIB)
FREE = replace(
    FITS,
    rows=(
        replace(NONE, device_bytes=GIB, fits=True, seconds=1.0, slowdown=1.0),
        replace(AUTO, seconds=1.0, slowdown=1.0),
    ),
    bound_seconds=1.0,
    next_gib=None,
    memory={"weights": 2 * GIB, "activations": MIB},
)
NOT = replace(
    FITS,
    rows=(
        NONE,
        replace(RECOMPUTED, fits=False, seconds=None, slowdown=None),
        replace(AUTO, fits=False, seconds=None, slowdown=None),
    ),
    budget_bytes=512 * MIB,
    device_bytes=512 * MIB,
    host_budget_bytes=0,
    bound_seconds=None,
    blocks=(),
    next_gib=None,
)
EMPTY = replace(NOT, rows=NOT.rows[-1:], memory={}, phases={}, provenance={"op_seconds": "guessed"}, notes=())
FORECASTS = {
    "fits": FITS,
    "longest": LONGEST,
    "disk": DISK,
    "free": FREE,
    "not": NOT,
    "empty": EMPTY,
    "evil": replace(
        FITS, model=EVIL, training=EVIL, device=EVIL, notes=(EVIL,), memory={EVIL: GIB}, provenance={EVIL: EVIL}
    ),
}

POLICIES = (KEEP, CHEAP, Policy(price=1e-10), RECOMPUTE)
PLAN = Plan(
    mode="auto",
    device="cuda:0",
    budget_bytes=24 * GIB,
    peak_bytes=23 * GIB,
    first_step_peak_bytes=22 * GIB,
    untouched_peak_bytes=41 * GIB,
    flops=5 * 10**15,
    untouched_flops=4 * 10**15,
    memory={"weights": 15 * GIB, "activations": 7 * GIB, "other": GIB},
    untouched_memory={"weights": 15 * GIB, "activations": 26 * GIB},
    blocks=tuple(
        BlockPlan(
            name=f"layers.{number}",
            kind="Layer",
            policy=policy,
            input="device" if number else "recompute",
            held_bytes=(300 + number) * MIB,
            recompute_flops=number * 10**12,
            reason="a hook is in the way" if number == 2 else "",
        )
        for number, policy in enumerate(POLICIES)
    ),
    alternatives=(
        Alternative(name="none", peak_bytes=41 * GIB, flops=4 * 10**15, fits=False),
        Alternative(name="recompute", peak_bytes=19 * GIB, flops=53 * 10**14, fits=True),
        Alternative(name="auto (this plan)", peak_bytes=23 * GIB, flops=5 * 10**15, fits=None),
    ),
    keep=("attention",),
    notes=("a note",),
)
PLANS = {
    "budget": PLAN,
    "no budget": replace(PLAN, budget_bytes=None),
    "over": replace(PLAN, budget_bytes=20 * GIB),
    "empty": replace(
        PLAN, budget_bytes=None, untouched_flops=0, memory={}, untouched_memory={}, blocks=(), alternatives=()
    ),
    "evil": replace(PLAN, mode=EVIL, device=EVIL, keep=(EVIL,), drop=(EVIL,), notes=(EVIL,), memory={EVIL: GIB}),
}


class Page(HTMLParser):
    """What a page says; fails on an element that is not closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if {"td", "th"} & set(self.open) and "svg" not in self.open:
            self.tables[-1][-1][-1] += data

    def table(self, *header: str) -> list[list[str]]:
        """The rows of the table whose header begins like this."""
        rows = next(rows for rows in self.tables if tuple(rows[0][: len(header)]) == header)
        return [[" ".join(cell.split()) for cell in row] for row in rows[1:]]

    def ids(self) -> list[str]:
        return [attributes["id"] or "" for _, attributes in self.elements if "id" in attributes]
