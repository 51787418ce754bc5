"""The output directory: writable before anything else happens, and never mixed up with an earlier run."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tapeline.errors import UsageError
from tapeline.train.config import LAST, TrainConfig

PLAN_FILE = "tapeline_plan.json"
REPORT_FILE = "tapeline_report.json"
_STATE_FILE = "trainer_state.json"  # the Trainer writes it last: a checkpoint that has it is complete
_RESULT_FILES = (
    PLAN_FILE,
    REPORT_FILE,
    "config.json",
    "adapter_config.json",
    "model.safetensors",
    "adapter_model.safetensors",
)
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def check_output_dir(config: TrainConfig) -> Path:
    """Make sure that results can be written, without writing any, and that they replace nothing by accident.

    Raises:
        UsageError: if the directory cannot be written, or holds an earlier run that is neither resumed nor overwritten.
    """
    path = Path(config.output_dir).expanduser().absolute()
    nearest = next(folder for folder in (path, *path.parents) if folder.exists())
    if not nearest.is_dir():
        raise UsageError(f"Cannot write to output_dir {config.output_dir!r}: {str(nearest)!r} is a file.")
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise UsageError(f"Cannot write to output_dir {config.output_dir!r}: {error.strerror}.") from error
    earlier = _results(path)
    if earlier and not (config.resume_from_checkpoint or config.overwrite_output_dir):
        raise UsageError(
            f"output_dir {config.output_dir!r} holds an earlier run ({earlier[0].name}): continue it with "
            "--resume_from_checkpoint last, replace it with --overwrite_output_dir, or name another directory."
        )
    return path


def make_output_dir(config: TrainConfig, path: Path) -> None:
    """Create the directory, or clear an earlier run out of it, once everything else is ready."""
    path.mkdir(parents=True, exist_ok=True)
    if config.overwrite_output_dir and not config.resume_from_checkpoint:
        for entry in _results(path):
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()


@contextmanager
def nothing_left_behind(path: Path) -> Iterator[None]:
    """If the body fails, take away the directories that were made in it and are still empty (the Trainer makes one)."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in missing:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise


def find_checkpoint(config: TrainConfig, output_dir: Path) -> Path | None:
    """The checkpoint to resume from, or ``None`` if none was asked for.

    Raises:
        UsageError: if it does not exist or is not complete.
    """
    asked = config.resume_from_checkpoint
    if not asked:
        return None
    if asked == LAST:
        found = last_checkpoint(output_dir)
        if found is None:
            raise UsageError(
                f"No complete checkpoint in {config.output_dir!r} to resume from: leave the option out to start anew."
            )
        return found
    path = Path(asked).expanduser()
    if not _is_complete(path):
        raise UsageError(f"Cannot resume from {asked!r}: it is not a complete checkpoint (no readable {_STATE_FILE}).")
    return path


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest complete checkpoint; one that was being written when the process died is passed over."""
    if not output_dir.is_dir():
        return None
    numbered = [(int(m.group(1)), p) for p in output_dir.iterdir() if (m := _CHECKPOINT.fullmatch(p.name))]
    complete = [entry for entry in sorted(numbered) if _is_complete(entry[1])]
    return complete[-1][1] if complete else None


def _is_complete(path: Path) -> bool:
    try:
        json.loads((path / _STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _results(path: Path) -> list[Path]:
    entries = sorted(path.iterdir()) if path.is_dir() else []
    return [entry for entry in entries if _CHECKPOINT.fullmatch(entry.name) or entry.name in _RESULT_FILES]
