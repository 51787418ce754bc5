"""Planning runs on a copy without data: nothing of the user's may be read as trained, written or used up."""

from __future__ import annotations

import functools
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tapeline
from tapeline.errors import UsageError
from tests.models import FAMILIES, TinyModel

LAYERS = functools.partial(nn.Linear, 8, 8)


def small_model() -> nn.Module:
    return nn.Sequential(*[nn.Sequential(LAYERS(), nn.GELU(), LAYERS()) for _ in range(3)])


def plan_with(loss_fn: Any, batch: Any = None, **options: Any) -> tapeline.Plan:
    batch = torch.randn(4, 8) if batch is None else batch
    return tapeline.plan(small_model(), batch, mode="recompute", loss_fn=loss_fn, **options)


def test_a_loss_may_write_into_its_copy_of_the_batch() -> None:
    batch = {"x": torch.randn(4, 8), "labels": torch.ones(4, 8, dtype=torch.long)}

    def loss_fn(model: nn.Module, b: Any) -> torch.Tensor:
        b["labels"][:, :2] += 1
        b["x"].mul_(2)
        return (model(b["x"]) * (b["labels"] == 1)).sum()

    before = {name: tensor.clone() for name, tensor in batch.items()}
    plan_with(loss_fn, batch)
    assert all(torch.equal(batch[name], before[name]) for name in batch)


def test_other_mappings_are_batches_too(llama: TinyModel) -> None:
    from transformers import BatchEncoding

    encoding = BatchEncoding(llama.batch)
    assert tapeline.plan(llama.model, encoding, mode="recompute") == tapeline.plan(
        llama.model, llama.batch, mode="recompute"
    )


