"""Seeing Python calls that the dispatcher does not show: modules, and autograd Functions as a whole.

`sys.setprofile` reports calls of one thread without anything being patched. It sees `autograd.Function.apply` also where
somebody bound it early (``f = Fn.apply``), with its arguments.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

from torch import nn
from torch.autograd import Function

_APPLY: CodeType = Function.apply.__func__.__code__  # type: ignore[attr-defined]
_CALL_MODULE: CodeType = nn.Module._call_impl.__code__


class CallWatch:
    """Calls back when a Function is applied and returns, and knows which module runs; for one thread.

    Args:
        names: names of the modules to tell apart, by `id`.
        on_apply: called as ``on_apply(cls, args)`` before the forward of an outermost Function.
        on_return: called with what ``apply`` returned, ``None`` after an exception.
    """

    def __init__(
        self,
        names: dict[int, str],
        on_apply: Callable[[type, tuple[Any, ...]], None],
        on_return: Callable[[Any], None],
    ) -> None:
        self.names, self.on_apply, self.on_return = names, on_apply, on_return
        self.modules: list[str] = [""]
        """Names of the modules that run, outermost first."""
        self.depth = 0
        """How many Functions are being applied, one inside the other."""
        self._before: Any = None

    def __enter__(self) -> CallWatch:
        self._before = sys.getprofile()
        sys.setprofile(self._notice)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.setprofile(self._before)

    def _notice(self, frame: FrameType, event: str, value: Any) -> None:
        if event == "call":
            if frame.f_code is _CALL_MODULE:
                self.modules.append(self.names.get(id(frame.f_locals["self"]), self.modules[-1]))
            elif frame.f_code is _APPLY:
                self.depth += 1
                if self.depth == 1:
                    self.on_apply(frame.f_locals["cls"], frame.f_locals["args"])
        elif event == "return":
            if frame.f_code is _CALL_MODULE:
                self.modules.pop()
            elif frame.f_code is _APPLY:
                self.depth -= 1
                if self.depth == 0:
                    self.on_return(value)
        if self._before is not None:
            self._before(frame, event, value)
