"""The record of `bench.tables` as the tables of docs/tables.md; a test holds the two together."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from bench.longest import FUSED, HALF, LEAN
from bench.quoted import ACTIVATIONS, AGGRESSIVE, GB, GIB, LORA_GB
from bench.steps import ANY_HOST, CHUNKED, NO_HOST, PLAN, SAME_HOST, STOCK, at
from tapeline.planner.rules import CLAIMS

WAYS = {
    STOCK: "code of transformers and PEFT, all logits at once",
    CHUNKED: "the same, logits in chunks",
    HALF: "the same, adapters in bfloat16",
    FUSED: "fused kernels by formula, logits in chunks",
}
HEADS = {STOCK: "at once", CHUNKED: "in chunks"}
NAMES = {"llama-3.1-8b": "8B", "llama-3.1-70b": "70B"}
Share = tuple[float, float]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as docs have it."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(record: dict[str, Any]) -> dict[str, str]:
    """Every table by name."""
    made: dict[str, Callable[[dict[str, Any]], str]] = {
        "activations": activations,
        "activations quoted": activations_quoted,
        "lora": lora,
        "headlines": headlines,
        "shares": shares,
        "longest": longest,
        "plans": plans,
        "checkpointed": checkpointed,
        "per token": per_token,
        "fixed": fixed,
    }
    return {name: make(record) for name, make in made.items()}


def renewed(page: str, found: Iterable[str]) -> str:
    """A page with its tables replaced by those that have the same header.

    Raises:
        ValueError: if the page has no table with a header, or more than one.
    """
    for text in found:
        header = re.escape(text.partition("\n")[0])
        page, count = re.subn(rf"^{header}$(\n\|.*$)*", lambda _, text=text: text, page, flags=re.MULTILINE)
        if count != 1:
            raise ValueError(f"the page has {count} tables with the header {text.partition(chr(10))[0]!r}")
    return page


def _gb(size: float, digits: int = 1) -> str:
    return f"{size / GB:.{digits}f}"


def _gib(size: float, digits: int = 1) -> str:
    return f"{size / GIB:.{digits}f}"


def _host(size: float) -> str:
    """GiB of the host, in parentheses."""
    gib = size / GIB
    return f"({gib:.0f})" if gib >= 10 else f"({gib:.1f})"


def _percent(share: float) -> str:
    return f"{100 * share + 0.0:.0f}%".replace("-0%", "0%")


def _range(values: Iterable[float]) -> str:
    """Percent from and to."""
    found = list(values)
    low, high = (round(100 * value) for value in (min(found), max(found)))
    return f"{low}%" if low == high else f"{low}-{high}%"


# -- activations -------------------------------------------------------------------------------------------------------


def activations(record: dict[str, Any]) -> str:
    """Gigabytes of activations at the length that the models were trained for, by setting."""
    rows = []
    for row in record["activations"]:
        point = row["points"][0]
        known = {name: point["rows"][name] for name in ("none", "recompute", "offload", "offload everything")}
        cells = [_gb(known[name]["device_bytes"], 2) for name in known]
        cells[2:] = [
            f"{_gb(known[name]['device_bytes'], 2)} ({_gb(known[name]['host_bytes'])})" for name in list(known)[2:]
        ]
        rows.append([row["model"], f"{point['tokens']:,}", *cells, _gb(point["loss_bytes"], 2)])
    header = (
        "model",
        "tokens",
        "kept",
        "checkpointed",
        "inputs on the host (host)",
        "everything there (host)",
        "logits",
    )
    return markdown(header, rows)


def activations_quoted(record: dict[str, Any]) -> str:
    """What would have to be so for the quoted figures."""
    rows = []
    for row in record["activations"]:
        kept, checkpointed_gb = ACTIVATIONS[row["model"]]
        there = row["at_quoted"]
        rows.append(
            [
                row["model"],
                f"{kept} -> {checkpointed_gb} ({kept / checkpointed_gb:.1f}x)",
                _gb(4 * row["points"][0]["num_parameters"]),
                f"{row['tokens_of_quoted']:,}",
                f"{_gb(there['none'])} -> {_gb(there['recompute'])} ({there['none'] / there['recompute']:.1f}x)",
                f"{row['tokens_of_quoted_checkpointed']:,}",
            ]
        )
    header = (
        "model",
        "quoted, GB",
        "4 bytes a parameter",
        "tokens that keep as much",
        "computed there",
        "tokens checkpointed",
    )
    return markdown(header, rows)


# -- LoRA --------------------------------------------------------------------------------------------------------------


def lora(record: dict[str, Any]) -> str:
    """Where Llama-2-7B with adapters needs what is quoted."""
    rows = []
    for row in record["lora"]:
        point, where = row["points"][0], row["where"]
        before = _gb(sum(point["memory"].values()) + point["gradients"])
        hosts = [(p["tokens"], p["rows"]["offload"]["host_bytes"]) for p in row["points"]]
        first, second = where["none"], where["offload"]
        cells = [f"{first['tokens']:,}", _gb(first["recompute"])]
        cells += [f"{_gb(first['offload'])} ({_gb(at(hosts, first['tokens']))})"]
        there = (
            [f"{second['tokens']:,}", _gb(second["none"]), _gb(at(hosts, second["tokens"]))] if second["tokens"] else []
        )
        rows.append([f"{row['bits']} bits", HEADS[row["head"]], before, *cells, *(there or ["never", "-", "-"])])
    kept, moved = LORA_GB
    header = ("base", "logits", "before any token", f"tokens that need {kept} GB kept", "checkpointed", "inputs on the host (host)",
              f"tokens at {moved} GB with inputs on the host", "kept", "host")  # fmt: skip
    return markdown(header, rows)


# -- shares ------------------------------------------------------------------------------------------------------------


def headlines(record: dict[str, Any]) -> str:
    """What guides promise of memory and time, beside the least and the most that was computed."""
    found = record["shares"]
    promised: dict[str, list[tuple[Share | None, Share | None]]] = {
        "checkpointed": [(c.saved, c.slowdown) for c in CLAIMS if c.mode == "recompute"],
        "inputs on the host": [(c.saved, c.slowdown) for c in CLAIMS if c.mode == "offload" and not c.remark],
        "aggressive": [AGGRESSIVE],
    }
    settings = {"checkpointed": "recompute", "inputs on the host": "offload", "aggressive": NO_HOST}
    rows = []
    for name, setting in settings.items():
        said = [_span(share[place] for share in promised[name]) for place in (0, 1)]
        saved = _range(_saved(row, setting) for row in found)
        slower = [
            _range(row["rows"][setting]["slowdown"] - 1 for row in found if (row["trained"] == "full") == is_full)
            for is_full in (True, False)
        ]
        rows.append([name, *said, saved, *slower])
    longer = _range(
        timed["slowdown"]["offload"] - timed["slowdown"]["recompute"]
        for row in found
        for timed in row["timed"].values()
    )
    points = _range(_saved(row, "offload") - _saved(row, "recompute") for row in found).replace("%", " points")
    rows.append(["inputs on the host, beyond checkpointing", "10-20%", "more", f"{points}, or {_range(map(_further, found))} of the rest",
                 longer, longer])  # fmt: skip
    header = (
        "setting",
        "quoted: saves",
        "slower by",
        "computed: saves",
        "slower by, all weights",
        "slower by, adapters",
    )
    return markdown(header, rows)


def _span(shares: Iterable[Share | None]) -> str:
    found = [share for share in shares if share is not None]
    return _range(value for share in found for value in share)


def _saved(row: dict[str, Any], setting: str) -> float:
    """Share of all bytes of the device."""
    return 1 - row["rows"][setting]["device_bytes"] / row["rows"]["none"]["device_bytes"]


def _further(row: dict[str, Any]) -> float:
    """What moving inputs saves of what checkpointing leaves."""
    return 1 - row["rows"]["offload"]["device_bytes"] / row["rows"]["recompute"]["device_bytes"]


def shares(record: dict[str, Any]) -> str:
    """Memory saved and time added, by what is trained and by length; pairs are for logits at once and in chunks."""
    by_case: dict[tuple[str, int], dict[str, Any]] = {}
    for row in record["shares"]:
        by_case.setdefault((row["trained"], row["length"]), {})[row["head"]] = row
    rows = []
    for (trained, length), heads in by_case.items():
        both, whole = [heads[STOCK], heads[CHUNKED]], heads[STOCK]
        timed = whole["timed"].values()
        plan = [time[PLAN] for time in timed if time[PLAN]]
        rows.append(
            [
                trained,
                f"{length:,}",
                _pair(both, lambda row: _gib(row["rows"]["none"]["device_bytes"])),
                _pair(both, lambda row: _percent(_saved(row, "recompute"))),
                _pair(both, lambda row: _percent(_saved(row, "offload"))),
                _gib(whole["rows"]["offload"]["host_bytes"]),
                " / ".join(_percent(time["slowdown"]["offload"] - 1) for time in timed),
                " / ".join(_percent(one["slowdown"] - 1) for one in plan),
                " / ".join(_gib(one["host_bytes"]) for one in plan),
            ]
        )
    header = ("trained", "tokens", "kept, GiB", "checkpointed saves", "inputs on the host save", "host, GiB",
              "both slower by", "plan at these bytes slower by", "its host, GiB")  # fmt: skip
    return markdown(header, rows)


def _pair(rows: Sequence[dict[str, Any]], of: Callable[[dict[str, Any]], str]) -> str:
    return " / ".join(of(row) for row in rows)


# -- longest sequences -------------------------------------------------------------------------------------------------


def longest(record: dict[str, Any]) -> str:
    """Inputs of blocks on the host: what is quoted and what is computed."""
    found = record["longest"]
    rows = []
    for row in found["rows"]:
        quoted = f"{row['offloaded']:,} {_host(_inputs(found, row['model'], row['offloaded']))}"
        rows.append([*_card(row), quoted, *_ways(row, "offload", (STOCK, CHUNKED, FUSED, LEAN))])
    header = ("model", "card", "budget, GiB", "quoted: inputs on the host (host, GiB)", "logits at once", "logits in chunks",
              "fused kernels by formula", "and a smaller base")  # fmt: skip
    return markdown(header, rows)


def _ways(row: dict[str, Any], setting: str, ways: Sequence[str]) -> list[str]:
    return [_tokens(row["ways"][way][setting]) if way in row["ways"] else "-" for way in ways]


def _card(row: dict[str, Any]) -> list[str]:
    return [NAMES.get(row["model"], row["model"]), f"{row['gigabytes']} GB", _gib(row["budget_bytes"])]


def _tokens(found: dict[str, Any]) -> str:
    if not found["tokens"]:
        return "none"
    host = f" {_host(found['host_bytes'])}" if found["host_bytes"] is not None else ""
    return f"{found['tokens']:,}{host}"


def _inputs(found: dict[str, Any], model: str, tokens: int) -> float:
    """Bytes on the host with all inputs of blocks there."""
    points = found["points"][model][STOCK]
    return at([(p["tokens"], p["rows"]["offload"]["host_bytes"]) for p in points], tokens)


def plans(record: dict[str, Any]) -> str:
    """Our plans on the same cards: how long, and how fast where moving inputs is at its longest."""
    found = record["longest"]
    again = {(c["model"], c["gigabytes"], c["setting"], c["head"]): c for c in found["checks"]}
    rows = []
    for row in found["rows"]:
        there, key = row["ways"][CHUNKED], (row["model"], row["gigabytes"])
        at_offload, at_plan = (again.get((*key, name, CHUNKED)) for name in ("offload", PLAN))
        last = _step(at_plan[PLAN]) if at_plan else "-"
        rows.append(
            [
                *_card(row)[:2],
                _tokens(there["offload"]),
                *(_step(at_offload[name]) if at_offload else "-" for name in ("offload", SAME_HOST, PLAN)),
                _tokens(there[SAME_HOST] | {"host_bytes": _inputs(found, row["model"], there[SAME_HOST]["tokens"])}),
                _tokens(there[PLAN]),
                last,
                *_ways(row, PLAN, (FUSED,)),
            ]
        )
    header = ("model", "card", "inputs on the host", "its step", "plan there, no more host", "plan there, 128 GiB",
              "longest, host of inputs", "longest, 128 GiB", "its step", "longest, fused kernels")  # fmt: skip
    return markdown(header, rows)


def _step(found: dict[str, Any] | None) -> str:
    return "-" if found is None else f"{found['slowdown']:.2f}x {_host(found['host_bytes'])}"


def checkpointed(record: dict[str, Any]) -> str:
    """torch's checkpoint: what is quoted for transformers and what is computed."""
    rows = []
    for row in record["longest"]["rows"]:
        quoted = f"{row['checkpointed']:,}" if row["checkpointed"] else "out of memory"
        rows.append([*_card(row), quoted, *_ways(row, "recompute", (STOCK, CHUNKED, FUSED))])
    header = ("model", "card", "budget, GiB", "quoted: checkpointed", "logits at once", "logits in chunks",
              "fused kernels by formula")  # fmt: skip
    return markdown(header, rows)


