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


def test_a_parameter_given_new_data_before_backward_is_an_error(llama: TinyModel) -> None:
    loss, _ = loss_under_recompute(llama)
    parameter = llama.model.get_submodule("model.layers.2.mlp.up_proj").weight
    parameter.data = parameter.data * 2
    with pytest.raises(RuntimeError, match="was replaced"):
        loss.backward()


def test_a_parameter_frozen_before_backward_is_an_error(llama: TinyModel) -> None:
    loss, _ = loss_under_recompute(llama)
    llama.model.get_submodule("model.layers.2.mlp.up_proj").weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match="frozen or unfrozen"):
        loss.backward()


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


def test_another_adapter_before_backward_is_an_error() -> None:
    from peft import LoraConfig

    from tests.models import llama_lora

    tiny = llama_lora()
    tiny.model.add_adapter("other", LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    tiny.model.set_adapter("default")
    loss, _ = loss_under_recompute(tiny)
    tiny.model.set_adapter("other")
    with pytest.raises(RuntimeError, match="frozen or unfrozen"):
        loss.backward()
