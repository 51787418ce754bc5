from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import tapeline
from tapeline.errors import UsageError
from tapeline.ledger import Ledger
from tapeline.planner.schema import Plan
from tests.models import FAMILIES, TinyModel, assert_equal

MODES = ("none", "recompute", "segments:2", "segments:3")


def attributes(model: nn.Module) -> dict[str, Any]:
    """Everything that hangs on the modules and their configurations, by identity."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found |= {f"{name}:{key}": id(value) for key, value in vars(module).items()}
        found |= {f"{name}:hooks": (len(module._forward_hooks), len(module._forward_pre_hooks))}
        config = getattr(module, "config", None)
        if config is not None:
            found |= {f"{name}:config.{key}": repr(value) for key, value in vars(config).items()}
    return found


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_the_untouched_model(family: TinyModel, mode: str) -> None:
    expected = family.step()
    plan = tapeline.plan(family.model, family.batch, mode=mode, loss_fn=family.loss_fn)
    with tapeline.apply(family.model, plan, measure=False) as session:
        got = family.step(measured_by=session.measure())
    assert_equal(got, expected)
    report = session.report()
    assert report.deviation is not None
    assert abs(report.deviation) < 0.02
    assert not report.notes
    if mode != "none":
        assert report.recomputed_calls > 0


def test_removing_restores_every_attribute(family: TinyModel) -> None:
    before = attributes(family.model)
    plan = tapeline.plan(family.model, family.batch, mode="recompute", loss_fn=family.loss_fn)
    assert attributes(family.model) == before
    session = tapeline.apply(family.model, plan)
    assert attributes(family.model) != before
    session.remove()
    session.remove()
    assert attributes(family.model) == before


def test_an_exception_in_the_body_restores_the_model(llama: TinyModel) -> None:
    before = attributes(llama.model)
    plan = tapeline.plan(llama.model, llama.batch, mode="recompute")
    with pytest.raises(ZeroDivisionError), tapeline.apply(llama.model, plan):
        raise ZeroDivisionError
    assert attributes(llama.model) == before
    with Ledger():
        pass  # the dispatch mode was taken off as well


def test_checkpointing_of_transformers_is_replaced_and_put_back(llama: TinyModel) -> None:
    expected = llama.step()
    llama.model.activation_checkpointing_enable()
    plan = tapeline.plan(llama.model, llama.batch, mode="none")
    assert plan.flops == plan.untouched_flops
    with tapeline.apply(llama.model, plan):
        assert not llama.model.is_activation_checkpointing
    assert llama.model.is_activation_checkpointing
    with tapeline.fit(llama.model, llama.batch, mode="recompute") as session:
        assert_equal(llama.step(), expected)
    assert session.report().recomputed_calls == 6


def test_somebody_else_switching_checkpointing_on_is_reported(llama: TinyModel) -> None:
    with tapeline.fit(llama.model, llama.batch, mode="recompute") as session:
        llama.model.activation_checkpointing_enable()
    assert "someone else has set" in session.report().notes[0]


def test_evaluation_and_no_grad_passes_are_left_alone(llama: TinyModel) -> None:
    with tapeline.fit(llama.model, llama.batch, mode="segments:2", measure=False) as session:
        expected = llama.step()
        with torch.no_grad():
            llama.loss_fn(llama.model, llama.batch)
        llama.model.eval()
        llama.loss_fn(llama.model, llama.batch)
        llama.model.train()
        assert_equal(llama.step(), expected)
        assert session.report().recomputed_calls == 12


@pytest.mark.parametrize("mode", ["recompute", "segments:3"])
def test_two_forwards_before_one_backward(llama: TinyModel, mode: str) -> None:
    def both() -> dict[str, torch.Tensor]:
        llama.model.zero_grad()
        torch.manual_seed(3)
        first = llama.loss_fn(llama.model, llama.batch)
        second = llama.loss_fn(llama.model, {k: v[:1] for k, v in llama.batch.items()})
        (first + 2 * second).backward()
        return {n: p.grad.clone() for n, p in llama.model.named_parameters()}

    expected = both()
    with tapeline.fit(llama.model, llama.batch, mode=mode, measure=False):
        assert_equal(both(), expected)


@pytest.mark.parametrize("mode", ["recompute", "segments:3"])
def test_retained_graphs_and_autograd_grad(llama: TinyModel, mode: str) -> None:
    parameters = list(llama.model.parameters())

    def run() -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        loss = llama.loss_fn(llama.model, llama.batch)
        first = torch.autograd.grad(loss, parameters, retain_graph=True)
        second = torch.autograd.grad(loss, parameters)
        return {str(i): g for i, g in enumerate((*first, *second))}

    expected = run()
    with tapeline.fit(llama.model, llama.batch, mode=mode, measure=False):
        assert_equal(run(), expected)


def test_nothing_below_the_first_trainable_block_is_recomputed() -> None:
    tiny = FAMILIES["llama"]()
    for name, parameter in tiny.model.named_parameters():
        parameter.requires_grad_(any(f"layers.{i}." in name for i in (4, 5)))
    expected = tiny.step()
    plan = tapeline.plan(tiny.model, tiny.batch, mode="recompute")
    assert [block.saved for block in plan.blocks] == ["device"] * 4 + ["recompute"] * 2
    assert plan.blocks[0].reason == "autograd records nothing here"
    with tapeline.apply(tiny.model, plan) as session:
        assert_equal(tiny.step(), expected)
    assert session.report().recomputed_calls == 2


def test_a_frozen_block_above_a_trainable_one_is_managed() -> None:
    """It has no trainable parameter, yet autograd records it all the same."""
    tiny = FAMILIES["llama"]()
    for name, parameter in tiny.model.named_parameters():
        parameter.requires_grad_("layers.0." in name or "layers.1." in name)
    plan = tapeline.plan(tiny.model, tiny.batch, mode="recompute")
    assert {block.saved for block in plan.blocks} == {"recompute"}
    assert plan.peak_bytes < plan.untouched_peak_bytes


def test_no_input_is_made_to_require_a_gradient() -> None:
    tiny = FAMILIES["llama_lora"]()
    plan = tapeline.plan(tiny.model, tiny.batch, mode="recompute")
    seen = []
    layer = next(m for n, m in tiny.model.named_modules() if n.endswith("layers.0"))
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].requires_grad))
    with tapeline.apply(tiny.model, plan, measure=False):
        tiny.step()
    handle.remove()
    assert seen == [False]


def test_blocks_that_write_buffers_write_them_once() -> None:
    """Batch norm is on the tape like everything else; what writes running statistics is never replayed."""
    tiny = FAMILIES["unet"]()
    expected = tiny.step()
    with tapeline.fit(tiny.model, tiny.batch, mode="recompute", loss_fn=tiny.loss_fn, measure=False) as session:
        assert {block.saved for block in session.plan.blocks} == {"recompute"}
        for _ in range(2):
            assert_equal(tiny.step(), expected)


def test_the_cache_is_off_while_blocks_are_recomputed(llama: TinyModel) -> None:
    """Per call, so that a configuration saved in between is the user's own."""
    assert llama.model(**llama.batch).past_key_values is not None
    with tapeline.fit(llama.model, llama.batch, mode="recompute", measure=False):
        assert llama.model(**llama.batch).past_key_values is None
        assert llama.model.config.use_cache
    assert llama.model(**llama.batch).past_key_values is not None


