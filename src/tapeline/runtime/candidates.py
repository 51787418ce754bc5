"""Ways to place the blocks of one model, each run on fake tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

from tapeline.ledger import BACKWARD
from tapeline.planner.block import front
from tapeline.planner.chain import Chain, Option
from tapeline.planner.policy import CHEAP, KEEP, LEAST, RECOMPUTE, Policy
from tapeline.planner.profile import StepProfile, build_chain, held_bytes
from tapeline.planner.schema import BlockPlan, Placement
from tapeline.planner.windows import ahead_bytes
from tapeline.runtime.below import Below
from tapeline.runtime.moving import LEAST_BYTES
from tapeline.runtime.predict import FakeStep
from tapeline.runtime.tiers.opening import ALIGNMENTS
from tapeline.runtime.tiers.tier import DISK, HOST
from tapeline.tape.graph import ARGUMENT, Source, Tape
from tapeline.tape.options import block_graph
from tapeline.tape.rules import EVERYTHING

_SEGMENT_LENGTHS = (2, 3, 4, 6, 8, 12, 16, 24)
NOT_RECORDED = "autograd records nothing here"
_NUM_BETWEEN = 3
_MAX_SAMPLES = 2
_MAX_WINDOWS = 3

Blocks = tuple[BlockPlan, ...]


class Candidates:
    """Placements for a model, and the profile of a step under each.

    Args:
        step: the step without bytes.
        below: the tier that tensors may be moved to.
        is_later: the batch comes after others, so that its first step finds the optimizer's state.
    """

    def __init__(self, step: FakeStep, below: Below | None = None, *, is_later: bool = False) -> None:
        self.step, self.below, self.is_later = step, below, is_later
        kinds = {name: type(step.model.get_submodule(name)).__name__ for name in step.block_names}
        self._kinds = kinds
        kept = [_plan(name, kinds[name], KEEP) for name in step.block_names]
        self.recorded = step.record(kept)
        if any(records.num_changes for records in step.library.blocks.values()):
            self.recorded = step.record(kept)  # once is setting up, twice is a habit
        # the untouched model may fill caches for later tokens; a managed one does not
        has_cache = step.library.cache_switch is not None and step.library.cache_switch.was_on
        self.kept = step.run(()) if has_cache else self.recorded
        self.names = _in_order_of_execution(step.block_names, self.kept)
        self.tapes = {name: self._tapes_of(name) for name in self.names}
        self._reasons = {name: reason for name in self.names if (reason := self._reason(name))}
        self._profiles: dict[Blocks, StepProfile] = {}
        self._first_peaks: dict[Blocks, int] = {}
        self._chain: Chain | None = None
        self._policies: dict[str, Policy] = {}
        self._rooms: dict[Blocks, dict[str, int]] = {}

    def profile(self, blocks: Blocks) -> StepProfile:
        """The step under these placements, run once."""
        if blocks not in self._profiles:
            keeps_all = all(block.policy.keeps_all for block in blocks) and not self.step.library.rules.drop
            keeps_all = keeps_all and all(block.input == "device" for block in blocks)
            in_flight = self.in_flight_bytes(blocks)
            self._profiles[blocks] = self.kept if keeps_all else self.step.run(blocks, in_flight_bytes=in_flight)
        return self._profiles[blocks]

    def first_peak(self, blocks: Blocks) -> int:
        """The peak of the first step: blocks are recorded, and recipes are verified.

        The very first one ends with the optimizer making its state.
        """
        if blocks not in self._first_peaks:
            profile = self.profile(blocks)
            if profile is not self.kept:
                profile = self.step.run(blocks, in_flight_bytes=self.in_flight_bytes(blocks), is_first=True)
                self._rooms[blocks] = profile.room_bytes
            self._first_peaks[blocks] = profile.peak_bytes if self.is_later else self.step.first_step_peak(profile)
        return self._first_peaks[blocks]

    def peak(self, blocks: Blocks) -> int:
        """The largest peak of any step."""
        return max(self.profile(blocks).peak_bytes, self.first_peak(blocks))

    def fits(self, blocks: Blocks, limit: int) -> bool:
        """Whether no step needs more than `limit` bytes; the first step is run only where the others fit."""
        fits = self.profile(blocks).peak_bytes <= limit and self.first_peak(blocks) <= limit
        return fits and self.has_room(blocks)

    def has_room(self, blocks: Blocks) -> bool:
        """Whether the tiers below have room for what is moved."""
        there: dict[str, int] = {}
        if self.below is not None:
            there |= {tier.name: tier.room_bytes for tier in self.below.tiers}
        return all(size <= there.get(tier, 0) for tier, size in self.rooms(blocks).items())

    def rooms(self, blocks: Blocks) -> dict[str, int]:
        """What each tier below must have room for, in any step."""
        self.first_peak(blocks)
        found = dict(self._rooms.get(blocks, {}))
        for tier, size in self.profile(blocks).room_bytes.items():
            found[tier] = max(size, found.get(tier, 0))
        return found

    def cost(self, blocks: Blocks) -> float:
        """Operations of a micro-batch, and what the device could do while it waits for links."""
        profile, count = self.profile(blocks), self.step.accumulation
        flops = profile.flops / count
        if self.below is None or not profile.moved_bytes:
            return flops
        moved, copies = (
            sum(profile.moved_bytes.values()) // count,
            sum(len(self.moved_sizes(block)) for block in blocks),
        )
        return flops + self.below.link(self.recorded, self.step).wait_flops(moved, copies)

    def uniform(self, policy: Policy) -> Blocks:
        """The same policy for all blocks that it can apply to."""
        return tuple(self._place(name, policy) for name in self.names)

    def keep_all(self) -> Blocks:
        return self.uniform(KEEP)

    def recompute_all(self) -> Blocks:
        return self.uniform(RECOMPUTE)

    def segments(self, length: int, policy: Policy = RECOMPUTE) -> Blocks:
        """Recompute everything, and keep only every `length`-th input of each run of chained blocks."""
        blocks = []
        position = -1
        for name in self.names:
            position = position + 1 if position >= 0 and self._is_chained(name) else 0
            blocks.append(self._place(name, policy, "recompute" if position % length else "device"))
            if blocks[-1].reason:
                position = -1
        return tuple(blocks)

    def offloaded(self, policy: Policy = RECOMPUTE) -> Blocks:
        """Every input below the device but the last block's, which is needed at once; the rest as `policy` says.

        Where a block's replay starts from something else, such as a copy of its input that autocast has made, that is moved.
        """
        assert self.below is not None, "asked for where there is a tier"
        blocks = [self._place(name, policy, self.below.name) for name in self.names]
        blocks = [b if self.moved_sizes(b) else self._moved(b.name, policy, "all") for b in blocks]
        for number in reversed(range(len(blocks))):  # the last one at least, and from there on as few as have room
            blocks[number] = self._place(blocks[number].name, policy)
            spilled = self._spilled(tuple(blocks))
            if self._has_room_for(spilled):
                return spilled
        return tuple(blocks)

    def moving(self, policy: Policy, num_blocks: int) -> Blocks:
        """The policy for all blocks, with all that the first ones hold below the device."""
        return self._spilled(
            tuple(self._moved(n, policy, "all" if i < num_blocks else "") for i, n in enumerate(self.names))
        )

    def one_ahead(self, blocks: Blocks) -> Blocks:
        """Each block's backward begins with the fetch of what the block before it has moved."""
        sizes = [0, *(sum(self.moved_sizes(block)) for block in blocks)]
        return tuple(replace(block, ahead_bytes=size) for block, size in zip(blocks, sizes, strict=False))

    def far_ahead(self, blocks: Blocks, limit: int) -> Blocks:
        """What was moved comes back as early as the device has room for it."""
        sizes = {block.name: self.moved_sizes(block) for block in blocks}
        points = [(point.block, point.peak_bytes) for point in self.profile(blocks).points if point.phase == BACKWARD]
        for _ in range(_MAX_WINDOWS):
            ahead = ahead_bytes(points[-self._num_backward(points) :], sizes, limit)
            opened = tuple(replace(block, ahead_bytes=ahead.get(block.name, 0)) for block in blocks)
            excess = self.peak(opened) - limit
            if excess <= 0:
                return opened
            limit -= excess
        return blocks

    def moved_sizes(self, block: BlockPlan) -> list[int]:
        """Bytes of the storages that one call of a block moves, in the order of need."""
        found: list[int] = []
        for tape in self.tapes[block.name]:
            recipe = self.step.library.recipe(tape, block.policy)
            sizes = [tape.values[value].num_bytes for value in reversed(recipe.tiers)]
            if block.input not in ("device", "recompute") and recipe.needs_input:
                sizes += [v.num_bytes for v in tape.values if v.source == Source(ARGUMENT, 0)]
            found = max(found, [size for size in sizes if size >= LEAST_BYTES], key=sum)
        return found

    def in_flight_bytes(self, blocks: Blocks) -> int:
        """What one block moves may be on its way out while the next one runs."""
        if self.below is None or self.below.in_flight_bytes is not None:
            return 0 if self.below is None else self.below.in_flight_bytes or 0
        return max((sum(self.moved_sizes(block)) for block in blocks), default=0)

    def default_segment_length(self) -> int:
        """About the square root of the number of blocks."""
        return max(2, round(math.sqrt(len(self.names))))

    def all_segments(self, policy: Policy = RECOMPUTE) -> Iterator[Blocks]:
        """Segments of growing length, each with more recomputation than the one before."""
        for length in _SEGMENT_LENGTHS:
            blocks = self.segments(length, policy)
            if length < len(self.names) and any(block.input == "recompute" for block in blocks):
                yield blocks

    def from_options(self, options: Sequence[Option]) -> Blocks:
        """The placements that a solution of `chain` stands for."""
        chosen = {self.names[option.block]: option.kind.partition("+") for option in options}
        return self._spilled(
            tuple(self._moved(name, self._policies[kind], way) for name, (kind, _, way) in chosen.items())
        )

    @property
    def has_chain(self) -> bool:
        """Whether `chain` has been made already."""
        return self._chain is not None

    def chain(self) -> Chain:
        """The choice problem between keeping each block, replaying all of it, and what lies between.

        What lies between is measured on samples: in one run, blocks with equal tapes take different policies, and what one
        of them was found to hold and need is taken for the others.
        """
        if self._chain is None:
            self._policies = {"keep": KEEP, "recompute": RECOMPUTE} | self._between()
            between = [kind for kind in self._policies if kind not in ("keep", "recompute")]
            samples = [(self.profile(blocks), kinds) for blocks, kinds in self._samples(between)]
            groups = {name: self.group(name) for name in self.names}
            self._chain = build_chain(
                self.recorded,
                self.profile(self.recompute_all()),
                self.names,
                samples,
                groups,
                self._ways,
                None if self.below is None else self.below.link(self.recorded, self.step),
            )
        return self._chain

    def notes(self) -> Iterator[str]:
        """What could not be chosen freely."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self._reasons.items():
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            if reason != NOT_RECORDED:
                shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                yield f"not replayed from a tape: {shown} ({len(names)} in all), {reason}"

    def _tapes_of(self, name: str) -> list[Tape]:
        records = self.step.library.blocks.get(name)
        return [known.tape for known in records.classes.values() if known.tape is not None] if records else []

    def _reason(self, name: str) -> str:
        """Why a block has no tape."""
        facts = self.recorded.blocks[name]
        return facts.reason if facts.num_calls else NOT_RECORDED

    def _can_rerun(self, name: str) -> bool:
        records = self.step.library.blocks.get(name)
        if records is None or records.fixed is not None:
            return False
        return all(known.can_rerun for known in records.classes.values())

    def _is_chained(self, name: str) -> bool:
        facts = self.recorded.blocks[name]
        return facts.num_calls == facts.num_chained == self.step.accumulation

    def _between(self) -> dict[str, Policy]:
        """Policies between keeping and recomputing, best first: the largest tape says which prices are worth having."""
        tapes = {tape.digest: tape for tapes in self.tapes.values() for tape in tapes}
        if not tapes:
            return {}
        largest = max(tapes.values(), key=Tape.saved_bytes)
        rows = front(block_graph(largest, self.step.library.rates))
        inner = [policy for policy, _ in rows if policy.saved == "mixed"]
        picked = [inner[len(inner) * i // _NUM_BETWEEN] for i in range(min(_NUM_BETWEEN, len(inner)))]
        possible = {policy for policy, _ in rows}
        policies = dict.fromkeys([CHEAP, LEAST, *picked])
        if self.step.library.rules.drop and CHEAP not in possible:
            del policies[CHEAP]
        return {f"option {number}": policy for number, policy in enumerate(policies)}

    def _samples(self, kinds: list[str]) -> Iterator[tuple[Blocks, dict[str, str]]]:
        """Mixtures in which every group of equal blocks takes as many of the policies as it has members."""
        if not kinds:
            return
        members: dict[str, list[str]] = {}
        for name in self.names:
            members.setdefault(self.group(name), []).append(name)
        for sample in range(_MAX_SAMPLES):
            taken = {
                name: kinds[(place + sample * len(names)) % len(kinds)]
                for names in members.values()
                for place, name in enumerate(names)
            }
            yield tuple(self._place(name, self._policies[taken[name]]) for name in self.names), taken
            if all(len(names) >= len(kinds) for names in members.values()):
                return

    def group(self, name: str) -> str:
        """Blocks with equal tapes are in one group."""
        return "+".join(tape.digest for tape in self.tapes[name]) or name

    def _ways(self, name: str, kind: str) -> dict[str, list[int]]:
        """The ways to move what a block holds under an option, and the bytes of each tensor."""
        num_calls = self.recorded.blocks[name].num_calls // self.step.accumulation
        found: dict[str, list[int]] = {}
        for way in ("input", "all"):
            block = self._moved(name, self._policies[kind], way)
            sizes = [] if block.reason or name == self.names[-1] else self.moved_sizes(block) * num_calls
            if sizes and sizes not in found.values():
                found[way] = sizes
        return found

    def _moved(self, name: str, policy: Policy, way: str) -> BlockPlan:
        """A block with its input below the device, or all that it holds."""
        if not way or self.below is None or self._reasons.get(name):
            return self._place(name, policy)
        if way == "all":
            policy = replace(policy, host=(EVERYTHING,))
        return _on_tier(self._place(name, policy, self.below.name), self.below.name)

    def _spilled(self, blocks: Blocks) -> Blocks:
        """What the tier below has no room for goes to the one after it, the first blocks first: theirs is needed last."""
        if self.below is None or self.below.overflow is None:
            return blocks
        left, found = self.below.room_bytes, []
        for block in reversed(blocks):
            left -= self._moved_bytes(block, self.below.name)
            found.append(block if left >= 0 else _on_tier(block, self.below.overflow.name))
        return tuple(reversed(found))

    def _has_room_for(self, blocks: Blocks) -> bool:
        """Whether the sizes alone say that the tiers have room; running it says where they are put."""
        sums = Counter[str]()
        for block in blocks:
            sums[_tier_of(block)] += self._moved_bytes(block, _tier_of(block))
        return all(sums[tier.name] <= tier.room_bytes for tier in (self.below.tiers if self.below else ()))

    def _moved_bytes(self, block: BlockPlan, tier: str) -> int:
        """What a block moves in a forward of the model, with what the places of a tier are rounded up to."""
        num_calls, unit = self.recorded.blocks[block.name].num_calls // self.step.accumulation, ALIGNMENTS[tier]
        return num_calls * sum(-(-size // unit) * unit for size in self.moved_sizes(block))

    def _num_backward(self, points: list[tuple[str | None, int]]) -> int:
        """Points of the last micro-batch."""
        return max(1, len(points) // self.step.accumulation)

    def _place(self, name: str, policy: Policy, source: Placement = "device") -> BlockPlan:
        reason = self._reasons.get(name, "")
        if reason and not (policy.drops_all and reason != NOT_RECORDED and self._can_rerun(name)):
            policy = KEEP
        return _plan(name, self._kinds[name], policy, "device" if reason else source, reason)

    def described(self, blocks: Blocks) -> Blocks:
        """The placements with what they hold and recompute filled in."""
        profile = self.profile(blocks)
        held = held_bytes(self.recorded, self.profile(self.recompute_all()))
        return tuple(
            BlockPlan(
                name=block.name,
                kind=block.kind,
                policy=block.policy,
                input=block.input,
                ahead_bytes=block.ahead_bytes,
                held_bytes=max(0, held[block.name]),
                recompute_flops=profile.blocks[block.name].recompute_flops,
                reason=block.reason,
            )
            for block in blocks
        )


def _plan(name: str, kind: str, policy: Policy, source: Placement = "device", reason: str = "") -> BlockPlan:
    return BlockPlan(name=name, kind=kind, policy=policy, input=source, held_bytes=0, recompute_flops=0, reason=reason)


def _tier_of(block: BlockPlan) -> str:
    """Where a block moves what it moves."""
    return DISK if block.policy.disk or block.input == DISK else HOST


def _on_tier(block: BlockPlan, tier: Literal["host", "disk"]) -> BlockPlan:
    """A block whose moves all go to one tier."""
    names = block.policy.host + block.policy.disk
    policy = replace(block.policy, host=names if tier == HOST else (), disk=() if tier == HOST else names)
    return replace(block, policy=policy, input=block.input if block.input in ("device", "recompute") else tier)


def _in_order_of_execution(names: list[str], profile: StepProfile) -> list[str]:
    called = [point.block for point in profile.points if point.phase == "forward" and point.block is not None]
    order = {name: index for index, name in reversed(list(enumerate(called)))}
    return sorted(names, key=lambda name: order.get(name, len(called)))
