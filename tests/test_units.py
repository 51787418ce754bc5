from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapeline.errors import UsageError
from tapeline.units import Budget, format_bytes, format_flops, is_zero, parse_budget, parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", 1),
        ("4096", 4096),
        ("22GiB", 22 * 2**30),
        ("1.5 GB", 1_500_000_000),
        ("500mb", 500_000_000),
        ("2 kib", 2048),
    ],
)
def test_sizes_are_read(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["-1", "0", "12 parsecs", "", "GiB", "1.2.3 GiB", "nan", "inf", "0%", "-5%", "abc%", "0.2", "1e999GiB"]
)
def test_absurd_budgets_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_budget(text)


@pytest.mark.parametrize("value", [0, -1, 0.5, True, float("nan"), float("inf")])
def test_absurd_numbers_are_refused(value: float) -> None:
    with pytest.raises(UsageError):
        parse_budget(value)


def test_a_wrong_unit_gets_a_hint() -> None:
    with pytest.raises(UsageError, match="did you mean 'GiB'"):
        parse_bytes("22 GiBs")
    with pytest.raises(UsageError, match="did you mean 'GiB'"):
        parse_bytes("22G")


def test_kinds_of_budget() -> None:
    assert parse_budget("60%") == Budget(fraction=0.6)
    assert parse_budget(" AUTO ") == Budget(auto=True)
    assert parse_budget(1000) == Budget(num_bytes=1000)
    assert parse_budget(None) is None


@given(st.integers(min_value=1, max_value=2**50))
def test_bytes_survive_text(num_bytes: int) -> None:
    assert parse_bytes(str(num_bytes)) == num_bytes
    assert parse_bytes(format_bytes(num_bytes).replace(" ", "")) == pytest.approx(num_bytes, rel=0.01)


def test_flops_are_written_for_people() -> None:
    assert format_flops(2.5e12) == "2.5 TFLOP"
    assert format_flops(3e18) == "3e+03 PFLOP"


@pytest.mark.parametrize("text", [0, "0", "0%", " 0 GiB", "0.0", "00 %"])
def test_nothing_can_be_written_as_a_size(text: str | int) -> None:
    assert is_zero(text)


@pytest.mark.parametrize("text", [1, "", "%", ".", "10", "0.5%", "5%", "auto", "GiB", "0 parsec"])
def test_what_is_not_nothing(text: str | int) -> None:
    assert not is_zero(text)
