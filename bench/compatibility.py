"""The matrix of `tests/exact` as a record, and the page that users read.

Run: ``python -m bench.compatibility`` (some minutes). Writes ``bench/results/cpu/matrix.json`` and ``docs/compatibility.md``;
with ``--page`` only the page, from the record that is there.
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "bench" / "results" / "cpu" / "matrix.json"
PAGE = ROOT / "docs" / "compatibility.md"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "torchao")
_HEAD = """# What it works with

Tiny random models of each family, trained in every mode, with the other settings covered by pairs: attention and experts
implementation, batch size, length below and above a sliding window, padding, dropout, precision, accumulation, which part is trained, what
frozen weights are stored in. A row is *exact* if loss, every gradient and the random state are those of the untouched model bit for
bit, in three steps. It is exact *on the tape* if every block is replayed from its tape; by *fall-back* if some blocks are run again as a
whole, or kept, and why. The untouched model is the one without a key-value cache in training (`use_cache=False`).
Deterministic kernels on a CPU; made by `python -m bench.compatibility`, checked by `tests/exact`.
"""
_TAIL = """
Not in the matrix: flash and flex attention (no backward on a CPU), fp8, tensors sharded over several devices. A family that is not listed
needs no code of its own: the last three were added after the mechanism was built. Try yours with
[`tapeline doctor`](doctor.md).
"""


def outcome(text: str) -> dict[str, Any]:
    """Run the row with this name."""
    import torch
    from tests.exact.check import run_row
    from tests.exact.rows import covering_rows

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    row = next(row for row in covering_rows() if str(row) == text)
    try:
        result = run_row(row)
    except Exception as error:  # noqa: BLE001 - a row that crashes is a result, too
        return row._asdict() | {"row": text, "is_exact": False, "fall_back": f"{type(error).__name__}: {error}"}
    return row._asdict() | {
        "row": text,
        "is_exact": not result.different and not result.kept_instead,
        "fall_back": result.fall_back.partition("), ")[2] or result.fall_back,
        "untouched_bytes": result.untouched_peak,
        "predicted_bytes": result.predicted,
        "measured_bytes": result.peaks[-1],
    }


def page(record: dict[str, Any]) -> str:
    """The page as Markdown."""
    families: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in record["rows"]:
        families[row["family"]].append(row)
    rows = record["rows"]
    exact, taped = (sum(r["is_exact"] for r in rows), sum(r["is_exact"] and not r["fall_back"] for r in rows))
    packages = ", ".join(f"{name} {number}" for name, number in record["packages"].items())
    lines = [_HEAD, f"{len(rows)} rows: {exact} exact, {taped} of them on the tape as a whole. {packages}.", ""]
    lines += ["| family | rows | exact | on the tape | falls back |", "| --- | --- | --- | --- | --- |"]
    for family, found in families.items():
        reasons = dict.fromkeys(_reason(row) for row in found if row["fall_back"])
        taped = sum(not row["fall_back"] for row in found)
        cells = (family, len(found), sum(row["is_exact"] for row in found), taped, "; ".join(reasons))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n" + _TAIL


def _reason(row: dict[str, Any]) -> str:
    where = "eager experts" if row["experts"] == "eager" else row["trained"] if "set_" in row["fall_back"] else "always"
    return f"{where}: {row['fall_back']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", action="store_true", help="only write the page, from the record")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    if not options.page:
        from tests.exact.rows import covering_rows

        os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        with ProcessPoolExecutor(options.jobs) as pool:
            rows = list(pool.map(outcome, map(str, covering_rows())))
        record = {"case": "matrix", "packages": {name: version(name) for name in PACKAGES}, "rows": rows}
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    PAGE.write_text(page(json.loads(RECORD.read_text())))


if __name__ == "__main__":
    main()
