"""Block inputs that are rebuilt instead of kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tapeline
from tests.models import TinyModel, assert_equal


def check_segments(tiny: TinyModel, length: int = 3) -> None:
    expected = tiny.step()
    plan = tapeline.plan(tiny.model, tiny.batch, mode=f"segments:{length}", loss_fn=tiny.loss_fn)
    assert any(block.input == "recompute" for block in plan.blocks)
    with tapeline.apply(tiny.model, plan, measure=False):
        assert_equal(tiny.step(), expected)


def mean_loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).pow(2).mean()


class ByGradMode(nn.Module):
    """Computes something else without autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).sin() if torch.is_grad_enabled() and x.requires_grad else self.linear(x).cos()


class Recurrent(nn.Module):
    """Its training kernel is not its inference kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x)[0]


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.linear(x).sin())


@pytest.mark.parametrize("block", [ByGradMode, Recurrent, Dropping])
def test_a_replay_runs_the_forward_as_it_was(block: type[nn.Module]) -> None:
    x = torch.randn(4, 6, 8, requires_grad=True)
    check_segments(TinyModel(nn.Sequential(*[block() for _ in range(6)]), x, mean_loss))


def test_an_input_changed_between_blocks_is_kept_instead() -> None:
    class Adding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Dropping() for _ in range(6)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for index, layer in enumerate(self.layers):
                x = layer(x)
                if index == 2:
                    x.mul_(2)
            return x

    tiny = TinyModel(Adding(), torch.randn(2, 8), mean_loss)
    plan = tapeline.plan(tiny.model, tiny.batch, mode="segments:6", loss_fn=mean_loss)
    assert [block.input for block in plan.blocks] == ["device", *["recompute"] * 2, "device", *["recompute"] * 2]
    check_segments(tiny, 6)


def test_a_kept_input_changed_in_place_is_an_error() -> None:
    model = nn.Sequential(*[Dropping() for _ in range(4)])
    x = torch.randn(2, 8)
    with tapeline.fit(model, x, mode="segments:4", loss_fn=mean_loss, measure=False):
        loss = mean_loss(model, x)
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified"):
            loss.backward()


def test_backward_through_a_part_of_the_model() -> None:
    model = nn.Sequential(*[Dropping() for _ in range(6)])
    x = torch.randn(2, 8)

    def part() -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        middle = model[3](model[2](model[1](model[0](x))))
        loss = middle.sum() + model[5](model[4](middle)).sum()
        return {str(i): g for i, g in enumerate(torch.autograd.grad(loss, list(model[2:5].parameters())))}

    expected = part()
    with tapeline.fit(model, x, mode="segments:3", loss_fn=mean_loss, measure=False):
        assert_equal(part(), expected)