def per_token(record: dict[str, Any]) -> str:
    """Bytes of the device for one token more, by way and setting, and of the lines that the quoted figures lie on."""
    return markdown(
        ("model", "", "inputs on the host", "checkpointed", "least possible"), list(_slopes(record["longest"]))
    )


def _slopes(found: dict[str, Any]) -> Iterator[list[str]]:
    for model, ways in found["per_token"].items():
        name = NAMES.get(model, model)
        quoted = found["lines"][model]
        cells = [
            f"{line['bytes_per_token'] / 1000:,.0f} to {line['gib_bytes_per_token'] / 1000:,.0f}" if line else "-"
            for line in (quoted.get("offloaded"), quoted.get("checkpointed"))
        ]
        yield [name, "quoted: GB of 10^9 bytes to GiB", *cells, "-"]
        for way, text in WAYS.items():
            if way in ways:
                yield [
                    name,
                    text,
                    *(f"{ways[way][setting] / 1000:,.0f}" for setting in ("offload", "recompute", ANY_HOST)),
                ]


def fixed(record: dict[str, Any]) -> str:
    """What is on the device before the first token."""
    rows = []
    for model, parts in record["longest"]["fixed"].items():
        shown = {name: size for name, size in parts.items() if not name.endswith("_saves")}
        cells = [_gib(parts[name], 2) for name in ("context", "weights", "optimizer", "gradients")]
        cells += [_gib(sum(shown.values()), 2)]
        cells += [_gib(parts[name], 2) for name in ("double_quant_saves", "8bit_state_saves")]
        rows.append([NAMES.get(model, model), *cells])
    header = ("model", "context", "weights", "optimizer", "gradients", "together, GiB", "quantised scales would save",
              "8-bit state would save")  # fmt: skip
    return markdown(header, rows)
