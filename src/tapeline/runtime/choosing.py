"""Which placements of the blocks a mode stands for, and the cheapest or the smallest of them; each answer has been run."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

from tapeline.errors import InfeasibleBudgetError
from tapeline.planner.chain import Chain, smallest, solve
from tapeline.planner.policy import CHEAP, KEEP, LEAST, RECOMPUTE
from tapeline.planner.schema import Alternative, Plan
from tapeline.runtime.candidates import Blocks, Candidates
from tapeline.runtime.moving import LEAST_BYTES
from tapeline.units import format_bytes

logger = logging.getLogger(__name__)

_MAX_CORRECTIONS = 6
_CLOSE = 0.01


def choose(candidates: Candidates, mode: str, segment_length: int | None, limit: int | None) -> Blocks:
    """The placements of a mode.

    Args:
        candidates: the step.
        mode: its name.
        segment_length: of mode ``segments``; ``None``: its default.
        limit: what the peak may reach; mode ``auto`` has one.

    Raises:
        InfeasibleBudgetError: if they need more than `limit`, or than the tier below has room for.
    """
    blocks = _of_mode(candidates, mode, segment_length, limit)
    if any(candidates.moved_sizes(block) for block in blocks):
        blocks = candidates.one_ahead(blocks) if limit is None else candidates.far_ahead(blocks, limit)
    if limit is not None and candidates.peak(blocks) > limit:
        raise _infeasible(candidates, limit, f"mode {mode!r} needs {format_bytes(candidates.peak(blocks))}, ")
    if not candidates.has_room(blocks):
        rooms = " and ".join(f"{format_bytes(size)} on the {tier}" for tier, size in candidates.rooms(blocks).items())
        raise _infeasible(
            candidates, limit or candidates.peak(blocks), f"mode {mode!r} moves {rooms}, which has less room, "
        )
    return blocks


def _of_mode(candidates: Candidates, mode: str, segment_length: int | None, limit: int | None) -> Blocks:
    if mode == "auto":
        assert limit is not None, "mode auto has a budget"
        return _cheapest(candidates, limit)
    if mode == "segments":
        return candidates.segments(segment_length or candidates.default_segment_length())
    if mode == "offload":
        return candidates.offloaded()
    if mode == "cheap" and limit is not None and candidates.below is not None:
        return _cheap(candidates, limit)
    if mode == "least":
        return smallest_peak(candidates)
    return candidates.uniform({"none": KEEP, "cheap": CHEAP, "recompute": RECOMPUTE}[mode])


def _cheap(candidates: Candidates, limit: int) -> Blocks:
    """What replays for nothing is dropped, and of the rest as much as must be is moved, that of the first blocks first."""
    few, many = 0, len(candidates.names) - 1
    if candidates.fits(candidates.moving(CHEAP, 0), limit):
        return candidates.moving(CHEAP, 0)
    while many - few > 1:
        middle = (few + many) // 2
        if candidates.profile(candidates.moving(CHEAP, middle)).peak_bytes <= limit:
            many = middle
        else:
            few = middle
    return candidates.moving(CHEAP, many)


def _cheapest(candidates: Candidates, limit: int) -> Blocks:
    """The placements that take the least time and fit, checked by running them: recomputing, and waiting for links.

    Where there is a tier below, they are looked for without it as well, so that room there never makes a step slower.
    """
    if candidates.fits(candidates.keep_all(), limit):
        return candidates.keep_all()
    chain = candidates.chain()
    found: list[Blocks | None] = []
    if candidates.below is not None:
        found.append(_solved(candidates, chain, limit))
        if found[0] is not None and candidates.cost(found[0]) <= (1 + _CLOSE) * candidates.cost(candidates.keep_all()):
            return found[0]
        found.append(_first(candidates, limit, _moved(candidates)))
    found.append(_solved(candidates, chain.without_moves(), limit))
    if found[-1] is None:
        found.append(_first(candidates, limit, (candidates.recompute_all(), candidates.uniform(LEAST))))
    fitting = [blocks for blocks in found if blocks is not None]
    if fitting:
        return min(fitting, key=candidates.cost)
    segments = (*candidates.all_segments(), *candidates.all_segments(LEAST))
    if (blocks := _first(candidates, limit, segments)) is not None:
        return blocks
    raise _infeasible(candidates, limit)


def _solved(candidates: Candidates, chain: Chain, limit: int) -> Blocks | None:
    """A solution of the choice problem that fits when it is run, the cheapest that was met.

    What is composed may need more when it is run, above all in the first step, in which blocks are recorded: the problem is solved
    again for less. Where tensors are moved, less is so much cheaper for the device that this goes too far: then the
    middle is tried.
    """
    target, most, least = limit, limit, None
    best: Blocks | None = None
    for _ in range(_MAX_CORRECTIONS):
        found = solve(chain, target)
        if found is None:
            break
        blocks = candidates.from_options(found)
        excess = candidates.peak(blocks) - limit
        if excess <= 0 and candidates.has_room(blocks):
            if best is None or candidates.cost(blocks) < candidates.cost(best):
                best = blocks
            is_free = candidates.cost(best) <= (1 + _CLOSE) * candidates.cost(candidates.keep_all())
            if chain.link is None or is_free or most - target <= _CLOSE * limit:
                break
            least = target
        else:
            logger.debug("composed plan is %d bytes above the budget when run: solving again", excess)
            most = target
        target = most - max(1, excess) if least is None else (least + most) // 2
    return best


def _first(candidates: Candidates, limit: int, tried: Iterable[Blocks]) -> Blocks | None:
    return next((blocks for blocks in tried if candidates.fits(blocks, limit)), None)


def _moved(candidates: Candidates) -> Iterator[Blocks]:
    """Recomputing everything from inputs below the device."""
    if candidates.below is not None:
        yield candidates.offloaded()
        yield candidates.offloaded(LEAST)


def smallest_peak(candidates: Candidates) -> Blocks:
    """The placements with the smallest peak.

    Steps under all of them are run; the first step, which costs another run, only where it could still matter.
    """
    tried = [candidates.keep_all(), candidates.recompute_all(), candidates.uniform(LEAST)]
    tried += candidates.all_segments(LEAST)
    tried += [blocks for blocks in _moved(candidates) if candidates.has_room(blocks)]
    if candidates.has_chain:
        tried += [b for b in (candidates.from_options(smallest(candidates.chain())),) if candidates.has_room(b)]
    tried.sort(key=lambda blocks: candidates.profile(blocks).peak_bytes)
    best = tried[0]
    for blocks in tried[1:]:
        if candidates.profile(blocks).peak_bytes < candidates.peak(best) > candidates.peak(blocks):
            best = blocks
    return best


def _infeasible(candidates: Candidates, limit: int, detail: str = "") -> InfeasibleBudgetError:
    blocks = smallest_peak(candidates)
    profile, peak = candidates.profile(blocks), candidates.peak(blocks)
    parts = ", ".join(f"{kind} {format_bytes(size)}" for kind, size in profile.memory.items() if size)
    advice = (
        f'Mode "auto" fits {format_bytes(limit)}.'
        if peak <= limit
        else f"Raise the budget to {peak} bytes, or use shorter sequences or a smaller batch."
    )
    return InfeasibleBudgetError(
        f"Does not fit: budget {format_bytes(limit)}, {detail}smallest possible {format_bytes(peak)} ({parts}). {advice}",
        budget_bytes=limit,
        smallest_feasible_bytes=peak,
    )


def finished(candidates: Candidates, mode: str, chosen: Blocks, limit: int | None) -> Plan:
    """Put a choice and what it costs into a plan."""
    step, kept, profile = candidates.step, candidates.kept, candidates.profile(chosen)
    notes = list(candidates.notes())
    rooms = candidates.rooms(chosen)
    if candidates.below is not None and not profile.moved_bytes:
        room = format_bytes(sum(tier.room_bytes for tier in candidates.below.tiers))
        reason = f"it has room for {room}, and tensors under {format_bytes(LEAST_BYTES)} stay"
        reason = "the budget is kept without" if mode != "offload" else reason
        notes.append(f"nothing is moved to the {candidates.below.name}: {reason}")
    if step.optimizer is None:
        notes.append("no optimizer was given: its state is not counted")
    if not candidates.names:
        notes.append("no blocks were found: nothing is managed")
    return Plan(
        mode=mode,
        device=str(step.device),
        budget_bytes=limit,
        peak_bytes=profile.peak_bytes,
        first_step_peak_bytes=candidates.first_peak(chosen),
        untouched_peak_bytes=kept.peak_bytes,
        flops=profile.flops,
        untouched_flops=kept.flops,
        memory=profile.memory,
        untouched_memory=kept.memory,
        blocks=candidates.described(chosen),
        alternatives=_alternatives(candidates, mode, chosen, limit),
        keep=step.library.rules.keep,
        drop=step.library.rules.drop,
        notes=tuple(notes),
        moved={tier: size // step.accumulation for tier, size in profile.moved_bytes.items()},
        in_flight_bytes=candidates.in_flight_bytes(chosen),
        host_bytes=rooms.get("host", 0),
        disk_bytes=rooms.get("disk", 0),
    )


def _alternatives(candidates: Candidates, mode: str, chosen: Blocks, limit: int | None) -> tuple[Alternative, ...]:
    named = {"none": candidates.keep_all(), "recompute": candidates.recompute_all()}
    named[mode if mode in named else f"{mode} (this plan)"] = chosen
    rows = []
    for name, blocks in named.items():
        profile = candidates.profile(blocks)
        fits = None if limit is None else profile.peak_bytes <= limit
        rows.append(Alternative(name=name, peak_bytes=profile.peak_bytes, flops=profile.flops, fits=fits))
    return tuple(rows)
