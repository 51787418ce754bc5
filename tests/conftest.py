"""Shared by all tests: offline, few threads, and tiny models built from configurations."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tests.models import FAMILIES, TinyModel


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_stored_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured on this machine before must not decide what a test sees."""
    monkeypatch.setenv("TAPELINE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True, scope="session")
def _doctests_see_torch() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> TinyModel:
    """Each tiny model in turn."""
    return FAMILIES[request.param]()


@pytest.fixture
def llama() -> TinyModel:
    return FAMILIES["llama"]()
