from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapeline.planner.forecast import Forecast
from tapeline.report.chart import slowdown_chart
from tests.report.samples import FITS, FORECASTS, FREE, GIB, NONE, NOT, RECOMPUTED


def test_a_setting_is_at_its_smallest_budget_and_the_plan_at_its_own() -> None:
    chart = slowdown_chart(FITS)
    none, recompute, plan = chart.points
    assert [p.spot.num_bytes for p in chart.points] == [90 * GIB, 21 * GIB, 22 * GIB]
    assert recompute.across < plan.across < none.across
    assert plan.across == chart.budget.at
    assert recompute.down < plan.down < none.down
    assert (none.spot.fits, recompute.spot.fits, plan.spot.is_plan) == (False, True, True)
    assert chart.bound is not None
    assert plan.down < chart.bound < none.down


def test_a_plan_that_does_not_fit_is_a_line() -> None:
    chart = slowdown_chart(NOT)
    assert [p.spot.label for p in chart.points] == ["none", "recompute"]
    assert chart.smallest is not None
    assert chart.smallest.label == "smallest budget 19.00 GiB"
    assert chart.bound is None
    assert slowdown_chart(FITS).smallest is None


@pytest.mark.parametrize("forecast", FORECASTS.values(), ids=FORECASTS)
def test_everything_is_inside(forecast: Forecast) -> None:
    _check_inside(forecast)


@given(st.lists(st.integers(0, 2**50), max_size=6), st.floats(1, 1e4), st.integers(1, 2**50))
def test_everything_is_inside_whatever_the_sizes(sizes: list[int], slowdown: float, budget: int) -> None:
    rows = [replace(RECOMPUTED, device_bytes=size, slowdown=slowdown) for size in sizes]
    _check_inside(replace(FREE, rows=(*rows, FREE.rows[-1]), budget_bytes=budget))


def _check_inside(forecast: Forecast) -> None:
    chart = slowdown_chart(forecast)
    across = [*(p.across for p in chart.points), *(at for at, _ in chart.sizes), chart.budget.at]
    down = [*(p.down for p in chart.points), *(at for at, _ in chart.slowdowns)]
    assert all(chart.left <= at <= chart.right for at in across)
    assert all(0 < at <= chart.bottom for at in down)
    assert all(math.isfinite(at) for at in (*across, *down))
    assert 1 <= len(chart.sizes) <= 5
    assert 2 <= len(chart.slowdowns) <= 6


def test_numbers_of_points_in_one_place_stand_apart() -> None:
    rows = [replace(NONE, name=str(n)) for n in range(4)]
    chart = slowdown_chart(replace(FITS, rows=(*rows, FITS.rows[-1])))
    assert len({p.shift for p in chart.points[:4]}) == 4
