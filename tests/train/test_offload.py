"""`tapeline train` with a disk below the model: the losses of a run without, nothing left behind, and wrong input said at once."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tapeline.cli import app
from tapeline.train.demo import byte_tokenizer
from tests.models import _llama

pytestmark = pytest.mark.filterwarnings("default")  # the libraries around a training loop warn about themselves

INPUT = 4 * 128 * 64 * 4
"""Bytes of what enters a block: four sequences of 128 tokens, 64 numbers each."""


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    error: str


Command = Callable[..., Ended]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A saved model, and data."""
    folder = tmp_path_factory.mktemp("files")
    _llama(vocab_size=len(byte_tokenizer()), attention_dropout=0.0, num_hidden_layers=4).save_pretrained(
        folder / "model"
    )
    lines = (json.dumps({"text": f"{number} and {number} is {2 * number}. " * 12}) for number in range(64))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return str(folder / "model"), str(folder / "data.jsonl")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


@pytest.fixture
def train(
    files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """`tapeline train` on these, in a folder of its own, with other settings."""
    model, data = files
    common = {"model": model, "tokenizer": "bytes", "data": data, "max_length": 128, "per_device_train_batch_size": 4}
    common |= {"packing": None, "max_steps": 3, "logging_steps": 1, "learning_rate": 1e-3, "json": None}

    def run(**settings: Any) -> Ended:
        given = {"output_dir": str(tmp_path / "out")} | common | settings
        words = [word for name, value in given.items() for word in (f"--{name}", value) if word is not None]
        monkeypatch.setattr("sys.argv", ["tapeline", "train", *map(str, words)])
        code = 0
        try:
            app.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return Ended(code, *capsys.readouterr())

    return run


def test_losses_are_those_without_and_the_report_names_what_was_moved(
    train: Command, tmp_path: Path, disk: Path
) -> None:
    plain = train(mode="none", output_dir=tmp_path / "plain")
    moved = train(mode="offload", disk_budget="1GiB", offload_dir=disk)
    assert plain.code == moved.code == 0
    results = [json.loads(ended.out) for ended in (plain, moved)]
    assert results[0]["losses"] == results[1]["losses"]
    assert len(results[1]["losses"]) == 3
    assert not list(disk.iterdir())
    report = json.loads((tmp_path / "out" / "tapeline_report.json").read_text())
    (tier,) = report["tiers"]
    assert tier["name"] == "disk"
    assert tier["out_bytes"] == tier["planned_bytes"] == 3 * INPUT, "of four blocks, the last keeps its input"
    assert tier["total_out_bytes"] == 3 * tier["out_bytes"]
    assert results[1]["report"]["tiers"] == report["tiers"]
    assert results[0]["report"]["tiers"] == []
    assert "moved to the disk" in moved.error
    assert "moved to the disk" not in plain.error


def test_a_plan_that_is_saved_with_the_result_says_where_tensors_went(
    train: Command, tmp_path: Path, disk: Path
) -> None:
    assert train(mode="offload", disk_budget="900TiB", offload_dir=disk, max_steps=1).code == 0
    plan = json.loads((tmp_path / "out" / "tapeline_plan.json").read_text())
    assert [block["input"] for block in plan["blocks"]] == ["disk", "disk", "disk", "device"]
    assert plan["disk_bytes"] == 3 * INPUT, "a large budget is no claim"


WRONG: list[tuple[dict[str, Any], int, str]] = [
    ({"mode": "offload"}, 2, 'on a CPU that is the disk: say how much of it with disk_budget="20GiB"'),
    ({"mode": "offload", "disk_budget": "1GiB"}, 2, "disk_budget says how much; say where with offload_dir"),
    ({"offload_dir": "."}, 2, "offload_dir says where; say how much with disk_budget"),
    ({"disk_budget": "1GiB"}, 2, "disk_budget says how much; say where with offload_dir"),
    ({"mode": "offload", "disk_budget": "1GiB", "offload_dir": "/nowhere"}, 5, "/nowhere"),
    ({"mode": "offload", "disk_budget": "1GiB", "offload_dir": __file__}, 5, __file__),
    ({"mode": "offload", "host_budget": "1GiB"}, 2, "the model is on the CPU, where the host is the same memory"),
    ({"host_budget": "1GiB"}, 2, "Use disk_budget"),
    ({"mode": "offload", "disk_budget": "much", "offload_dir": "."}, 2, "Cannot read 'much' as a memory size"),
    ({"mode": "offload", "disk_budget": "0", "offload_dir": "."}, 2, "more than zero"),
    ({"mode": "offloaded", "disk_budget": "1GiB", "offload_dir": "."}, 2, "did you mean 'offload'"),
    ({"on_full_tier": "ignore"}, 2, "on_full_tier must be 'error' or 'replan'"),
]


def check_refused(ended: Ended, code: int, message: str, folder: Path) -> None:
    """One message, no traceback, and nothing was trained or written."""
    assert ended.code == code
    assert message in ended.error
    assert ended.error.splitlines()[-1].startswith("tapeline: ")
    assert "Traceback" not in ended.error
    assert "step 1" not in ended.error
    assert json.loads(ended.out)["exit_code"] == code
    assert not (folder / "out").exists()


@pytest.mark.parametrize(("settings", "code", "message"), WRONG)
def test_wrong_input_is_one_message_before_any_step(
    train: Command, tmp_path: Path, settings: dict[str, Any], code: int, message: str
) -> None:
    check_refused(train(**settings), code, message, tmp_path)


@pytest.fixture
def full_disk(disk: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with room for the input of two blocks."""
    claim = os.posix_fallocate

    def claim_what_there_is(file: int, offset: int, length: int) -> None:
        if offset + length > 2 * INPUT:
            raise OSError(errno.ENOSPC, "No space left on device")
        claim(file, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", claim_what_there_is)
    return disk


def test_a_full_disk_is_said_before_any_step(train: Command, tmp_path: Path, full_disk: Path) -> None:
    ended = train(mode="offload", disk_budget="1GiB", offload_dir=full_disk)
    check_refused(ended, 5, "make room, name another offload_dir, or a smaller disk_budget", tmp_path)
    assert not list(full_disk.iterdir())


def test_on_a_full_disk_the_run_is_planned_again_with_less_if_asked(
    train: Command, tmp_path: Path, full_disk: Path
) -> None:
    with pytest.warns(UserWarning, match="Planning again with"):
        ended = train(mode="offload", disk_budget="1GiB", offload_dir=full_disk, on_full_tier="replan")
    assert ended.code == 0
    (tier,) = json.loads(ended.out)["report"]["tiers"]
    assert 0 < tier["out_bytes"] == tier["planned_bytes"] <= 2 * INPUT
    assert not list(full_disk.iterdir())


def test_a_budget_that_the_disk_has_room_for_is_kept(train: Command, tmp_path: Path, full_disk: Path) -> None:
    ended = train(mode="offload", disk_budget=2 * INPUT, offload_dir=full_disk)
    assert ended.code == 0
    assert json.loads(ended.out)["plan"]["disk_bytes"] == 2 * INPUT
