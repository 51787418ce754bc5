"""What the cache gives is what the op gives: layout, dtype, device, and whose storage it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

from tapeline.tape.fake import ShapeMode

OPS: dict[str, Callable[..., Any]] = {
    "add": lambda x, y: x + y,
    "add to itself": lambda x, y: x + x,
    "scale": lambda x, y: x * 2,
    "other dtype": lambda x, y: x.bfloat16(),
    "product": lambda x, y: x @ y.t(),
    "transposed": lambda x, y: x.t(),
    "part": lambda x, y: x[1:, 2:],
    "parts": lambda x, y: x.chunk(2, -1),
    "in place": lambda x, y: x.mul_(2),
    "in place on a part": lambda x, y: x[1:].add_(1),
    "values and indices": lambda x, y: x.max(-1),
    "dropout": lambda x, y: F.dropout(x, 0.5),
    "norm": lambda x, y: F.layer_norm(x, x.shape[-1:]),
    "not dense": lambda x, y: torch.empty_strided((2, 2), (8, 1)).add_(x[:2, :2]),
    "factory": lambda x, y: torch.zeros(3, 4, dtype=torch.float64) + x.new_ones(3, 4),
    "integers": lambda x, y: torch.arange(4) + torch.ones(4, dtype=torch.int64),
    "mask": lambda x, y: torch.where(torch.ones(4, 6, dtype=torch.bool).tril(), x, 0.0),
    "expanded": lambda x, y: x[:1].expand(4, 6),
    "flipped": lambda x, y: x.flip(0),
}


def describe(out: Any, operands: tuple[torch.Tensor, ...]) -> Any:
    if isinstance(out, tuple | list):
        return [describe(item, operands) for item in out]
    storage = out.untyped_storage()
    owners = [place for place, x in enumerate(operands) if x.untyped_storage()._cdata == storage._cdata]
    same = [place for place, x in enumerate(operands) if x is out]
    layout = tuple(out.shape), out.stride(), out.storage_offset(), out.dtype, out.device, storage.nbytes()
    return type(out), layout, owners, same, out.requires_grad


def operands(mode: ShapeMode) -> tuple[torch.Tensor, ...]:
    return tuple(mode.fake_mode.from_tensor(torch.randn(4, 6), static_shapes=True) for _ in range(2))


@pytest.mark.parametrize("name", OPS)
def test_the_second_time_gives_what_the_first_gave(name: str) -> None:
    mode = ShapeMode()
    seen = []
    for _ in range(3):
        given = operands(mode)
        with mode:
            seen.append(describe(OPS[name](*given), given))
    fresh = ShapeMode()
    given = operands(fresh)
    with fresh:
        expected = describe(OPS[name](*given), given)
    assert seen == [expected] * 3
    assert mode._cache._results


def test_autograd_goes_through_what_is_remembered() -> None:
    mode = ShapeMode()
    for _ in range(2):
        (x, y) = operands(mode)
        x.requires_grad_()
        with mode:
            view = x.t()
            (view.sin() @ y).sum().backward()
        assert view._base is x
        assert isinstance(x.grad, FakeTensor)
        assert x.grad.shape == (4, 6)


def test_numbers_that_are_equal_are_told_apart() -> None:
    mode = ShapeMode()
    for number, dtype in ((1, torch.int64), (True, torch.bool), (1.0, torch.float32)):
        with mode:
            assert torch.full((2,), number).dtype == dtype
            assert torch.full((2,), number).dtype == dtype


def test_the_default_dtype_counts() -> None:
    mode = ShapeMode()
    with mode:
        assert torch.zeros(2000, 20000).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        with mode:
            assert torch.zeros(2000, 20000).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_ops_that_change_a_layout_are_left_to_the_mode() -> None:
    mode = ShapeMode()
    for _ in range(2):
        x, y = operands(mode)
        with mode:
            assert x.t_().shape == (6, 4)
            assert y.resize_(2, 2).shape == (2, 2)
            out = x.new_empty(0)
            torch.add(x, 1, out=out)
            assert out.shape == (6, 4)
