from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tapeline.errors import UsageError
from tapeline.train.config import load_config
from tapeline.train.output import check_output_dir, find_checkpoint, last_checkpoint, make_output_dir


def config(folder: Path, **settings: Any) -> Any:
    return load_config({"output_dir": str(folder)} | settings)


def checkpoint(folder: Path, step: int, state: str | None = "{}") -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return path


def test_checking_creates_nothing(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    assert check_output_dir(config(target)) == target
    assert not (tmp_path / "a").exists()
    make_output_dir(config(target), target)
    assert target.is_dir()


def test_an_unwritable_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        check_output_dir(config(tmp_path / "file" / "out"))
    with pytest.raises(UsageError, match="Cannot write to output_dir"):
        check_output_dir(config(Path("/proc/tapeline")))


def test_an_earlier_run_is_not_overwritten_by_accident(tmp_path: Path) -> None:
    checkpoint(tmp_path, 5)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds an earlier run \(checkpoint-5\)"):
        check_output_dir(config(tmp_path))
    again = config(tmp_path, overwrite_output_dir=True)
    make_output_dir(again, check_output_dir(again))
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]


def test_the_last_complete_checkpoint_is_resumed(tmp_path: Path) -> None:
    checkpoint(tmp_path, 5)
    good = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 15, state=None)
    checkpoint(tmp_path, 20, state='{"half')
    assert last_checkpoint(tmp_path) == good
    assert find_checkpoint(config(tmp_path, resume_from_checkpoint="last"), tmp_path) == good
    assert find_checkpoint(config(tmp_path, resume_from_checkpoint=str(good)), tmp_path) == good
    with pytest.raises(UsageError, match="not a complete checkpoint"):
        find_checkpoint(config(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-15")), tmp_path)


def test_nothing_to_resume_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No complete checkpoint"):
        find_checkpoint(config(tmp_path, resume_from_checkpoint="last"), tmp_path)
    assert find_checkpoint(config(tmp_path), tmp_path) is None
