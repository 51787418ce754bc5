from __future__ import annotations

import pytest
import torch
from torch import nn

import tapeline
from tests.models import TinyModel


def loss_under_recompute(tiny: TinyModel) -> tuple[torch.Tensor, tapeline.Session]:
    plan = tapeline.plan(tiny.model, tiny.batch, mode="recompute")
    session = tapeline.apply(tiny.model, plan, measure=False)
    return tiny.loss_fn(tiny.model, tiny.batch), session


def test_a_parameter_changed_before_backward_is_an_error(llama: TinyModel) -> None:
    loss, _ = loss_under_recompute(llama)
    with torch.no_grad():
        llama.model.get_submodule("model.layers.2.mlp.up_proj").weight.add_(1)
    with pytest.raises(RuntimeError, match=r"'mlp.up_proj.weight' of block 'model.layers.2' is at version"):
        loss.backward()


def test_a_parameter_replaced_before_backward_is_an_error(llama: TinyModel) -> None:
    loss, _ = loss_under_recompute(llama)
    layer = llama.model.get_submodule("model.layers.2.mlp.up_proj")
    layer.weight = nn.Parameter(layer.weight.detach() * 2)
    with pytest.raises(RuntimeError, match="was replaced"):
        loss.backward()


def test_switching_to_eval_before_backward_is_an_error(llama: TinyModel) -> None:
    """Recomputing without dropout would give a wrong gradient without a word."""
    loss, _ = loss_under_recompute(llama)
    llama.model.eval()
    with pytest.raises(RuntimeError, match="between train and eval"):
        loss.backward()


def test_an_optimizer_step_after_backward_is_no_error(llama: TinyModel) -> None:
    loss, _ = loss_under_recompute(llama)
    optimizer = torch.optim.SGD(llama.model.parameters(), lr=0.1)
    loss.backward()
    optimizer.step()
    llama.loss_fn(llama.model, llama.batch).backward()
