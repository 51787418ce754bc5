from __future__ import annotations

import pytest

from tapeline.report.svg import line, pieces, placed, width_for
from tests.report.samples import BLOCKS, GIB


def test_pieces_follow_each_other_and_share_the_width_by_bytes() -> None:
    found = pieces({"a": 30, "b": 0, "c": 10}, most=80)
    assert [(p.number, p.label, p.left, p.width) for p in found] == [(1, "a", 0, 37.5), (3, "c", 37.5, 12.5)]
    assert [p.middle for p in found] == [18.75, 43.75]


def test_what_is_less_than_nothing_is_not_drawn_and_narrow_pieces_have_no_number() -> None:
    first, second = pieces({"a": -5, "b": 1, "c": 99}, most=100)
    assert (first.left, first.has_room) == (0, False)
    assert (second.left, second.has_room) == (1, True)


def test_colours_start_again_after_the_last() -> None:
    found = pieces({str(number): 1 for number in range(10)}, most=10)
    assert [piece.colour for piece in found] == [1, 2, 3, 4, 5, 6, 7, 8, 1, 2]


def test_a_width_is_never_nothing_and_shows_the_largest() -> None:
    assert width_for() > 0
    assert width_for(0, None) > 0
    assert 100 < width_for(100, None, 40) < 110


def test_bars_of_blocks_are_to_one_scale() -> None:
    (kept, moved), nothing = placed(BLOCKS)
    assert moved / kept == pytest.approx(576 / 160, rel=1e-4)
    assert 90 < kept + moved < 100
    assert nothing == (0, 0)
    assert placed(()) == []


def test_a_line_is_named_after_its_bytes() -> None:
    assert line(70, "budget", GIB).label == "budget 1.00 GiB"
    assert line(70, "budget", GIB).is_late
