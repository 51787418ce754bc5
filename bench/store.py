"""Results that took long, kept in a file until all of them are there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tapeline


def source_digest() -> str:
    """What the code is that the numbers come from."""
    package = Path(tapeline.__file__).parent
    files = [*package.rglob("*.py"), *package.rglob("*.json"), Path(__file__).with_name("steps.py")]
    found = hashlib.sha256()
    for path in sorted(files):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


class Store:
    """Results by name in a file, so that an interrupted run goes on where it was; those of other code are not taken.

    Args:
        path: of the file; it need not exist.
        code: `source_digest` of the code that runs.
    """

    def __init__(self, path: Path, code: str) -> None:
        self.path, self.found = path, {"code": code}
        if path.exists():
            there = json.loads(path.read_text())
            self.found = there if there.get("code") == code else self.found

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        """What is there under a name; made and written if it is not."""
        if key not in self.found:
            self.found[key] = make()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.found))
            print(f"  {key}", flush=True)
        return self.found[key]

    def remove(self) -> None:
        """The file is no longer needed."""
        self.path.unlink(missing_ok=True)
