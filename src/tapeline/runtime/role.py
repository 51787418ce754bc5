"""What a plan has for each block, as the block's seam is told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from tapeline.planner.policy import Policy
from tapeline.planner.schema import BlockPlan
from tapeline.runtime.tiers.tier import DISK, HOST
from tapeline.tape.rules import Rules


class Role(NamedTuple):
    """How the calls of one block are to be treated."""

    policy: Policy
    """How to choose what is dropped."""
    drops_input: bool = False
    """Rebuild the input in backward instead of keeping it, where it is the output of the block before."""
    feeds_next: bool = False
    """The next block drops its input, so that this call must be repeatable."""
    moves_input: str = ""
    """The tier that the input goes to; empty: it stays."""
    ahead_bytes: int = 0
    """What earlier blocks have moved that may be on its way back when the backward of this one begins."""
    has_moves: bool = False
    """This block or the one before moves something, or the fetch of something begins with the backward of this one."""
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
    tiers = {block.name: block.input for block in blocks if block.input in (HOST, DISK)}
    losers = {block.name for block, after in pairwise(blocks) if after.name in tiers} | feeders
    movers = {block.name for block in blocks if block.policy.moves} | tiers.keys()
    movers |= {after.name for block, after in pairwise(blocks) if block.name in movers}
    movers |= {block.name for block in blocks if block.ahead_bytes}
    for block in blocks:
        is_touched = block.name in droppers | feeders | movers
        policy = replace(block.policy, has_output=block.name not in losers)
        yield (
            block.name,
            Role(
                policy,
                drops_input=block.name in droppers,
                feeds_next=block.name in feeders,
                moves_input=tiers.get(block.name, ""),
                ahead_bytes=block.ahead_bytes,
                has_moves=block.name in movers,
                is_idle=not (records or rules.drop or is_touched or not block.policy.keeps_all),
            ),
        )
