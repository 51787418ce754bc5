"""What stays in force, what must cost nothing, and what must not be ignored: a plan among the settings of others."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import tapeline
from tapeline.errors import UsageError
from tapeline.runtime.blocks import find_blocks
from tests.exact.families import FAMILIES
from tests.failure_modes.test_integration import (
    SIZES,
    WIDTH,
    Caller,
    Layer,
    backward_flops,
    direct_loss,
    layers_of,
    lora,
    lora_plan,
    pair_of,
)
from tests.models import _llama, assert_equal

# -- F67 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["cheap", "segments:2"])
def test_f67_checkpointing_that_was_on_is_off_for_the_session_and_back_after_it(mode: str) -> None:
    model = lora()
    model.activation_checkpointing_enable(every_n_layers=2)
    flags = [layer.gradient_checkpointing for layer in layers_of(model)]
    functions = [layer._gradient_checkpointing_func for layer in layers_of(model)]
    assert flags == [True, False]
    with pair_of(model, lora_plan(mode)) as pair:
        pair.untouched.activation_checkpointing_disable()
        pair.check()
        flops = [backward_flops(one, pair.batch) for one in (pair.managed, pair.untouched)]
        assert (flops[0] == flops[1]) == (mode == "cheap")
        assert pair.session.report().recomputed_calls
        assert not pair.session.report().notes
    assert [layer.gradient_checkpointing for layer in layers_of(model)] == flags
    assert [layer._gradient_checkpointing_func for layer in layers_of(model)] == functions


@pytest.mark.parametrize(
    ("mode", "use_reentrant"), [("cheap", True), ("recompute", False), ("segments:2", True), ("segments:2", False)]
)
def test_f67_checkpointing_switched_on_during_a_session_is_exact_and_reported(
    mode: str, *, use_reentrant: bool
) -> None:
    with pair_of(lora(), lora_plan(mode)) as pair:
        pair.check()
        for model in (pair.managed, pair.untouched):
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
        pair.check()
        pair.check()
        assert "someone else has set LlamaDecoderLayer.gradient_checkpointing" in pair.session.report().notes[0]
        for model in (pair.managed, pair.untouched):
            model.activation_checkpointing_disable()
        pair.check()
        before = pair.session.report()
        pair.check()
        after = pair.session.report()
        assert not any("someone else has set" in note for note in after.notes)
        assert after.recomputed_calls == before.recomputed_calls + 2
        assert after.rerun_calls == before.rerun_calls


def test_f67_a_session_that_ends_while_somebody_else_checkpoints_is_gone() -> None:
    """Theirs is left as they set it, and nothing of the plan stays behind."""
    model = lora()
    with pair_of(model, lora_plan("recompute")) as pair:
        pair.check()
        model.activation_checkpointing_enable()
    assert [layer.gradient_checkpointing for layer in layers_of(model)] == [True, True]
    assert not any("forward" in vars(module) for module in model.modules())
    model.activation_checkpointing_disable()
    with tapeline.apply(model, lora_plan("cheap"), measure=False):
        pair.untouched.enable_input_require_grads()
        pair.check()


@pytest.mark.parametrize("mode", ["cheap", "segments:2"])
@pytest.mark.parametrize("is_before", [True, False])
def test_f67_inputs_made_to_require_gradients_by_somebody_else(mode: str, *, is_before: bool) -> None:
    model = lora()
    if is_before:
        model.enable_input_require_grads()
    with pair_of(model, lora_plan(mode)) as pair:
        pair.check()
        if not is_before:
            for one in (pair.managed, pair.untouched):
                one.enable_input_require_grads()
        for _ in range(2):
            before = pair.session.report()
            pair.check()
            after = pair.session.report()
        assert after.recomputed_calls == before.recomputed_calls + 2
        assert after.rerun_calls == before.rerun_calls
        assert not after.notes


def test_f67_a_trainer_that_checkpoints(tmp_path: Path) -> None:
    """The Trainer switches checkpointing on after the session has begun: same weights, and the report says so."""
    from transformers import Trainer, TrainingArguments

    ids = torch.randint(3, 96, (8, 12))
    data = [{"input_ids": row, "labels": row} for row in ids]
    with pair_of(lora(), lora_plan("recompute")) as pair:
        for model, is_on in ((pair.managed, True), (pair.untouched, False)):
            arguments = TrainingArguments(
                output_dir=str(tmp_path),
                max_steps=3,
                per_device_train_batch_size=2,
                activation_checkpointing=is_on,
                report_to="none",
                disable_tqdm=True,
                save_strategy="no",
                logging_strategy="no",
                use_cpu=True,
            )
            Trainer(model=model, args=arguments, train_dataset=data).train()
        assert_equal(pair.managed.state_dict(), pair.untouched.state_dict())
        assert "someone else has set" in "; ".join(pair.session.report().notes)


# -- F68 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "family", "tower"),
    [("cheap", "clip", "vision_model"), ("recompute", "clip", "vision_model"), ("segments:2", "llava", "vision_tower")],
)
def test_f68_a_frozen_tower_costs_no_recompute(mode: str, family: str, tower: str) -> None:
    """Whether it was frozen when the plan was made or after that: replaying costs what it costs without the tower."""
    made = FAMILIES[family]
    model, batch = made.model(), made.batch(2, made.lengths[0])
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) > 3:
            del module[3:]

    def is_of_tower(name: str) -> bool:
        return tower in name

    def freeze(*, is_frozen: bool) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not (is_frozen and is_of_tower(name)))

    def replayed(plan: tapeline.Plan) -> int:
        """FLOPs that backward spends on replaying."""
        with pair_of(model, plan, batch) as pair:
            pair.loss = lambda one: one(**batch).loss
            pair.check()
            calls = sum(seam.num_calls for name, seam in pair.session._seams.items() if is_of_tower(name))
            is_frozen = not any(p.requires_grad for name, p in model.named_parameters() if is_of_tower(name))
            assert (calls == 0) == (is_frozen or not any(is_of_tower(block.name) for block in plan.blocks))
            return backward_flops(model, batch) - backward_flops(pair.untouched, batch)

    def planned() -> tapeline.Plan:
        return tapeline.plan(model, batch, mode=mode)

    for_all = planned()
    spent = replayed(for_all)
    freeze(is_frozen=True)
    for_rest = planned()
    reasons = {block.reason for block in for_rest.blocks if is_of_tower(block.name)}
    assert reasons == {"autograd records nothing here"}
    rest = replace(for_rest, blocks=tuple(block for block in for_rest.blocks if not is_of_tower(block.name)))
    expected = replayed(rest)
    assert replayed(for_rest) == replayed(for_all) == expected
    assert (spent == expected == 0) if mode == "cheap" else (spent > expected > 0)


# -- F69 -----------------------------------------------------------------------------------------------------------


def adapters_in_the_last_layers(depth: int, count: int = 1) -> nn.Module:
    model = _llama(**SIZES | {"num_hidden_layers": depth})
    return lora(model, layers_to_transform=list(range(depth - count, depth)))


@pytest.mark.parametrize("mode", ["cheap", "recompute"])
def test_f69_nothing_is_spent_below_the_first_trainable_block(mode: str) -> None:
    """With adapters in the last layer, one layer is replayed, whatever lies below it."""
    spent = []
    for depth in (2, 4):
        with pair_of(adapters_in_the_last_layers(depth), mode) as pair:
            pair.check()
            assert [name.rsplit(".", 1)[-1] for name in pair.session._seams] == [str(depth - 1)]
            managed, untouched = (backward_flops(model, pair.batch) for model in (pair.managed, pair.untouched))
            spent.append(managed - untouched)
    assert spent[0] == spent[1]
    assert (spent[0] == 0) == (mode == "cheap")


def test_f69_inputs_forced_to_require_gradients_cost_three_times_the_backward() -> None:
    """Backward FLOPs of 8 layers with adapters in the last two, against the untouched model: 1.0x, and 3.2x if forced.

    Forced is what checkpointing asks for elsewhere. Another number is that of a model that somebody else has forced.
    """
    model = adapters_in_the_last_layers(8, 2)
    forced = copy.deepcopy(model)
    forced.enable_input_require_grads()
    with pair_of(model, "cheap") as pair:
        untouched = backward_flops(pair.untouched, pair.batch)
        assert backward_flops(model, pair.batch) == untouched
        assert 2.9 < backward_flops(forced, pair.batch) / untouched < 3.3


# -- F71 -----------------------------------------------------------------------------------------------------------


class Named(nn.Module):
    """Layers and a head under any name, tied to the embedding or not."""

    def __init__(self, layers: str, head: str, *, is_tied: bool) -> None:
        super().__init__()
        self.names = layers, head
        self.embed = nn.Embedding(32, WIDTH)
        self.add_module(layers, nn.ModuleList(Layer() for _ in range(3)))
        self.add_module(head, nn.Linear(WIDTH, 32, bias=False))
        if is_tied:
            self.get_submodule(head).weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.get_submodule(self.names[0]):
            x = layer(x, x.new_ones(()))
        return nn.functional.cross_entropy(self.get_submodule(self.names[1])(x).flatten(0, -2), ids.flatten())


@pytest.mark.parametrize(("mode", "is_tied"), [("cheap", True), ("recompute", False)])
def test_f71_no_name_makes_a_module_a_head(mode: str, *, is_tied: bool) -> None:
    """Blocks are known by structure, and what is no block is left alone: there is no head to be found."""
    ids = torch.randint(0, 32, (2, 6))
    described = []
    for layers, head in (("layers", "lm_head"), ("h", "embed_out"), ("lm_head", "layers"), ("head", "unembedding")):
        torch.manual_seed(0)
        model = Named(layers, head, is_tied=is_tied)
        with pair_of(model, mode, ids, loss_fn=direct_loss) as pair:
            pair.loss = lambda one: one(ids)
            pair.check()
            plan = pair.session.plan
            assert [block.name for block in plan.blocks] == [f"{layers}.{number}" for number in range(3)]
            described.append((plan.peak_bytes, plan.flops, plan.memory, pair.session.report().recomputed_calls))
    assert described == [described[0]] * 4
    assert described[0][2]["head and loss"] > 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt", "bert", "t5", "whisper", "vit"])
def test_f71_heads_and_embeddings_of_transformers_are_no_part_of_a_block(family: str) -> None:
    model = FAMILIES[family].model()
    blocks = [model.get_submodule(name) for name in find_blocks(model)]
    managed = {id(p) for block in blocks for p in block.parameters()}
    outside = [
        module.weight
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
        if hasattr(module, "weight")
    ]
    assert managed
    assert not managed & set(map(id, outside))


# -- F72 -----------------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"mode": "offload"}, "say how much of it with disk_budget"),
    ({"mode": "offload:2", "disk_budget": "1GiB"}, "Unknown mode 'offload:2'"),
    ({"mode": "auto", "host_budget": "1GiB"}, "the host is the same memory"),
    ({"mode": "auto", "disk_budget": "1 parsec"}, "Unknown unit"),
    ({"mode": "recomptue"}, "did you mean 'recompute'"),
    ({"mode": "cheap:2"}, "Unknown mode 'cheap:2'"),
    ({"mode": "segments:0"}, "k must be a whole number"),
    ({"mode": "recompute", "margin": "5%"}, "margin"),
    ({"mode": "none", "margin": "lots"}, "margin"),
    ({"mode": "recompute", "keep": ["no_such_part"]}, "matches nothing"),
    ({"mode": "none", "drop": ["no_such_part"]}, "matches nothing"),
    ({"mode": "cheap", "drop": ["matmul"]}, "cannot be dropped"),
    ({"mode": "recompute", "keep": ["up"], "drop": ["up"]}, "keep and drop both name"),
    ({"mode": "recompute", "blocks": ["layers.7"]}, "No module matches"),
    ({"mode": "recompute", "optimizer": "adamw"}, "Unknown optimizer"),
    ({"mode": "recompute", "accumulation": 0}, "accumulation must be at least 1"),
    ({"mode": "recompute", "on_infeasible": "ignore"}, "on_infeasible must be"),
    ({"mode": "recompute", "budget": "1 parsec"}, "Unknown unit"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_f72_a_setting_that_cannot_take_effect_is_an_error(options: dict[str, Any], message: str) -> None:
    model, x = Caller("module"), torch.randn(4, WIDTH)
    with pytest.raises(UsageError, match=re.escape(message)):
        tapeline.plan(model, x, **{"blocks": ["layers.*"], "loss_fn": direct_loss} | options)


def test_f72_a_mode_without_its_budget_or_a_budget_too_small_is_an_error() -> None:
    model, x = Caller("module"), torch.randn(4, WIDTH)
    for mode in ("none", "auto", "recompute", "least"):
        with pytest.raises(tapeline.InfeasibleBudgetError, match="smallest possible"):
            tapeline.plan(model, x, "1KiB", mode=mode, loss_fn=direct_loss)
    with pytest.raises(TypeError, match="unexpected keyword"):
        tapeline.fit(model, x, mode="none", loss_fn=direct_loss, offload="host")
    with pytest.raises(UsageError, match="on_full_tier must be"):
        tapeline.fit(model, x, mode="none", loss_fn=direct_loss, on_full_tier="ignore")  # type: ignore[arg-type]


def test_f72_the_report_says_what_took_effect_and_what_did_not() -> None:
    """Of three blocks one is replayed, one is checkpointed by the model itself, and one is not called any more."""

    class Mixed(Caller):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, second, third = self.layers
            x = first(x, self.factor)
            if self.form == "module":
                return third(second(x, self.factor), self.factor).pow(2).mean()
            return torch_checkpoint(second, x, self.factor, use_reentrant=False).pow(2).mean()

    x = torch.randn(4, WIDTH)
    with pair_of(Mixed("module"), "recompute", x, blocks=["layers.*"], loss_fn=direct_loss) as pair:
        for model in (pair.managed, pair.untouched):
            model.form = "otherwise"
        pair.loss = lambda model: model(x)
        pair.check()
        report = pair.session.report()
    assert report.mode == "recompute"
    assert report.recomputed_calls == 1
    assert any("layers.1" in note and "somebody else checkpoints" in note for note in report.notes)
    assert any("never recorded" in note and "layers.2" in note for note in report.notes)
    assert not any("layers.0" in note for note in report.notes)
    assert all(note in str(report) for note in report.notes)
