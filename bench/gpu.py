"""What a step costs on a GPU in each way to save memory, ours and others': seconds, peaks, bytes moved, and equal gradients.

Llama of 8B and 1B parameters with random weights, with LoRA and in full, from 512 to 65536 tokens, with and without Liger's kernels; and the
bandwidth of the links. Each row is kept as soon as it is there: a later run of the same code goes on where the last one was stopped.

Run: ``python -m bench.gpu`` (about ten minutes), ``--all`` (everything, over several runs), ``--quick`` (a minute on a CPU). Writes
``bench/results/<device>/gpu/<case>.json``, and all of them to ``bench/results/<device>/gpu.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.gpu_cases import ALL, DEFAULT, LORA_R, QUICK, Case, Suite, built
from bench.gpu_links import link_rows
from bench.gpu_rows import DEVICE_LOST, Rows, completed, lost
from bench.gpu_table import table
from bench.gpu_ways import first_line, obstacle
from bench.smoke import PACKAGES, device_name, hardware
from bench.store import source_digest
from tapeline.errors import TapelineError

LINKS = "links"
OTHERS = ("liger-kernel", "triton", "trl", "accelerate", "unsloth_zoo", "torchtune")
"""Packages that some ways need."""
MINUTES = 9.0
"""After which the default run begins no further row."""


class Records:
    """What was found, a file for each case and one for all of them.

    Args:
        folder: of the device.
        code: what the code is that runs; rows of other code are not taken for its own.
        about: what else belongs to the record.
    """

    def __init__(self, folder: Path, code: str, about: dict[str, Any]) -> None:
        self.folder, self.code, self.about = folder / "gpu", code, about
        self.summary = folder / "gpu.json"
        if not self.folder.exists() and self.summary.exists():  # one file travels more easily than many
            for found in json.loads(self.summary.read_text())["cases"]:
                self._write(found)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """What there is of a case, found by this code."""
        path = self.folder / f"{name}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        rows: list[dict[str, Any]] = found["rows"] if found.get("code") == self.code else []
        return rows

    def keep(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Write a case, and the summary."""
        self._write({"case": name, "code": self.code, "packages": packages(), "rows": rows})
        self.save()

    def save(self) -> None:
        """Write the summary: all cases that are there, of this code or another."""
        cases = [json.loads(path.read_text()) for path in sorted(self.folder.glob("*.json"))]
        self.summary.parent.mkdir(parents=True, exist_ok=True)
        self.summary.write_text(json.dumps(self.about | {"cases": cases}, indent=1) + "\n")

    def _write(self, found: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"{found['case']}.part"
        part.write_text(json.dumps(found, indent=1) + "\n")
        part.replace(self.folder / f"{found['case']}.json")  # a run may be killed at any time


class Run:
    """One run through a suite.

    Args:
        suite: what to do.
        device: where.
        records: what is there already; what is found is added.
        minutes: after which no row is begun.
    """

    def __init__(self, suite: Suite, device: torch.device, records: Records, minutes: float) -> None:
        self.suite, self.device, self.records = suite, device, records
        self.end = time.perf_counter() + 60 * minutes
        self.left: list[str] = []
        """Rows for which there was no time."""

    def run(self, folder: Path) -> None:
        """Do what is not there yet; `folder` is for tensors and files that are gone afterwards."""
        if not self.records.rows(LINKS):
            self.records.keep(LINKS, self._links(folder))
        for case in self.suite.cases:
            self._case(case, folder)
        self.records.save()

    def _links(self, folder: Path) -> list[dict[str, Any]]:
        try:
            return link_rows(self.device, self.suite.link_bytes, folder)
        except (RuntimeError, TapelineError) as error:
            return [{"case": LINKS, "way": "", "failed": first_line(error)}]

    def _case(self, case: Case, folder: Path) -> None:
        rows = {row["way"]: row for row in self.records.rows(case.name)}
        pending = []
        for way in case.ways:
            if way in rows and "skipped" not in rows[way]:
                continue
            row = {"case": case.name, "way": way, "skipped": obstacle(way, self.device, liger=case.liger)}
            if row["skipped"] is None:  # what was missing may be there by now
                pending.append(way)
            elif row != rows.get(way):
                self._add(case, rows, row)
        if not pending:
            print(f"{case.name}: nothing left to do", flush=True)
        elif self._is_over():
            self.left += [f"{case.name} {way}" for way in pending]
        else:
            self._run(case, folder, rows, pending)

    def _run(self, case: Case, folder: Path, rows: dict[str, Any], pending: list[str]) -> None:
        left = list(pending)
        try:
            with built(case, self.suite, self.device, folder) as setting:
                made = Rows(case, setting, self.suite.row_seconds)
                while left and not self._is_over():
                    self._add(case, rows, made.row(left[0]))
                    left.pop(0)
            self.left += [f"{case.name} {way}" for way in left]
        except Exception as error:  # noqa: BLE001 - a model that cannot be built is a result, too
            reason = {"failed": f"{type(error).__name__}: {first_line(error)}", **lost(self.device)}
            for way in left:
                self._add(case, rows, {"case": case.name, "way": way} | reason)

    def _add(self, case: Case, rows: dict[str, Any], row: dict[str, Any]) -> None:
        rows[row["way"]] = row
        self.records.keep(case.name, completed(rows.values()))
        print(f"{case.name} {row['way']}: {_in_short(row)}", flush=True)
        if DEVICE_LOST in row:
            raise SystemExit(
                f"This process cannot use the device any more: {row[DEVICE_LOST]} Run the same command again."
            )

    def _is_over(self) -> bool:
        return time.perf_counter() > self.end


def _in_short(row: dict[str, Any]) -> str:
    for what in ("skipped", "failed"):
        if what in row:
            return f"{what}: {row[what]}"
    return f"{row['seconds']['median']:.3f} s a step, {row['row_seconds']} s in all"


def packages() -> dict[str, str]:
    """Versions of what is installed."""
    found = {}
    for name in (*PACKAGES, *OTHERS):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def code_digest() -> str:
    """What the code is that the numbers come from: the package, and this benchmark."""
    found = hashlib.sha256(source_digest().encode())
    here = Path(__file__).parent
    for path in sorted([*here.glob("gpu*.py"), here / "smoke.py"]):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def about(suite: Suite, device: torch.device) -> dict[str, Any]:
    """What belongs to a record beside its cases."""
    sizes = {name: asdict(config) for name, config in suite.sizes.items()}
    return {
        "case": "gpu",
        "device": device_name(device),
        "hardware": hardware(device),
        "packages": packages(),
        "config": {"sizes": sizes, "batch_size": suite.batch_size, "dtype": "bfloat16", "lora_r": LORA_R},
    }


def read(path: Path) -> dict[str, Any]:
    """A record: a file, or the one in a folder."""
    found = [path] if path.is_file() else sorted(path.rglob("gpu.json"))
    if len(found) != 1:
        raise SystemExit(f"{len(found)} files gpu.json in {path}: name one of them.")
    record: dict[str, Any] = json.loads(found[0].read_text())
    return record


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--all", action="store_true", help="all models and lengths")
    parser.add_argument("--quick", action="store_true", help="tiny models, to see that it works; a CPU will do")
    parser.add_argument("--cases", metavar="GLOB", help="of all cases, those with such a name: '8b-*-4096*'")
    parser.add_argument(
        "--minutes", type=float, help=f"begin no row after this time; default: {MINUTES:g}, with --all none"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="where results go; default: bench/results")
    parser.add_argument(
        "--table", type=Path, metavar="PATH", help="print the table of a record, or of the one in a folder"
    )
    options = parser.parse_args(arguments)
    if options.table:
        print(table(read(options.table)))
        return
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu" and not options.quick:
        parser.error("there is no accelerator here: --quick runs tiny models on the CPU")
    suite = QUICK if options.quick else ALL if options.all or options.cases else DEFAULT
    minutes = options.minutes
    if minutes is None:
        minutes = MINUTES if suite is DEFAULT else math.inf
    suite = replace(suite, cases=tuple(case for case in suite.cases if fnmatch(case.name, options.cases or "*")))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product runs
    if options.quick:
        torch.set_num_threads(1)
    output = options.output or (
        Path(tempfile.mkdtemp(prefix="gpu-")) if options.quick else Path(__file__).parent / "results"
    )
    records = Records(output / device_name(device), code_digest(), about(suite, device))
    run = Run(suite, device, records, minutes)
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        run.run(Path(folder))
    print(table(read(records.summary)))
    print(f"record: {records.summary}")
    if run.left:
        print(f"no time was left for {len(run.left)} rows: {', '.join(run.left)}. The same command goes on with them.")


if __name__ == "__main__":
    main()
