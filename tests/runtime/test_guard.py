from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

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
    with pytest.raises(RuntimeError, match=r"block 'model.layers.2'.*parameter 'mlp.up_proj.weight'"):
        loss.backward()


def _replace(model: nn.Module) -> None:
    layer = model.get_submodule("model.layers.2.mlp.up_proj")
    layer.weight = nn.Parameter(layer.weight.detach() * 2)


def _freeze(model: nn.Module) -> None:
    model.get_submodule("model.layers.2.mlp.up_proj").weight.requires_grad_(False)


@pytest.mark.parametrize("change", [nn.Module.eval, _replace, _freeze])
def test_what_changes_after_the_forward_does_not_reach_a_replay(llama: TinyModel, change: Callable[..., Any]) -> None:
    """A replay starts from the tensors and numbers of the forward, as autograd does."""
    untouched = TinyModel(copy.deepcopy(llama.model), llama.batch)
    grads = []
    for tiny, mode in ((untouched, "none"), (llama, "recompute")):
        with tapeline.fit(tiny.model, tiny.batch, mode=mode, measure=False):
            torch.manual_seed(1)
            loss = tiny.loss_fn(tiny.model, tiny.batch)
            change(tiny.model)
            loss.backward()
        grads.append([p.grad for p in tiny.model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_parameter_given_new_data_does_not_reach_a_replay(llama: TinyModel) -> None:
    expected = llama.step()
    loss, _ = loss_under_recompute(llama)
    llama.model.zero_grad()
    torch.manual_seed(llama.seed)
    loss = llama.loss_fn(llama.model, llama.batch)
    parameter = llama.model.get_submodule("model.layers.2.mlp.up_proj").weight
    parameter.data = parameter.data * 2
    loss.backward()
    name = "grad.model.layers.2.mlp.up_proj.weight"
    assert torch.equal(parameter.grad, expected[name])


def test_an_optimizer_step_after_backward_is_no_error(llama: TinyModel) -> None:
    loss, _ = loss_under_recompute(llama)
    optimizer = torch.optim.SGD(llama.model.parameters(), lr=0.1)
    loss.backward()
    optimizer.step()
    llama.loss_fn(llama.model, llama.batch).backward()


def test_a_module_put_in_after_apply_is_guarded_too(llama: TinyModel) -> None:
    plan = tapeline.plan(llama.model, llama.batch, mode="recompute")
    tapeline.apply(llama.model, plan, measure=False)
    mlp = llama.model.get_submodule("model.layers.2.mlp")
    mlp.up_proj = nn.Linear(64, 176, bias=False)
    loss = llama.loss_fn(llama.model, llama.batch)
    with torch.no_grad():
        mlp.up_proj.weight.add_(1)
    with pytest.raises(RuntimeError, match="is at version"):
        loss.backward()
