"""`tapeline.checkpoint` in the place where transformers puts torch's function, in every family that checkpoints its layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tapeline
from tests.exact.families import FAMILIES
from tests.exact.rows import set_dropout, switch_cache_off
from tests.models import assert_equal


def results(model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    loss = model(**batch).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach(), "random state": torch.get_rng_state()}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")  # transformers 5.17 knows no other name
@pytest.mark.parametrize("is_forced", [False, True], ids=["", "inputs require grad"])
@pytest.mark.parametrize("name", FAMILIES)
def test_layers_checkpointed_by_our_function_are_exact(name: str, *, is_forced: bool) -> None:
    torch.manual_seed(0)
    family = FAMILIES[name]
    model: Any = family.model().train()
    if not getattr(model, "supports_gradient_checkpointing", False):
        pytest.skip("checkpoints nothing itself")
    set_dropout(model, 0.1)
    switch_cache_off(model)
    batch = family.batch(2, family.lengths[0])
    expected = results(model, batch)
    calls = []

    def function(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return tapeline.checkpoint(*args, **kwargs)

    model.gradient_checkpointing_enable()
    if is_forced:
        model.enable_input_require_grads()
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = function
    got = results(model, batch)
    assert calls
    assert_equal({key: value for key, value in got.items() if key in expected}, expected)
    calls.clear()
    model.gradient_checkpointing_disable()
    assert_equal({key: value for key, value in results(model, batch).items() if key in expected}, expected)
    assert not calls
