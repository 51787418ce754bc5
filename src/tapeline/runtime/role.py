"""What a plan has for each block, as the block's seam is told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from tapeline.planner.policy import Policy
from tapeline.planner.schema import BlockPlan
from tapeline.tape.rules import Rules


class Role(NamedTuple):
    """How the calls of one block are to be treated."""

    policy: Policy
    """How to choose what is dropped."""
    drops_input: bool = False
    """Rebuild the input in backward instead of keeping it, where it is the output of the block before."""
    feeds_next: bool = False
    """The next block drops its input, so that this call must be repeatable."""
    is_idle: bool = False
    """Nothing is to be done: the block runs as it is."""


def roles(blocks: Sequence[BlockPlan], rules: Rules, records: bool = False) -> Iterator[tuple[str, Role]]:
    """The role of each block of a plan, by name.

    Args:
        blocks: in their order.
        rules: what the user insists on.
        records: blocks that keep everything are recorded too.
    """
    droppers = {block.name for block in blocks if block.input == "recompute"}
    feeders = {block.name for block, after in pairwise(blocks) if after.name in droppers}
    for block in blocks:
        has_to_do = records or rules.drop or not block.policy.keeps_all or block.name in droppers | feeders
        policy = replace(block.policy, has_output=block.name not in feeders)
        yield block.name, Role(policy, block.name in droppers, block.name in feeders, is_idle=not has_to_do)
