"""Pages of forecasts and plans: whole, closed in themselves, saying what the data says."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tapeline
from tapeline.errors import UsageError
from tapeline.planner.forecast import Forecast
from tapeline.planner.schema import Plan
from tapeline.report.html import render
from tapeline.units import format_bytes, format_flops
from tests.report.samples import DISK, EVIL, FITS, FORECASTS, FREE, LONGEST, NOT, PLAN, PLANS, Page

RESULTS = [*FORECASTS.values(), *PLANS.values()]
NAMES = [*(f"forecast {name}" for name in FORECASTS), *(f"plan {name}" for name in PLANS)]
GEOMETRY = {"x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "dx", "dy", "r", "width", "height"}

each = pytest.mark.parametrize("result", RESULTS, ids=NAMES)


@each
def test_a_page_is_well_formed_and_closed_in_itself(result: Forecast | Plan) -> None:
    text = render(result)
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>\n")
    assert not {tag for tag, _ in page.elements} & {"script", "link", "img", "iframe", "object", "base", "form"}
    assert "://" not in text
    assert "url(" not in text
    assert "@import" not in text
    for _, attributes in page.elements:
        assert not set(attributes) & {"src", "href", "srcset", "style"}
        assert not [name for name in attributes if name.startswith("on")]
    assert "None" not in page.text


@each
def test_charts_have_finite_numbers_and_a_text_instead(result: Forecast | Plan) -> None:
    page = Page(render(result))
    ids = page.ids()
    assert len(set(ids)) == len(ids)
    for tag, attributes in page.elements:
        for name in GEOMETRY & set(attributes):
            if tag != "meta":
                value = float((attributes[name] or "").removesuffix("%"))
                assert math.isfinite(value), (tag, name)
                assert value >= 0 or name in ("dx", "dy")
        if attributes.get("role") == "img":
            assert attributes["aria-labelledby"] in ids
            assert attributes["aria-describedby"] in ids


@pytest.mark.parametrize("result", [FORECASTS["evil"], PLANS["evil"]], ids=["forecast", "plan"])
def test_what_comes_from_outside_is_text(result: Forecast | Plan) -> None:
    text = render(result)
    assert "<script" not in text
    assert "&amp;lt;" not in text
    assert EVIL in Page(text).text


@pytest.mark.parametrize("forecast", FORECASTS.values(), ids=FORECASTS)
def test_every_number_of_the_printed_forecast_is_on_its_page(forecast: Forecast) -> None:
    page = Page(render(forecast))
    rows = {row[1].removesuffix(" (the plan)"): row for row in page.table("#", "setting")}
    lines = str(forecast).splitlines()
    assert forecast.verdict in page.text
    for name, row in rows.items():
        line = next(line for line in lines if line.startswith(f"{name}  "))
        for cell in re.split(r"\s{2,}", line.strip())[1:]:
            assert any(cell in text for text in row), (cell, row)
    assert ("lower bound" in rows) == (forecast.bound_seconds is not None)
    for phase, tiers in forecast.phases.items():
        assert [phase, *(format_bytes(size) for size in tiers.values())] in page.table("phase")
    for kind, size in forecast.memory.items():
        assert not size or any(row[:2] == [" ".join(kind.split()), format_bytes(size)] for row in page.table("what"))


def test_the_page_of_a_forecast_has_its_parts_in_order() -> None:
    text = Page(render(FITS)).text
    order = [
        "fits 22.00 GiB at 1.047x",
        "8.07 B parameters, 8 layers",
        "1 x 8192 tokens",
        "What fills the device",
        "Settings and the plan",
        "Where the plan puts",
        "One GiB more on the device would save 1.3% of the step",
        "phase",
        "Where the numbers of rtx-4090 come from",
        "step times are estimates",
    ]
    where = [text.rindex(part) for part in order]
    assert where == sorted(where)


def test_placements_and_origins_are_in_tables() -> None:
    page = Page(render(FITS))
    blocks = page.table("blocks")
    assert blocks[0][0] == "0-3, 7"
    assert blocks[0][2].startswith("160.0 MiB")
    assert blocks[0][3] == "576.0 MiBmlp.up_proj.add"
    assert blocks[0][4] == "10"
    assert blocks[1][2:] == ["0 B", "0 B", "0"]
    assert [row[1:] for row in page.table("origin")] == [
        ["1", "memory_bytes"],
        ["1", "peak_flops.float16"],
        ["1", "op_seconds"],
    ]


def test_columns_are_there_for_what_was_asked() -> None:
    assert Page(render(FITS)).table("#", "setting", "smallest budget", "step")
    assert Page(render(LONGEST)).table("#", "setting", "smallest budget", "longest", "batch")[1][3:5] == ["1583", "1"]
    rows = Page(render(DISK)).table("#", "setting", "smallest budget", "step", "slowdown", "host", "disk")
    assert rows[2][6] == "3.00 GiB"


def test_what_does_not_fit_says_so_and_names_the_budget_that_would() -> None:
    page = Page(render(NOT))
    assert "does not fit 512.0 MiB; the smallest budget that does is 19.00 GiB" in page.text
    assert "smallest budget 19.00 GiB" in page.text
    assert [row[3] for row in page.table("#")] == [
        "does not fit; 1.000x on a device with room",
        "does not fit; 1.337x on a device with room",
        "does not fit",
    ]
    assert "One GiB more" not in page.text


def test_what_is_known_already_is_advised() -> None:
    text = Page(render(FREE)).text
    assert FREE.advice
    assert FREE.advice in text
    assert FREE.memory_note in text
    assert "More memory on the device would not make the step faster" in text


def test_the_page_of_a_plan_has_everything() -> None:
    page = Page(render(PLAN))
    assert PLAN.headline in page.text
    assert page.table("what") == [
        ["weights", "15.00 GiB", "15.00 GiB"],
        ["activations", "26.00 GiB", "7.00 GiB"],
        ["other", "0 B", "1.00 GiB"],
        ["peak", "41.00 GiB", "23.00 GiB"],
    ]
    assert [row[1:] for row in page.table("way to run")] == [
        ["41.00 GiB", "4 PFLOP", "1.000x", "no"],
        ["19.00 GiB", "5.3 PFLOP", "1.325x", "yes"],
        ["23.00 GiB", "5 PFLOP", "1.250x", "-"],
    ]
    for block, row in zip(PLAN.blocks, page.table("block"), strict=True):
        assert row[:3] == [block.name, "Layer", block.saved]
        assert row[4:] == [format_bytes(block.held_bytes), format_flops(block.recompute_flops), block.reason]
    assert "a note" in page.text


def test_the_verb_writes_the_page(tmp_path: Path) -> None:
    path = tapeline.to_html(Plan.from_json(PLAN.to_json()), tmp_path / "plan.html")
    assert path.read_text(encoding="utf-8") == render(PLAN)
    with pytest.raises(UsageError, match="Cannot make a page of a dict"):
        tapeline.to_html({}, tmp_path / "other.html")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == [path]


def test_a_page_is_made_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys, tapeline\n"
        "from tapeline.planner.schema import Plan\n"
        f"tapeline.to_html(Plan.from_json({PLAN.to_json()!r}), {str(tmp_path / 'plan.html')!r})\n"
        "sys.exit('torch' in sys.modules or 'tapeline.api' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
