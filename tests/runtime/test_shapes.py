"""Shapes of batches, and the buckets that they share plans in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tapeline.runtime.shapes import GROWTH, Shape, cut, lay_over, shape_of
from tests.models import token_batch

sizes = st.integers(1, 10_000)


@given(sizes, sizes, st.integers(1, 64), st.integers(1, 64), st.booleans())
def test_a_bucket_holds_its_shapes_and_is_not_much_larger(
    length: int, longest: int, batch: int, most: int, is_padded: bool
) -> None:
    largest = Shape(most, longest)
    shape = Shape(min(batch, most), min(length, longest), is_padded)
    bucket = shape.bucket(largest)
    assert bucket.covers(shape)
    assert bucket.length <= max(shape.length * GROWTH + GROWTH, 2)
    assert bucket.batch <= max(shape.batch * GROWTH + GROWTH, 2)
    assert bucket.length <= longest
    assert bucket.batch <= most
    assert bucket.bucket(largest) == bucket  # its corner belongs to it


@given(sizes)
def test_buckets_are_few(longest: int) -> None:
    largest = Shape(1, longest)
    buckets = {Shape(1, length).bucket(largest) for length in range(1, longest + 1, max(1, longest // 500))}
    assert len(buckets) <= 45  # log(10,000) / log(1.25) is 41


def test_an_empty_dimension_ends_too() -> None:
    assert Shape(0, 0).bucket(Shape(2, 48)) == Shape(2, 48)


def test_beyond_the_grid_a_shape_is_its_own_bucket() -> None:
    assert Shape(3, 70).bucket(Shape(2, 64)) == Shape(3, 70)
    assert not Shape(2, 64).covers(Shape(3, 64))
    assert not Shape(2, 64).covers(Shape(2, 64, is_padded=True))
    assert Shape(2, 64, is_padded=True).covers(Shape(2, 64))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (token_batch(3, 17), Shape(3, 17)),
        (token_batch(3, 17, padding=2), Shape(3, 17, is_padded=True)),
        (((), {"labels": torch.zeros(9, 9), "input_ids": torch.zeros(2, 5, dtype=torch.long)}), Shape(2, 5)),
        ((torch.zeros(4, 8, 16),), Shape(4, 8)),
        ((torch.zeros(4),), Shape(4, 1)),
        ((torch.tensor(1.0), {"note": "text"}), None),
        ((), None),
        ((torch.zeros(0, 48),), None),
        ({"attention_mask": torch.ones(2, 1, 5, 5), "input_ids": torch.zeros(2, 5)}, Shape(2, 5, is_padded=True)),
    ],
)
def test_shape_of(values: Any, expected: Shape | None) -> None:
    assert shape_of(values) == expected


def test_cut_takes_sequences_and_tokens_where_they_are() -> None:
    batch = {
        "input_ids": torch.arange(24).view(2, 12),
        "mask": torch.ones(2, 1, 12, 12),
        "inputs_embeds": torch.zeros(2, 12, 12),  # the second 12 is no length
        "weights": torch.zeros(7),
        "scale": torch.tensor(1.0),
        "name": "text",
    }
    small = cut(batch, Shape(2, 12), Shape(1, 5))
    assert small["input_ids"].tolist() == [[0, 1, 2, 3, 4]]
    assert small["mask"].shape == (1, 1, 5, 5)
    assert small["inputs_embeds"].shape == (1, 5, 12)
    assert small["weights"].shape == (7,)
    assert small["name"] == "text"
    assert all(tensor.is_contiguous() for tensor in small.values() if isinstance(tensor, torch.Tensor))


def test_lay_over_gives_the_padding_of_the_call() -> None:
    whole, call = token_batch(2, 8), token_batch(1, 6, padding=2)
    laid = lay_over(whole, call, is_padded=True)
    assert laid["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0, 1, 1], [1] * 8]
    assert torch.equal(laid["input_ids"][:1, :6], call["input_ids"])
    assert whole["attention_mask"].all()  # the batch itself is not written
    padded = token_batch(2, 8, padding=1)
    assert lay_over(padded, {}, is_padded=False)["attention_mask"].all()
    assert lay_over((torch.zeros(2),), call, is_padded=True)[0].shape == (2,)
