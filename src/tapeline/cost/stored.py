"""What was measured on this machine, kept in the user's cache folder: one JSON file for each host and device."""

from __future__ import annotations

import json
import os
import platform
import re
import tempfile
from pathlib import Path
from typing import Any

from tapeline.errors import UsageError

_SCHEMA = 1


def cache_folder() -> Path:
    """``$TAPELINE_CACHE``, else ``$XDG_CACHE_HOME/tapeline``, else ``~/.cache/tapeline``."""
    own = os.environ.get("TAPELINE_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "tapeline"


def host_name() -> str:
    """The name of this machine: a home folder may be shared by several."""
    return platform.node() or "localhost"


def entry_path(device: str) -> Path:
    """Where the entry of a device of this machine is kept."""
    return cache_folder() / "devices" / _file_name(host_name()) / f"{_file_name(device)}.json"


def write_entry(device: str, entry: dict[str, Any]) -> Path:
    """Store an entry; another process sees the old one or the new one, never a part.

    Args:
        device: the name that it is found by.
        entry: what JSON can hold.

    Returns:
        Where it is.

    Raises:
        UsageError: if the folder cannot be written.
    """
    path = entry_path(device)
    text = json.dumps({"schema": _SCHEMA, "host": host_name(), "device": entry}, indent=2) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, text)
    except OSError as error:
        raise UsageError(
            f"Cannot store the measurement in {path.parent}: {error.strerror or error}. "
            "Set TAPELINE_CACHE to a folder that can be written."
        ) from error
    return path


def read_entry(device: str) -> tuple[dict[str, Any] | None, Path]:
    """The stored entry of a device of this machine, ``None`` if there is none; and where it would be.

    Raises:
        UsageError: if there is one that cannot be read.
    """
    path = entry_path(device)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        entry = found["device"] if found["schema"] == _SCHEMA else None
    except (FileNotFoundError, NotADirectoryError):
        return None, path
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, f"{type(error).__name__}: {error}") from error
    if not isinstance(entry, dict):
        raise _unreadable(path, "it was written by another version of tapeline")
    return entry, path


def _replace(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _unreadable(path: Path, reason: str) -> UsageError:
    return UsageError(
        f"Cannot read the measurement in {path}: {reason}. Run `tapeline doctor` again, or delete the file."
    )


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip(".") or "_"