def test_a_copy_or_pickle_of_a_managed_model_works_on_its_own(family: TinyModel) -> None:
    expected = family.step()
    with tapeline.fit(family.model, family.batch, mode="recompute", loss_fn=family.loss_fn, measure=False):
        copies = [copy.deepcopy(family.model), pickle.loads(pickle.dumps(family.model))]
    for model in copies:
        twin = TinyModel(model, family.batch, family.loss_fn)
        twin.start = family.start
        assert_equal(twin.step(), expected)
        assert all(
            m.grad is None or m.grad is not p.grad
            for m, p in zip(model.parameters(), family.model.parameters(), strict=True)
        )


def test_nothing_stays_alive_without_the_garbage_collector(llama: TinyModel) -> None:
    plan = tapeline.plan(llama.model, llama.batch, mode="segments:3")
    gc.collect()
    gc.disable()
    try:
        ledger = Ledger()
        with tapeline.apply(llama.model, plan, measure=False):
            llama.step()
            ledger.track(llama.model.parameters(), "weights")
            sizes = []
            for _ in range(4):
                with ledger:
                    loss = llama.loss_fn(llama.model, llama.batch)
                    loss.backward()
                    del loss
                    llama.loss_fn(llama.model, llama.batch)  # never run backward
                    llama.model.zero_grad()
                sizes.append(ledger.live_bytes())
        assert len(set(sizes[1:])) == 1
    finally:
        gc.enable()


