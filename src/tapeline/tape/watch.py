"""Seeing Python calls that the dispatcher does not show: modules, and autograd Functions as a whole.

`sys.setprofile` reports calls of one thread without anything being patched. It sees `autograd.Function.apply` also where
somebody bound it early (``f = Fn.apply``), with its arguments.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn
from torch.autograd import Function

_APPLY: CodeType = Function.apply.__func__.__code__  # type: ignore[attr-defined]
_CALL_MODULE: CodeType = nn.Module._call_impl.__code__
_READS = {"tolist", "numpy", "__array__", "__dlpack__", "data_ptr"}


class CallWatch:
    """Calls back when a Function is applied and returns, and knows which module runs; for one thread.

    Args:
        names: names of the modules to tell apart, by `id`.
        on_apply: called as ``on_apply(cls, args)`` before the forward of an outermost Function.
        on_return: called with what ``apply`` returned, ``None`` after an exception.
        on_read: called with the name of a method by which the values of a tensor leave for Python.
    """

    def __init__(
        self,
        names: dict[int, str],
        on_apply: Callable[[type, tuple[Any, ...]], None],
        on_return: Callable[[Any], None],
        on_read: Callable[[str], None],
    ) -> None:
        self.names = names
        self.on_apply: Callable[[type, tuple[Any, ...]], None] = on_apply
        self.on_return: Callable[[Any], None] = on_return
        self.on_read: Callable[[str], None] = on_read
        self.modules: list[str] = [""]
        """Names of the modules that run, outermost first."""
        self.depth = 0
        """How many Functions are being applied, one inside the other."""
        self.is_inside_op = False
        """What the Python kernel of an op does is the op's own business: it is run again as a whole."""
        self._before: Any = None

    def start(self) -> bool:
        """Begin to watch; returns whether that is possible: a profiler written in C cannot be shared with."""
        self._before = sys.getprofile()
        if self._before is not None and not callable(self._before):
            return False
        sys.setprofile(self._notice)
        return True

    def stop(self) -> None:
        """Leave everything as it was."""
        if sys.getprofile() == self._notice:
            sys.setprofile(self._before)
        self.on_apply = self.on_return = self.on_read = _ignore  # what they belong to holds this watch

    def _notice(self, frame: FrameType, event: str, value: Any) -> None:
        if self.is_inside_op:
            pass
        elif event == "c_call":
            self._notice_read(value)
        elif frame.f_code is _CALL_MODULE:
            self._notice_module(frame, event)
        elif frame.f_code is _APPLY:
            self._notice_function(frame, event, value)
        if self._before is not None:
            self._before(frame, event, value)

    def _notice_module(self, frame: FrameType, event: str) -> None:
        if event == "call":
            self.modules.append(self.names.get(id(frame.f_locals["self"]), self.modules[-1]))
        elif event == "return":
            self.modules.pop()

    def _notice_function(self, frame: FrameType, event: str, value: Any) -> None:
        if event == "call":
            self.depth += 1
            if self.depth == 1:
                self.on_apply(frame.f_locals["cls"], frame.f_locals["args"])
        elif event == "return":
            self.depth -= 1
            if self.depth == 0:
                self.on_return(value)

    def _notice_read(self, function: Any) -> None:
        if function.__name__ in _READS and isinstance(getattr(function, "__self__", None), torch.Tensor):
            self.on_read(function.__name__)


def _ignore(*_: Any) -> None:
    """Nobody listens any more."""
