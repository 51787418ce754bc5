"""The longest sequences that are said to fit cards of 8 to 80 GB, and those that the planner finds.

For each card: what Unsloth's configuration (inputs of blocks on the host), transformers' own checkpointing, and our plans would take.
Steps are recorded at some lengths; between them bytes grow along straight lines. Each answer that is printed with a time is recorded
once more at its own length, and how far it is off the budget is in the record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import tapeline
from bench.planner import LOSS_BYTES
from bench.quoted import GIB, LONGEST, Quote, lines
from bench.steps import (
    ANY_HOST,
    CHUNKED,
    PLAN,
    SAME_HOST,
    STOCK,
    Case,
    Curve,
    Point,
    at,
    fastest,
    needs,
    point,
    reach,
    record,
    slope,
)
from bench.store import Store
from tapeline.cost.catalogue import find_device
from tapeline.cost.links import links_of
from tapeline.planner.forecast import OURS
from tapeline.planner.route import Route
from tapeline.planner.synthetic import LLAMA_3_8B, LLAMA_3_70B, LlamaBlock, Shape, Speed

MARGIN = 0.05
"""Share of a card that `tapeline.forecast` leaves free where no budget is given; the driver's context is counted as used."""
LENGTHS = (128, 512, 2048, 8192, 16384, 32768, 65536, 131072, 262144)
LORA_R = 32
FUSED, LEAN, HALF = "fused", "fused and lean", "bfloat16 adapters"
BYTES_8BIT_STATE = 2
"""Of Adam, for each trained number."""
ANSWERED = ("recompute", "offload", SAME_HOST, PLAN, ANY_HOST)
PLANNED = {
    STOCK: (ANY_HOST,),
    CHUNKED: (SAME_HOST, PLAN, ANY_HOST),
    FUSED: (PLAN, ANY_HOST),
    LEAN: (),
    HALF: (ANY_HOST,),
}
"""Placements of least bytes that are looked for, by the way in which blocks and head are run."""
CARDS = {
    8: "rtx-4070",
    12: "rtx-4070",
    16: "rtx-4080",
    24: "rtx-4090",
    40: "a100-40gb",
    48: "l40s",
    80: "h100",
}
"""Whose rates are taken for the seconds. The catalogue has no card of 8 GB; bytes do not depend on the card."""
SHAPES: dict[str, Shape] = {"llama-3.1-8b": LLAMA_3_8B, "llama-3.1-70b": LLAMA_3_70B}


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What is computed; tests ask for less."""

    quotes: tuple[Quote, ...] = LONGEST
    lengths: tuple[int, ...] = LENGTHS
    shapes: dict[str, Shape] = field(default_factory=lambda: dict(SHAPES))
    """Of the models whose blocks are counted by formula, too."""
    lora_r: int = LORA_R


def budget_of(gigabytes: int) -> int:
    """Bytes that may be used of a card: its name in GiB, as the catalogue has it, less the margin."""
    return int(gigabytes * GIB * (1 - MARGIN))


def case(model: str, head: str, length: int, lora_r: int) -> Case:
    return Case(model=model, length=length, lora_r=lora_r, load_in_4bit=True, head=head)


# -- curves ------------------------------------------------------------------------------------------------------------


def points(wanted: Wanted, store: Store, model: str, head: str) -> list[Point]:
    """What a step needs, recorded at every length."""
    device = find_device(CARDS[80])
    return [
        store.get(
            f"longest {model} {head} {length}",
            lambda length=length: point(record(case(model, head, length, wanted.lora_r)), device, PLANNED[head]),
        )
        for length in wanted.lengths
    ]


def curve(found: Sequence[Point], setting: str, what: str = "device_bytes") -> Curve:
    return [(p["tokens"], p["rows"][setting][what]) for p in found]


def fused_point(shape: Shape, like: Point, lora_r: int, plans: Sequence[str] = ()) -> Point:
    """The same with blocks by formula, as fused kernels would run them, and what surrounds them as it was recorded.

    Args:
        shape: of the model.
        like: a recorded step of the same length.
        lora_r: rank of the adapters.
        plans: as in `needs`.
    """
    device = find_device(CARDS[80])
    rates = device.rates("bfloat16")
    speed = Speed(matmul_flops=rates.matmul_flops, memory_bytes=rates.memory_bytes, op_seconds=rates.op_seconds)
    block = LlamaBlock(shape, speed, length=like["tokens"], batch=1, training="lora", lora_r=lora_r, is_4bit=True)
    stage = replace(block.stage(), gradient_bytes=like["gradients"] // shape.num_layers)
    route = Route(
        stages=(stage,) * shape.num_layers,
        loss_seconds=block.head_seconds(),
        loss_bytes=LOSS_BYTES,
        base_bytes=sum(like["memory"].values()),
    )
    return {"tokens": like["tokens"], "rows": needs(route, links_of(device), plans)}


# -- answers -----------------------------------------------------------------------------------------------------------


def answer(curves: dict[str, list[Point]], quote: Quote) -> dict[str, Any]:
    """One row: a card, and for each way to run blocks and head the longest sequence of each setting."""
    budget = budget_of(quote.gigabytes)
    found: dict[str, Any] = {}
    for way, there in curves.items():
        found[way] = {}
        for setting in (name for name in ANSWERED if name in there[0]["rows"]):
            tokens = reach(curve(there, setting), budget)
            host = at(curve(there, setting, "host_bytes"), tokens) if tokens and setting == "offload" else None
            found[way][setting] = {"tokens": tokens, "host_bytes": None if host is None else round(host)}
    return asdict(quote) | {"card": CARDS[quote.gigabytes], "budget_bytes": budget, "ways": found}


def check(wanted: Wanted, quote: Quote, setting: str, head: str, tokens: int) -> dict[str, Any]:
    """Record a step at the length that was found: its bytes, and what its settings take on the card."""
    device, budget = find_device(CARDS[quote.gigabytes]), budget_of(quote.gigabytes)
    work = record(case(quote.model, head, tokens, wanted.lora_r)).on(device)
    links = links_of(device)
    rows = needs(work.route, links, [setting] if setting in PLANNED[CHUNKED] else [])
    need, host = rows[setting]["device_bytes"], rows["offload"]["host_bytes"]
    limit = max(budget, need * LEEWAY)
    return {
        "model": quote.model,
        "gigabytes": quote.gigabytes,
        "setting": setting,
        "head": head,
        "tokens": tokens,
        "device_bytes": need,
        "off": need / budget - 1,
        "step_seconds": work.route.base_seconds,
        "offload": rows["offload"],
        PLAN: fastest(work.route, links, device=limit),
        SAME_HOST: fastest(work.route, links, device=limit, host=host),
    }


LEEWAY = 1.001
"""Where a length was found a little too long, the budget of its plans is this multiple of what it needs."""
CLOSE, ROUNDS = 0.002, 4
"""How far an answer may be off the budget, and how often it is put right."""
CHECKED = (("offload", CHUNKED), (PLAN, CHUNKED))
"""Settings whose answer is recorded again on every card."""
SAMPLED = (("recompute", STOCK), ("recompute", CHUNKED), ("offload", STOCK))
"""The same on one card."""
SAMPLE = 24
LARGE = (80,)
FORECAST_LENGTHS = (512, 2048)
"""Of the steps from which `tapeline.forecast` is asked for the longest."""


def checks(
    wanted: Wanted, store: Store, curves: dict[str, dict[str, list[Point]]], rows: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Answers recorded again at their own length, and put right where they were off."""
    found = []
    for quote, row in zip(wanted.quotes, rows, strict=True):
        for setting, head in (*CHECKED, *(SAMPLED if quote.gigabytes == SAMPLE else ())):
            there = row["ways"][head][setting]
            if there["tokens"]:
                found.append(_settled(wanted, store, quote, (setting, head), curve(curves[quote.model][head], setting)))
                there["tokens"] = found[-1]["tokens"]
    return found