def test_a_dropped_graph_frees_kept_inputs(llama: TinyModel) -> None:
    with tapeline.fit(llama.model, llama.batch, mode="segments:3", measure=False):
        kept: list[weakref.ref[torch.Tensor]] = []
        layer = llama.model.get_submodule("model.layers.3")
        handle = layer.register_forward_pre_hook(lambda _, args: kept.append(weakref.ref(args[0].untyped_storage())))
        loss = llama.loss_fn(llama.model, llama.batch)
        assert kept[0]() is not None
        del loss
        assert kept[0]() is None
        handle.remove()


def test_an_exception_in_the_forward_leaves_a_working_session(llama: TinyModel) -> None:
    expected = llama.step()
    layer = llama.model.get_submodule("model.layers.3.mlp")
    with tapeline.fit(llama.model, llama.batch, mode="segments:2", measure=False):
        handle = layer.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llama.step()
        handle.remove()
        assert_equal(llama.step(), expected)


def test_only_one_session_at_a_time(llama: TinyModel) -> None:
    plan = tapeline.plan(llama.model, llama.batch, mode="recompute")
    with tapeline.apply(llama.model, plan):
        with pytest.raises(UsageError, match="already in force"):
            tapeline.apply(llama.model, plan)
        with pytest.raises(UsageError, match=r"session.remove\(\) before planning"):
            tapeline.plan(llama.model, llama.batch)


def test_a_plan_for_another_model_is_refused(llama: TinyModel) -> None:
    plan = tapeline.plan(llama.model, llama.batch, mode="recompute")
    with pytest.raises(UsageError, match=r"it has no block 'model\.layers\.0'"):
        tapeline.apply(FAMILIES["encoder"]().model, plan)
    changed = plan.to_json().replace("LlamaDecoderLayer", "OtherLayer")
    with pytest.raises(UsageError, match="planned as OtherLayer"):
        tapeline.apply(llama.model, Plan.from_json(changed))


def test_parts_can_be_measured_one_by_one(llama: TinyModel) -> None:
    optimizer = torch.optim.AdamW(llama.model.parameters())
    session = tapeline.fit(llama.model, llama.batch, mode="recompute", optimizer=optimizer, measure=False)
    assert session.report().measured_peak_bytes is None
    for predicted in (session.plan.first_step_peak_bytes, session.plan.peak_bytes):
        with session.measure(optimizer):
            llama.loss_fn(llama.model, llama.batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert session.last_peak_bytes == pytest.approx(predicted, rel=0.01)
    assert session.peak_table(3).count("\n") == 4
    session.remove()


def test_measurements_do_not_nest(llama: TinyModel) -> None:
    with (
        tapeline.fit(llama.model, llama.batch, mode="none") as session,
        pytest.raises(UsageError, match="running already"),
        session.measure(),
    ):
        pass


def test_a_session_that_recomputed_nothing_says_so(llama: TinyModel) -> None:
    with tapeline.fit(llama.model, llama.batch, mode="recompute") as session, torch.no_grad():
        llama.loss_fn(llama.model, llama.batch)
    assert "no block was recomputed" in session.report().notes[0]
