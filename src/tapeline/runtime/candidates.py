"""Ways to place the blocks of one model, each run once on fake tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import nn

from tapeline.errors import UnsupportedModelError
from tapeline.planner.chain import Chain, Option
from tapeline.planner.profile import StepProfile, build_chain, held_bytes
from tapeline.planner.schema import BlockPlan, Placement
from tapeline.runtime.predict import FakeStep

_SEGMENT_LENGTHS = (2, 3, 4, 6, 8, 12, 16, 24)
_FAILS = "recomputing it fails, for example because it changes its input in place"
_NOT_RECORDED = "autograd records nothing here"

Blocks = tuple[BlockPlan, ...]


class Candidates:
    """Placements for a model, and the profile of a step under each.

    Args:
        step: the step without bytes.
        model: the model, for the classes of its blocks.
    """

    def __init__(self, step: FakeStep, model: nn.Module) -> None:
        self.step = step
        self.kept = step.run(())
        self.names = _in_order_of_execution(step.block_names, self.kept)
        self._kinds = {name: type(model.get_submodule(name)).__name__ for name in self.names}
        self._fixed = {name: reason for name in self.names if (reason := self.kept.blocks[name].fixed_reason)}
        self.recomputed = self._recompute_what_can_be()
        for name, facts in self.recomputed.blocks.items():
            if facts.num_calls == 0:
                self._fixed.setdefault(name, _NOT_RECORDED)
        self._held = held_bytes(self.kept, self.recomputed)
        self._profiles: dict[Blocks, StepProfile] = {}
        self._chain: Chain | None = None

    def profile(self, blocks: Blocks) -> StepProfile:
        """The step under these placements, run once."""
        if blocks not in self._profiles:
            keeps_all = all(block.saved == "device" for block in blocks)
            self._profiles[blocks] = self.kept if keeps_all else self.step.run(blocks)
        return self._profiles[blocks]

    def keep_all(self) -> Blocks:
        return tuple(self._place(name, self.recomputed, "device") for name in self.names)

    def recompute_all(self) -> Blocks:
        return tuple(self._place(name, self.recomputed, "recompute") for name in self.names)

    def segments(self, length: int) -> Blocks:
        """Recompute everything, and keep only every `length`-th input of each run of chained blocks."""
        blocks = []
        position = -1
        for name in self.names:
            position = position + 1 if position >= 0 and self._is_chained(name) else 0
            blocks.append(
                self._place(name, self.recomputed, "recompute", "recompute" if position % length else "device")
            )
            if blocks[-1].saved == "device":
                position = -1
        return tuple(blocks)

    def default_segment_length(self) -> int:
        """About the square root of the number of blocks."""
        return max(2, round(math.sqrt(len(self.names))))

    def all_segments(self) -> Iterator[Blocks]:
        """Segments of growing length, each with more recomputation than the one before."""
        for length in _SEGMENT_LENGTHS:
            blocks = self.segments(length)
            if length < len(self.names) and any(block.input == "recompute" for block in blocks):
                yield blocks

    def from_options(self, options: Sequence[Option]) -> Blocks:
        """The placements that a solution of `chain` stands for."""
        kinds = {self.names[option.block]: option.kind for option in options}
        return tuple(
            self._place(name, self.recomputed, "recompute" if kinds[name] == "recompute" else "device")
            for name in self.names
        )

    def chain(self) -> Chain:
        """The choice problem between keeping and recomputing each block."""
        if self._chain is None:
            self._chain = build_chain(self.kept, self.recomputed, self.names)
        return self._chain

    def notes(self) -> Iterator[str]:
        """What could not be chosen freely."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self._fixed.items():
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            if reason != _NOT_RECORDED:
                shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                yield f"always kept: {shown} ({len(names)} in all), {reason}"

    def _recompute_what_can_be(self) -> StepProfile:
        """Run the step with every block recomputed; if that fails, find the blocks that cannot be, one by one."""
        try:
            return self.step.run([self._place(name, None, "recompute") for name in self.names])
        except UnsupportedModelError:
            for name in self.names:
                try:
                    self.step.run([self._place(n, None, "recompute" if n == name else "device") for n in self.names])
                except UnsupportedModelError:
                    self._fixed.setdefault(name, _FAILS)
        return self.step.run([self._place(name, None, "recompute") for name in self.names])

    def _is_chained(self, name: str) -> bool:
        facts = self.recomputed.blocks[name]
        return facts.num_calls == facts.num_chained == self.step.accumulation

    def _place(
        self, name: str, recomputed: StepProfile | None, saved: Placement, source: Placement = "device"
    ) -> BlockPlan:
        reason = self._fixed.get(name, "")
        return BlockPlan(
            name=name,
            kind=self._kinds[name],
            saved="device" if reason else saved,
            input="device" if reason else source,
            held_bytes=max(0, self._held[name]) if recomputed else 0,
            recompute_flops=recomputed.blocks[name].recompute_flops if recomputed else 0,
            reason=reason,
        )


def _in_order_of_execution(names: list[str], profile: StepProfile) -> list[str]:
    called = [point.block for point in profile.points if point.phase == "forward" and point.block is not None]
    order = {name: index for index, name in reversed(list(enumerate(called)))}
    return sorted(names, key=lambda name: order.get(name, len(called)))
