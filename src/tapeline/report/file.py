"""A page on the disk: whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from tapeline.errors import UsageError


def check_target(path: str | os.PathLike[str]) -> Path:
    """Make sure that a file can be written, without writing it.

    Args:
        path: of the file; one that exists may be replaced.

    Returns:
        The path with links followed, so that a link stays a link.

    Raises:
        UsageError: if the directory is missing or cannot be written, or something other than a file has the name.
    """
    target = Path(os.path.realpath(path))
    try:
        if target.exists():
            _check_file(path, target)
        _create(target.parent).unlink()
    except OSError as error:
        raise _refused(path, target, error) from error
    return target


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a file; a reader sees the old one or the new one, never a part, and a failure leaves nothing behind.

    Args:
        path: of the file; it is replaced if it exists, and keeps its permissions.
        text: all of it.

    Returns:
        Where it is.

    Raises:
        UsageError: as `check_target`, and if the disk is full.
    """
    target = check_target(path)
    try:
        _replace(target, text)
    except OSError as error:
        raise _refused(path, target, error) from error
    return target


def _replace(target: Path, text: str) -> None:
    temporary = _create(target.parent)
    try:
        temporary.write_text(text, encoding="utf-8", errors="replace", newline="\n")
        if target.exists():
            shutil.copymode(target, temporary)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _check_file(path: str | os.PathLike[str], target: Path) -> None:
    if not target.is_file():
        what = "a directory" if target.is_dir() else "not a regular file"
        raise UsageError(f"Cannot write the page to {str(path)!r}: it is {what}. Name a file, such as 'plan.html'.")
    if not os.access(target, os.W_OK):
        raise UsageError(f"Cannot write the page to {str(path)!r}: the file is read-only. Name another file.")


def _create(folder: Path) -> Path:
    """A new file with the permissions that files of this user have."""
    path = folder / f".tapeline-{secrets.token_hex(8)}.tmp"
    path.touch(exist_ok=False)
    return path


def _refused(path: str | os.PathLike[str], target: Path, error: OSError) -> UsageError:
    if isinstance(error, FileNotFoundError) and not target.parent.exists():
        cause, step = f"there is no directory {str(target.parent)!r}", "Create it, or name another file"
    else:
        cause, step = error.strerror or str(error), "Name a file in a directory that can be written"
    return UsageError(f"Cannot write the page to {str(path)!r}: {cause}. {step}.")
