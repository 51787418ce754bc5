"""A recipe in the hands of one block: how its sources are found in a call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tapeline.runtime.inputs import Away, RebuiltInput
from tapeline.runtime.invocation import Hooks, Invocation
from tapeline.runtime.library import MAX_CLASSES, CallClass, remember
from tapeline.runtime.moving import MovedCall
from tapeline.runtime.role import Role
from tapeline.tape.program import Recipe
from tapeline.tape.sources import Getter


@dataclass(slots=True)
class Prepared:
    """A class of calls with the recipe of this block's policy."""

    known: CallClass
    recipe: Recipe | None
    getters: list[Getter | int]
    """How to find each source: a function, or the place among the tensors of the arguments."""
    cast_getters: list[Getter | int]
    """The same for the parameters that autocast casts."""
    output_getters: list[Getter | int]
    """The same for what the outputs are made of, if the next block drops its input."""

    def cast_parameters(self) -> list[torch.Tensor]:
        """The parameters that autocast casts in such a call."""
        return [place() for place in self.cast_getters if not isinstance(place, int)]


class PreparedCalls:
    """What is prepared for the classes of calls of one block, in each role that plans have given it."""

    def __init__(self) -> None:
        self._tables: dict[Role, dict[Any, Prepared]] = {}
        self.current: dict[Any, Prepared] = {}
        """What is prepared for the present role, by class of calls."""

    def take(self, role: Role) -> None:
        """Go over to what is prepared for a role."""
        self.current = self._tables.setdefault(role, {})

    def find(self, key: Any) -> Prepared | None:
        return self.current.get(key)

    def remember(self, key: Any, prepared: Prepared) -> Prepared:
        return remember(self.current, key, prepared, MAX_CLASSES)

    def drop(self, key: Any) -> None:
        """Forget a class of calls, in every role."""
        for table in self._tables.values():
            table.pop(key, None)

    def clear(self) -> None:
        for table in self._tables.values():
            table.clear()


@dataclass(slots=True)
class Given:
    """One call, and what is in force around it."""

    invocation: Invocation
    tensors: list[torch.Tensor]
    """Those among the arguments."""
    foreign: Hooks | None
    """The saved-tensor hooks of somebody else."""
    rebuilt: RebuiltInput | None = None
    """The input, if it is to be rebuilt."""
    moves: MovedCall | None = None
    """What moves something of this call."""
    tier: str = ""
    """Where the input goes."""

    def away(self, recipe: Recipe) -> Away | None:
        """The input, if it is not to stay."""
        if self.rebuilt is not None or self.moves is None or not self.tier or not recipe.needs_input:
            return self.rebuilt
        return self.moves.send(self.tensors[0], self.tier)


def find_sources(
    getters: list[Getter | int], tensors: list[torch.Tensor], away: Away | None = None
) -> list[torch.Tensor | Away]:
    """The sources of a call, under aliases that later changes of the originals do not reach."""
    found: list[torch.Tensor | Away] = []
    for place in getters:
        if not isinstance(place, int):
            found.append(_alias(place()))
        elif place == 0 and away is not None:
            found.append(away)
        else:
            tensor = tensors[place]
            found.append(tensor.clone() if tensor.is_inference() else tensor.detach())
    return found


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory under another tensor, which keeps it when the original is given new data (``p.data = ...``).

    A tensor made in inference mode has no version that would tell of a change; what is not a weight is copied.
    """
    if tensor.is_inference():
        return tensor.detach() if isinstance(tensor, nn.Parameter) else tensor.clone()
    return tensor.detach() if type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer) else tensor
