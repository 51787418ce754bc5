"""Whether the copies of parameters that autocast has cached are still those of the parameters as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tapeline.tape.verify import same_bits


class Casts:
    """The version that each parameter had when autocast copied it last, as far as the calls of blocks tell.

    An optimizer step inside one autocast context leaves copies of the old weights in the cache, and the next forward uses
    them. A replay would cast the new ones.
    """

    def __init__(self) -> None:
        self._versions: dict[int, int] = {}

    def note(self, parameters: Sequence[torch.Tensor], num_found: int = 0) -> bool:
        """A call has cast these parameters, or found `num_found` of them in the cache.

        Returns:
            False if it has found a copy of a parameter that has been written since.
        """
        versions = {id(parameter): parameter._version for parameter in parameters}
        num_stale = sum(self._versions.get(key, version) != version for key, version in versions.items())
        if num_found > len(versions) - num_stale and not all(map(_is_current, parameters)):
            return False
        self._versions |= versions
        return True


class _Found(Exception):  # noqa: N818 - no error
    """Carries the copy that autocast hands to an op."""


class _Probe(TorchDispatchMode):
    """Stops at the first product and takes its first operand."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default):
            raise _Found(args[0])
        return func(*args, **(kwargs or {}))


def _is_current(parameter: torch.Tensor) -> bool:
    """Whether the copy that autocast takes for a parameter now is that of its present content."""
    ones = [torch.ones(1, size, 1, device=parameter.device) for size in parameter.shape[-1:]]
    try:
        with _Probe():
            if parameter.dim() == 1:
                torch.addmm(parameter, ones[0][0, :1], ones[0][..., 0])
            elif parameter.dim() == 2:
                torch.mm(parameter, ones[0][0])
            elif parameter.dim() == 3:
                torch.bmm(parameter, ones[0].expand(len(parameter), -1, -1))
    except _Found as found:
        copy: torch.Tensor = found.args[0]
        return same_bits(copy.detach(), parameter.detach().to(copy.dtype))
    return False  # it takes part in something else: not known
