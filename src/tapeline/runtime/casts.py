"""Whether the copies of parameters that autocast has cached are still those of the parameters as they are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


class Casts:
    """The version that each parameter had when autocast copied it last, as far as the calls of blocks tell.

    An optimizer step inside one autocast context leaves copies of the old weights in the cache, and the next forward uses
    them. A replay would cast the new ones.
    """

    def __init__(self) -> None:
        self._versions: dict[int, int] = {}

    def note(self, parameters: Sequence[nn.Parameter], num_found: int = 0) -> bool:
        """A call has cast these parameters, or found `num_found` of them in the cache.

        Returns:
            False if it must have found a copy of a parameter that has been written since.
        """
        versions = {id(parameter): parameter._version for parameter in parameters}
        num_stale = sum(self._versions.get(key, version) != version for key, version in versions.items())
        if num_found > len(versions) - num_stale:
            return False
        self._versions |= versions
        return True
