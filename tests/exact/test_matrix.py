"""Every family in every mode, with the other axes covered by pairs: exact on the tape, or exact by a fall-back that is named.

A fall-back that disappears makes its row fail, so that progress is kept. The full product has some ten million rows; what is
marked `slow` covers every pair of values within every family.
"""

from __future__ import annotations

import itertools

import pytest

from tests.exact.check import run_row
from tests.exact.expected import SOMETIMES, expected_fall_back, peak_tolerance
from tests.exact.families import FAMILIES
from tests.exact.rows import MODES, Row, covering_rows, covering_rows_of, pairs, rows_with_every_pair

ROWS = list(covering_rows())
# the libraries warn of choices that the matrix makes on purpose
pytestmark = pytest.mark.filterwarnings("ignore")


def check(row: Row) -> None:
    outcome = run_row(row)
    assert not outcome.different
    assert not outcome.kept_instead
    expected = expected_fall_back(row)
    if row.family in SOMETIMES and outcome.fall_back:
        expected = SOMETIMES[row.family]
    assert expected in outcome.fall_back
    assert bool(expected) == bool(outcome.fall_back), outcome.fall_back
    tolerance = peak_tolerance(row)
    assert outcome.peaks[0] <= max(outcome.predicted_first, outcome.predicted) * (1 + tolerance)
    assert outcome.peaks[-1] == pytest.approx(outcome.predicted, rel=tolerance)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_exact(row: Row) -> None:
    check(row)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_with_every_pair_of_values(family: str) -> None:
    for row in covering_rows_of(family):
        check(row)


def test_the_rows_cover_every_pair() -> None:
    covered = {pair for row in ROWS for pair in pairs(tuple(row)[1:])}
    possible = {pair for family in FAMILIES for values in rows_with_every_pair(family) for pair in pairs(values)}
    assert covered == possible
    assert {(row.family, row.mode) for row in ROWS} == set(itertools.product(FAMILIES, MODES))


def test_nine_rows_in_ten_are_on_the_tape() -> None:
    assert sum(not expected_fall_back(row) for row in ROWS) >= 0.9 * len(ROWS)