@pytest.mark.parametrize("write", [lambda t: t.add_(1), lambda t: torch._foreach_mul_([t], 0.5)])
def test_writing_into_a_tensor_from_outside_is_an_error(write: Any) -> None:
    outside = torch.ones(100, 100)

    def loss_fn(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        write(outside)
        return model(x).sum()

    with pytest.raises(UsageError, match="belongs neither to the model nor to the batch"):
        plan_with(loss_fn)
    assert torch.equal(outside, torch.ones(100, 100))


def test_writing_into_a_view_of_a_tensor_from_outside_leaves_it_alone() -> None:
    outside = torch.ones(100, 100)

    def loss_fn(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        outside[:1].zero_()
        return model(x).sum()

    plan_with(loss_fn)
    assert torch.equal(outside, torch.ones(100, 100))


def test_a_teacher_without_gradients_is_fine() -> None:
    teacher = small_model()

    def loss_fn(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = teacher(x)
        return (model(x) - target).pow(2).sum()

    assert plan_with(loss_fn).peak_bytes > 0


def test_random_states_of_all_libraries_are_put_back() -> None:
    def loss_fn(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model(x).sum() * random.random() * np.random.rand()

    random.seed(0)
    np.random.seed(0)
    expected = (random.random(), np.random.rand())
    random.seed(0)
    np.random.seed(0)
    plan_with(loss_fn)
    assert (random.random(), np.random.rand()) == expected


def test_a_fake_tensor_that_escaped_cannot_be_used_unnoticed() -> None:
    @functools.cache
    def table() -> torch.Tensor:
        return torch.linspace(0, 1, 8)

    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = LAYERS()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) * table()

    model = nn.Sequential(*[Cached() for _ in range(3)])
    x = torch.randn(4, 8)
    tapeline.plan(model, x, mode="recompute", loss_fn=lambda m, b: m(b).sum())
    with pytest.raises(Exception, match="FakeTensor|fake"):
        model(x)


def test_planning_works_in_inference_mode(llama: TinyModel) -> None:
    expected = tapeline.plan(llama.model, llama.batch, mode="recompute")
    with torch.inference_mode():
        assert tapeline.plan(llama.model, llama.batch, mode="recompute") == expected


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adafactor", "RMSprop"])
def test_optimizers_by_name_are_counted_as_they_run(llama: TinyModel, name: str) -> None:
    optimizer = getattr(torch.optim, name)(llama.model.parameters(), lr=1e-3)
    plan = tapeline.plan(llama.model, llama.batch, mode="recompute", optimizer=name)
    assert plan == tapeline.plan(llama.model, llama.batch, mode="recompute", optimizer=optimizer)
    with tapeline.apply(llama.model, plan, measure=False) as session:
        for predicted in (plan.first_step_peak_bytes, plan.peak_bytes):
            with session.measure(optimizer):
                llama.loss_fn(llama.model, llama.batch).backward()
                optimizer.step()
                optimizer.zero_grad()
            assert session.last_peak_bytes == pytest.approx(predicted, rel=0.02)


def test_subclasses_of_optimizers_keep_their_attributes(llama: TinyModel) -> None:
    class Own(torch.optim.AdamW):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters)
            self.own = {"initialized": True}

        def step(self, closure: Any = None) -> Any:
            assert self.own["initialized"]
            return super().step(closure)

    optimizer = Own(llama.model.parameters())
    by_name = tapeline.plan(llama.model, llama.batch, mode="none", optimizer="AdamW")
    assert tapeline.plan(llama.model, llama.batch, mode="none", optimizer=optimizer).peak_bytes == by_name.peak_bytes


def test_an_optimizer_that_needs_a_closure_is_refused(llama: TinyModel) -> None:
    with pytest.raises(UsageError, match="optimizer=None"):
        tapeline.plan(llama.model, llama.batch, mode="none", optimizer="LBFGS")


def test_state_that_exists_is_counted_in_the_body(llama: TinyModel) -> None:
    optimizer = torch.optim.AdamW(llama.model.parameters())

    def step() -> None:
        llama.loss_fn(llama.model, llama.batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with tapeline.fit(llama.model, llama.batch, mode="recompute", optimizer=optimizer) as session:
        step()
    assert session.report().measured_peak_bytes == pytest.approx(session.plan.peak_bytes, rel=0.02)


def test_quantised_weights_are_counted_with_their_scales(tmp_path: Any) -> None:
    pytest.importorskip("bitsandbytes")
    from tapeline.integrations.peft import add_lora
    from tapeline.integrations.transformers import load_model
    from tests.models import _llama, assert_equal, token_batch

    _llama(attention_dropout=0.0).save_pretrained(tmp_path)
    model = add_lora(
        load_model(str(tmp_path), load_in_4bit=True), r=4, alpha=8, dropout=0.1, target_modules="all-linear"
    )
    batch = token_batch()
    model.train()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(1)
        model(**batch).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    plan = tapeline.plan(model, batch, "70%")
    with tapeline.apply(model, plan, measure=False) as session:
        assert_equal(gradients(), expected)
        model.zero_grad()
        with session.measure():
            model(**batch).loss.backward()
    assert session.last_peak_bytes == pytest.approx(plan.peak_bytes, rel=0.02)


def test_adapters_on_a_loaded_model_do_not_hide_that_its_blocks_are_not_training() -> None:
    from peft import LoraConfig, get_peft_model

    def planned(*, trains: bool) -> tapeline.Plan:
        model = FAMILIES["llama"]()
        adapted = get_peft_model(model.model.eval(), LoraConfig(r=4, target_modules="all-linear"))
        assert adapted.training
        return tapeline.plan(adapted.train() if trains else adapted, model.batch, mode="recompute")

    assert planned(trains=False).peak_bytes == planned(trains=True).peak_bytes


def test_a_part_that_is_in_evaluation_mode_on_purpose_stays_there() -> None:
    model = nn.Sequential(*[nn.Sequential(LAYERS(), nn.Dropout(0.5), LAYERS()) for _ in range(3)])
    batch = torch.randn(4, 8)

    def saved() -> int:
        return tapeline.plan(model, batch, mode="none", loss_fn=lambda m, x: m(x).sum()).peak_bytes

    training = saved()
    model[0].eval()
    assert saved() < training
