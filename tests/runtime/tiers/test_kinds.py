"""Tensors of every kind that models save come back from a disk as they were; what cannot go there stays, and is named."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from tapeline.runtime.session import Session
from tapeline.tape.graph import Geometry
from tests.runtime.tiers.kinds import (
    WAYS,
    Block,
    Body,
    Model,
    a_batch,
    check,
    check_weights_stayed,
    gradients_of,
    moved,
    note_sent,
    plan_of,
)


def views(b: Block, x: torch.Tensor) -> torch.Tensor:
    one, two = b.up(x).chunk(2, -1)
    return x + b.down(torch.cat([one.sin() * two, two.cos().exp()], -1))


def transposes(b: Block, x: torch.Tensor) -> torch.Tensor:
    h = b.up(x).tanh()
    scores = (h @ h.transpose(-1, -2)).softmax(-1)
    return x + b.down((scores.transpose(-1, -2) @ h).sin())


def expanded(b: Block, x: torch.Tensor) -> torch.Tensor:
    row = b.up(x).sin().exp().unsqueeze(0).expand(3, -1, -1, -1)
    return x + b.down((row * row.cos()).sum(0))


def overlapping(b: Block, x: torch.Tensor) -> torch.Tensor:
    h = b.up(x).sin()
    odd, windows = h[:, ::2].transpose(0, 1), h.unfold(1, 4, 2)
    return x + b.down(h + (odd * odd.cos()).mean() + (windows * windows.cos()).mean())


def complexes(b: Block, x: torch.Tensor) -> torch.Tensor:
    h = torch.fft.rfft(b.up(x).sin(), dim=1) / 9
    h = torch.conj_physical(h * torch.polar(b.shift, b.shift.exp())) * 1j
    parts = torch.view_as_real(h).sin().sum((-1, 1), keepdim=True)[..., 0]
    return x + b.down(torch.fft.irfft(h.exp() * h.conj(), n=x.shape[1], dim=1) + parts)


def masks(b: Block, x: torch.Tensor) -> torch.Tensor:
    h = b.up(x).tanh()
    mask, rank = h.detach() > 0, h.detach().argsort(-1)
    return x + b.down(torch.where(mask, h.sin(), h.exp()) * ~mask + h.gather(-1, rank) * (rank % 5).to(torch.uint8))


def written(b: Block, x: torch.Tensor) -> torch.Tensor:
    h = b.up(x).sin()
    h[..., 1:] += h[..., :-1].exp()
    return x + b.down((h * h.cos()).relu_())


def no_elements(b: Block, x: torch.Tensor) -> torch.Tensor:
    h = b.up(x)
    nothing, scale = h[:, :0].sin().exp(), h.mean().exp()
    return x + b.down(torch.cat([h.sin(), nothing.cos() * nothing], 1).exp() / scale.sqrt())


def span(geometry: Geometry) -> int:
    """Elements from the first to the last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(geometry.shape, geometry.stride, strict=True))


KINDS: dict[str, tuple[Body, Callable[[Geometry], bool]]] = {
    "views": (views, lambda g: g.offset > 0),
    "transposes": (transposes, lambda g: g.stride[-1] > 1),
    "expanded": (expanded, lambda g: 0 in g.stride),
    "overlapping": (overlapping, lambda g: math.prod(g.shape) > span(g) and 0 not in g.stride),
    "complex": (complexes, lambda g: g.dtype.is_complex),
    "masks": (masks, lambda g: g.dtype == torch.bool),
    "whole numbers": (masks, lambda g: g.dtype == torch.int64),
    "written in place": (written, lambda g: True),
    "no elements": (no_elements, lambda g: True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_back_as_it_was(kind: str, way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sent = note_sent(monkeypatch)
    body, is_of_kind = KINDS[kind]
    model, batch = Model(body), a_batch()
    expected, plan = gradients_of(model, batch), plan_of(model, batch, way)
    with Session(model, plan, measure=False, offload_dir=tmp_path) as session:
        tier = check(session, expected, batch)
        assert tier.out_bytes == tier.planned_bytes == plan.moved_bytes > 0
        assert not tier.stayed
        assert not session.report().notes
        assert way != "everything" or any(is_of_kind(geometry) for geometry in moved(session))
    check_weights_stayed(model, sent)


def two_dtypes(b: Block, x: torch.Tensor) -> torch.Tensor:
    """The bits of one storage are saved as numbers of 32 bits, and of 16."""
    h = b.up(x).sin()
    whole = (h.detach() * 100).int().float()
    wide = torch.cat([h, h], -1).bfloat16().tanh()
    return x + b.down(h.cos() * whole + (wide * whole.view(torch.bfloat16)).float()[..., : h.shape[-1]])


@pytest.mark.parametrize("way", WAYS)
def test_a_storage_that_is_saved_in_two_dtypes_comes_back_as_it_was(way: str, tmp_path: Path) -> None:
    model, batch = Model(two_dtypes), a_batch()
    expected, plan = gradients_of(model, batch), plan_of(model, batch, way)
    with Session(model, plan, measure=False, offload_dir=tmp_path) as session:
        tier = check(session, expected, batch)
        assert tier.out_bytes == tier.planned_bytes == plan.moved_bytes > 0


# -- wrappers ----------------------------------------------------------------------------------------------------------


class Wrapped(torch.autograd.Function):
    """Two copies of a tensor as one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return TwoTensor(x.clone(), x.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> torch.Tensor:
        return gradient.a


class Unwrapped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> torch.Tensor:
        return x.a.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return TwoTensor(gradient, gradient)


def plain(b: Block, x: torch.Tensor) -> torch.Tensor:
    h = b.up(x).sin()
    return x + b.down(h.exp() * h)


def in_a_wrapper(b: Block, x: torch.Tensor) -> torch.Tensor:
    h = Wrapped.apply(b.up(x).sin())
    return x + b.down(Unwrapped.apply(h.exp() * h))


@pytest.mark.parametrize("way", WAYS)
def test_tensors_of_a_wrapper_class_stay_and_are_named(way: str, tmp_path: Path) -> None:
    """Such a step cannot be planned: the plan is that of a model of plain tensors."""
    model, batch = Model(in_a_wrapper), a_batch()
    expected, plan = gradients_of(model, batch), plan_of(Model(plain), batch, way)
    with Session(model, plan, measure=False, offload_dir=tmp_path) as session:
        tier = check(session, expected, batch)
        notes = session.report().notes
    assert 0 < tier.out_bytes <= tier.planned_bytes
    assert (way == "inputs") == (tier.out_bytes == tier.planned_bytes and not tier.stayed)
    if way != "inputs":
        assert tier.stayed["TwoTensor tensors stay on the device"]
        assert any("TwoTensor tensors stay on the device" in note for note in notes)


@pytest.mark.parametrize("way", WAYS)
def test_distributed_tensors_stay_and_are_named(way: str, tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    model, batch = Model(views), a_batch()
    plan = plan_of(model, batch, way)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        distribute_module(model, mesh)
        spread = distribute_tensor(batch, mesh, [Shard(0)])
        expected = gradients_of(model, spread)
        with Session(model, plan, measure=False, offload_dir=tmp_path) as session:
            tier = check(session, expected, spread)
            notes = session.report().notes
    finally:
        dist.destroy_process_group()
    assert tier.out_bytes == 0 < tier.planned_bytes
    assert tier.stayed == {"DTensor tensors stay on the device": tier.stayed["DTensor tensors stay on the device"]}
    assert any("DTensor tensors stay on the device" in note for note in notes)
