"""Triton's kernels in a step without data: not launched there, launched everywhere else."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import tapeline
from tapeline.errors import UnsupportedModelError
from tapeline.tape import kernels
from tapeline.tape.kernels import without_launches

WIDTH = 64


class Kernel:
    """What Triton makes of a function: it is launched with addresses."""

    def __init__(self) -> None:
        self.num_launches = 0

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: self.run(*args, grid=grid, warmup=False, **kwargs)

    def run(self, source: torch.Tensor, target: torch.Tensor, *, grid: Any, warmup: bool) -> str:
        assert not isinstance(source, torch._subclasses.FakeTensor), "launched with the address 0"
        self.num_launches += 1
        with torch.no_grad():
            target.numpy()[...] = source.numpy() * 2  # out of sight
        return "launched"


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> type[Kernel]:
    monkeypatch.setattr(
        kernels, "_LAUNCHERS", ((__name__, "Kernel"), (__name__, "NotThere"), ("not_installed.jit", "Jit"))
    )
    return Kernel


def doubling(kernel: Kernel) -> type[torch.autograd.Function]:
    class Doubling(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            out = torch.empty_like(x)
            kernel[(1,)](x.detach(), out)
            return out

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            out = torch.empty_like(grads[0])
            kernel[(1,)](grads[0].detach().contiguous(), out)
            return out + 0 * ctx.saved_tensors[0]

    return Doubling


class Block(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.up, self.down, self.function = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.down(self.function.apply(torch.tanh(self.up(x))))
        return out


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", ["cheap", "recompute", "least"])
def test_a_model_with_triton_kernels_is_planned_and_trained_exactly(kernel: type[Kernel], mode: str) -> None:
    torch.manual_seed(0)
    launcher = kernel()
    function = doubling(launcher)
    model, batch = nn.Sequential(*(Block(function) for _ in range(3))), torch.randn(80, WIDTH)
    loss_of(model, batch).backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    before, run = launcher.num_launches, kernel.run
    plan = tapeline.plan(model, batch, mode=mode, loss_fn=loss_of)
    assert launcher.num_launches == before
    assert kernel.run is run
    with tapeline.apply(model, plan, measure=False) as session:
        for _ in range(2):
            model.zero_grad()
            with session.measure():
                loss_of(model, batch).backward()
            assert all(
                torch.equal(p.grad, b) for p, b in zip(model.parameters(), expected, strict=True) if p.grad is not None
            )
        assert session.last_peak_bytes == plan.peak_bytes
        assert not session.report().kept_instead


def test_kernels_with_real_tensors_run_beside_and_the_launcher_is_put_back_last(kernel: type[Kernel]) -> None:
    launcher, run = kernel(), kernel.run
    with FakeTensorMode():
        fake = torch.empty(4)
    real, target = torch.ones(4), torch.empty(4)
    results: list[Any] = []

    def beside() -> None:
        with without_launches():
            results.append(launcher[(1,)](real, target))

    with without_launches():
        assert launcher[(1,)](fake, fake) is None
        thread = threading.Thread(target=beside)
        thread.start()
        thread.join()
        assert kernel.run is not run
        assert launcher[(1,)](fake, fake) is None
    assert results == ["launched"]
    assert target.tolist() == [2.0] * 4
    assert kernel.run is run


def test_asking_for_the_address_of_a_tensor_without_data_is_an_error() -> None:
    class Addressed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            assert x.data_ptr()
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            return grads[0]

    model = nn.Sequential(*(Block(Addressed) for _ in range(2)))
    with pytest.raises(UnsupportedModelError, match="Cannot access data pointer"):
        tapeline.plan(model, torch.randn(8, WIDTH), mode="cheap", loss_fn=loss_of)