def _settled(wanted: Wanted, store: Store, quote: Quote, what: tuple[str, str], known: Curve) -> dict[str, Any]:
    """The check of an answer; while it is off the budget, its own length is one more point of the curve."""
    first = None
    for _ in range(ROUNDS):
        tokens = reach(known, budget_of(quote.gigabytes))
        key = f"check {quote.model} {quote.gigabytes} {' '.join(what)} {tokens}"
        again = store.get(key, lambda tokens=tokens: check(wanted, quote, *what, tokens))
        first = again["off"] if first is None else first
        if abs(again["off"]) <= CLOSE:
            break
        known = [*known, (tokens, again["device_bytes"])]
    return again | {"off_at_first": first}


def by_forecast(wanted: Wanted, store: Store, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `tapeline.forecast` itself says is longest, from a short step, beside what was found here for the stock head."""
    found = []
    for quote, row in zip(wanted.quotes, rows, strict=True):
        if quote.gigabytes not in (SAMPLE, *LARGE):
            continue
        for length in FORECAST_LENGTHS:
            key = f"forecast {quote.model} {quote.gigabytes} {length}"
            said = store.get(key, lambda args=(quote, length): _said(wanted, *args))
            here = {name: row["ways"][STOCK][name]["tokens"] for name in ("recompute", "offload", ANY_HOST)}
            found.append(
                {"model": quote.model, "gigabytes": quote.gigabytes, "from": length, "said": said, "found": here}
            )
    return found


def _said(wanted: Wanted, quote: Quote, length: int) -> dict[str, int | None]:
    said = tapeline.forecast(
        quote.model,
        device=CARDS[quote.gigabytes],
        budget=budget_of(quote.gigabytes),
        max_length=length,
        lora_r=wanted.lora_r,
        load_in_4bit=True,
        longest=True,
    )
    named = {row.name: row.longest for row in said.rows}
    return {"recompute": named["recompute"], "offload": named["offload"], ANY_HOST: named[OURS]}


# -- what the bytes of one token are -----------------------------------------------------------------------------------


def adapters_in_half(wanted: Wanted, store: Store, model: str) -> list[Point]:
    """A step whose adapters are not float32, recorded at the lengths that give a slope."""
    device = find_device(CARDS[80])
    return [
        store.get(
            f"longest {model} {HALF} {length}",
            lambda length=length: point(
                record(replace(case(model, CHUNKED, length, wanted.lora_r), adapters="bfloat16")), device, PLANNED[HALF]
            ),
        )
        for length in wanted.lengths[-2:]
    ]


def per_token(curves: dict[str, list[Point]]) -> dict[str, Any]:
    """For each way, what one token more takes of the device under each setting."""
    return {
        way: {setting: round(slope(curve(there, setting))[0]) for setting in ("recompute", "offload", ANY_HOST)}
        for way, there in curves.items()
        if way != LEAN
    }


def fixed(wanted: Wanted, store: Store, model: str, shortest: Point) -> dict[str, Any]:
    """What there is beside activations, and what two savings that this run does without would take off it."""
    smaller = replace(case(model, STOCK, shortest["tokens"], wanted.lora_r), double_quant=True)
    device = find_device(CARDS[80])
    quantised = store.get(f"longest {model} double quant", lambda: dict(record(smaller).on(device).memory))
    memory = shortest["memory"]
    return {
        **memory,
        "gradients": shortest["gradients"],
        "double_quant_saves": memory["weights"] - quantised["weights"],
        "8bit_state_saves": memory["optimizer"] - BYTES_8BIT_STATE * shortest["num_trainable"],
    }


# -- the table ---------------------------------------------------------------------------------------------------------


def table(wanted: Wanted, store: Store) -> dict[str, Any]:
    """Everything about the longest sequences, as data."""
    models = tuple(dict.fromkeys(quote.model for quote in wanted.quotes))
    found: dict[str, Any] = {"per_token": {}, "fixed": {}, "lines": {}, "points": {}}
    for model in models:
        curves = {head: points(wanted, store, model, head) for head in (STOCK, CHUNKED)}
        found["fixed"][model] = fixed(wanted, store, model, curves[STOCK][0])
        curves |= by_formula(wanted, store, model, curves[STOCK], found["fixed"][model])
        found["per_token"][model] = per_token(curves | {HALF: adapters_in_half(wanted, store, model)})
        found["lines"][model] = lines([quote for quote in wanted.quotes if quote.model == model])
        found["points"][model] = curves
    rows = [answer(found["points"][quote.model], quote) for quote in wanted.quotes]
    found["checks"] = checks(wanted, store, found["points"], rows)
    return found | {"rows": rows, "by_forecast": by_forecast(wanted, store, rows)}


def by_formula(
    wanted: Wanted, store: Store, model: str, stock: Sequence[Point], parts: dict[str, int]
) -> dict[str, list[Point]]:
    """Blocks as fused kernels would run them, with weights and state as they are, and with less of both."""
    shape = wanted.shapes.get(model)
    if shape is None:
        return {}
    lean = {"saved": -parts["double_quant_saves"] - parts["8bit_state_saves"]}
    found: dict[str, list[Point]] = {}
    for way, less in ((FUSED, {}), (LEAN, lean)):
        found[way] = [
            store.get(
                f"longest {model} {way} {like['tokens']}",
                lambda like=like | {"memory": like["memory"] | less}, way=way: fused_point(
                    shape, like, wanted.lora_r, PLANNED[way]
                ),
            )
            for like in stock
        ]
    return found
