"""Kernels that no dispatcher sees: Triton launches them with addresses, and tensors without data have none."""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

_LAUNCHERS = (
    ("triton.runtime.jit", "JITFunction"),
    ("triton.runtime.autotuner", "Autotuner"),
    ("triton.runtime.autotuner", "Heuristics"),
    ("triton.runtime.interpreter", "InterpretedFunction"),
)
_LOCK = threading.Lock()
_inside = 0
_originals: dict[type, Callable[..., Any]] = {}


@contextmanager
def without_launches() -> Iterator[None]:
    """Launch no Triton kernel that is given a tensor without data: what it would write has its shape already.

    Kernels that are given real tensors, in this thread or another, run. An autotuner would otherwise remember what it measured on
    nothing.
    """
    global _inside  # noqa: PLW0603 - the launchers are the process's, and several threads may plan
    try:
        with _LOCK:
            _inside += 1
            if _inside == 1:
                _guard()
        yield
    finally:
        with _LOCK:
            _inside -= 1
            if not _inside:
                while _originals:
                    launcher, run = _originals.popitem()
                    launcher.run = run  # type: ignore[attr-defined]


def _guard() -> None:
    for module, name in _LAUNCHERS:
        is_installed = find_spec(module.partition(".")[0]) is not None
        launcher = None
        if is_installed:
            with suppress(ImportError):  # no kernel can be launched with what cannot be imported
                launcher = getattr(importlib.import_module(module), name, None)
        if launcher is not None and "run" in vars(launcher):
            _originals[launcher] = launcher.run
            launcher.run = _skipping(launcher.run)


def _skipping(run: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(run)
    def skipping(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        if any(isinstance(value, FakeTensor) for value in given if isinstance(value, torch.Tensor)):
            return None
        return run(self, *args, **kwargs)

    return skipping
