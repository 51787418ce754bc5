"""A page is on the disk whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tapeline.errors import UsageError
from tapeline.report.file import check_target, write_text


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "plan.html"
    assert write_text(path, "one") == path
    write_text(str(path), "two\n\u00e9")
    assert path.read_bytes() == "two\n\u00e9".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_others_may_read_it_as_they_may_read_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    path = write_text(tmp_path / "plan.html", "one")
    assert path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode
    path.chmod(0o640)
    write_text(path, "two")
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    real, link = tmp_path / "real.html", tmp_path / "link.html"
    link.symlink_to(real)
    assert write_text(link, "one") == real
    assert link.is_symlink()
    assert real.read_text() == "one"


def test_checking_writes_nothing(tmp_path: Path) -> None:
    assert check_target(tmp_path / "plan.html") == tmp_path / "plan.html"
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_not_utf_8_does_not_stop_it(tmp_path: Path) -> None:
    assert write_text(tmp_path / "plan.html", "a\udcffb").read_text() == "a?b"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere/plan.html", r"there is no directory .*nowhere'\. Create it, or name another file\.$"),
        ("", r"it is a directory\. Name a file, such as 'plan\.html'\.$"),
        ("file/plan.html", r"Not a directory\. Name a file in a directory that can be written\.$"),
        ("pipe", r"it is not a regular file"),
        ("loop", r"Cannot write the page"),
        ("x" * 300, r"File name too long"),
    ],
)
def test_a_path_that_cannot_be_written_is_refused_with_the_reason(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").write_text("kept")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop" / "x")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError, match=message):
        write_text(tmp_path / name, "text")
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "file").read_text() == "kept"


def test_a_file_that_may_not_be_changed_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_text(tmp_path / "plan.html", "one")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anything
    with pytest.raises(UsageError, match="the file is read-only"):
        write_text(path, "two")
    assert path.read_text() == "one"


def test_a_directory_that_may_not_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(UsageError, match="Permission denied. Name a file in a directory that can be written"):
        check_target(tmp_path / "plan.html")


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["write_text", "replace"])
def test_a_failure_leaves_the_old_page_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, failure: BaseException
) -> None:
    path = write_text(tmp_path / "plan.html", "one")

    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(Path, step, fail)
    with pytest.raises((UsageError, KeyboardInterrupt)) as caught:
        write_text(path, "two")
    assert isinstance(failure, KeyboardInterrupt) or "No space left on device" in str(caught.value)
    monkeypatch.undo()
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]
