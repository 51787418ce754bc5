from __future__ import annotations

from tapeline.planner.profile import BlockFacts, Point, StepProfile, build_chain, held_bytes

FACTS = BlockFacts(recompute_flops=7, num_calls=1, num_chained=1)


def profile(*points: tuple[str, str | None, int, int, int], facts: BlockFacts = FACTS) -> StepProfile:
    made = tuple(Point(phase=p, block=b, start_bytes=s, peak_bytes=k, end_bytes=e) for p, b, s, k, e in points)
    return StepProfile(
        peak_bytes=max(p.peak_bytes for p in made), flops=0, memory={}, points=made, blocks={"a": facts, "b": facts}
    )


KEPT = profile(
    ("forward", "a", 10, 40, 35),
    ("forward", "b", 35, 65, 60),
    ("backward", None, 60, 70, 60),
    ("backward", "b", 60, 62, 35),
    ("backward", "a", 35, 37, 10),
)
RECOMPUTED = profile(
    ("forward", "a", 10, 40, 15),
    ("forward", "b", 15, 45, 20),
    ("backward", None, 20, 30, 20),
    ("backward", "b", 20, 47, 15),
    ("backward", "a", 15, 42, 10),
)


def test_held_bytes_are_the_difference_in_growth() -> None:
    assert held_bytes(KEPT, RECOMPUTED) == {"a": 20, "b": 20}


def test_mixed_choices_are_composed_point_by_point() -> None:
    chain = build_chain(KEPT, RECOMPUTED, ["a", "b"])
    choice = {(o.block, o.kind): o for o in chain.options}
    assert chain.peak_bytes([choice[0, "keep"], choice[1, "keep"]]) == KEPT.peak_bytes
    assert chain.peak_bytes([choice[0, "recompute"], choice[1, "recompute"]]) == RECOMPUTED.peak_bytes
    # b kept, a recomputed: 20 + 20 held at the loss, and a's own replay at the end
    assert chain.peak_bytes([choice[0, "recompute"], choice[1, "keep"]]) == 50
    # a kept, b recomputed: a's bytes are still there while b is replayed
    assert chain.peak_bytes([choice[0, "keep"], choice[1, "recompute"]]) == 67


def test_blocks_that_record_nothing_are_only_kept() -> None:
    facts = BlockFacts(recompute_flops=0, num_calls=0, num_chained=0)
    recomputed = profile(
        *[(p.phase, p.block, p.start_bytes, p.peak_bytes, p.end_bytes) for p in RECOMPUTED.points], facts=facts
    )
    chain = build_chain(KEPT, recomputed, ["a", "b"])
    assert {option.kind for option in chain.options} == {"keep"}


def test_a_sample_gives_all_blocks_of_its_group_the_option() -> None:
    chain = build_chain(KEPT, RECOMPUTED, ["a", "b"], [(RECOMPUTED, {"a": "half"})], {"a": "equal", "b": "equal"})
    assert sorted(o.block for o in chain.options if o.kind == "half") == [0, 1]
