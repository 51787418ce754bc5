from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tapeline.planner.windows import ahead_bytes

MOST_BLOCKS = 4
Stretches = list[tuple[str | None, int]]
Sizes = dict[str, list[int]]


@st.composite
def backwards(draw: st.DrawFn) -> tuple[Stretches, Sizes]:
    """Up to eight blocks, with or without something between them, each of which has moved up to three tensors."""
    stretches: Stretches = []
    sizes: Sizes = {}
    for number in range(draw(st.integers(min_value=1, max_value=8))):
        if draw(st.booleans()):
            stretches.append((None, draw(st.integers(min_value=0, max_value=100))))
        stretches.append((str(number), draw(st.integers(min_value=0, max_value=100))))
        sizes[str(number)] = draw(st.lists(st.integers(min_value=1, max_value=40), max_size=3))
    return stretches, sizes


limits = st.integers(min_value=0, max_value=250)


def needs(stretches: Stretches, sizes: Sizes) -> list[tuple[int, int]]:
    """What was moved, in the order of need: where it is needed, and how much it is."""
    return [(place, size) for place, (block, _) in enumerate(stretches) for size in sizes.get(block or "", ())]


def bytes_early(stretches: Stretches, sizes: Sizes, ahead: dict[str, int]) -> list[int]:
    """Bytes that are there before their need, at each stretch, if each block fetches as the runtime does."""
    found, order = [], needs(stretches, sizes)
    there: set[int] = set()
    for place, (block, _) in enumerate(stretches):
        later = [number for number, (need, _) in enumerate(order) if need > place]
        left = ahead.get(block or "", 0)
        for number in later:
            left -= order[number][1]
            if block is None or left < 0:
                break
            there.add(number)
        found.append(sum(order[number][1] for number in there.intersection(later)))
    return found


@settings(max_examples=300, deadline=None)
@given(backwards(), limits)
def test_no_stretch_has_more_than_the_limit_for_what_comes_early(case: tuple[Stretches, Sizes], limit: int) -> None:
    stretches, sizes = case
    early = bytes_early(stretches, sizes, ahead_bytes(stretches, sizes, limit))
    for (_, there), more in zip(stretches, early, strict=True):
        assert there + more <= max(limit, there)


@settings(max_examples=300, deadline=None)
@given(backwards(), limits)
def test_what_comes_early_is_all_there_and_nothing_else(case: tuple[Stretches, Sizes], limit: int) -> None:
    stretches, sizes = case
    ahead = ahead_bytes(stretches, sizes, limit)
    assert all(ahead.values())
    early = bytes_early(stretches, sizes, ahead)
    for (block, _), more in zip(stretches, early, strict=True):
        assert block is None or more == ahead.get(block, 0)


@settings(max_examples=300, deadline=None)
@given(backwards(), limits)
def test_the_order_of_needs_is_kept(case: tuple[Stretches, Sizes], limit: int) -> None:
    """What comes early is always what is needed next, without a gap."""
    stretches, sizes = case
    ahead = ahead_bytes(stretches, sizes, limit)
    for place, (block, _) in enumerate(stretches):
        if block is not None:
            later = [size for need, size in needs(stretches, sizes) if need > place]
            assert ahead.get(block, 0) in {sum(later[:count]) for count in range(len(later) + 1)}


@settings(max_examples=200, deadline=None)
@given(backwards())
def test_with_much_room_everything_comes_four_blocks_early(case: tuple[Stretches, Sizes]) -> None:
    stretches, sizes = case
    names = [block for block, _ in stretches if block is not None]
    expected = {
        name: sum(sum(sizes[later]) for later in names[number + 1 : number + 1 + MOST_BLOCKS])
        for number, name in enumerate(names)
    }
    assert ahead_bytes(stretches, sizes, 10**6) == {name: size for name, size in expected.items() if size}


@settings(max_examples=200, deadline=None)
@given(backwards())
def test_without_room_nothing_comes_early(case: tuple[Stretches, Sizes]) -> None:
    stretches, sizes = case
    assert ahead_bytes(stretches, sizes, min(there for _, there in stretches)) == {}


def test_what_has_no_room_in_between_waits_until_it_has() -> None:
    stretches: Stretches = [("a", 10), (None, 90), ("b", 10), ("c", 50)]
    assert ahead_bytes(stretches, {"c": [40]}, 100) == {"b": 40}
    assert ahead_bytes(stretches, {"c": [40]}, 130) == {"a": 40, "b": 40}
    assert ahead_bytes(stretches, {"c": [40, 40, 40]}, 100) == {"b": 80}, "the third comes at its need"
    assert ahead_bytes(stretches, {"b": [20], "c": [40]}, 130) == {"a": 20, "b": 40}
    assert ahead_bytes(stretches, {"b": [60], "c": [10]}, 120) == {"b": 10}, "the second does not overtake the first"
