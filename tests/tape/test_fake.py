from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from tapeline.errors import UnsupportedModelError
from tapeline.tape.fake import ShapeMode, fake_batch, fake_copy
from tests.models import TinyModel


def test_activations_are_fake_and_small_integers_are_real() -> None:
    mode = ShapeMode()
    x = fake_batch(mode, torch.randn(4, 8))
    with mode:
        assert isinstance(x, FakeTensor)
        assert isinstance(torch.randn(3), FakeTensor)
        assert not isinstance(torch.arange(3), FakeTensor)
        assert not isinstance(torch.ones_like(x, dtype=torch.long), FakeTensor)
        assert not isinstance(x.new_full((2,), 7, dtype=torch.int32), FakeTensor)
        assert isinstance(x > 0, FakeTensor)
        assert int(torch.arange(5).sum()) == 10
        assert torch.full_like(x, 3, dtype=torch.int64).unique().tolist() == [3]
        assert isinstance(torch.arange(2**26), FakeTensor)


def test_branches_on_masks_have_an_answer() -> None:
    mode = ShapeMode()
    mask = fake_batch(mode, torch.ones(2, 5, dtype=torch.long))
    with mode:
        assert bool(mask.all())
        assert mask.nonzero().shape == (10, 2)


def test_values_of_activations_have_none() -> None:
    mode = ShapeMode()
    x = fake_batch(mode, torch.randn(4))
    with mode, pytest.raises(UnsupportedModelError, match="depends on the values"):
        float(x.sum())


def test_a_copy_has_no_bytes_and_the_original_is_not_touched(llama: TinyModel) -> None:
    mode = ShapeMode()
    before = {name: (id(p), p._version) for name, p in llama.model.named_parameters()}
    copied = fake_copy(mode, llama.model)
    assert all(isinstance(t, FakeTensor) for t in (*copied.parameters(), *copied.buffers()))
    assert {n: (p.shape, p.dtype, p.requires_grad) for n, p in copied.named_parameters()} == {
        n: (p.shape, p.dtype, p.requires_grad) for n, p in llama.model.named_parameters()
    }
    assert {name: (id(p), p._version) for name, p in llama.model.named_parameters()} == before


def test_tied_weights_stay_tied_and_attributes_come_along() -> None:
    model = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    model[1].weight = model[0].weight
    model[0].weight.note = {"scale": torch.ones(3)}
    copied = fake_copy(ShapeMode(), model)
    assert copied[0].weight is copied[1].weight
    assert isinstance(copied[0].weight.note["scale"], FakeTensor)


def test_what_cannot_be_copied_is_an_error() -> None:
    class Locked(nn.Linear):
        def __deepcopy__(self, memo: object) -> None:
            raise TypeError("cannot pickle a lock")

    with pytest.raises(UnsupportedModelError, match="cannot pickle a lock"):
        fake_copy(ShapeMode(), Locked(2, 2))
    with pytest.raises(TypeError):
        copy.deepcopy(Locked(2, 2))


def test_grouped_products_have_a_shape_in_every_dtype() -> None:
    mode = ShapeMode()
    tokens, experts = fake_batch(mode, (torch.randn(6, 8), torch.randn(2, 8, 4)))
    with mode:
        out = torch._grouped_mm(tokens, experts, offs=torch.tensor([3, 6], dtype=torch.int32))
    assert (out.shape, out.dtype) == ((6, 4), torch.float32)
